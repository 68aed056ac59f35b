//! Sessions at a steady rate: made for the operator, or by a client that also makes the claim and the Job itself, and that may
//! record what it made as the operator does.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use http::Request;
use k8s_openapi::api::{batch::v1::Job, core::v1::PersistentVolumeClaim};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use super::plane::NAMESPACE;

const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces";
const SESSIONS: &str = "/apis/vteam.ambient-code/v1alpha1/namespaces";
/// About as long as a task that a person writes.
const PROMPT: &str = "Read the failing test, find out why it fails, correct the code and not the test, and explain in \
    three sentences what was wrong. ";

/// Who makes claim and Job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The operator.
    Operator,
    /// The client that made the session.
    Bare,
    /// That client, and it then writes the status and the Event that the operator writes.
    Recording,
}

/// What the operator writes for a session until its pod waits, to be written again by the bare client.
pub struct Children {
    claim: String,
    job: String,
    status: String,
    event: String,
    name: String,
    uid: String,
}

impl Children {
    /// Those of a session whose waiting pod the operator has told of.
    pub async fn of(client: &Client, name: &str, uid: &str) -> Result<Self> {
        let jobs: Api<Job> = Api::namespaced(client.clone(), NAMESPACE);
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), NAMESPACE);
        let mut job = serde_json::to_value(jobs.get(&format!("{name}-job")).await?)?;
        let mut claim = serde_json::to_value(claims.get(&format!("ambient-workspace-{name}")).await?)?;
        let session = get(client, &format!("{SESSIONS}/{NAMESPACE}/agenticsessions/{name}")).await?;
        let told = get(
            client,
            &format!("{EVENTS}/{NAMESPACE}/events?fieldSelector=regarding.name={name}"),
        )
        .await?;
        let mut event = told["items"][0].clone();
        for object in [&mut job, &mut claim, &mut event] {
            let object = object.as_object_mut().context("not an object")?;
            object.remove("status");
            let metadata = object["metadata"].as_object_mut().context("no metadata")?;
            for servers in [
                "uid",
                "resourceVersion",
                "creationTimestamp",
                "generation",
                "managedFields",
                "finalizers",
            ] {
                metadata.remove(servers);
            }
        }
        job["spec"].as_object_mut().context("no spec")?.remove("selector");
        for labels in ["/metadata/labels", "/spec/template/metadata/labels"] {
            if let Some(Value::Object(labels)) = job.pointer_mut(labels) {
                labels.retain(|name, _| !name.contains("controller-uid") && !name.contains("job-name"));
            }
        }
        Ok(Self {
            claim: claim.to_string(),
            job: job.to_string(),
            status: json!({"status": session["status"]}).to_string(),
            event: event.to_string(),
            name: name.to_owned(),
            uid: uid.to_owned(),
        })
    }

    /// One of them as it is for another session.
    fn of_session(&self, object: &str, name: &str, uid: &str) -> Vec<u8> {
        object.replace(&self.name, name).replace(&self.uid, uid).into_bytes()
    }
}

/// A client that makes sessions.
pub struct Load {
    client: Client,
    side: Side,
    own: Option<Own>,
}

/// What is made by the client itself, and as whom: with the operator's account, so that both wait in the same queue of the API server and pass
/// the same checks.
#[derive(Clone)]
struct Own {
    children: Arc<Children>,
    account: Client,
}

impl Load {
    /// One whose sessions are the operator's work.
    pub fn for_operator(client: Client) -> Self {
        Self {
            client,
            side: Side::Operator,
            own: None,
        }
    }

    /// One that does itself what `side` does; what the operator would do as its `account`.
    pub fn of_side(client: Client, side: Side, children: Arc<Children>, account: Client) -> Self {
        Self {
            client,
            side,
            own: Some(Own { children, account }),
        }
    }

    /// Makes `count` sessions `<prefix>-<n>`, `rate` of them a second, however slow the answers are; waits for all answers.
    pub async fn run(&self, prefix: &str, count: usize, rate: f64) -> Result<()> {
        let start = Instant::now();
        let mut under_way = JoinSet::new();
        for n in 0..count {
            tokio::time::sleep_until(start + Duration::from_secs_f64(n as f64 / rate)).await;
            let (client, own, side) = (self.client.clone(), self.own.clone(), self.side);
            let name = format!("{prefix}-{n}");
            under_way.spawn(async move {
                match own {
                    Some(own) if side != Side::Operator => create_all(&client, &own, &name, side).await,
                    _ => create_session(&client, NAMESPACE, &name, json!({})).await.map(drop),
                }
            });
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        Ok(())
    }
}

/// Makes a session; `extra` goes into its spec. Answers its UID.
pub async fn create_session(client: &Client, namespace: &str, name: &str, extra: Value) -> Result<String> {
    let mut spec = json!({"prompt": PROMPT.repeat(6), "timeout": 3600});
    if let (Value::Object(spec), Value::Object(extra)) = (&mut spec, extra) {
        spec.extend(extra);
    }
    let session = json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    });
    let answer = post(
        client,
        &format!("{SESSIONS}/{namespace}/agenticsessions"),
        session.to_string().into_bytes(),
    )
    .await?;
    let session: Value = serde_json::from_str(&answer)?;
    Ok(session["metadata"]["uid"]
        .as_str()
        .context("a session without UID")?
        .to_owned())
}

async fn create_all(client: &Client, own: &Own, name: &str, side: Side) -> Result<()> {
    let uid = create_session(client, NAMESPACE, name, json!({})).await?;
    let Own { children, account } = own;
    let of_session = |object| children.of_session(object, name, &uid);
    let claims = format!("/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims");
    post(account, &claims, of_session(&children.claim)).await?;
    let jobs = format!("/apis/batch/v1/namespaces/{NAMESPACE}/jobs");
    post(account, &jobs, of_session(&children.job)).await?;
    if side == Side::Recording {
        post(
            account,
            &format!("{EVENTS}/{NAMESPACE}/events"),
            of_session(&children.event),
        )
        .await?;
        let status = format!("{SESSIONS}/{NAMESPACE}/agenticsessions/{name}/status");
        let status = Request::patch(status).header("content-type", "application/merge-patch+json");
        account.request_text(status.body(of_session(&children.status))?).await?;
    }
    Ok(())
}

async fn post(client: &Client, path: &str, body: Vec<u8>) -> Result<String> {
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(body)?;
    client
        .request_text(request)
        .await
        .with_context(|| format!("failed to POST to {path}"))
}

async fn get(client: &Client, path: &str) -> Result<Value> {
    let request = Request::get(path).body(Vec::new())?;
    let answer = client
        .request_text(request)
        .await
        .with_context(|| format!("failed to GET {path}"))?;
    Ok(serde_json::from_str(&answer)?)
}
