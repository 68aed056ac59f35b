//! From a request to the first line of its answer: where the time goes, with a claim and without one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use jiff::Timestamp;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tests::http;
use tests::model::script;

use crate::harness::audit::events;
use crate::harness::client::Gateway;
use crate::harness::command::kubectl;
use crate::harness::forward::Forward;
use crate::harness::mock::Mock;
use crate::harness::scene::{compat_scene, marker};
use crate::harness::wait::{SOON, until};
use crate::harness::{COMPAT, SYSTEM};

/// Requests of each kind where nothing else is said; `cargo xtask bench first-token` says more.
const REQUESTS: usize = 1;

/// What has happened at the end of each step, and whose step it is.
const STEPS: [(&str, &str); 10] = [
    ("the session is made", "gateway and API server"),
    ("its Job is made", "**operator**"),
    ("its pod is made", "Job controller"),
    ("the pod has its node", "scheduler, and the volume's provisioner"),
    ("the agent's container has started", "kubelet, containerd"),
    ("the runner's container has started", "kubelet, containerd"),
    ("the runner has its volume, and the agent its socket", "**runner**"),
    ("the CLI speaks", "CLI"),
    ("the model is asked", "CLI, **proxy**"),
    ("the first line is at the client", "model, CLI, **runner, gateway**"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Workspace {
    Ephemeral,
    Claim,
}

struct Bench {
    server: Forward,
    gateway: Gateway,
    mock: Mock,
}

impl Bench {
    /// The moments of one request: that of sending it, and the end of each step.
    async fn request(&self, workspace: Workspace) -> Result<Vec<Timestamp>> {
        let said = marker();
        let prompt = script::prompt(&said, &json!([{"text": "First."}]));
        let sent = Timestamp::now();
        let (name, first) = match workspace {
            Workspace::Ephemeral => {
                let body = json!({"prompt": prompt});
                let url = format!("{}/claude-code", self.server.url());
                let first = first_with(http::client().post(url).json(&body), "\"assistant\"").await?;
                (session_of(&said).await?, first)
            }
            Workspace::Claim => {
                let body = json!({"prompt": prompt, "ttlSecondsAfterFinished": 60});
                let (code, made) = self.gateway.ask(Method::POST, "", Some(&body)).await?;
                ensure!(code.is_success(), "{code}: {made}");
                let name = made["name"].as_str().context("no name")?.to_owned();
                let follow = self.gateway.request(Method::GET, &format!("/{name}/events"));
                let first = first_with(follow, "\"type\":\"assistant\"").await?;
                (name, first)
            }
        };
        let mut moments = vec![sent];
        moments.extend(self.cluster(&name).await?);
        moments.extend(self.runner(&name).await?);
        let asked = self.mock.requests(&said).await?;
        moments.push(asked.first().context("the model was not asked")?.at.parse()?);
        moments.push(first);
        Ok(moments)
    }

    /// What the API server was told, and when.
    async fn cluster(&self, name: &str) -> Result<[Timestamp; 6]> {
        until("the cluster's words about the session", SOON, async || {
            let all = events()?;
            let created = |resource: &str, sub: Option<&str>, is: &dyn Fn(&str) -> bool| {
                let found = all.iter().filter(|event| {
                    let object = &event["objectRef"];
                    event["verb"] == "create"
                        && object["namespace"] == COMPAT
                        && object["resource"] == resource
                        && object["subresource"].as_str() == sub
                        && is(object["name"].as_str().unwrap_or_default())
                });
                let stamps = found.filter_map(|event| event["stageTimestamp"].as_str()?.parse::<Timestamp>().ok());
                stamps.collect::<Vec<_>>()
            };
            let (job, pod) = (format!("{name}-job"), format!("{name}-job-"));
            let session = created("agenticsessions", None, &|n| n == name || n.is_empty());
            let job = created("jobs", None, &|n| n == job);
            let bound = created("pods", Some("binding"), &|n| n.starts_with(&pod));
            let told = told(name).await?;
            let of = |what: &str| {
                let event = told.get(what)?;
                created("events", None, &|n| n == event).first().copied()
            };
            let (Some(job), Some(bound)) = (job.first().copied(), bound.first().copied()) else {
                return Ok(None);
            };
            // The name of one that has been given it is not in the log of each version.
            let session = session.into_iter().rfind(|at| *at <= job);
            let (Some(session), Some(made), Some(agent), Some(runner)) =
                (session, of("pod"), of("agent"), of("runner"))
            else {
                return Ok(None);
            };
            // Who makes a pod tells of it a little later.
            Ok(Some([session, job, made.min(bound), bound, agent, runner]))
        })
        .await
    }

    /// What the runner has recorded, and when.
    async fn runner(&self, name: &str) -> Result<[Timestamp; 2]> {
        until("the records of the session", SOON, async || {
            let transcript = self.gateway.request(Method::GET, &format!("/{name}/transcript"));
            let text = transcript.send().await?.error_for_status()?.text().await?;
            let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let records: Vec<_> = records.collect();
            let first = |kind: &str| {
                let found = records.iter().find(|record| record["kind"] == kind)?;
                found["ts"].as_str()?.parse::<Timestamp>().ok()
            };
            Ok(first("session")
                .zip(first("cli"))
                .map(|(begun, speaks)| [begun, speaks]))
        })
        .await
    }
}

/// Names of the Events by which the Job controller told of the pod, and the kubelet of each container's start.
async fn told(session: &str) -> Result<BTreeMap<String, String>> {
    let all: Value = serde_json::from_str(&kubectl(&["get", "events", "-n", COMPAT, "-o", "json"]).await?)?;
    let (job, pod) = (format!("{session}-job"), format!("{session}-job-"));
    let named = all["items"]
        .as_array()
        .context("no Events")?
        .iter()
        .filter_map(|event| {
            let of = &event["involvedObject"];
            let name = of["name"].as_str()?;
            let what = match event["reason"].as_str()? {
                "SuccessfulCreate" if name == job => "pod",
                "Started" if name.starts_with(&pod) => {
                    of["fieldPath"].as_str()?.split_once('{')?.1.trim_end_matches('}')
                }
                _ => return None,
            };
            Some((what.to_owned(), event["metadata"]["name"].as_str()?.to_owned()))
        });
    Ok(named.collect())
}

/// When the first line with this text came.
async fn first_with(request: RequestBuilder, text: &str) -> Result<Timestamp> {
    let response = request.send().await?.error_for_status()?;
    let (mut chunks, mut so_far) = (response.bytes_stream(), Vec::new());
    let mut found = None;
    while let Some(chunk) = tokio::time::timeout(SOON, chunks.next()).await?.transpose()? {
        so_far.extend_from_slice(&chunk);
        if found.is_none() && String::from_utf8_lossy(&so_far).contains(text) {
            found = Some(Timestamp::now());
        }
    }
    found.with_context(|| format!("no line with {text} in {}", String::from_utf8_lossy(&so_far)))
}

async fn session_of(marker: &str) -> Result<String> {
    let all: Value = serde_json::from_str(&kubectl(&["get", "agenticsessions", "-n", COMPAT, "-o", "json"]).await?)?;
    let all = all["items"].as_array().context("no list")?;
    let ours = all
        .iter()
        .find(|session| session["spec"]["prompt"].to_string().contains(marker));
    let name = ours.and_then(|session| session["metadata"]["name"].as_str());
    Ok(name.context("the request has no session")?.to_owned())
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Milliseconds of each step, and of all together, in the median.
fn medians(requests: &[Vec<Timestamp>]) -> Vec<Duration> {
    let between = |from: Timestamp, to: Timestamp| Duration::try_from(to.duration_since(from)).unwrap_or_default();
    let steps = (0..STEPS.len()).map(|step| {
        let took = requests.iter().map(|moments| between(moments[step], moments[step + 1]));
        median(took.collect())
    });
    let all = requests.iter().map(|moments| between(moments[0], moments[STEPS.len()]));
    steps.chain([median(all.collect())]).collect()
}

fn table(ephemeral: &[Vec<Timestamp>], claim: &[Vec<Timestamp>]) -> String {
    let mut text = "| until | whose | ephemeral, ms | with a claim, ms |\n| --- | --- | --- | --- |\n".to_owned();
    let rows = STEPS.iter().copied().chain([("**all**", "")]);
    for (((what, whose), ephemeral), claim) in rows.zip(medians(ephemeral)).zip(medians(claim)) {
        let _ = writeln!(
            text,
            "| {what} | {whose} | {} | {} |",
            ephemeral.as_millis(),
            claim.as_millis()
        );
    }
    text
}

#[tokio::test]
async fn the_time_from_a_request_to_its_first_line_is_told_step_by_step() -> Result<()> {
    let told = std::env::var("FIRST_TOKEN_REQUESTS").ok().and_then(|n| n.parse().ok());
    let requests: usize = told.unwrap_or(REQUESTS);
    compat_scene(async || {
        let bench = Bench {
            server: Forward::to_service(SYSTEM, "agentic-gateway", 8080).await?,
            gateway: Gateway::of_namespace(COMPAT).await?,
            mock: Mock::reach().await?,
        };
        let (mut ephemeral, mut claim) = (Vec::new(), Vec::new());
        for turn in 0..=requests {
            let (without, with) = (
                bench.request(Workspace::Ephemeral).await?,
                bench.request(Workspace::Claim).await?,
            );
            for moments in [&without, &with] {
                // A kubelet tells of a container a little later than it starts.
                let firm = [0, 1, 2, 3, 4, 7, 9, 10].map(|at| moments[at]);
                ensure!(firm.is_sorted(), "steps out of order: {moments:#?}");
            }
            // The first of each warms up.
            if turn > 0 {
                ephemeral.push(without);
                claim.push(with);
            }
        }
        let table = table(&ephemeral, &claim);
        println!("{requests} requests of each kind, taking turns; medians.\n\n{table}");
        if let Some(file) = std::env::var_os("FIRST_TOKEN_TABLE") {
            let machine = tests::bench::machine::describe();
            std::fs::write(file, format!("{machine}; {}.\n\n{table}", Timestamp::now()))?;
        }
        Ok(())
    })
    .await
}
