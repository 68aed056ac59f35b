//! Whatever happens to an agent's pod, its conversation goes on from the last finished answer.

use anyhow::{Context as _, Result, ensure};
use crds::session::{Amounts, Resources};
use crds::{AgenticSessionSpec, AgenticSessionStatus, Phase};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Api;
use kube::api::EvictParams;
use serde_json::{Value, json};
use tests::model::script::prompt;

use crate::events::complete_log;
use crate::harness::client::Gateway;
use crate::harness::kill::{container_id, kill_container, kill_for_memory, processes_of_pod};
use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::sse::Event;
use crate::harness::volume::on_volume;
use crate::harness::wait::{SOON, until};
use crate::harness::{Keys, Scene, scene};

/// What a session is in the middle of.
struct Work<'a> {
    scene: &'a Scene,
    mock: Mock,
    marker: String,
    name: &'a str,
}

impl<'a> Work<'a> {
    /// A session that has one answer of the model and waits for the second.
    async fn half_done(scene: &'a Scene, name: &'a str) -> Result<Self> {
        let (mock, marker) = (Mock::reach().await?, marker());
        let left_behind = "echo one >> runs.txt; setsid sh -c 'while :; do sleep 1; done' >/dev/null 2>&1 &";
        let steps = json!([
            { "text": "First.", "tools": [{ "name": "Bash", "input": { "command": left_behind, "description": "t" } }],
              "usage": { "input_tokens": 1000, "output_tokens": 100 } },
            { "text": "Second.", "hold": marker, "usage": { "input_tokens": 2000, "output_tokens": 200 } },
        ]);
        scene.create(name, &marker, &steps).await?;
        let work = Self {
            scene,
            mock,
            marker,
            name,
        };
        work.asks_for_the_second().await?;
        scene.phase(name, Phase::Running).await?;
        Ok(work)
    }

    async fn pod(&self) -> Result<String> {
        self.scene.status(self.name).await?.pod_name.context("no pod in status")
    }

    /// Waits until the model is asked for the second answer, by somebody who still waits for it.
    async fn asks_for_the_second(&self) -> Result<()> {
        let waits = |request: &tests::model::Logged| request.step == Some(1) && request.end.is_none();
        self.mock.request(&self.marker, SOON, waits).await?;
        Ok(())
    }

    /// The number of requests so far that nobody waits for any more.
    async fn given_up(&self) -> Result<usize> {
        let requests = self.mock.requests(&self.marker).await?;
        Ok(requests
            .iter()
            .filter(|request| request.step == Some(1) && request.end.is_some())
            .count())
    }

    /// Waits until whoever asked for the second answer is gone and somebody asks again, lets it come, and looks at all that
    /// was to be kept.
    async fn goes_on(&self, attempt: u32) -> Result<AgenticSessionStatus> {
        until("the first one who asked to be gone", SOON, async || {
            Ok((self.given_up().await? > 0).then_some(()))
        })
        .await?;
        self.asks_for_the_second().await?;
        self.mock.release(&self.marker).await?;
        let status = self.scene.phase(self.name, Phase::Completed).await?;
        ensure!(
            status.attempt == Some(attempt) && status.result.as_deref() == Some("Second."),
            "{status:#?}"
        );
        self.mock.prompt_was_given_once(&self.marker).await?;
        let requests = self.mock.requests(&self.marker).await?;
        let first = requests.iter().filter(|request| request.step == Some(0)).count();
        ensure!(first == 1, "the answer that was there is asked for {first} times");
        let runs = on_volume(self.scene, self.name, "cat /data/sessions/*/workspace/runs.txt").await?;
        ensure!(runs == "one\n", "the tool ran once, and its work is there: {runs:?}");
        let usage = status.usage.as_ref().context("no usage")?;
        ensure!(
            status.turns == Some(2) && usage.input_tokens >= 3000 && usage.output_tokens >= 300,
            "the numbers of all attempts: {status:#?}"
        );
        let cost: f64 = status.cost_usd.as_deref().context("no cost")?.parse()?;
        ensure!(cost >= (3000.0 * 4.0 + 300.0 * 20.0) / 1e6, "{cost}");
        let log = complete_log(&Gateway::reach(self.scene).await?, self.name).await?;
        let ends = log.iter().filter(|record| record.kind == "end").count();
        ensure!(
            ends == attempt as usize,
            "{ends} of {attempt} attempts are closed in the log"
        );
        Ok(status)
    }
}

