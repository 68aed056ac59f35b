//! The mock model in the cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::http;
use tests::model::Logged;

use super::TOOLS;
use super::forward::Forward;
use super::wait::until;

/// The mock model, reached from outside.
#[derive(Debug)]
pub struct Mock(Forward);

impl Mock {
    /// Reaches it.
    pub async fn reach() -> Result<Self> {
        Forward::to_service(TOOLS, "mock-model", 8080).await.map(Self)
    }

    /// All requests of the CLI sessions in which `marker` was said, oldest first.
    pub async fn requests(&self, marker: &str) -> Result<Vec<Logged>> {
        let url = format!("{}/__mock/requests", self.0.url());
        let mut all: Vec<Logged> = http::client().get(url).send().await?.error_for_status()?.json().await?;
        let says = |request: &Logged| request.body["messages"].to_string().contains(marker);
        let sessions: BTreeSet<_> = all
            .iter()
            .filter(|one| says(one))
            .map(|one| one.session.clone())
            .collect();
        all.retain(|request| request.asks_for_message() && sessions.contains(&request.session));
        Ok(all)
    }

    /// Waits for a request that satisfies `wanted` in a session in which `marker` was said.
    pub async fn request(&self, marker: &str, deadline: Duration, wanted: impl Fn(&Logged) -> bool) -> Result<Logged> {
        until("a request to the model", deadline, async || {
            Ok(self.requests(marker).await?.into_iter().find(|request| wanted(request)))
        })
        .await
    }

    /// Lets every answer on that holds for `name`.
    pub async fn release(&self, name: &str) -> Result<()> {
        let url = format!("{}/__mock/release/{name}", self.0.url());
        http::client().post(url).send().await?.error_for_status()?;
        Ok(())
    }

    /// Whatever was killed and resumed: in every request the prompt stands in exactly one user message.
    pub async fn prompt_was_given_once(&self, marker: &str) -> Result<()> {
        self.said_once(marker, marker).await
    }

    /// A later message of the conversation in which `prompt` was said: from its first request on it stands in exactly one
    /// user message.
    pub async fn said_once(&self, prompt: &str, marker: &str) -> Result<()> {
        let requests = self.requests(prompt).await?;
        let since = requests
            .iter()
            .skip_while(|request| request.user_messages_with(marker) == 0);
        let requests: Vec<_> = if prompt == marker {
            requests.iter().collect()
        } else {
            since.collect()
        };
        ensure!(!requests.is_empty(), "the model was never asked with {marker}");
        for request in requests {
            ensure!(
                request.session.is_some(),
                "request {} names no session of the CLI",
                request.id
            );
            let found = request.user_messages_with(marker);
            ensure!(
                found == 1,
                "{found} user messages with {marker} in request {}: {:#?}",
                request.id,
                request.messages()
            );
        }
        Ok(())
    }
}
