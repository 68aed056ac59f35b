//! The whole run of an attempt, from the volume to the exit code.

mod converse;
mod finish;
mod ladder;
mod live;
mod orders;
mod repos;
mod verdict;
mod volume;
mod written;

use std::path::Path;
use std::sync::Arc;

use protocol::record::{LogLevel, SessionBody, UserBody};
use protocol::{Outcome, identity, names};
use secrecy::SecretString;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, MissedTickBehavior, interval, sleep_until};
use uuid::Uuid;

use crate::agent::{Agent, AgentError, Place};
use crate::cli::command::Conversation;
use crate::cli::outcome;
use crate::config::{Config, Folders};
use crate::control::Control;
use crate::history::History;
use crate::journal::Journal;
use crate::langfuse::Exporter;
use crate::last_word::LastWord;
use crate::limits::Amount;
use crate::plan::{Plan, messages_again, plan};
use crate::proxy::mcp::Servers;
use crate::proxy::{Metered, Proxy, ProxyConfig, ProxyError, Witness};
use crate::report::ReportFile;
use crate::spool::{Spool, SpoolError};
use crate::status::Status;
use crate::transcript::Transcript;
use crate::uplink::Uplink;
use crate::workspace::state::{self, Guard, Keeper, StateError};
use crate::workspace::transcripts;

use converse::{Converse, Episode};
use live::Live;

/// How often the agent is started again within an attempt.
const RESTARTS: u32 = 3;
/// Said to an agent whose turn was stopped.
pub const CONTINUE: &str = "Your work was interrupted before it was finished. Continue where you left off.";

const LOST_CONVERSATION: &str = "The earlier conversation could not be resumed: its transcript is not there. A new one begins with the messages of the turn that was open.";

/// How an attempt ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Outcome.
    pub outcome: Outcome,
    /// For people: what happened and what to do.
    pub message: String,
}

impl End {
    fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            message: message.into(),
        }
    }
}

impl From<SpoolError> for End {
    fn from(error: SpoolError) -> Self {
        Self::new(error.outcome(), chain(&error))
    }
}

