//! Sessions that came back from a backup: another UID, the status of another life, written by somebody else.

use crds::{Phase, condition};
use kube::{
    ResourceExt as _,
    api::{Patch, PatchParams},
};
use operator::TimingSettings;
use protocol::Outcome;
use serde_json::json;

use crate::world::{World, report};

#[tokio::test]
async fn a_session_that_was_restored_while_it_ran_goes_on_in_another_attempt_and_counts_anew() {
    let mut world = World::without_operator("restored").await;
    world.timing = TimingSettings {
        retry_first_wait: 1,
        ..TimingSettings::default()
    };
    world.create("poem", json!({"prompt": "write"})).await;
    // Longer ago than its timeout.
    let then = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24);
    let then = then.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let says = |type_: &str, status: &str, reason: &str| json!({"type": type_, "status": status, "reason": reason, "message": "m", "lastTransitionTime": then});
    let status = json!({
        "phase": "Running", "reason": "Running", "message": "The agent works.", "observedGeneration": 1,
        "run": 1, "attempt": 3, "firstAttempt": 3, "runningSeconds": 9, "startTime": then, "agentRestarts": 2,
        "jobName": "poem-job-3", "podName": "poem-job-3-abcde", "podUID": "11111111-2222-3333-4444-555555555555",
        "turns": 50, "lastSeq": 500, "ackedSeq": 480,
        "conditions": [
            says(condition::RUNNER_STARTED, "True", "Running"),
            says(condition::EVENTS_DELIVERED, "False", "Undelivered"),
        ],
    });
    let by_restore = PatchParams {
        field_manager: Some("restore".to_owned()),
        ..PatchParams::default()
    };
    let restored = Patch::Merge(json!({"status": status}));
    let sessions = world.sessions();
    sessions.patch_status("poem", &by_restore, &restored).await.unwrap();
    world.start_operator().await;

    let pod = world.pod("poem", 4).await;
    world.start(&pod).await;
    let running = world.phase("poem", Phase::Running).await;
    assert_eq!((running.attempt, running.pod_uid), (Some(4), pod.uid()));
    assert_eq!((running.agent_restarts, running.next_attempt_time), (None, None));

    world.end(&pod, 7, Some(&report(Outcome::Succeeded, 4))).await;
    let over = world.phase("poem", Phase::Completed).await;
    assert_eq!(
        (over.turns, over.last_seq, over.acked_seq),
        (Some(3), Some(17), Some(17)),
        "the records of the other life were on a volume that is gone"
    );
    let delivered = over.conditions.iter().find(|c| c.type_ == condition::EVENTS_DELIVERED);
    assert_eq!(delivered.map(|c| &*c.status), Some("True"));
}
