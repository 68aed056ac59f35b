//! The trace collector in the cluster.

use anyhow::{Context as _, Result};
use serde_json::Value;
use tests::http;
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY};

use super::TOOLS;
use super::forward::Forward;
use super::wait::{SOON, until};

/// The trace collector, reached from outside.
#[derive(Debug)]
pub struct Collector(Forward);

impl Collector {
    /// Reaches it.
    pub async fn reach() -> Result<Self> {
        Forward::to_service(TOOLS, "trace-collector", 3000).await.map(Self)
    }

    /// `GET`, as a client of Langfuse's public API does.
    pub async fn get(&self, path: &str) -> Result<Value> {
        let request = http::client().get(format!("{}{path}", self.0.url()));
        let request = request.basic_auth(FAKE_PUBLIC_KEY, Some(FAKE_SECRET_KEY));
        Ok(request.send().await?.error_for_status()?.json().await?)
    }

    /// The traces with this name; waits for the first.
    pub async fn traces(&self, name: &str) -> Result<Vec<Value>> {
        until(&format!("a trace named {name}"), SOON, async || {
            let found = self.get(&format!("/api/public/traces?name={name}")).await?;
            Ok(found["data"].as_array().filter(|data| !data.is_empty()).cloned())
        })
        .await
    }

    /// The observations of a trace.
    pub async fn observations(&self, trace: &str) -> Result<Vec<Value>> {
        let found = self
            .get(&format!("/api/public/observations?traceId={trace}&limit=1000"))
            .await?;
        found["data"]
            .as_array()
            .cloned()
            .context("the collector gave no list of observations")
    }
}
