//! Commands: what people ask of the session while it runs. Each is carried out once, and answered when that is on disk.

use protocol::frame::CommandResult;
use protocol::record::{SessionBody, UserBody};
use protocol::{Outcome, identity};
use tokio::time::{Duration, Instant};

use super::End;
use super::converse::Converse;
use crate::agent::ToShim;
use crate::cli::stdin::{self, PermissionAnswer};
use crate::command::{Command, Order};
use crate::control::Control;
use crate::history::Done;
use crate::kill_point;
use crate::spool::SpoolError;
use crate::status::{Phase, Status};
use crate::uplink::Request;

/// How long a turn may take to stop when a user interrupts it. There are cases in which the CLI acknowledges an interrupt
/// and goes on.
const STOPS: Duration = Duration::from_secs(5);

/// Bytes that may wait for the CLI to take them up. They are all said at once to a CLI that is started anew, and a shim takes
/// 16 MiB at a time.
const MAX_QUEUED: usize = 12 << 20;

/// What became of an order.
enum Effect {
    /// The seq of the record that holds it.
    Done(u64),
    /// Why nothing did.
    Refused(String),
}

impl Converse<'_> {
    /// Takes what the uplink asks for.
    pub(super) async fn requested(&mut self, request: Request) -> Result<(), End> {
        match request {
            Request::Command(command) => self.command(command).await,
            Request::CheckLease => {
                self.attempt.keeper.check();
                Ok(())
            }
            request => self.attempt.append_again(request).await,
        }
    }

    /// Carries out a command, unless that was done before.
    pub(super) async fn command(&mut self, command: Command) -> Result<(), End> {
        if self.closing {
            // Dropped without an answer: it is for the next attempt, if there is one.
            return Ok(());
        }
        if let Some(why) = command.refused() {
            self.answer(command, None, Some(why.to_owned()));
            return Ok(());
        }
        if let Some(Done { error, seq }) = self.attempt.journal.history().commands.get(&command.id) {
            let (error, seq) = (error.clone(), *seq);
            self.answer(command, Some(seq), error);
            return Ok(());
        }
        let effect = match &command.order {
            Order::UserMessage(text) => self.message(&command.id, text).await?,
            Order::Interrupt(turn) => self.interrupt(&command.id, *turn).await?,
            Order::EndSession => self.end_session(&command.id)?,
            Order::PermissionResponse { request_id, response } => {
                self.permission(&command.id, request_id, response).await?
            }
        };
        self.publish();
        match effect {
            Effect::Done(seq) => self.answer(command, Some(seq), None),
            Effect::Refused(why) => {
                let seq = self.done(&command.id, Some(why.clone()))?;
                self.answer(command, Some(seq), Some(why));
            }
        }
        Ok(())
    }

    /// Answers as soon as the record is on disk.
    fn answer(&self, command: Command, seq: Option<u64>, error: Option<String>) {
        let Command { id, answer, .. } = command;
        let mut progress = self.attempt.journal.spool().progress();
        tokio::spawn(async move {
            let due = seq.unwrap_or(0);
            if progress.wait_for(|progress| progress.durable >= due).await.is_ok() {
                let _ = answer.send(CommandResult { id, error, seq });
            }
        });
    }

    /// Remembers that a command is not to be carried out again.
    fn done(&mut self, id: &str, error: Option<String>) -> Result<u64, SpoolError> {
        let id = id.to_owned();
        self.attempt.journal.session(&SessionBody::CommandDone { id, error })
    }

    async fn message(&mut self, id: &str, text: &str) -> Result<Effect, End> {
        if !self.attempt.interactive {
            return Ok(Effect::Refused("this session is not interactive".to_owned()));
        }
        self.attempt.active = Instant::now();
        let body = UserBody {
            command: id.to_owned(),
            uuid: identity::message_uuid(&self.attempt.uid, id),
            text: text.to_owned(),
        };
        let length = |body: &UserBody| stdin::user_message(body.uuid, &body.text).len();
        let untaken = self.attempt.journal.history().untaken();
        let queued: usize = untaken.map(|message| length(&message.body)).sum();
        if queued + length(&body) > MAX_QUEUED {
            return Ok(Effect::Refused(format!(
                "messages of {queued} bytes wait for the agent, which may be {MAX_QUEUED} with this one: say it again, under another id, when it has taken them up"
            )));
        }
        if self.attempt.rounds_used_up().is_some() {
            // It is kept, and the agent gets it when the limit is raised.
            let seq = self.attempt.journal.user(&body)?;
            self.ending = self.attempt.rounds_used_up();
            return Ok(Effect::Done(seq));
        }
        // An agent that is lost is found out about by the next step; the message is recorded, and its successor gets it.
        let _ = self.say(&body).await?;
        let seq = self.attempt.journal.history().commands.get(id).map(|done| done.seq);
        Ok(Effect::Done(seq.unwrap_or_default()))
    }

    async fn interrupt(&mut self, id: &str, turn: u32) -> Result<Effect, End> {
        let history = self.attempt.journal.history();
        if turn != history.turn || !history.open_turn() || history.stopped().is_some() {
            return Ok(Effect::Refused(format!("turn {turn} does not run")));
        }
        // On disk before it is done, so that nobody goes on with a turn that a user did not want.
        let cause = Outcome::StoppedByUser;
        self.attempt.journal.session(&SessionBody::Stopping { turn, cause })?;
        let seq = self.done(id, None)?;
        self.attempt.durable(seq).await?;
        kill_point::reach("interrupt", 0);
        self.interrupting = Some((turn, Instant::now() + STOPS));
        self.turn.interrupted();
        // What people said meanwhile is not theirs to lose: it opens the next turn.
        let _ = self.tell(&ToShim::Stdin(stdin::interrupt(id, false).into()));
        Ok(Effect::Done(seq))
    }

    fn end_session(&mut self, id: &str) -> Result<Effect, End> {
        if !self.attempt.interactive {
            return Ok(Effect::Refused(
                "this session is not interactive: it ends by itself, or by spec.suspend".to_owned(),
            ));
        }
        let cause = Outcome::EndedByRequest;
        let turn = self.attempt.journal.history().turn;
        self.attempt.journal.session(&SessionBody::Stopping { turn, cause })?;
        let seq = self.done(id, None)?;
        self.ending = Some(End::new(cause, ""));
        Ok(Effect::Done(seq))
    }

    async fn permission(&mut self, id: &str, request_id: &str, response: &str) -> Result<Effect, End> {
        let Some(at) = self.questions.iter().position(|asked| asked.request_id == request_id) else {
            return Ok(Effect::Refused("no such question is open".to_owned()));
        };
        let answer = match PermissionAnswer::parse(response) {
            Ok(answer) => answer,
            Err(why) => return Ok(Effect::Refused(why.to_owned())),
        };
        self.attempt.active = Instant::now();
        self.questions.remove(at);
        self.attempt.journal.session(&SessionBody::PermissionAnswered {
            request_id: request_id.to_owned(),
            allowed: answer.allowed,
        })?;
        let seq = self.done(id, None)?;
        self.attempt.durable(seq).await?;
        let _ = self.tell(&ToShim::Stdin(answer.line(request_id).into()));
        Ok(Effect::Done(seq))
    }

    /// Tells the figures to those who ask for them.
    pub(super) fn publish(&self) {
        let history = self.attempt.journal.history();
        let phase = match (history.open_turn(), self.questions.is_empty()) {
            (false, _) => Phase::Idle,
            (true, true) => Phase::Working,
            (true, false) => Phase::Asking,
        };
        self.attempt.publish(|status| {
            status.phase = phase;
            status.questions.clone_from(&self.questions);
            status.background_tasks = self.turn.tasks();
        });
    }
}

impl super::Attempt {
    /// Tells the figures, and what `more` knows.
    pub(super) fn publish(&self, more: impl FnOnce(&mut Status)) {
        let history = self.journal.history();
        let last_seq = self.journal.spool().next_seq() - 1;
        self.status.send_modify(|status| {
            status.turn = history.turn;
            status.rounds = history.rounds;
            status.usage = history.usage();
            status.cost_usd = history.cost();
            status.limits = self.live.now();
            status.used_seconds = (self.used + self.begun.elapsed()).as_secs();
            status.queued = history.queued();
            status.last_seq = last_seq;
            status.unacked = self
                .uplink
                .as_ref()
                .map(|uplink| last_seq.saturating_sub(uplink.acked()));
            more(status);
        });
    }
}

/// The next command of the control socket, if there is one; without one, never.
pub(super) async fn commanded(control: &mut Option<Control>) -> Option<Command> {
    match control {
        Some(control) => control.command().await,
        None => std::future::pending().await,
    }
}
