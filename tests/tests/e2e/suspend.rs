//! `suspend`: stop, keep, and go on.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use serde_json::json;

use crate::harness::mock::Mock;
use crate::harness::scene::marker;
use crate::harness::volume::on_volume;
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, audit, scene};

#[tokio::test]
async fn a_suspended_session_stops_and_goes_on_with_its_conversation() -> Result<()> {
    scene("suspend", Keys::Good, async |scene| {
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "text": "First.", "tools": [{ "name": "Bash", "input": { "command": "echo kept > /workspace/kept.txt" } }] },
            { "text": "Second.", "hold": marker },
        ]);
        scene.create("pausing", &marker, &steps).await?;
        mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let running = scene.phase("pausing", Phase::Running).await?;
        let pod = running.pod_name.context("no pod in status")?;

        let patch = |suspend: bool| json!({ "spec": { "suspend": suspend } }).to_string();
        scene.kubectl(&["patch", "as", "pausing", "--type=merge", "-p", &patch(true)]).await?;
        let stopped = scene.phase("pausing", Phase::Stopped).await?;
        ensure!(stopped.reason.as_deref() == Some("StoppedByUser"), "{stopped:#?}");
        until("its pod to be gone", SOON, async || {
            let pods = scene.kubectl(&["get", "pods", "-o", "name"]).await?;
            Ok((!pods.contains(&pod)).then_some(()))
        })
        .await?;

        scene.kubectl(&["patch", "as", "pausing", "--type=merge", "-p", &patch(false)]).await?;
        mock.request(&marker, SOON, |request| request.step == Some(1) && request.end.is_none()).await?;
        mock.release(&marker).await?;
        let status = scene.phase("pausing", Phase::Completed).await?;
        ensure!(status.attempt == Some(2) && status.run == Some(2), "{status:#?}");
        ensure!(status.result.as_deref() == Some("Second."), "{status:#?}");
        mock.prompt_was_given_once(&marker).await?;
        let kept = on_volume(scene, "pausing", "cat /data/sessions/*/workspace/kept.txt").await?;
        ensure!(kept == "kept\n", "{kept:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_session_suspended_from_the_start_waits() -> Result<()> {
    scene("asleep", Keys::Good, async |scene| {
        let marker = marker();
        let mut spec = crate::harness::scene::small();
        spec.prompt = Some(tests::model::script::prompt(&marker, &json!([{ "text": "Awake." }])));
        spec.suspend = Some(true);
        scene.create_with("sleeper", spec).await?;
        let status = until("the reason", SOON, async || {
            let status = scene.status("sleeper").await?;
            Ok(status.reason.is_some().then_some(status))
        })
        .await?;
        ensure!(
            status.phase == Phase::Pending && status.reason.as_deref() == Some("Suspended"),
            "{status:#?}"
        );
        ensure!(audit::jobs_created(&scene.namespace)?.is_empty(), "nothing was started");
        scene
            .kubectl(&[
                "patch",
                "as",
                "sleeper",
                "--type=merge",
                "-p",
                r#"{"spec":{"suspend":false}}"#,
            ])
            .await?;
        let status = scene.phase("sleeper", Phase::Completed).await?;
        ensure!(status.result.as_deref() == Some("Awake."), "{status:#?}");
        Ok(())
    })
    .await
}
