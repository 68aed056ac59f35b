//! What takes a while beside the agent, and what must not wait for it.

use protocol::Outcome;
use tokio::time::sleep_until;

use super::{Attempt, End};
use crate::uplink::{Request, Uplink};

impl Attempt {
    /// Does something that takes a while, and what must not wait for it. `limited`: it counts as the run's own time.
    pub(super) async fn meanwhile<T>(&mut self, limited: bool, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(work);
        loop {
            let mut stop = self.stop.clone();
            tokio::select! {
                done = &mut work => return Ok(done),
                Some(request) = duty(&mut self.uplink) => match request {
                    Request::CheckLease => self.keeper.check(),
                    request => self.append_again(request).await?,
                },
                Some(event) = self.metered.recv() => self.meter(event)?,
                () = told(&mut stop) => {
                    return Err(End::new(Outcome::Stopped, "told to stop while the agent was not at work"));
                }
                lost = self.keeper.lost() => return Err(lost.into()),
                _ = self.clock.tick() => self.tick(),
                () = sleep_until(self.deadline), if limited => return Err(super::verdict::timed_out()),
            }
        }
    }
}

/// What cannot wait; commands can.
async fn duty(uplink: &mut Option<Uplink>) -> Option<Request> {
    match uplink {
        Some(uplink) => uplink.duty().await,
        None => std::future::pending().await,
    }
}

async fn told(stop: &mut tokio::sync::watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}
