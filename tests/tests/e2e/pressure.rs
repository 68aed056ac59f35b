//! What the node does to a pod that uses too much, done by its kubelet.

use anyhow::{Result, ensure};
use crds::Phase;
use serde_json::{Value, json};

use crate::harness::command::apply;
use crate::harness::mock::Mock;
use crate::harness::scene::marker;
use crate::harness::{Keys, scene};
use crate::resume::told_why;

fn bash(command: &str) -> Value {
    json!({ "name": "Bash", "input": { "command": command, "description": "t" } })
}

#[tokio::test]
async fn a_pod_that_the_kubelet_evicts_for_its_disk_is_followed_by_another_attempt() -> Result<()> {
    scene("disk", Keys::Good, async |scene| {
        // What a namespace's administrator sets where disks are dear.
        let range = json!({ "apiVersion": "v1", "kind": "LimitRange", "metadata": { "name": "disk" },
            "spec": { "limits": [{ "type": "Container", "default": { "ephemeral-storage": "100Mi" } }] } });
        apply(&scene.namespace, &range.to_string()).await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let fill = "if [ ! -e filled ]; then touch filled; head -c 400M /dev/zero > /tmp/large; sleep 300; fi";
        let steps = json!([
            { "text": "First.", "tools": [bash("echo one >> runs.txt")] },
            { "text": "Filling.", "tools": [bash(fill)] },
            { "text": "Third." },
        ]);
        scene.create("greedy", &marker, &steps).await?;
        let status = scene.phase("greedy", Phase::Completed).await?;
        ensure!(
            status.attempt == Some(2) && status.result.as_deref() == Some("Third."),
            "{status:#?}"
        );
        ensure!(
            status.free_retries.unwrap_or_default() == 0,
            "it is the agent's doing: {status:#?}"
        );
        told_why(scene, "greedy", "DiskFull").await?;
        mock.prompt_was_given_once(&marker).await?;
        let first = mock
            .requests(&marker)
            .await?
            .iter()
            .filter(|request| request.step == Some(0))
            .count();
        ensure!(first == 1, "the first answer is asked for {first} times");
        Ok(())
    })
    .await
}