impl From<StateError> for End {
    fn from(error: StateError) -> Self {
        let outcome = match &error {
            StateError::Superseded { .. } => Outcome::Superseded,
            StateError::Volume { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => Outcome::DiskFull,
            StateError::Volume { .. } | StateError::Expired => Outcome::VolumeUnavailable,
        };
        Self::new(outcome, error.to_string())
    }
}

impl From<ProxyError> for End {
    fn from(error: ProxyError) -> Self {
        let outcome = match &error {
            ProxyError::BaseUrl(_) | ProxyError::Credential(_) => Outcome::ConfigError,
            ProxyError::Listen(_) | ProxyError::Client(_) => Outcome::RunnerError,
        };
        Self::new(outcome, chain(&error))
    }
}

/// An error and what caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Leaves the report of an attempt whose configuration cannot be read; returns its outcome.
pub fn refuse(report: &Path, attempt: u32, error: &dyn std::error::Error) -> Outcome {
    finish::without_records(report, attempt, &End::new(Outcome::ConfigError, chain(error)))
}

/// Runs an attempt and leaves its report; `stop` becomes true when we are told to stop.
pub async fn drive(config: Config, mut stop: watch::Receiver<bool>) -> Outcome {
    let begun = Instant::now();
    let prepared = tokio::select! {
        prepared = Attempt::begin(&config, stop.clone(), begun) => prepared,
        _ = stop.wait_for(|stop| *stop) => Err(End::new(Outcome::Stopped, "told to stop before the agent was started")),
    };
    let mut attempt = match prepared {
        Ok(attempt) => attempt,
        Err(end) => return finish::without_records(&config.folders.report, config.attempt.unwrap_or(0), &end),
    };
    let end = match Box::pin(attempt.clone_repos(&config)).await {
        Ok(()) => match attempt.work(&config).await {
            Ok(end) | Err(end) => end,
        },
        Err(end) => end,
    };
    let end = Box::pin(attempt.push_repos(&config, end)).await;
    attempt.finish(end).await
}

/// What an attempt holds while it runs.
struct Attempt {
    journal: Journal,
    keeper: Keeper,
    report: Option<Arc<ReportFile>>,
    last_word: Arc<LastWord>,
    uplink: Option<Uplink>,
    uid: String,
    run: u32,
    /// Running time of the run until this attempt began.
    used: Duration,
    live: Live,
    interactive: bool,
    begun: Instant,
    stop: watch::Receiver<bool>,
    metered: mpsc::Receiver<Metered>,
    meter: mpsc::Sender<Metered>,
    proxy: Option<Proxy>,
    agent: Option<Agent>,
    clock: tokio::time::Interval,
    /// When the running time is used up, by the limits as last read.
    deadline: Instant,
    /// Continuation messages sent in this attempt.
    continuations: u32,
    /// Messages written to the CLI in this attempt.
    said: u64,
    /// How often the agent was lost since a turn went well.
    losses: u32,
    /// When somebody last had a part in an interactive session, or a turn worked.
    active: Instant,
    /// Version of the CLI that this attempt has met.
    cli_version: Option<String>,
    control: Option<Control>,
    status: watch::Sender<Status>,
    /// What the end record will say.
    ending: Outcome,
    /// Rounds, tokens and conversation of the last report.
    reported: (u64, protocol::Usage, Option<Uuid>),
    /// Messages that the records do not hold as they were written, until they are taken.
    written: written::Written,
    /// Seconds that the model API asked to wait.
    retry_after: Option<u64>,
    trace_id: Option<String>,
    /// What became of the repositories.
    repos: Vec<protocol::report::RepoReport>,
}

impl Attempt {
    /// Volume, lock, records of earlier attempts, the record that this one begins, uplink.
    async fn begin(config: &Config, stop: watch::Receiver<bool>, begun: Instant) -> Result<Self, End> {
        let Folders {
            state, report, limits, ..
        } = &config.folders;
        state::prepare(state)?;
        let guard = Guard::take(state, config.attempt.unwrap_or(0), &config.pod_uid).await?;
        let report = ReportFile::open(report)
            .inspect_err(|error| tracing::error!(error = %chain(error), "there will be no report"))
            .ok()
            .map(Arc::new);
        let mut journal = open_journal(config)?;
        let keeper = guard.keep();
        journal.spool().write_while(keeper.holding());
        let uplink = config.gateway.as_ref().map(|gateway| {
            let hello = hello(config, &journal);
            let spool = journal.spool();
            Uplink::start(
                gateway.clone(),
                hello,
                spool.readers(),
                spool.progress(),
                config.files(),
            )
        });
        journal.session(&SessionBody::AttemptStarted {
            run: config.run,
            pod_uid: config.pod_uid.clone(),
            runner_version: env!("CARGO_PKG_VERSION").to_owned(),
        })?;
        let mut clock = interval(Duration::from_millis(250));
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (meter, metered) = mpsc::channel(64);
        let trace_id = journal.trace_id();
        let status = watch::Sender::new(Status {
            session: config.name.clone(),
            run: config.run,
            attempt: journal.attempt(),
            interactive: config.options.interactive,
            ..Status::default()
        });
        let control = Control::listen(&config.folders.control, status.subscribe())
            .inspect_err(|error| tracing::warn!(%error, path = %config.folders.control.display(), "no control socket"))
            .ok();
        let mut attempt = Self {
            live: Live::new(config.limits, limits.clone()),
            interactive: config.options.interactive,
            losses: 0,
            said: 0,
            active: begun,
            cli_version: None,
            control,
            status,
            journal,
            keeper,
            report,
            last_word: Arc::clone(&config.last_word),
            uplink,
            uid: config.uid.clone(),
            run: config.run,
            used: config.used,
            begun,
            stop,
            metered,
            meter,
            proxy: None,
            agent: None,
            clock,
            deadline: begun,
            continuations: 0,
            ending: Outcome::Running,
            reported: Default::default(),
            written: written::Written::default(),
            retry_after: None,
            trace_id,
            repos: Vec::new(),
        };
        attempt.live.read();
        attempt.deadline = attempt.deadline();
        attempt.write_report(&End::new(Outcome::Running, ""));
        Ok(attempt)
    }