/// The sessions' attempts so far had this reason for another one, by the Events.
pub async fn told_why(scene: &Scene, name: &str, reason: &str) -> Result<()> {
    let field = format!("involvedObject.name={name}");
    let events = scene
        .kubectl(&[
            "get",
            "events",
            "--field-selector",
            &field,
            "-o",
            "jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}",
        ])
        .await?;
    ensure!(events.contains(reason), "no Event says {reason}: {events}");
    Ok(())
}

#[tokio::test]
async fn an_evicted_session_goes_on_free_of_charge() -> Result<()> {
    scene("evicted", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "moved").await?;
        let pods: Api<Pod> = Api::namespaced(scene.client.clone(), &scene.namespace);
        pods.evict(&work.pod().await?, &EvictParams::default()).await?;
        let status = work.goes_on(2).await?;
        ensure!(status.free_retries == Some(1), "it uses up no try: {status:#?}");
        told_why(scene, "moved", "Evicted").await
    })
    .await
}

#[tokio::test]
async fn a_killed_runner_is_followed_by_another_attempt() -> Result<()> {
    scene("runner-killed", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "headless").await?;
        kill_container(&container_id(scene, &work.pod().await?, "runner").await?).await?;
        let status = work.goes_on(2).await?;
        ensure!(status.free_retries.unwrap_or_default() == 0, "it counts: {status:#?}");
        told_why(scene, "headless", "RunnerCrashed").await
    })
    .await
}

