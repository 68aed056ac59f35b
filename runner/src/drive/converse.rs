//! One CLI process, from its start to the end of its work.

use protocol::record::{LogLevel, SessionBody, UserBody};
use protocol::{Outcome, identity};
use secrecy::SecretString;
use tokio::time::{Duration, Instant, sleep_until};
use uuid::Uuid;

use super::{Attempt, End, Say};
use crate::agent::{AgentError, Exit, FromShim, ToShim};
use crate::cli::command::{self, Conversation, Start};
use crate::cli::turn::resume_refused;
use crate::cli::{Event, Lines, RawLine, Turn, outcome, wire};
use crate::config::Config;

/// How long a resumed CLI may take to go on by itself.
const GOES_ON: Duration = Duration::from_secs(15);
/// How much of stderr is kept for a message.
const STDERR_TAIL: usize = 2_000;

/// How it went.
pub(super) enum Episode {
    /// The work is over, one way or another.
    Ended(End),
    /// The conversation to resume is not there.
    ResumeRefused,
    /// The process or its container is gone.
    AgentLost {
        /// Memory was the cause.
        out_of_memory: bool,
        /// For people.
        why: String,
    },
}

/// See the module.
pub(super) struct Converse<'a> {
    pub(super) attempt: &'a mut Attempt,
    pub(super) turn: Turn,
    lines: Lines,
    stderr: String,
    resumed: bool,
    /// Until when the CLI must have gone on by itself.
    goes_on_by: Option<Instant>,
    wrote: bool,
}

impl<'a> Converse<'a> {
    /// Starts the CLI, says what is to be said, and follows it to the end.
    pub(super) async fn start(
        attempt: &'a mut Attempt,
        config: &Config,
        conversation: Conversation,
        say: Say,
        token: &SecretString,
    ) -> Result<Episode, End> {
        let resumed = matches!(conversation, Conversation::Resumed { .. });
        let mut converse = Self {
            attempt,
            turn: Turn::default(),
            lines: Lines::default(),
            stderr: String::new(),
            resumed,
            goes_on_by: None,
            wrote: false,
        };
        converse.spawn(config, conversation, token).await?;
        let said = match say {
            Say::Prompt => {
                let uuid = identity::message_uuid(&config.uid, identity::PROMPT_COMMAND);
                let command = identity::PROMPT_COMMAND.to_owned();
                converse
                    .say(&UserBody {
                        command,
                        uuid,
                        text: config.prompt.clone(),
                    })
                    .await?
            }
            Say::Continuation => converse.go_on().await?,
            Say::Again(messages) => converse.say_again(&messages).await,
            Say::NothingYet => {
                converse.goes_on_by = Some(Instant::now() + GOES_ON);
                Ok(())
            }
        };
        match said {
            Ok(()) => converse.follow().await,
            Err(lost) => Ok(lost.into()),
        }
    }

    async fn spawn(&mut self, config: &Config, conversation: Conversation, token: &SecretString) -> Result<(), End> {
        let proxy = self.attempt.proxy.as_ref().map(crate::proxy::Proxy::addr);
        let spawn = command::spawn(&Start {
            cli: &config.agent.cli,
            workspace: &config.agent.workspace,
            home: &config.agent.home,
            config_dir: &config.agent.config_dir,
            model: config.model.as_deref(),
            deltas: self.attempt.uplink.is_some(),
            conversation,
            proxy: proxy.unwrap_or_else(|| std::net::SocketAddr::from(([127, 0, 0, 1], 0))),
            token,
        });
        let started = SessionBody::CliStarted {
            cli_session_id: conversation.id(),
            resumed: self.resumed,
        };
        let seq = self.attempt.journal.session(&started)?;
        self.attempt.journal.spool().durable(seq).await?;
        // A shim that is gone already is found out about by the next word to it.
        let _ = self.tell(ToShim::Spawn(spawn)).await;
        Ok(())
    }

