//! Two gateways on PostgreSQL, installed as the operations guide says, under a session with the real CLI.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};
use crds::Phase;
use reqwest::Method;
use serde_json::{Value, json};
use tests::http;
use tests::model::script::prompt;
use xtask::postgres::{PASSWORD, Postgres};

use crate::conversation::{idle, say};
use crate::events::complete_log;
use crate::harness::client::Gateway;
use crate::harness::command::{apply, helm, kubectl};
use crate::harness::forward::Forward;
use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::sse::{self, Event};
use crate::harness::wait::{SOON, until};
use crate::harness::{SHELL_IMAGE, SYSTEM, Scene, TOOLS, disturbing, required, root};

const PODS: [&str; 2] = ["agentic-gateway-0", "agentic-gateway-1"];
const SECRET: &str = "gateway-database";

/// Asks a Service again and again, each time on a new connection, and says what came of it.
const PROBE: &str = r#"
trap 'exit 0' TERM
ask() { timeout 5 bash -c 'exec 3<>/dev/tcp/agentic-gateway.agentic-system.svc/8080 && printf "GET /health HTTP/1.0\r\nHost: x\r\n\r\n" >&3 && IFS= read -r line <&3 && [[ $line == *" 200 "* ]]' 2>&1; }
while true; do
  if said=$(ask); then echo answered; else echo "REFUSED $(date +%T.%N) $said"; fi
  sleep 0.1 & wait $!
done
"#;

/// PostgreSQL on the node.
struct Database {
    server: Postgres,
    words: String,
}

impl Database {
    async fn start() -> Result<Self> {
        let address = [
            "get",
            "nodes",
            "-o",
            "jsonpath={.items[0].status.addresses[?(@.type==\"InternalIP\")].address}",
        ];
        let address: IpAddr = kubectl(&address).await?.parse().context("the node has no address")?;
        let network = required("CLUSTER_NETWORK")?;
        let (server, words) = tokio::task::spawn_blocking(move || {
            let server = Postgres::start_in(&network, address)?;
            let words = server.database()?;
            anyhow::Ok((server, words))
        })
        .await??;
        let url = server.url_at(&words, &address.to_string());
        let url = url.replace("agentic@", &format!("agentic:{PASSWORD}@"));
        let _ = kubectl(&["delete", "secret", "-n", SYSTEM, SECRET, "--ignore-not-found"]).await;
        let url = format!("--from-literal=url={url}");
        kubectl(&["create", "secret", "generic", "-n", SYSTEM, SECRET, &url]).await?;
        Ok(Self { server, words })
    }

    /// The pod of the gateway that a session's runner is connected to, and the other one.
    async fn places(&self, session: &str) -> Result<[&'static str; 2]> {
        until("the gateway of the runner", SOON, async || {
            let select = format!("SELECT gateway FROM sessions WHERE name = '{session}'");
            let address = self.server.say(&self.words, &select)?;
            let address = address
                .trim()
                .rsplit_once(':')
                .map_or("", |(address, _)| address)
                .to_owned();
            for (n, pod) in PODS.into_iter().enumerate() {
                let found = kubectl(&["get", "pod", "-n", SYSTEM, pod, "-o", "jsonpath={.status.podIP}"]).await?;
                if !address.is_empty() && found == address {
                    return Ok(Some([pod, PODS[1 - n]]));
                }
            }
            Ok(None)
        })
        .await
    }
}

async fn upgrade(values: &[&str]) -> Result<()> {
    let chart = root().join("charts/agentic-operator");
    let chart = chart.to_string_lossy();
    let mut words = vec![
        "upgrade",
        "agentic-operator",
        &chart,
        "-n",
        SYSTEM,
        "--reset-then-reuse-values",
    ];
    words.extend(["--wait", "--timeout", "150s", "--set"]);
    let values = values.join(",");
    words.push(&values);
    helm(&words).await?;
    Ok(())
}

/// A client that is cut off now and then, and goes on where it was.
struct Reader<'a> {
    scene: &'a Scene,
    session: &'static str,
    had: Vec<Event>,
}