    /// Decides what is left to do and has the CLI do it.
    async fn work(&mut self, config: &Config) -> Result<End, End> {
        let token = SecretString::from(format!("run-{}", Uuid::new_v4()));
        let mut refused = false;
        loop {
            let (conversation, say) = if std::mem::take(&mut refused) {
                self.journal.goes_on(&[]);
                let again = messages_again(self.journal.history(), self.interactive);
                (Conversation::New(Uuid::new_v4()), Say::Again(again))
            } else {
                match self.opening(config)? {
                    Opening::Work(conversation, say) => (conversation, say),
                    Opening::Finish(end) => return Ok(end),
                }
            };
            let say = match say {
                Say::Again(messages) => Say::Again(self.as_written(config, messages)?),
                say => say,
            };
            self.start_proxy(config, &token).await?;
            if self.agent.is_none() {
                self.open_agent(config).await?;
            }
            match Converse::start(self, config, conversation, say, &token).await? {
                Episode::Ended(end) => return Ok(end),
                Episode::ResumeRefused => {
                    self.journal.log(LogLevel::Warning, LOST_CONVERSATION)?;
                    refused = true;
                }
                Episode::AgentLost { out_of_memory, why } => self.agent_lost(out_of_memory, &why).await?,
                Episode::Forced => self.clear_agent().await,
            }
        }
    }

    /// What the CLI is to be started for, if it is.
    fn opening(&mut self, config: &Config) -> Result<Opening, End> {
        self.conclude_what_is_recorded()?;
        self.conclude_what_was_cleared(config)?;
        let plan = self.plan(config);
        let resumed = |id, interrupted| Conversation::Resumed { id, interrupted };
        let fresh = || Conversation::New(Uuid::new_v4());
        let (conversation, say) = match plan {
            Plan::Finish(Outcome::Succeeded) => return Ok(Opening::Finish(End::new(Outcome::Succeeded, ""))),
            Plan::Finish(outcome) => {
                let said = self.journal.history().result.clone();
                return Ok(Opening::Finish(End::new(outcome, said)));
            }
            Plan::Wait { conversation } => {
                let conversation = conversation.map_or_else(fresh, |id| resumed(id, false));
                return Ok(Opening::Work(conversation, Say::Nothing));
            }
            Plan::Begin { again } if again.is_empty() && config.prompt.is_empty() => {
                return Ok(Opening::Work(fresh(), Say::Nothing));
            }
            Plan::Begin { again } if again.is_empty() => (fresh(), Say::Prompt),
            Plan::Begin { again } => {
                if self.journal.history().conversation.is_some() {
                    self.journal.log(LogLevel::Warning, LOST_CONVERSATION)?;
                }
                (fresh(), Say::Again(again))
            }
            Plan::Resume {
                conversation: id,
                interrupted,
                again,
            } if again.is_empty() => (resumed(id, interrupted), Say::NothingYet),
            Plan::Resume {
                conversation: id,
                interrupted,
                again,
            } => (resumed(id, interrupted), Say::Again(again)),
            Plan::Continue { conversation: id } => (resumed(id, false), Say::Continuation),
        };
        Ok(match self.rounds_used_up() {
            Some(end) => Opening::Finish(end),
            None => Opening::Work(conversation, say),
        })
    }

    /// Writes that a turn is over whose result, or whose stop, is recorded, for a runner that died in between.
    fn conclude_what_is_recorded(&mut self) -> Result<(), End> {
        let history = self.journal.history();
        if !history.open_turn() {
            return Ok(());
        }
        let turn = history.turn;
        // The next message was taken up already.
        let goes_on = history.untaken().any(|message| message.started);
        let ended = match (history.stopped(), history.stream.concluded()) {
            (Some(cause), _) => Some(cause),
            (None, Some(result)) if !goes_on => Some(outcome(result, &Witness::default())),
            _ => None,
        };
        ended.map_or(Ok(()), |outcome| self.turn_ended(turn, outcome))
    }

    /// Writes that the conversation was cleared while nobody listened: what was sent last is in the transcript of another
    /// one. Without a message since, the turn is over with it.
    fn conclude_what_was_cleared(&mut self, config: &Config) -> Result<(), End> {
        let history = self.journal.history();
        let Some(last) = history.untaken().last().map(|message| message.body.clone()) else {
            return Ok(());
        };
        let found = transcripts::conversation(&config.folders.transcripts, &last.uuid).unwrap_or_else(|error| {
            tracing::warn!(%error, "the transcripts could not be searched");
            None
        });
        let (Some(cli_session_id), Some(known)) = (found, history.conversation) else {
            return Ok(());
        };
        let (turn, open) = (history.turn, history.open_turn() && history.stopped().is_none());
        if cli_session_id != known {
            self.journal
                .session(&SessionBody::ConversationReset { cli_session_id })?;
        }
        // It stands in the transcript of the conversation that it began.
        if open && last.text.trim_start().starts_with("/clear") {
            self.journal.session(&SessionBody::Taken { uuids: vec![last.uuid] })?;
            self.turn_ended(turn, Outcome::Succeeded)?;
        }
        Ok(())
    }