    /// Records a message and sends it once that is on disk. The inner error: the agent is lost, the record stays.
    async fn say(&mut self, body: &UserBody) -> Result<Result<(), AgentError>, End> {
        let seq = self.attempt.journal.user(body)?;
        self.attempt.journal.spool().durable(seq).await?;
        Ok(self.say_again(std::slice::from_ref(body)).await)
    }

    async fn say_again(&mut self, messages: &[UserBody]) -> Result<(), AgentError> {
        for body in messages {
            self.tell(ToShim::Stdin(wire::user_message(body.uuid, &body.text).into()))
                .await?;
        }
        Ok(())
    }

    async fn go_on(&mut self) -> Result<Result<(), AgentError>, End> {
        let body = self.attempt.continuation();
        self.say(&body).await
    }

    pub(super) async fn tell(&mut self, message: ToShim) -> Result<(), AgentError> {
        match &mut self.attempt.agent {
            Some(agent) => agent.send(message).await,
            None => Err(AgentError::Lost("it is not connected".to_owned())),
        }
    }

    /// Follows the CLI until its work is over or must be.
    async fn follow(mut self) -> Result<Episode, End> {
        loop {
            if let Step::Gone(gone) = self.step(None).await? {
                return self.gone(gone);
            }
            if let Some(end) = self.stopped() {
                return self.stop(end).await.map(Episode::Ended);
            }
            if resume_refused(&self.turn) && self.resumed {
                // The next process is started when this one is gone.
                self.ladder_after_the_end().await?;
                return Ok(Episode::ResumeRefused);
            }
            if self.turn.over_at().is_some_and(|at| at <= Instant::now()) {
                let end = self.over()?;
                self.ladder_after_the_end().await?;
                return Ok(Episode::Ended(end));
            }
            if self.turn.began() {
                self.goes_on_by = None;
            }
            if self.goes_on_by.is_some_and(|at| at <= Instant::now()) {
                self.goes_on_by = None;
                if let Err(lost) = self.go_on().await? {
                    return Ok(lost.into());
                }
            }
        }
    }

    /// Waits for the next thing to happen, at most until `due`, and takes it in. Not to be dropped while it waits: what it
    /// has taken out of the stream would be lost.
    pub(super) async fn step(&mut self, due: Option<Instant>) -> Result<Step, End> {
        let Attempt {
            agent,
            metered,
            uplink,
            stop,
            clock,
            keeper,
            ..
        } = &mut *self.attempt;
        let Some(agent) = agent else {
            return Ok(Step::Gone(Gone::Lost("it is not connected".to_owned())));
        };
        let told_to_stop = *stop.borrow();
        tokio::select! {
            from = agent.next() => return self.heard(from).await,
            Some(event) = metered.recv() => self.attempt.meter(event)?,
            Some(request) = crate::uplink::request(uplink) => self.attempt.journal.append_again(request).await?,
            _ = stop.changed(), if !told_to_stop => {}
            lost = keeper.lost() => return Err(lost.into()),
            _ = clock.tick() => self.attempt.tick(),
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => return Ok(Step::Due),
        }
        Ok(Step::Went)
    }

    async fn heard(&mut self, from: Result<FromShim, AgentError>) -> Result<Step, End> {
        match from {
            Ok(FromShim::Stdout(bytes)) => {
                let mut cut = Vec::new();
                self.lines.push(&bytes, |line| cut.push(line));
                for line in cut {
                    self.line(line).await?;
                }
                self.attempt.journal.spool().room().await?;
            }
            Ok(FromShim::Stderr(bytes)) => self.stderr(&bytes),
            Ok(FromShim::Exit(exit)) => {
                if let Some(line) = self.lines.finish() {
                    self.line(line).await?;
                }
                return Ok(Step::Gone(Gone::Exit(exit)));
            }
            Ok(FromShim::SpawnFailed(why)) => return Ok(Step::Gone(Gone::NotStarted(why))),
            Ok(FromShim::Hello(_) | FromShim::Killed) => {}
            Err(error) => return Ok(Step::Gone(Gone::Lost(error.to_string()))),
        }
        Ok(Step::Went)
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.stderr += &String::from_utf8_lossy(bytes);
        let mut from = self.stderr.len().saturating_sub(STDERR_TAIL);
        while !self.stderr.is_char_boundary(from) {
            from += 1;
        }
        self.stderr.drain(..from);
    }

