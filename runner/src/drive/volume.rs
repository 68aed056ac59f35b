//! Waits for the volume, which may hang: no longer than the lease, the timeout or whoever stops us allows.

use protocol::Outcome;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, sleep_until};

use super::{Attempt, End, verdict};
use crate::spool::SpoolError;
use crate::uplink::Request;
use crate::workspace::state::Keeper;

/// How long the volume may still take when the session must end.
const LAST_CHANCE: Duration = Duration::from_secs(5);

/// What ends a wait.
struct Patience<'a> {
    keeper: &'a mut Keeper,
    stop: watch::Receiver<bool>,
    deadline: Instant,
}

impl Patience<'_> {
    /// What the volume did, or the end that did not wait for it.
    async fn wait<T>(mut self, done: impl Future<Output = Result<T, SpoolError>>) -> Result<T, End> {
        tokio::pin!(done);
        let end = tokio::select! {
            biased;
            done = &mut done => return Ok(done?),
            lost = self.keeper.lost() => return Err(lost.into()),
            end = must_end(&mut self.stop, self.deadline) => end,
        };
        tokio::select! {
            biased;
            done = &mut done => Ok(done?),
            lost = self.keeper.lost() => Err(lost.into()),
            () = sleep(LAST_CHANCE) => Err(end),
        }
    }
}

async fn must_end(stop: &mut watch::Receiver<bool>, deadline: Instant) -> End {
    tokio::select! {
        () = told(stop) => End::new(Outcome::Stopped, "told to stop while the volume did not answer"),
        () = sleep_until(deadline) => verdict::timed_out(),
    }
}

async fn told(stop: &mut watch::Receiver<bool>) {
    let told = stop.wait_for(|stop| *stop).await.is_ok();
    if !told {
        // Nobody is left who could tell.
        std::future::pending::<()>().await;
    }
}

impl Attempt {
    /// Waits until `seq` is on disk.
    pub(super) async fn durable(&mut self, seq: u64) -> Result<(), End> {
        let patience = Patience {
            keeper: &mut self.keeper,
            stop: self.stop.clone(),
            deadline: self.deadline,
        };
        patience.wait(self.journal.spool().durable(seq)).await
    }

    /// Waits until `seq` is on disk, when the session ends in any case: not for long.
    pub(super) async fn durable_soon(&mut self, seq: u64) -> Result<(), End> {
        tokio::select! {
            done = self.journal.spool().durable(seq) => Ok(done?),
            lost = self.keeper.lost() => Err(lost.into()),
            () = sleep(LAST_CHANCE) => {
                tracing::warn!(seq, "the volume does not answer; the agent is stopped all the same");
                Ok(())
            }
        }
    }

    /// Waits until the volume has nearly caught up with what it was given.
    pub(super) async fn room(&mut self) -> Result<(), End> {
        let patience = Patience {
            keeper: &mut self.keeper,
            stop: self.stop.clone(),
            deadline: self.deadline,
        };
        patience.wait(self.journal.spool().room()).await
    }

    /// Gives records new seqs, as the uplink asks.
    pub(super) async fn append_again(&mut self, request: Request) -> Result<(), End> {
        let patience = Patience {
            keeper: &mut self.keeper,
            stop: self.stop.clone(),
            deadline: self.deadline,
        };
        patience.wait(self.journal.append_again(request)).await
    }
}
