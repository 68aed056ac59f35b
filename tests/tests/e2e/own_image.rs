//! The agent in an image that its user brings.

use anyhow::{Context as _, Result, ensure};
use crds::session::PodOptions;
use crds::{AgenticSessionSpec, Phase};
use serde_json::json;
use tests::model::script::prompt;

use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, Scene, scene};

const IMAGES: &str = "localhost/agentic-test-";

fn in_image(image: &str, marker: &str) -> AgenticSessionSpec {
    let look = "echo \"image $TOOLCHAIN, user $(id -u)\"; touch /opt/agentic/x /opt/agentic/runner || echo \"may not\"";
    let steps = json!([
        { "tools": [{ "name": "Bash", "input": { "command": look, "description": "t" } }] },
        { "text": "Done." },
    ]);
    AgenticSessionSpec {
        prompt: Some(prompt(marker, &steps)),
        pod: Some(PodOptions {
            image: Some(format!("{IMAGES}{image}:dev")),
            ..PodOptions::default()
        }),
        ..small()
    }
}

async fn images_are_allowed(scene: &Scene) -> Result<()> {
    let names = ["toolchain", "bare", "that-nobody-built"].map(|name| format!("{IMAGES}{name}"));
    scene.settings(&json!({ "allowedImages": names })).await
}

#[tokio::test]
async fn an_agent_works_in_the_image_of_its_user_with_runner_and_cli_copied_in() -> Result<()> {
    scene("toolchain", Keys::Good, async |scene| {
        images_are_allowed(scene).await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        scene.create_with("builder", in_image("toolchain", &marker)).await?;
        let status = scene.phase("builder", Phase::Completed).await?;
        let request = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let seen = request.messages().last().map(ToString::to_string).unwrap_or_default();
        ensure!(
            seen.contains("image of-the-user, user 10001") && seen.contains("may not"),
            "its tools run there, as the product's user, and cannot change what drives them: {seen}"
        );
        let pod = status.pod_name.context("no pod in status")?;
        let images = "jsonpath={.spec.initContainers[*].image} {.spec.containers[*].image}";
        let images = scene.kubectl(&["get", "pod", &pod, "-o", images]).await?;
        ensure!(
            images == "localhost/agentic-runner:dev localhost/agentic-test-toolchain:dev localhost/agentic-runner:dev",
            "only the agent is in it: {images}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_image_that_lacks_what_an_agent_needs_is_told_so_by_name() -> Result<()> {
    scene("bare", Keys::Good, async |scene| {
        images_are_allowed(scene).await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        // Neither a C library nor bash nor git; the shim starts all the same.
        scene.create_with("lean", in_image("bare", &marker)).await?;
        let status = scene.phase("lean", Phase::Failed).await?;
        let said = status.message.as_deref().unwrap_or_default();
        ensure!(
            status.reason.as_deref() == Some("ConfigError") && said.contains("lacks glibc, bash, git:"),
            "{status:#?}"
        );
        ensure!(
            status.attempt == Some(1),
            "an image does not change by itself: {status:#?}"
        );
        ensure!(mock.requests(&marker).await?.is_empty(), "the model is not asked");

        scene
            .create_with("nowhere", in_image("that-nobody-built", &marker))
            .await?;
        let status = until("the image to be missed", SOON, async || {
            let status = scene.status("nowhere").await?;
            Ok((status.reason.as_deref() == Some("ImagePullFailed")).then_some(status))
        })
        .await?;
        ensure!(
            status.phase == Phase::Creating
                && status
                    .message
                    .as_deref()
                    .unwrap_or_default()
                    .contains("agentic-test-that-nobody-built"),
            "it heals by itself when the image comes: {status:#?}"
        );
        Ok(())
    })
    .await
}
