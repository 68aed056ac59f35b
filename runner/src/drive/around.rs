//! What the CLI needs around it: the proxy, and the agent's container.

use protocol::record::{LogLevel, SessionBody};
use protocol::{Outcome, names};
use secrecy::SecretString;
use tokio::time::sleep_until;

use super::converse::Episode;
use super::{Attempt, End, chain, ladder, verdict};
use crate::agent::{Agent, AgentError, Place, Spawn};
use crate::config::Config;
use crate::limits::Amount;
use crate::proxy::mcp::Servers;
use crate::proxy::{Proxy, ProxyConfig};

/// How often the agent is started again within an attempt.
const RESTARTS: u32 = 3;

impl Attempt {
    pub(super) async fn start_proxy(&mut self, config: &Config, token: &SecretString) -> Result<(), End> {
        if self.proxy.is_some() {
            return Ok(());
        }
        let Some(upstream) = config.upstream.clone() else {
            return Err(no_credentials());
        };
        self.every_model_has_a_price(config)?;
        let proxy = ProxyConfig {
            upstream,
            token: token.clone(),
            prices: config.prices.clone(),
            mcp: Servers::new(&config.options.tools.mcp_servers, &config.mcp)
                .map_err(|error| End::new(Outcome::ConfigError, error.to_string()))?,
        };
        let proxy = Proxy::start(proxy, self.meter.clone()).await?;
        let history = self.journal.history();
        proxy.set_spent(Amount {
            cost: history.cost_so_far(),
            tokens: history.usage().total(),
        });
        proxy.set_limits(self.live.budget());
        self.proxy = Some(proxy);
        Ok(())
    }

    /// A limit of dollars can hold only for models with a price.
    fn every_model_has_a_price(&self, config: &Config) -> Result<(), End> {
        let models = [
            config.options.model.as_deref(),
            config.options.fallback_model.as_deref(),
        ];
        let unpriced = models
            .into_iter()
            .flatten()
            .find(|model| config.prices.of_setting(model).is_none());
        match unpriced {
            Some(model) if self.live.now().max_cost_usd.is_some() => Err(End::new(
                Outcome::ConfigError,
                format!(
                    "limits.maxCostUSD is set, and there is no price for the model {model:?}: name another model, or have the administrator add its price to ProjectSettings `prices`"
                ),
            )),
            _ => Ok(()),
        }
    }

    pub(super) async fn open_agent(&mut self, config: &Config) -> Result<(), End> {
        let mut stop = self.stop.clone();
        let opened = tokio::select! {
            opened = Agent::open(&config.agent.place) => opened,
            _ = stop.wait_for(|stop| *stop) => return Err(End::new(Outcome::Stopped, "told to stop while the agent was started")),
            () = sleep_until(self.deadline()) => return Err(verdict::timed_out()),
        };
        let agent = opened.map_err(|error| End::new(Outcome::AgentLost, chain(&error)))?;
        let missing = agent.hello().missing.join(", ");
        if !missing.is_empty() {
            // On a person's own machine the CLI may find them elsewhere; an image says what it has.
            if matches!(config.agent.place, Place::Container(_)) {
                return Err(End::new(
                    Outcome::ConfigError,
                    format!(
                        "the agent's image lacks {missing}: the CLI and the runner need glibc, bash and git; build the image of spec.pod.image upon one that has them, such as debian with the packages bash and git"
                    ),
                ));
            }
            let said = format!("This machine lacks {missing}: the agent will miss it.");
            self.journal.log(LogLevel::Warning, said)?;
        }
        self.last_word.agent(agent.line());
        self.agent = Some(agent);
        Ok(())
    }

    pub(super) async fn agent_lost(&mut self, out_of_memory: bool, why: &str) -> Result<(), End> {
        self.losses += 1;
        if self.losses > RESTARTS {
            let outcome = if out_of_memory {
                Outcome::OutOfMemory
            } else {
                Outcome::AgentLost
            };
            return Err(End::new(
                outcome,
                format!("the agent was lost {} times; the last time: {why}", self.losses),
            ));
        }
        self.clear_agent().await;
        self.journal.session(&SessionBody::AgentRestarted { out_of_memory })?;
        Ok(())
    }

    /// The file in which the CLI counts its starts was torn, as by a kill or a full disk, or is the agent's work. The CLI refuses
    /// to start until somebody mends it, and makes another one when there is none; nothing of the session is in it.
    pub(super) async fn start_without_configuration(&mut self, config: &Config, why: &str) -> Result<(), End> {
        let file = format!("{}/.claude.json", config.agent.config_dir);
        let said = format!("The CLI cannot read {file}, which is removed; the session goes on without it.");
        self.journal.log(LogLevel::Warning, said)?;
        let removal = Spawn {
            argv: ["bash", "-c", r#"rm -rf -- "$1""#, "-", &file]
                .map(str::to_owned)
                .into(),
            env: Vec::new(),
            env_default: vec![("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned())],
            cwd: "/".to_owned(),
        };
        // Where it was lost, it is started anew in any case.
        let _ = self.run_in_agent(removal).await?;
        self.agent_lost(false, why).await
    }

    /// The container may live on, and with it the tools of the CLI that died. A shim takes one connection, so it is kept as
    /// long as there is one.
    pub(super) async fn clear_agent(&mut self) {
        if let Some(agent) = &mut self.agent
            && !agent.clear(ladder::KILLED).await
        {
            self.agent = None;
        }
    }
}

fn no_credentials() -> End {
    let [own, other] = names::RUNNER_SECRETS;
    End::new(
        Outcome::NoCredentials,
        format!(
            "no credential for the model API: put ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN (for Vertex AI: VERTEX_USER_TOKEN or GOOGLE_APPLICATION_CREDENTIALS) into the Secret {own} or {other} of the session's namespace"
        ),
    )
}

impl From<AgentError> for Episode {
    fn from(error: AgentError) -> Self {
        Self::AgentLost {
            out_of_memory: false,
            why: error.to_string(),
        }
    }
}