#[tokio::test]
async fn fifteen_seconds_of_grace_are_enough_to_end_in_order() -> Result<()> {
    scene("grace", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "hurried").await?;
        let pod = work.pod().await?;
        let uid = scene
            .kubectl(&["get", "pod", &pod, "-o", "jsonpath={.metadata.uid}"])
            .await?;
        scene
            .kubectl(&["delete", "pod", &pod, "--grace-period=15", "--wait=false"])
            .await?;
        work.goes_on(2).await?;
        told_why(scene, "hurried", "PodDeleted").await?;
        let log = complete_log(&Gateway::reach(scene).await?, "hurried").await?;
        let end = log
            .iter()
            .find(|record| record.kind == "end")
            .context("no end")?
            .json()?;
        ensure!(
            end["attempt"] == 1 && end["body"]["outcome"] == "stopped",
            "the first attempt ended itself, it was not cut: {end}"
        );
        let left = processes_of_pod(&uid).await?;
        ensure!(left.is_empty(), "processes of the deleted pod live: {left}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_pod_that_is_deleted_by_force_is_followed_by_another_attempt() -> Result<()> {
    scene("forced", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "fenced").await?;
        scene
            .kubectl(&[
                "delete",
                "pod",
                &work.pod().await?,
                "--force",
                "--grace-period=0",
                "--wait=false",
            ])
            .await?;
        work.goes_on(2).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_agent_whose_cli_or_container_is_killed_goes_on_in_the_same_pod() -> Result<()> {
    scene("agent-killed", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "robust").await?;
        let pod = work.pod().await?;
        let cli = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = claude ] && kill -9 ${p#/proc/}; done; true";
        scene
            .kubectl(&["exec", &pod, "-c", "agent", "--", "bash", "-c", cli])
            .await?;
        until("the dead CLI's request to be given up", SOON, async || {
            Ok((work.given_up().await? > 0).then_some(()))
        })
        .await?;
        work.asks_for_the_second().await?;
        let tools = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
        let left = scene
            .kubectl(&["exec", &pod, "-c", "agent", "--", "bash", "-c", tools])
            .await?;
        ensure!(!left.contains("while :"), "what the dead CLI left behind lives: {left}");

        let given_up = work.given_up().await?;
        kill_container(&container_id(scene, &pod, "agent").await?).await?;
        until("the dead container's request to be given up", SOON, async || {
            Ok((work.given_up().await? > given_up).then_some(()))
        })
        .await?;
        let status = work.goes_on(1).await?;
        ensure!(status.pod_name.as_deref() == Some(&pod), "{status:#?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_agent_whose_first_process_is_killed_for_memory_goes_on_in_the_same_pod() -> Result<()> {
    scene("first-process", Keys::Good, async |scene| {
        let work = Work::half_done(scene, "squeezed").await?;
        let pod = work.pod().await?;
        kill_for_memory(&container_id(scene, &pod, "agent").await?).await?;
        let path = "jsonpath={.status.initContainerStatuses[?(@.name=='agent')].lastState.terminated.reason}";
        until("the node's word on the agent's container", SOON, async || {
            let reason = scene.kubectl(&["get", "pod", &pod, "-o", path]).await?;
            ensure!(reason.is_empty() || reason == "OOMKilled", "it ended for {reason}");
            Ok((!reason.is_empty()).then_some(()))
        })
        .await?;
        let status = work.goes_on(1).await?;
        ensure!(status.pod_name.as_deref() == Some(&pod), "{status:#?}");
        told_why(scene, "squeezed", "AgentRestarted: ").await?;
        told_why(scene, "squeezed", "memory").await
    })
    .await
}

#[tokio::test]
async fn an_agent_that_runs_out_of_memory_is_started_again_and_goes_on() -> Result<()> {
    scene("memory", Keys::Good, async |scene| {
        let (mock, marker) = (Mock::reach().await?, marker());
        // Many small eaters, so that the largest process, which the kernel takes, is the CLI. Each stays until all are there.
        let eater = "{ head -c 40M /dev/zero; sleep 20; } | tail >/dev/null";
        let eaters = format!("for i in $(seq 30); do {eater} & done; wait");
        let eat = format!("if [ ! -e eaten ]; then touch eaten; {eaters}; fi");
        let steps: Value = json!([
            { "text": "First.", "tools": [{ "name": "Bash", "input": { "command": "echo one >> runs.txt", "description": "t" } }] },
            { "text": "Hungry.", "tools": [{ "name": "Bash", "input": { "command": eat, "description": "t" } }] },
            { "text": "Third." },
        ]);
        let spec = AgenticSessionSpec {
            prompt: Some(prompt(&marker, &steps)),
            resources: Some(Resources {
                requests: None,
                limits: Some(Amounts { memory: Some(Quantity("700Mi".to_owned())), ..Amounts::default() }),
            }),
            ..small()
        };
        scene.create_with("hungry", spec).await?;
        let status = scene.phase("hungry", Phase::Completed).await?;
        ensure!(
            status.attempt == Some(1) && status.result.as_deref() == Some("Third."),
            "{status:#?}"
        );
        mock.prompt_was_given_once(&marker).await?;
        let first = mock.requests(&marker).await?.iter().filter(|request| request.step == Some(0)).count();
        ensure!(first == 1, "the first answer is asked for {first} times");
        let runs = on_volume(scene, "hungry", "cat /data/sessions/*/workspace/runs.txt").await?;
        ensure!(runs == "one\n", "{runs:?}");
        let log = complete_log(&Gateway::reach(scene).await?, "hungry").await?;
        let restarted = |record: &&Event| record.data.contains("agentRestarted");
        let restarts: Vec<_> = log.iter().filter(restarted).map(|record| &record.data).collect();
        ensure!(
            !restarts.is_empty() && restarts.iter().all(|data| data.contains("\"outOfMemory\":true")),
            "the log says why the agent was started again: {restarts:?}"
        );
        Ok(())
    })
    .await
}
