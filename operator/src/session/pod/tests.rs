//! What pods say in the words of kubelets and controllers.

use rstest::rstest;
use serde_json::{Value, json};

use super::*;

/// A pod that was made at 03:00:00, with this runner.
fn seen(runner: &Value) -> RunnerSeen {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "poem-job-x", "creationTimestamp": "2026-01-02T03:00:00Z"},
        "spec": {"containers": []},
        "status": {"containerStatuses": [{"name": "runner", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": runner}}]},
    }))
    .unwrap();
    PodSeen::of(&pod, 1, "job-uid").runner
}

#[rstest]
#[case::by_our_clock(
    "2026-01-02T03:00:10Z",
    "2026-01-02T03:01:10Z",
    "2026-01-02T03:00:10Z",
    "2026-01-02T03:01:10Z"
)]
#[case::by_a_clock_that_is_behind(
    "2026-01-01T03:00:00Z",
    "2026-01-01T03:01:00Z",
    "2026-01-02T03:00:00Z",
    "2026-01-02T03:01:00Z"
)]
fn a_runner_started_after_its_pod_was_made_and_ran_as_long_as_its_node_says(
    #[case] started: &str,
    #[case] finished: &str,
    #[case] since: &str,
    #[case] until: &str,
) {
    let ended = seen(&json!({"exitCode": 1, "reason": "Error", "startedAt": started, "finishedAt": finished}));
    let RunnerSeen::Ended { since: s, until: u, .. } = ended else {
        panic!("it has ended")
    };
    assert_eq!((s, u), (Some(since.parse().unwrap()), Some(until.parse().unwrap())));
}

#[test]
fn a_runner_that_could_not_be_started_did_not_run_since_1970() {
    let never = json!({"exitCode": 128, "reason": "StartError", "message": "no such file", "startedAt": "1970-01-01T00:00:00Z",
        "finishedAt": "2026-01-02T03:00:20Z"});
    let RunnerSeen::Ended { since, until, said, .. } = seen(&never) else {
        panic!("it has ended")
    };
    assert_eq!((since, until), (None, Some("2026-01-02T03:00:20Z".parse().unwrap())));
    assert!(said.contains("no such file"));
}