    fn plan(&mut self, config: &Config) -> Plan {
        let folder = &config.folders.transcripts;
        let mut arrived = Vec::new();
        let plan = plan(self.journal.history(), config.run, self.interactive, |uuid| {
            let held = transcripts::holds(folder, uuid).unwrap_or_else(|error| {
                tracing::warn!(%error, "the transcripts could not be searched");
                false
            });
            arrived.extend(held.then_some(*uuid));
            held
        });
        self.journal.goes_on(&arrived);
        plan
    }

    async fn start_proxy(&mut self, config: &Config, token: &SecretString) -> Result<(), End> {
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

    async fn open_agent(&mut self, config: &Config) -> Result<(), End> {
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

    async fn agent_lost(&mut self, out_of_memory: bool, why: &str) -> Result<(), End> {
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

    /// The container may live on, and with it the tools of the CLI that died. A shim takes one connection, so it is kept as
    /// long as there is one.
    async fn clear_agent(&mut self) {
        if let Some(agent) = &mut self.agent
            && !agent.clear(ladder::KILLED).await
        {
            self.agent = None;
        }
    }

    /// When the running time is used up, by the limits as last read.
    fn deadline(&self) -> Instant {
        self.begun + self.live.timeout().saturating_sub(self.used)
    }

    /// The next continuation message.
    fn continuation(&mut self) -> UserBody {
        self.continuations += 1;
        let command = identity::continuation_command(self.run, self.journal.attempt(), self.continuations);
        UserBody {
            uuid: identity::message_uuid(&self.uid, &command),
            command,
            text: CONTINUE.to_owned(),
        }
    }

    /// Has every response's numbers recorded; an opening is on disk before the proxy goes on with it.
    fn meter(&mut self, Metered { body, durable }: Metered) -> Result<(), SpoolError> {
        let seq = self.journal.record(protocol::Kind::Usage, &body)?;
        if let Some(durable) = durable {
            let mut progress = self.journal.spool().progress();
            tokio::spawn(async move {
                if progress.wait_for(|progress| progress.durable >= seq).await.is_ok() {
                    let _ = durable.send(());
                }
            });
        }
        Ok(())
    }
}

/// What the CLI is told once it runs.
enum Say {
    /// The session's prompt, for the first time.
    Prompt,
    /// Messages that are recorded already.
    Again(Vec<UserBody>),
    /// That it shall go on.
    Continuation,
    /// Nothing, as long as it goes on by itself.
    NothingYet,
    /// Nothing: it waits for messages.
    Nothing,
}

/// How an attempt goes on.
enum Opening {
    /// The CLI is started.
    Work(Conversation, Say),
    /// There is nothing for it to do.
    Finish(End),
}

fn open_journal(config: &Config) -> Result<Journal, End> {
    let mut exporter = config.langfuse.as_ref().map(Exporter::start);
    let mut history = History::default();
    let spool = Spool::open(&config.folders.state.join("spool"), |record| {
        history.observe(record);
        if let Some(exporter) = &mut exporter {
            exporter.replay(record);
        }
    })?;
    let (last, ended) = spool.last_attempt();
    let attempt = config.attempt.unwrap_or(last + 1);
    if last > attempt {
        return Err(StateError::Superseded { attempt: last }.into());
    }
    config.vault.learn_all(config.secrets.iter().cloned());
    let mut journal = Journal::new(
        spool,
        history,
        config.vault.clone(),
        exporter,
        Transcript::new(config.format),
        attempt,
    );
    if last > 0 && last < attempt && !ended {
        journal.end(Outcome::Lost)?;
    }
    Ok(journal)
}

fn hello(config: &Config, journal: &Journal) -> protocol::frame::Hello {
    protocol::frame::Hello {
        protocol: protocol::frame::VERSION,
        role: protocol::frame::Role::Run,
        uid: config.uid.clone(),
        name: config.name.clone(),
        attempt: journal.attempt(),
        pod_uid: config.pod_uid.clone(),
        spool: journal.spool().id().to_owned(),
        next_seq: journal.spool().next_seq(),
        cli_version: journal.history().cli_version.clone(),
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