impl Reader<'_> {
    /// Reads at one of the gateways until the agent has said this.
    async fn until_said(&mut self, pod: &str, text: &str) -> Result<()> {
        let reading = async {
            loop {
                let gateway = Gateway::at_pod(self.scene, pod).await?;
                let mut request = gateway.request(Method::GET, &format!("/{}/events", self.session));
                if let Some(id) = self.had.last().and_then(|event| event.id.clone()) {
                    request = request.header("last-event-id", id);
                }
                let Ok(response) = request.send().await else { continue };
                if !response.status().is_success() {
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                    continue;
                }
                let had = &mut self.had;
                let read = sse::read(response, |event| {
                    if event.id.is_some() {
                        had.push(event.clone());
                    }
                    event.kind == "cli" && event.data.contains(r#""type":"result""#) && event.data.contains(text)
                });
                if matches!(read.await, Ok(true)) {
                    return anyhow::Ok(());
                }
            }
        };
        let done = tokio::time::timeout(SOON, reading).await;
        done.with_context(|| format!("{text:?} was not read at {pod} within {SOON:?}"))?
    }
}

async fn message(scene: &Scene, pod: &str, id: &str, steps: &Value) -> Result<()> {
    let gateway = Gateway::at_pod(scene, pod).await?;
    let body = json!({"id": id, "text": prompt(id, steps)});
    let (code, answer) = gateway.ask(Method::POST, "/pair/messages", Some(&body)).await?;
    ensure!(code == 202, "{code}: {answer}");
    Ok(())
}

/// A pod that asks the Service all the time.
async fn probe() -> Result<String> {
    let name = marker();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 2,
            "containers": [{"name": "probe", "image": SHELL_IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["bash", "-c", PROBE]}],
        },
    });
    apply(TOOLS, &pod.to_string()).await?;
    until("an answer to the probe", SOON, async || {
        let said = kubectl(&["logs", "-n", TOOLS, &name]).await.unwrap_or_default();
        Ok(said.contains("answered").then_some(()))
    })
    .await?;
    Ok(name)
}

/// Waits until the Service has led many requests to each of them.
async fn both_are_asked() -> Result<()> {
    for pod in PODS {
        let metrics = Forward::to_pod(SYSTEM, pod, 9090).await?;
        until(&format!("requests at {pod}"), SOON, async || {
            let text = http::client()
                .get(format!("{}/metrics", metrics.url()))
                .send()
                .await?
                .text()
                .await?;
            let asked = text
                .lines()
                .filter(|line| line.starts_with("http_requests_total{") && line.contains("/health"));
            let asked: f64 = asked
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum();
            // The kubelet asks, too, each five seconds: it alone would need longer than is waited for.
            Ok((asked > 60.0).then_some(()))
        })
        .await?;
    }
    Ok(())
}

async fn no_gateway_was_restarted() -> Result<()> {
    for pod in PODS {
        let count = "jsonpath={.status.containerStatuses[0].restartCount}";
        let restarts = kubectl(&["get", "pod", "-n", SYSTEM, pod, "-o", count]).await?;
        ensure!(restarts == "0", "{pod} was restarted {restarts} times");
    }
    Ok(())
}

#[tokio::test]
async fn a_session_goes_on_while_two_gateways_are_replaced_one_after_the_other_and_their_database_dies() -> Result<()> {
    disturbing("replicas", async |scene| {
        let database = Database::start().await?;
        upgrade(&[&format!("gateway.database.secretName={SECRET}")]).await?;
        upgrade(&["gateway.replicas=2"]).await?;
        let result = Box::pin(pair(scene, &database)).await;
        if result.is_err() {
            for pod in PODS {
                eprintln!(
                    "{}",
                    kubectl(&["logs", "-n", SYSTEM, pod, "--tail=100"])
                        .await
                        .unwrap_or_default()
                );
            }
        }
        // Whatever came of it, the tests after this one want the gateway that they know.
        upgrade(&["gateway.replicas=1", "gateway.database.secretName="]).await?;
        kubectl(&["delete", "pvc", "-n", SYSTEM, "data-agentic-gateway-1", "--wait=false"]).await?;
        result
    })
    .await
}

