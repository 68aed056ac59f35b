//! One CLI process, from its start to the end of its work.

use std::collections::VecDeque;

use protocol::record::{LogLevel, SessionBody, UserBody};
use protocol::{Outcome, identity};
use secrecy::SecretString;
use tokio::time::{Duration, Instant, sleep_until};
use uuid::Uuid;

use super::orders::commanded;
use super::{Attempt, End, Say};
use crate::agent::{AgentError, Exit, FromShim, ToShim};
use crate::cli::command::{self, Conversation, Start};
use crate::cli::turn::resume_refused;
use crate::cli::wire::State;
use crate::cli::{Event, Lines, RawLine, TESTED_VERSION, Turn, wire};
use crate::config::Config;
use crate::kill_point;
use crate::status::Question;

/// How long a resumed CLI may take to go on by itself.
const GOES_ON: Duration = Duration::from_secs(15);
/// How far the CLI's stdout may run ahead of its transcript.
const TRANSCRIBED: Duration = Duration::from_secs(1);
/// Permission questions that are open at the same time; the CLI asks one for each tool that it wants to use.
const MAX_QUESTIONS: usize = 64;
/// Bytes of a question's id; the CLI's are UUIDs.
const MAX_REQUEST_ID: usize = 256;
/// How much of stderr is kept for a message.
const STDERR_TAIL: usize = 2_000;

/// How long the CLI, idle, may take to take up a message that it was sent.
const TAKES_UP: Duration = Duration::from_secs(15);

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
    /// The process had to be ended, because it did not stop when a user wanted it to; the session goes on.
    Forced,
}

/// See the module.
pub(super) struct Converse<'a> {
    pub(super) attempt: &'a mut Attempt,
    pub(super) turn: Turn,
    lines: Lines,
    /// Lines that have come and are not taken in. One is at a time, because each may end a turn or begin one.
    cut: VecDeque<RawLine>,
    pub(super) stderr: String,
    pub(super) resumed: bool,
    /// Until when the CLI must have gone on by itself.
    goes_on_by: Option<Instant>,
    pub(super) wrote: bool,
    /// The turn that a user interrupts, and until when it must have stopped.
    pub(super) interrupting: Option<(u32, Instant)>,
    /// Permission questions without an answer.
    pub(super) questions: Vec<Question>,
    pub(super) round: Round,
    /// Messages that the model was given, and when that was seen.
    given: Vec<(Instant, Uuid)>,
    /// The session is to end for this.
    pub(super) ending: Option<End>,
    /// The process is being ended: nothing is begun any more.
    pub(super) closing: bool,
}

/// The tool calls of the last round.
#[derive(Default)]
pub(super) struct Round {
    message: Option<String>,
    calls: usize,
    /// All its calls are answered, so that the next round follows.
    pub(super) over: bool,
}

