//! Stopping the CLI: control `interrupt`, SIGINT, SIGTERM, SIGKILL, and then everything else in the container; nine
//! seconds at most.

use protocol::Outcome;
use protocol::record::SessionBody;
use tokio::time::{Duration, Instant};

use super::End;
use super::converse::{Converse, Episode, Step};
use crate::agent::ToShim;
use crate::cli::stdin;

/// How long each rung may take to have an effect.
const RUNG: Duration = Duration::from_secs(2);
/// How long the kernel may take to end what is killed.
pub(super) const KILLED: Duration = Duration::from_secs(2);

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

impl Converse<'_> {
    /// Stops the session, in mid-turn or not. That we do is on disk before, so that the next attempt knows what to do.
    pub(super) async fn stop(mut self, end: End) -> Result<End, End> {
        self.closing = true;
        let history = self.attempt.journal.history();
        let (turn, open, cause) = (history.turn, history.open_turn(), end.outcome);
        let seq = self.attempt.journal.session(&SessionBody::Stopping { turn, cause })?;
        self.attempt.write_report(&end);
        self.attempt.durable_soon(seq).await?;
        if !open {
            self.ladder_after_the_end().await?;
            return Ok(end);
        }
        let gone = self.interrupted().await?;
        if !gone {
            self.climb(&[ToShim::Signal(SIGINT), ToShim::Signal(SIGTERM)]).await?;
        }
        self.attempt.turn_ended(turn, cause)?;
        Ok(end)
    }

    /// Ends a CLI that does not stop the turn that a user interrupted.
    pub(super) async fn force(mut self) -> Result<Episode, End> {
        self.closing = true;
        let turn = self.attempt.journal.history().turn;
        self.climb(&[ToShim::Signal(SIGINT), ToShim::Signal(SIGTERM), ToShim::KillAll])
            .await?;
        let turn = self.interrupting.take().map_or(turn, |(turn, _)| turn);
        self.attempt.turn_ended(turn, Outcome::StoppedByUser)?;
        Ok(Episode::Forced)
    }

    /// Ends a CLI whose turn is over: its stdin ends, and only what it left running holds it back.
    pub(super) async fn ladder_after_the_end(&mut self) -> Result<(), End> {
        self.closing = true;
        self.climb(&[ToShim::CloseStdin, ToShim::Signal(SIGTERM), ToShim::KillAll])
            .await
    }

    /// Asks the CLI to stop its turn; returns whether the process is gone.
    async fn interrupted(&mut self) -> Result<bool, End> {
        let interrupt = ToShim::Stdin(stdin::interrupt("stop", true).into());
        if self.tell(&interrupt).is_err() {
            return Ok(true);
        }
        let due = Instant::now() + RUNG;
        loop {
            match self.step(Some(due)).await? {
                Step::Gone(_) => return Ok(true),
                Step::Due => return Ok(false),
                // Its result is there: what the signals would save is saved.
                Step::Went if self.turn.over_at().is_some() => return Ok(false),
                Step::Went => {}
            }
        }
    }

    /// Takes the rungs until the process is gone. Who is left after the last one is killed with all others.
    async fn climb(&mut self, rungs: &[ToShim]) -> Result<(), End> {
        for rung in rungs {
            if self.tell(rung).is_err() {
                return Ok(());
            }
            let due = Instant::now() + RUNG;
            loop {
                match self.step(Some(due)).await? {
                    Step::Gone(_) => return Ok(()),
                    Step::Due => break,
                    Step::Went => {}
                }
            }
        }
        Ok(())
    }
}
