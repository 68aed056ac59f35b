//! The whole run of an attempt, from the volume to the exit code.

mod around;
mod converse;
mod end;
mod finish;
mod heard;
mod ladder;
mod live;
mod meanwhile;
mod opening;
mod orders;
mod repos;
mod verdict;
mod volume;
mod written;

use std::path::Path;
use std::sync::Arc;

use protocol::record::{LogLevel, SessionBody, UserBody};
use protocol::report::Delivery;
use protocol::{Outcome, identity};
use secrecy::SecretString;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use crate::agent::Agent;
use crate::cli::command::Conversation;
use crate::config::{Config, Folders};
use crate::control::Control;
use crate::history::History;
use crate::journal::Journal;
use crate::langfuse::Exporter;
use crate::last_word::LastWord;
use crate::plan::messages_again;
use crate::proxy::{Metered, Proxy};
use crate::report::ReportFile;
use crate::spool::{Spool, SpoolError};
use crate::status::Status;
use crate::transcript::Transcript;
use crate::uplink::Uplink;
use crate::workspace::state::{self, Guard, Keeper, StateError};

use converse::{Converse, Episode};
use end::chain;
use live::Live;
use opening::{Opening, Say};

pub use end::End;

/// Said to an agent whose turn was stopped.
pub const CONTINUE: &str = "Your work was interrupted before it was finished. Continue where you left off.";

const LOST_CONVERSATION: &str = "The earlier conversation could not be resumed: its transcript is not there. A new one begins with the messages of the turn that was open.";

/// Leaves the report of an attempt whose configuration cannot be read; returns its outcome.
pub fn refuse(report: &Path, attempt: u32, error: &dyn std::error::Error) -> Outcome {
    let end = End::new(Outcome::ConfigError, chain(error));
    finish::without_records(report, attempt, Delivery::Off, &end)
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
        Err(end) => {
            let attempt = config.attempt.unwrap_or(0);
            // Nobody has looked at what earlier attempts left: a drain must.
            let mut spool = std::fs::read_dir(config.folders.state.join("spool"))
                .into_iter()
                .flatten();
            let left = config.gateway.is_some() && spool.next().is_some();
            let events = if left { Delivery::Failed } else { Delivery::Off };
            return finish::without_records(&config.folders.report, attempt, events, &end);
        }
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
        let mut guard = Guard::take(state, config.attempt.unwrap_or(0), &config.pod_uid).await?;
        let report = ReportFile::open(report)
            .inspect_err(|error| tracing::error!(error = %chain(error), "there will be no report"))
            .ok()
            .map(Arc::new);
        let mut journal = open_journal(config, &mut guard).await?;
        // What came behind the last record may have taken long, too.
        guard.renew_in_time()?;
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
                match self.opening(config).await? {
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
                Episode::Misconfigured(why) => self.start_without_configuration(config, &why).await?,
                Episode::Forced => self.clear_agent().await,
            }
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

async fn open_journal(config: &Config, guard: &mut Guard) -> Result<Journal, End> {
    let mut exporter = config.langfuse.as_ref().map(Exporter::start);
    let mut history = History::default();
    let mut held = Ok(());
    let spool = Spool::open_in_turns(&config.folders.state.join("spool"), |record| {
        history.observe(record);
        if let Some(exporter) = &mut exporter {
            exporter.replay(record);
        }
        // A long session's spool takes minutes on a slow volume: longer than the lease holds, and than we may stand still.
        config.pulse.beat();
        if held.is_ok() {
            held = guard.renew_in_time();
        }
    })
    .await?;
    held?;
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
        Transcript::new(config.format, config.stdout.clone()),
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
