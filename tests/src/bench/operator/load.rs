//! Sessions at a steady rate: made for the operator, or by a client that also makes the claim and the Job itself.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use http::Request;
use k8s_openapi::api::{batch::v1::Job, core::v1::PersistentVolumeClaim};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use super::plane::{BARE, NAMESPACE};

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
}

/// What the operator makes for a session, to be made again by the bare client.
pub struct Children {
    claim: String,
    job: String,
    name: String,
    uid: String,
}

impl Children {
    /// Those of a session that the operator has a Job for.
    pub async fn of(client: &Client, name: &str, uid: &str) -> Result<Self> {
        let jobs: Api<Job> = Api::namespaced(client.clone(), NAMESPACE);
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), NAMESPACE);
        let mut job = serde_json::to_value(jobs.get(&format!("{name}-job")).await?)?;
        let mut claim = serde_json::to_value(claims.get(&format!("ambient-workspace-{name}")).await?)?;
        for object in [&mut job, &mut claim] {
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
            metadata.insert("namespace".into(), json!(BARE));
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
            name: name.to_owned(),
            uid: uid.to_owned(),
        })
    }

    fn for_session(&self, name: &str, uid: &str) -> (Vec<u8>, Vec<u8>) {
        let made = |object: &str| object.replace(&self.name, name).replace(&self.uid, uid).into_bytes();
        (made(&self.claim), made(&self.job))
    }
}

/// A client that makes sessions.
pub struct Load {
    client: Client,
    children: Option<Arc<Children>>,
}

impl Load {
    /// One whose sessions are the operator's work.
    pub fn for_operator(client: Client) -> Self {
        Self { client, children: None }
    }

    /// One that makes claim and Job itself.
    pub fn bare(client: Client, children: Arc<Children>) -> Self {
        Self {
            client,
            children: Some(children),
        }
    }

    /// Makes `count` sessions `<prefix>-<n>`, `rate` of them a second, however slow the answers are; waits for all answers.
    pub async fn run(&self, prefix: &str, count: usize, rate: f64) -> Result<()> {
        let start = Instant::now();
        let mut under_way = JoinSet::new();
        for n in 0..count {
            tokio::time::sleep_until(start + Duration::from_secs_f64(n as f64 / rate)).await;
            let (client, children) = (self.client.clone(), self.children.clone());
            let name = format!("{prefix}-{n}");
            under_way.spawn(async move {
                match children {
                    None => create_session(&client, NAMESPACE, &name, json!({})).await.map(drop),
                    Some(children) => create_all(&client, &children, &name).await,
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

async fn create_all(client: &Client, children: &Children, name: &str) -> Result<()> {
    let uid = create_session(client, BARE, name, json!({})).await?;
    let (claim, job) = children.for_session(name, &uid);
    post(
        client,
        &format!("/api/v1/namespaces/{BARE}/persistentvolumeclaims"),
        claim,
    )
    .await?;
    post(client, &format!("/apis/batch/v1/namespaces/{BARE}/jobs"), job).await?;
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