async fn pair(scene: &Scene, database: &Database) -> Result<()> {
    let (mock, first) = (Mock::reach().await?, marker());
    let mut spec = small();
    spec.interactive = Some(true);
    spec.prompt = Some(prompt(&first, &json!([{"text": "answer-0"}])));
    scene.create_with("pair", spec).await?;
    idle(scene, "pair", 1).await?;
    let budget = "jsonpath={.status.disruptionsAllowed}";
    let budget = [
        "get",
        "poddisruptionbudget",
        "-n",
        SYSTEM,
        "agentic-gateway",
        "-o",
        budget,
    ];
    until("one of the two to be evictable", SOON, async || {
        Ok((kubectl(&budget).await? == "1").then_some(()))
    })
    .await?;

    // The client and its message at one, the runner at the other.
    let mut reader = Reader {
        scene,
        session: "pair",
        had: Vec::new(),
    };
    let [_, other] = database.places("pair").await?;
    let ids = [marker(), marker(), marker()];
    message(scene, other, &ids[0], &json!([{"text": "answer-1"}])).await?;
    reader.until_said(other, "answer-1").await?;

    // Both are replaced in the midst of a turn, and the Service always answers.
    let probe = probe().await?;
    let held = |text: &str, name: &str| json!([{"text": text, "hold": name}]);
    let [_, other] = database.places("pair").await?;
    message(scene, other, &ids[1], &held("answer-2", &ids[1])).await?;
    mock.request(&ids[1], SOON, |request| request.end.is_none()).await?;
    kubectl(&["rollout", "restart", "-n", SYSTEM, "statefulset/agentic-gateway"]).await?;
    kubectl(&[
        "rollout",
        "status",
        "-n",
        SYSTEM,
        "statefulset/agentic-gateway",
        "--timeout=150s",
    ])
    .await?;
    mock.release(&ids[1]).await?;
    let [_, other] = database.places("pair").await?;
    reader.until_said(other, "answer-2").await?;
    both_are_asked().await?;
    let said = kubectl(&["logs", "-n", TOOLS, &probe]).await?;
    kubectl(&["delete", "pod", "-n", TOOLS, &probe, "--wait=false"]).await?;
    let refused: Vec<_> = said.lines().filter(|line| line.starts_with("REFUSED")).collect();
    ensure!(refused.is_empty(), "of {} requests: {refused:#?}", said.lines().count());

    // The database is killed in the midst of a turn.
    message(scene, other, &ids[2], &held("answer-3", &ids[2])).await?;
    mock.request(&ids[2], SOON, |request| request.end.is_none()).await?;
    database.server.kill()?;
    let gateway = Forward::to_pod(SYSTEM, other, 8080).await?;
    mock.release(&ids[2]).await?;
    until("the gateway to miss its database", SOON, async || {
        let health = http::client().get(format!("{}/health", gateway.url())).send().await?;
        Ok((health.status() == 503).then_some(()))
    })
    .await?;
    database.server.resume()?;
    reader.until_said(other, "answer-3").await?;
    no_gateway_was_restarted().await?;

    say(scene, "pair", &["end"]).await?;
    scene.phase("pair", Phase::Completed).await?;
    let mut logs = Vec::new();
    for pod in PODS {
        logs.push(complete_log(&Gateway::at_pod(scene, pod).await?, "pair").await?);
    }
    ensure!(logs[0] == logs[1], "both have the same records");
    ensure!(
        logs[0].starts_with(&reader.had),
        "and a client that moved about had no others: {:#?}",
        reader.had
    );
    for id in &ids {
        mock.said_once(&first, id).await?;
    }
    let conflicts = database.server.say(&database.words, "SELECT count(*) FROM conflicts")?;
    if conflicts.trim() != "0" {
        bail!("{conflicts} conflicts");
    }
    Ok(())
}
