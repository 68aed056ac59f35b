//! One CLI process, from its start to the end of its work.

use std::collections::VecDeque;

use protocol::identity;
use protocol::record::{SessionBody, UserBody};
use secrecy::SecretString;
use tokio::time::{Duration, Instant, sleep_until};
use uuid::Uuid;

use super::heard::Round;
use super::orders::commanded;
use super::{Attempt, End, Say};
use crate::agent::{AgentError, Exit, ToShim};
use crate::cli::command::{self, Conversation, Start};
use crate::cli::turn::resume_refused;
use crate::cli::{Lines, RawLine, Turn, stdin};
use crate::config::Config;
use crate::kill_point;
use crate::status::Question;

/// How long a resumed CLI may take to go on by itself.
const GOES_ON: Duration = Duration::from_secs(15);
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
    /// The CLI cannot read its own configuration, and says so.
    Misconfigured(String),
    /// The process had to be ended, because it did not stop when a user wanted it to; the session goes on.
    Forced,
}

/// See the module.
pub(super) struct Converse<'a> {
    pub(super) attempt: &'a mut Attempt,
    pub(super) turn: Turn,
    pub(super) lines: Lines,
    /// Lines that have come and are not taken in. One is at a time, because each may end a turn or begin one.
    pub(super) cut: VecDeque<RawLine>,
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
    pub(super) given: Vec<(Instant, Uuid)>,
    /// The session is to end for this.
    pub(super) ending: Option<End>,
    /// The process is being ended: nothing is begun any more.
    pub(super) closing: bool,
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
            self.tell(&ToShim::Stdin(stdin::user_message(body.uuid, &body.text).into()))?;
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
