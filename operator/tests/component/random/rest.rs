//! Sessions whose sequence is over are brought to rest, and to their end.

use crds::Phase;
use kube::{
    ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use protocol::{Outcome, names::label};
use serde_json::{Value, json};

use super::{
    PATIENCE,
    oracle::is_ephemeral,
    scene::{NAME, Scene},
};
use crate::world::{report, until};

/// What is under way succeeds; then a new run is asked for. A session that waits for somebody goes on waiting.
pub async fn comes_to_rest(scene: &Scene, round: u64) {
    let patch = async |patch: Value| {
        let _ = scene
            .world
            .sessions()
            .patch(NAME, &PatchParams::default(), &Patch::Merge(patch))
            .await;
    };
    // What would end the session, or an attempt, in the middle of the comparison.
    patch(json!({"spec": {"ttlSecondsAfterFinished": null, "suspend": false}, "metadata": {"ownerReferences": null}}))
        .await;
    // Each is a request of its own: one that is handled already asks for nothing.
    let mut clicks = 0_u32;
    let last_click = |clicks: u32| format!("final-{round}-{clicks}");
    let rests = until("the session to come to rest", async || {
        let Some(session) = scene.session().await else {
            // Somebody's owner reference, or its own time after the end.
            return Some(());
        };
        let status = session.status.clone().unwrap_or_default();
        if status.observed_generation != session.metadata.generation {
            return None;
        }
        let reason = status.reason.as_deref().unwrap_or_default();
        let handled = status.handled_start_request == Some(last_click(clicks));
        match status.phase {
            Phase::Pending if reason == "Suspended" => {
                patch(json!({"spec": {"suspend": false}})).await;
                None
            }
            Phase::Pending if reason == "Retrying" && status.next_attempt_time.is_some() => {
                // The next attempt may be minutes away: stopping and going on is a run of its own.
                patch(json!({"spec": {"suspend": true}})).await;
                None
            }
            Phase::Pending if ["Creating", "WaitingForVolume", "Retrying"].contains(&reason) => None,
            Phase::Pending => Some(()),
            Phase::Creating if clicks > 0 && handled => Some(()),
            Phase::Creating if reason == "PodRejected" => {
                // Nobody makes its pod.
                patch(json!({"spec": {"suspend": true}})).await;
                None
            }
            Phase::Creating | Phase::Running => {
                go_on(scene).await;
                None
            }
            Phase::Stopping => None,
            // Its workspace went with its pod: there is no other run.
            Phase::Completed | Phase::Failed | Phase::Stopped if handled && is_ephemeral(&session) => Some(()),
            Phase::Completed | Phase::Failed | Phase::Stopped => {
                if clicks == 0 || handled {
                    clicks += 1;
                }
                let click = json!({"ambient-code.io/start-requested-at": last_click(clicks)});
                patch(json!({"spec": {"suspend": false}, "metadata": {"annotations": click}})).await;
                None
            }
        }
    });
    tokio::select! {
        () = rests => {}
        () = tokio::time::sleep(PATIENCE) => {
            panic!("does not come to rest: {:?}\n{}", scene.world.status(NAME).await, scene.inventory().await)
        }
    }
}

/// Moves what is under way towards its end.
async fn go_on(scene: &Scene) {
    let all = ListParams::default().labels(&format!("{}={NAME}", label::SESSION));
    for job in scene.world.jobs().list(&all).await.unwrap().items {
        if job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true) {
            let patch = Patch::Merge(json!({"spec": {"suspend": false}}));
            let _ = scene
                .world
                .jobs()
                .patch(&job.name_any(), &PatchParams::default(), &patch)
                .await;
        }
    }
    if let Some(pod) = scene.pod().await {
        let attempt = pod
            .labels()
            .get(label::ATTEMPT)
            .and_then(|n| n.parse().ok())
            .unwrap_or(1);
        if pod.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Running") {
            scene.world.start(&pod).await;
        }
        scene
            .world
            .end(&pod, 1, Some(&report(Outcome::Succeeded, attempt)))
            .await;
    }
}

/// Whether the run ended; else nobody makes its pod.
pub async fn finish(scene: &Scene) -> bool {
    until("the run to end", async || {
        let Some(status) = scene.session().await.and_then(|session| session.status) else {
            return Some(true);
        };
        if status.phase.is_terminal() || status.reason.as_deref() == Some("PodRejected") {
            return Some(status.phase.is_terminal());
        }
        go_on(scene).await;
        None
    })
    .await
}
