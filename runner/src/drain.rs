//! `runner drain`: delivers what a dead attempt left on the session's claim. No agent, no model, no secret of theirs.

use std::path::PathBuf;

use protocol::frame::{Hello, Role, VERSION};
use protocol::names::{env, path};
use protocol::report::Delivery;
use protocol::{Outcome, Report};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, timeout_at};

use crate::config::{ConfigError, Gateway, Lookup};
use crate::history::History;
use crate::journal::Journal;
use crate::redact::Vault;
use crate::report::ReportFile;
use crate::spool::{Spool, SpoolError};
use crate::transcript::{Format, Transcript};
use crate::uplink::Uplink;
use crate::workspace::state::{self, Guard, Keeper, StateError};

/// How long one pod tries, everything included; the next one goes on where it ended.
const PATIENCE: Duration = Duration::from_secs(270);
/// How long the volume may take to release the lease.
const RELEASED: Duration = Duration::from_secs(5);

/// What to deliver, and where.
pub struct DrainConfig {
    /// UID of the session.
    pub uid: String,
    /// Name of the session.
    pub name: String,
    /// UID of the pod.
    pub pod_uid: String,
    /// Attempt whose records are left.
    pub attempt: u32,
    /// The gateway.
    pub gateway: Gateway,
    /// Spool, lock and lease.
    pub state: PathBuf,
    /// The termination report.
    pub report: PathBuf,
    /// How long to try.
    pub patience: Duration,
}

impl DrainConfig {
    /// From the environment that the operator made.
    pub fn from_env(var: Lookup<'_>) -> Result<Self, ConfigError> {
        let required = |name: &'static str| var(name).ok_or(ConfigError::Missing(name));
        let uid = required(env::AGENTIC_SESSION_UID)?;
        let attempt = required(env::ATTEMPT)?;
        Ok(Self {
            name: required(env::AGENTIC_SESSION_NAME)?,
            pod_uid: required(env::POD_UID)?,
            attempt: attempt.parse().map_err(|_| ConfigError::Invalid {
                name: env::ATTEMPT,
                value: attempt,
                expected: "a whole number",
            })?,
            gateway: Gateway {
                url: required(env::WEBSOCKET_URL)?,
                token_file: var(env::GATEWAY_TOKEN_FILE).map(PathBuf::from),
            },
            state: PathBuf::from(path::DATA).join(path::state_dir(&uid)),
            report: path::TERMINATION_LOG.into(),
            patience: PATIENCE,
            uid,
        })
    }
}

/// Why nothing more is delivered.
#[derive(Debug, thiserror::Error)]
enum DrainError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("told to stop before all records were delivered")]
    Told,
    #[error("failed to deliver all records in {} s; the next drain goes on with them", .0.as_secs())]
    Late(Duration),
    #[error("failed to deliver the records: the gateway says that the session is gone")]
    Gone,
}

impl DrainError {
    fn outcome(&self) -> Outcome {
        match self {
            Self::State(StateError::Superseded { .. } | StateError::Expired) => Outcome::Superseded,
            _ => Outcome::Undelivered,
        }
    }
}

/// Delivers, and leaves a report; `stop` becomes true when we are told to stop.
pub async fn drain(config: &DrainConfig, mut stop: watch::Receiver<bool>) -> Outcome {
    let deadline = Instant::now() + config.patience;
    let begun = tokio::select! {
        begun = timeout_at(deadline, Drain::begin(config)) => {
            begun.unwrap_or_else(|_| Err(DrainError::Late(config.patience)))
        }
        _ = stop.wait_for(|stop| *stop) => Err(DrainError::Told),
    };
    let mut drain = match begun {
        Ok(drain) => drain,
        Err(error) => {
            let report = Report {
                events: Delivery::Failed,
                ..Report::new(error.outcome(), config.attempt)
            };
            leave(config, report, Some(&error));
            return error.outcome();
        }
    };
    let delivered = tokio::select! {
        delivered = timeout_at(deadline, drain.deliver()) => {
            delivered.unwrap_or(Err(DrainError::Late(config.patience)))
        }
        _ = stop.wait_for(|stop| *stop) => Err(DrainError::Told),
    };
    let error = delivered.err();
    let outcome = error.as_ref().map_or(Outcome::Succeeded, DrainError::outcome);
    leave(config, drain.report(outcome), error.as_ref());
    if outcome != Outcome::Superseded
        && let Err(error) = drain.keeper.release(RELEASED).await
    {
        tracing::warn!(%error, "the lease could not be released");
    }
    outcome
}