    async fn line(&mut self, line: RawLine) -> Result<(), End> {
        self.wrote = true;
        let bytes = match line {
            RawLine::Whole(bytes) => bytes,
            RawLine::TooLong(length) => {
                self.attempt.journal.too_long(length)?;
                return Ok(());
            }
        };
        let event = std::str::from_utf8(&bytes).ok().and_then(wire::event);
        match event {
            Some(Event::Live) => self.attempt.live(&bytes),
            // Answers to us, and the echo of our own.
            Some(Event::ControlResponse) => {}
            event => {
                self.attempt.journal.cli(&bytes)?;
                if let Some(event) = event {
                    self.turn.observe(&event, Instant::now());
                    self.react(event).await?;
                }
            }
        }
        Ok(())
    }

    async fn react(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Started(uuid) => self.taken(&[uuid])?,
            Event::Result(result) => self.taken(&result.user_message_uuids)?,
            Event::ConversationReset(Some(cli_session_id)) => {
                let seq = self
                    .attempt
                    .journal
                    .session(&SessionBody::ConversationReset { cli_session_id })?;
                self.attempt.journal.spool().durable(seq).await?;
            }
            Event::ControlRequest { request_id, subtype } => {
                let refusal = wire::refusal(&request_id, &subtype);
                // If the agent is lost, the next step says so.
                let _ = self.tell(ToShim::Stdin(refusal.into())).await;
            }
            _ => {}
        }
        Ok(())
    }

    fn taken(&mut self, uuids: &[Uuid]) -> Result<(), End> {
        let messages = &self.attempt.journal.history().messages;
        let news: Vec<Uuid> = messages
            .iter()
            .filter(|message| !message.taken && uuids.contains(&message.body.uuid))
            .map(|message| message.body.uuid)
            .collect();
        if !news.is_empty() {
            self.attempt.journal.session(&SessionBody::Taken { uuids: news })?;
        }
        Ok(())
    }

    /// Why the turn must be stopped now, if it must.
    fn stopped(&self) -> Option<End> {
        if *self.attempt.stop.borrow() {
            return Some(End::new(Outcome::Stopped, "told to stop"));
        }
        if Instant::now() >= self.attempt.deadline {
            return Some(timed_out());
        }
        let proxy = self.attempt.proxy.as_ref()?;
        if *proxy.beyond_limits().borrow() {
            return Some(budget_exceeded(proxy));
        }
        proxy.witness().credential_refused.then(invalid_credentials)
    }

    /// The turn ended by itself.
    fn over(&mut self) -> Result<End, End> {
        let witness = self
            .attempt
            .proxy
            .as_ref()
            .map(crate::proxy::Proxy::witness)
            .unwrap_or_default();
        let Some(result) = self.turn.result() else {
            return Ok(self.unexplained());
        };
        let outcome = match &result.startup_failure_reason {
            Some(_) => Outcome::ConfigError,
            None => outcome(result, &witness),
        };
        let said = result.result.clone().unwrap_or_else(|| result.errors.join("; "));
        let end = match outcome {
            Outcome::Succeeded => End::new(outcome, ""),
            Outcome::InvalidCredentials => invalid_credentials(),
            _ => End::new(outcome, said),
        };
        self.attempt.turn_ended(outcome)?;
        Ok(end)
    }

    fn unexplained(&self) -> End {
        End::new(
            Outcome::AgentError,
            format!("the CLI ended without a result: {}", self.stderr.trim()),
        )
    }

    /// The process is gone without our doing.
    fn gone(mut self, gone: Gone) -> Result<Episode, End> {
        let exit = match gone {
            Gone::Exit(exit) => exit,
            Gone::Lost(why) => {
                return Ok(Episode::AgentLost {
                    out_of_memory: false,
                    why,
                });
            }
            Gone::NotStarted(why) => return Ok(Episode::Ended(End::new(Outcome::ConfigError, why))),
        };
        if resume_refused(&self.turn) && self.resumed {
            return Ok(Episode::ResumeRefused);
        }
        if let Some(end) = self.stopped() {
            self.attempt.turn_ended(end.outcome)?;
            return Ok(Episode::Ended(end));
        }
        if self.turn.result().is_some() {
            return self.over().map(Episode::Ended);
        }
        if !self.wrote && exit.oom_kills == 0 && exit.signal.is_none() {
            // It would end the same way again: a flag that it does not know, a file that it cannot read.
            let end = self.unexplained();
            self.attempt.turn_ended(end.outcome)?;
            return Ok(Episode::Ended(end));
        }
        let why = match exit {
            Exit { oom_kills: 1.., .. } => "a process of the agent was killed for memory".to_owned(),
            Exit {
                signal: Some(signal), ..
            } => format!("the CLI was killed by signal {signal}"),
            Exit { code, .. } => format!("the CLI ended with code {} in mid-turn", code.unwrap_or(-1)),
        };
        self.attempt.journal.log(LogLevel::Warning, why.clone())?;
        Ok(Episode::AgentLost {
            out_of_memory: exit.oom_kills > 0,
            why,
        })
    }
}