impl Round {
    fn observe(&mut self, event: &Event) {
        match event {
            Event::Assistant {
                message_id,
                main: true,
                calls,
                ..
            } => {
                if self.message != *message_id {
                    *self = Self {
                        message: message_id.clone(),
                        ..Self::default()
                    };
                }
                self.calls += calls;
            }
            Event::ToolResults(results) if self.calls > 0 => {
                self.calls = self.calls.saturating_sub(*results);
                self.over = self.calls == 0;
            }
            _ => {}
        }
    }
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
            cut: VecDeque::new(),
            stderr: String::new(),
            resumed,
            goes_on_by: None,
            wrote: false,
            interrupting: None,
            questions: Vec::new(),
            round: Round::default(),
            given: Vec::new(),
            ending: None,
            closing: false,
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
            Say::Again(messages) => converse.say_again(&messages),
            Say::Nothing => Ok(()),
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
            options: &config.options,
            deltas: self.attempt.uplink.is_some(),
            conversation,
            proxy: proxy.unwrap_or_else(|| std::net::SocketAddr::from(([127, 0, 0, 1], 0))),
            token,
            vertex: config.upstream.as_ref().and_then(|upstream| upstream.vertex.as_ref()),
        });
        let started = SessionBody::CliStarted {
            cli_session_id: conversation.id(),
            resumed: self.resumed,
        };
        self.attempt.journal.forget_deltas();
        let seq = self.attempt.journal.session(&started)?;
        self.attempt.durable(seq).await?;
        // A shim that is gone already is found out about by the next word to it.
        let _ = self.tell(&ToShim::Spawn(spawn));
        Ok(())
    }

    /// Records a message and sends it once that is on disk. The inner error: the agent is lost, the record stays.
    pub(super) async fn say(&mut self, body: &UserBody) -> Result<Result<(), AgentError>, End> {
        self.attempt.remember(body);
        let seq = self.attempt.journal.user(body)?;
        self.attempt.durable(seq).await?;
        Ok(self.say_again(std::slice::from_ref(body)))
    }

    fn say_again(&mut self, messages: &[UserBody]) -> Result<(), AgentError> {
        for body in messages {
            self.tell(&ToShim::Stdin(wire::user_message(body.uuid, &body.text).into()))?;
            self.attempt.said += 1;
            kill_point::reach("sent", self.attempt.said);
        }
        Ok(())
    }

    async fn go_on(&mut self) -> Result<Result<(), AgentError>, End> {
        let body = self.attempt.continuation();
        self.say(&body).await
    }

    /// Tells the shim something; never waits for it.
    pub(super) fn tell(&self, message: &ToShim) -> Result<(), AgentError> {
        match &self.attempt.agent {
            Some(agent) => agent.send(message),
            None => Err(AgentError::Lost("it is not connected".to_owned())),
        }
    }

    /// Follows the CLI until its work is over or must be.
    async fn follow(mut self) -> Result<Episode, End> {
        loop {
            if let Step::Gone(gone) = self.step(None).await? {
                return self.gone(gone);
            }
            if let Some(end) = self.must_stop() {
                return self.stop(end).await.map(Episode::Ended);
            }
            if resume_refused(&self.turn) && self.resumed {
                // The next process is started when this one is gone.
                self.ladder_after_the_end().await?;
                return Ok(Episode::ResumeRefused);
            }
            if self.turn_is_over()
                && let Some(end) = self.conclude()?
            {
                self.ladder_after_the_end().await?;
                return Ok(Episode::Ended(end));
            }
            if self.interrupting.is_some_and(|(_, by)| by <= Instant::now()) {
                return self.force().await;
            }
            if self.turn.began() {
                self.resumed = false;
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

    /// A turn that a user interrupted is over with its result; any other one when nothing is left to do.
    fn turn_is_over(&self) -> bool {
        if self.interrupting.is_some() && self.turn.result().is_some() {
            return true;
        }
        let patience = match self.attempt.journal.history().queued() {
            0 => Duration::ZERO,
            // It is on its way to the CLI, which takes it up now.
            _ => TAKES_UP,
        };
        self.turn.over_at().is_some_and(|at| at + patience <= Instant::now())
    }

    /// Waits for the next thing to happen, at most until `due`, and takes it in. Not to be dropped while it waits: what it
    /// has taken out of the stream would be lost.
    pub(super) async fn step(&mut self, due: Option<Instant>) -> Result<Step, End> {
        if due.is_some_and(|due| due <= Instant::now()) {
            return Ok(Step::Due);
        }
        if let Some(line) = self.cut.pop_front() {
            self.line(line)?;
            // A flood of lines would leave no time for anything else: signals, the lease, the model's answers.
            tokio::task::yield_now().await;
            if self.cut.is_empty() {
                self.attempt.room().await?;
            }
            return Ok(Step::Went);
        }
        let Attempt {
            agent,
            metered,
            uplink,
            stop,
            clock,
            keeper,
            control,
            ..
        } = &mut *self.attempt;
        let Some(agent) = agent else {
            return Ok(Step::Gone(Gone::Lost("it is not connected".to_owned())));
        };
        let told_to_stop = *stop.borrow();
        tokio::select! {
            from = agent.next() => return self.heard(from),
            Some(event) = metered.recv() => self.attempt.meter(event)?,
            Some(request) = crate::uplink::request(uplink) => self.requested(request).await?,
            Some(command) = commanded(control) => self.command(command).await?,
            _ = stop.changed(), if !told_to_stop => {}
            lost = keeper.lost() => return Err(lost.into()),
            _ = clock.tick() => {
                self.attempt.tick();
                self.given_for_long()?;
                self.publish();
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => return Ok(Step::Due),
        }
        Ok(Step::Went)
    }

    fn heard(&mut self, from: Result<FromShim, AgentError>) -> Result<Step, End> {
        match from {
            Ok(FromShim::Stdout(bytes)) => {
                let cut = &mut self.cut;
                self.lines.push(&bytes, |line| cut.push_back(line));
            }
            Ok(FromShim::Stderr(bytes)) => self.stderr(&bytes),
            Ok(FromShim::Exit(exit)) => {
                if let Some(line) = self.lines.finish() {
                    self.line(line)?;
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

    fn line(&mut self, line: RawLine) -> Result<(), End> {
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
                self.turn_of_its_own(event.as_ref())?;
                self.attempt.journal.cli(&bytes)?;
                if let Some(event) = event {
                    self.turn.observe(&event, Instant::now());
                    self.round.observe(&event);
                    self.react(event)?;
                }
            }
        }
        Ok(())
    }

    /// The CLI begins to work though no turn is open: with messages that were left in its queue, or because a background
    /// task is done.
    fn turn_of_its_own(&mut self, event: Option<&Event>) -> Result<(), End> {
        let begins = matches!(event, Some(Event::Started(_) | Event::StateChanged(State::Running)));
        let history = self.attempt.journal.history();
        if begins && !history.open_turn() && !self.closing {
            let turn = history.turn + 1;
            self.attempt.journal.session(&SessionBody::TurnStarted { turn })?;
        }
        Ok(())
    }

    fn react(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Assistant {
                answers, main: true, ..
            } => {
                self.given
                    .extend(answers.into_iter().map(|uuid| (Instant::now(), uuid)));
            }
            Event::Result(result) => {
                let mut uuids = result.user_message_uuids;
                uuids.extend(self.given.drain(..).map(|(_, uuid)| uuid));
                self.taken(&uuids)?;
            }
            Event::ConversationReset(Some(id)) => self.conversation(id)?,
            Event::Init { session_id, version } => {
                // After `/clear` this is the one that can be resumed.
                if let Some(id) = session_id {
                    self.conversation(id)?;
                }
                if let Some(version) = version {
                    self.attempt.met(version)?;
                }
            }
            Event::ControlRequest {
                request_id,
                subtype,
                tool,
            } => self.asked(request_id, &subtype, &tool),
            Event::Withdrawn(request_id) => self.questions.retain(|question| question.request_id != request_id),
            _ => {}
        }
        Ok(())
    }

    /// The conversation that is to be resumed from now on is on disk before anything else is said in it: with the record of
    /// what is said.
    fn conversation(&mut self, cli_session_id: Uuid) -> Result<(), End> {
        if self.attempt.journal.history().conversation == Some(cli_session_id) {
            return Ok(());
        }
        let reset = SessionBody::ConversationReset { cli_session_id };
        self.attempt.journal.session(&reset)?;
        Ok(())
    }

    /// A question goes to people where there are any. The CLI's line is recorded; so they know of it.
    fn asked(&mut self, request_id: String, subtype: &str, tool: &str) {
        if request_id.len() > MAX_REQUEST_ID {
            // Not the CLI's: what is made of it would be as long.
            return;
        }
        let people = self.attempt.interactive && self.questions.len() < MAX_QUESTIONS;
        if people && subtype == "can_use_tool" {
            let tool = tool.chars().take(MAX_REQUEST_ID).collect();
            self.questions.push(Question { request_id, tool });
            self.publish();
            return;
        }
        let refusal = wire::refusal(&request_id, subtype);
        // If the agent is lost, the next step says so.
        let _ = self.tell(&ToShim::Stdin(refusal.into()));
    }

    /// What the model was given a while ago is in the transcript by now; what it was given just now may not be, and then the
    /// transcripts are to be asked for it.
    fn given_for_long(&mut self) -> Result<(), End> {
        let (long, since): (Vec<_>, Vec<_>) = self.given.drain(..).partition(|(at, _)| at.elapsed() >= TRANSCRIBED);
        self.given = since;
        let uuids: Vec<Uuid> = long.into_iter().map(|(_, uuid)| uuid).collect();
        self.taken(&uuids)
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

impl Attempt {
    /// What is due by the clock: the limits, and the report.
    pub(super) fn tick(&mut self) {
        if self.live.read()
            && let Some(proxy) = &self.proxy
        {
            proxy.set_limits(self.live.budget());
        }
        self.deadline = self.deadline();
        self.report_totals();
    }

    /// Records how a turn ended.
    pub(super) fn turn_ended(&mut self, turn: u32, outcome: Outcome) -> Result<(), End> {
        // The numbers of the last response are told before its last bytes: they are here already.
        while let Ok(event) = self.metered.try_recv() {
            self.meter(event)?;
        }
        self.journal.audit()?;
        self.journal.session(&SessionBody::TurnEnded { turn, outcome })?;
        self.journal.turn_end();
        Ok(())
    }

    /// Says once what is to be said of the CLI's version.
    fn met(&mut self, version: String) -> Result<(), End> {
        if self.cli_version.as_ref() == Some(&version) {
            return Ok(());
        }
        if let Some(uplink) = &self.uplink {
            uplink.cli_version(&version);
        }
        if version != TESTED_VERSION {
            self.journal.log(
                LogLevel::Warning,
                format!("This runner is tested with Claude Code {TESTED_VERSION}; the agent's is {version}. It is used all the same."),
            )?;
        }
        self.cli_version = Some(version);
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