fn leave(config: &DrainConfig, report: Report, error: Option<&DrainError>) {
    let message = error.map(ToString::to_string).unwrap_or_default();
    if error.is_some() {
        tracing::error!(outcome = ?report.outcome, "{message}");
    }
    let report = Report { message, ..report };
    if let Err(error) = ReportFile::open(&config.report).and_then(|file| file.write(&report)) {
        tracing::error!(%error, "there is no report");
    }
}

struct Drain {
    journal: Journal,
    uplink: Option<Uplink>,
    keeper: Keeper,
    attempt: u32,
}

impl Drain {
    /// Takes lock and lease, and closes the attempt that could not.
    async fn begin(config: &DrainConfig) -> Result<Self, DrainError> {
        state::prepare(&config.state)?;
        let mut guard = Guard::take(&config.state, config.attempt, &config.pod_uid).await?;
        let mut history = History::default();
        let mut held = Ok(());
        let spool = Spool::open_in_turns(&config.state.join("spool"), |record| {
            history.observe(record);
            // A long session's spool takes longer on a slow volume than the lease holds.
            if held.is_ok() {
                held = guard.renew_in_time();
            }
        })
        .await?;
        held?;
        guard.renew_in_time()?;
        let keeper = guard.keep();
        spool.write_while(keeper.holding());
        let (last, ended) = spool.last_attempt();
        if last > config.attempt {
            return Err(StateError::Superseded { attempt: last }.into());
        }
        let vault = Vault::default();
        let quiet = Transcript::new(Format::Quiet, None);
        let mut journal = Journal::new(spool, history, vault, None, quiet, last);
        if last > 0 && !ended {
            let seq = journal.end(Outcome::Lost)?;
            journal.spool().durable(seq).await?;
        }
        // An attempt that died before its first record left nothing, and a new spool's id would only confuse.
        let uplink = (last > 0).then(|| {
            let spool = journal.spool();
            let hello = hello(config, spool);
            Uplink::start(config.gateway.clone(), hello, spool.readers(), spool.progress(), None)
        });
        Ok(Self {
            journal,
            uplink,
            keeper,
            attempt: config.attempt,
        })
    }

    /// Serves the uplink until everything is acknowledged.
    async fn deliver(&mut self) -> Result<(), DrainError> {
        let Some(uplink) = &mut self.uplink else { return Ok(()) };
        loop {
            let last = self.journal.spool().next_seq() - 1;
            let request = tokio::select! {
                acked = uplink.acknowledged(last) => {
                    return if acked { Ok(()) } else { Err(DrainError::Gone) };
                }
                gone = self.keeper.lost() => return Err(gone.into()),
                request = uplink.request() => request,
            };
            self.journal.append_again(request.ok_or(DrainError::Gone)?).await?;
        }
    }

    fn report(&self, outcome: Outcome) -> Report {
        let history = self.journal.history();
        let events = match outcome {
            Outcome::Succeeded => Delivery::Delivered,
            _ => Delivery::Failed,
        };
        Report {
            turns: history.rounds,
            usage: history.usage(),
            cost_usd: history.cost(),
            last_seq: self.journal.spool().next_seq() - 1,
            acked_seq: self.uplink.as_ref().map_or(0, Uplink::acked),
            events,
            sdk_session_id: history.conversation.map(|id| id.to_string()),
            result: history.result.clone(),
            ..Report::new(outcome, self.attempt)
        }
    }
}

fn hello(config: &DrainConfig, spool: &Spool) -> Hello {
    Hello {
        protocol: VERSION,
        role: Role::Drain,
        uid: config.uid.clone(),
        name: config.name.clone(),
        attempt: config.attempt,
        pod_uid: config.pod_uid.clone(),
        spool: spool.id().to_owned(),
        next_seq: spool.next_seq(),
        cli_version: None,
    }
}