/// What a step was.
pub(super) enum Step {
    /// Something happened.
    Went,
    /// Nothing happened in time.
    Due,
    /// There is nothing to follow any more.
    Gone(Gone),
}

/// Why there is nothing to follow any more.
pub(super) enum Gone {
    /// The CLI ended.
    Exit(Exit),
    /// It could not be started.
    NotStarted(String),
    /// The shim is gone.
    Lost(String),
}

/// The end of a run that used up its time.
pub(super) fn timed_out() -> End {
    End::new(
        Outcome::Timeout,
        "the session's timeout is reached; its work is kept: set the annotation ambient-code.io/start-requested-at to a new value for another run",
    )
}

/// The end of a session that has used up its dollars or tokens.
fn budget_exceeded(proxy: &crate::proxy::Proxy) -> End {
    let (limits, spent) = (proxy.limits(), proxy.spent());
    let mut used = Vec::new();
    if let Some(limit) = limits.cost.filter(|limit| spent.cost >= *limit) {
        used.push(format!("{} of maxCostUSD {limit}", spent.cost));
    }
    if let Some(limit) = limits.tokens.filter(|limit| spent.tokens >= *limit) {
        used.push(format!("{} of maxTokens {limit}", spent.tokens));
    }
    End::new(
        Outcome::BudgetExceeded,
        format!(
            "the session has used {}; its work is kept: raise the limit, then set the annotation {} to a new value for another run",
            used.join(" and "),
            protocol::names::annotation::START_REQUESTED_AT
        ),
    )
}

fn invalid_credentials() -> End {
    let [own, other] = protocol::names::RUNNER_SECRETS;
    End::new(
        Outcome::InvalidCredentials,
        format!(
            "the model API refused the credential: check ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN in the Secret {own} or {other}"
        ),
    )
}

impl Attempt {
    /// What is due by the clock: the limits.
    fn tick(&mut self) {
        self.read_limits();
    }

    /// Records how a turn ended.
    pub(super) fn turn_ended(&mut self, outcome: Outcome) -> Result<(), End> {
        // The numbers of the last response are told before its last bytes: they are here already.
        while let Ok(event) = self.metered.try_recv() {
            self.meter(event)?;
        }
        self.journal.audit()?;
        let turn = self.journal.history().turn;
        self.journal.session(&SessionBody::TurnEnded { turn, outcome })?;
        self.journal.turn_end();
        Ok(())
    }

    fn live(&mut self, line: &[u8]) {
        let (Some(uplink), Ok(text)) = (&self.uplink, std::str::from_utf8(line)) else {
            return;
        };
        for line in self.journal.redacted_delta(text) {
            if let Ok(delta) = serde_json::value::RawValue::from_string(line) {
                uplink.delta(delta);
            }
        }
    }
}
