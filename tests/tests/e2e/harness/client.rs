//! The gateway's REST interface, as a client outside the cluster uses it.

use anyhow::{Context as _, Result};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use tests::http;

use super::command::kubectl;
use super::forward::Forward;
use super::{SYSTEM, Scene};

/// A caller with a token of a service account that may edit the scene's namespace.
#[derive(Debug)]
pub struct Gateway {
    forward: Forward,
    token: String,
    namespace: String,
}

impl Gateway {
    /// Makes the service account, once for each scene, and reaches the gateway.
    pub async fn reach(scene: &Scene) -> Result<Self> {
        Self::of_namespace(&scene.namespace).await
    }

    /// The same for a namespace.
    pub async fn of_namespace(namespace: &str) -> Result<Self> {
        let forward = Forward::to_service(SYSTEM, "agentic-gateway", 8080).await?;
        Self::through(forward, namespace).await
    }

    /// This one of several gateways.
    pub async fn at_pod(scene: &Scene, pod: &str) -> Result<Self> {
        let forward = Forward::to_pod(SYSTEM, pod, 8080).await?;
        Self::through(forward, &scene.namespace).await
    }

    async fn through(forward: Forward, namespace: &str) -> Result<Self> {
        let namespace = namespace.to_owned();
        let _ = kubectl(&["create", "serviceaccount", "caller", "-n", &namespace]).await;
        let account = format!("--serviceaccount={namespace}:caller");
        let _ = kubectl(&[
            "create",
            "rolebinding",
            "caller",
            "-n",
            &namespace,
            "--clusterrole=edit",
            &account,
        ])
        .await;
        let token = kubectl(&["create", "token", "caller", "-n", &namespace])
            .await?
            .trim()
            .to_owned();
        Ok(Self {
            forward,
            token,
            namespace,
        })
    }

    /// A request below the namespace's sessions, such as `""` or `"/hello/events"`.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!(
            "{}/api/projects/{}/agentic-sessions{path}",
            self.forward.url(),
            self.namespace
        );
        http::client().request(method, url).bearer_auth(&self.token)
    }

    /// Status and JSON of a request.
    pub async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, Value)> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.context("the gateway did not answer")?;
        let (status, text) = (response.status(), response.text().await?);
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }
}
