//! The way to the gateway: records from the spool, acknowledgements back, for as long as the attempt lasts.
//!
//! A task of its own reads the spool behind the writer's back, so nothing that the network does can hold up the agent.

mod connection;
mod line;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::PathBuf;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use protocol::Record;
use protocol::frame::{CommandResult, Hello, close};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Duration, sleep};

use crate::command::Command;
use crate::config::Gateway;
use crate::spool::{Progress, Reader};

use connection::{Connection, Lost};

/// Pieces that wait for the network; more are dropped, because they are live only.
const DELTAS: usize = 256;
/// Requests that wait for the session.
const REQUESTS: usize = 256;
/// First and longest pause between two connections.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What the uplink needs of the one who writes the spool.
#[derive(Debug)]
pub enum Request {
    /// Nothing of this spool is in the gateway's log, which ends at `after`: a gap behind that, and all own records again
    /// behind the gap. Answered with the gap's seq.
    AppendAllAgain {
        /// Last seq that the gateway holds.
        after: u64,
        /// Where to go on sending.
        done: oneshot::Sender<u64>,
    },
    /// The seq of this record is taken by another; it gets a new one.
    AppendAgain(Box<Record>),
    /// Something for the session itself. What is not taken before the end is asked for again in the next attempt.
    Command(Command),
    /// The gateway says that another pod drives the session, or none: the lease is to be looked at.
    CheckLease,
}

/// How far the gateway is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Status {
    /// Last seq that it acknowledged.
    acked: u64,
    /// It said that the session is gone: nothing more is tried.
    gone: bool,
}

/// The running uplink; ends when it is dropped.
pub struct Uplink {
    status: watch::Receiver<Status>,
    requests: mpsc::Receiver<Request>,
    /// Commands that came before anybody could carry them out.
    held: VecDeque<Request>,
    deltas: mpsc::Sender<Box<RawValue>>,
    cli_version: watch::Sender<Option<String>>,
    task: JoinHandle<()>,
}

impl Uplink {
    /// Connects and keeps connected. `open` gives a reader of the spool from a seq on; `files`: the folder whose files are
    /// served.
    pub fn start(
        gateway: Gateway,
        hello: Hello,
        open: impl Fn(u64) -> Reader + Send + 'static,
        progress: watch::Receiver<Progress>,
        files: Option<PathBuf>,
    ) -> Self {
        let (status_tx, status) = watch::channel(Status::default());
        let (requests_tx, requests) = mpsc::channel(REQUESTS);
        let (deltas, deltas_rx) = mpsc::channel(DELTAS);
        let (cli_version, cli_version_rx) = watch::channel(hello.cli_version.clone());
        let (results, results_rx) = mpsc::unbounded_channel();
        let link = Link {
            cli_version: cli_version_rx,
            results: (results, results_rx),
            gateway,
            hello,
            open: Box::new(open),
            progress,
            files,
            status: status_tx,
            requests: requests_tx,
            deltas: deltas_rx,
            appended_again: None,
        };
        Self {
            status,
            requests,
            held: VecDeque::new(),
            deltas,
            cli_version,
            task: tokio::spawn(link.run()),
        }
    }

    /// Last seq that the gateway acknowledged.
    pub fn acked(&self) -> u64 {
        self.status.borrow().acked
    }

    /// The next request.
    pub async fn request(&mut self) -> Option<Request> {
        match self.held.pop_front() {
            Some(request) => Some(request),
            None => self.requests.recv().await,
        }
    }

    /// The next request that is not a command; commands are kept for [`Uplink::request`]. May be dropped while it waits.
    pub async fn duty(&mut self) -> Option<Request> {
        loop {
            match self.requests.recv().await? {
                // The gateway sends again what is not answered, so the rest may be dropped.
                Request::Command(_) if self.held.len() >= REQUESTS => {}
                command @ Request::Command(_) => self.held.push_back(command),
                request => return Some(request),
            }
        }
    }

    /// What the next `hello` says of the CLI.
    pub fn cli_version(&self, version: &str) {
        self.cli_version.send_replace(Some(version.to_owned()));
    }

    /// Sends a piece that is live only, if there is a connection that keeps up.
    pub fn delta(&self, delta: Box<RawValue>) {
        let _ = self.deltas.try_send(delta);
    }

    /// Waits until `seq` is acknowledged, or cannot be any more.
    pub fn acknowledged(&self, seq: u64) -> impl Future<Output = bool> + use<> {
        let mut status = self.status.clone();
        async move {
            let seen = status.wait_for(|status| status.acked >= seq || status.gone).await;
            seen.is_ok_and(|status| status.acked >= seq)
        }
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The next request, if there is an uplink; without one, never.
pub async fn request(uplink: &mut Option<Uplink>) -> Option<Request> {
    match uplink {
        Some(uplink) => uplink.request().await,
        None => std::future::pending().await,
    }
}

/// What connections share.
struct Link {
    gateway: Gateway,
    hello: Hello,
    open: Box<dyn Fn(u64) -> Reader + Send>,
    progress: watch::Receiver<Progress>,
    /// Folder whose files are served.
    files: Option<PathBuf>,
    status: watch::Sender<Status>,
    requests: mpsc::Sender<Request>,
    deltas: mpsc::Receiver<Box<RawValue>>,
    cli_version: watch::Receiver<Option<String>>,
    /// Answers to commands, on their way from the session to the gateway.
    results: (
        mpsc::UnboundedSender<CommandResult>,
        mpsc::UnboundedReceiver<CommandResult>,
    ),
    /// Behind which seq our records were appended again, and where those begin: a second welcome of the same kind must
    /// not have it done twice.
    appended_again: Option<(u64, u64)>,
}

impl Link {
    async fn run(mut self) {
        let (first, longest) = PAUSE;
        let backoff = ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(longest)
            .with_jitter()
            .without_max_times();
        let mut pauses = backoff.build();
        loop {
            let mut welcomed = false;
            let lost = match Connection::open(&mut self).await {
                Ok(mut connection) => connection.serve(&mut welcomed).await,
                Err(lost) => lost,
            };
            match &lost {
                Lost::Closed(close::GONE) => {
                    tracing::warn!("the gateway says that the session is gone; its records stay in the spool");
                    self.status.send_modify(|status| status.gone = true);
                    return;
                }
                Lost::Owner => return,
                // The lease says who drives the session; whoever finds another owner there stops. So: try again.
                Lost::Closed(code) => {
                    tracing::warn!(code, "the gateway closed the connection");
                    if matches!(*code, close::NOT_THIS_POD | close::SUPERSEDED) {
                        let _ = self.requests.try_send(Request::CheckLease);
                    }
                }
                other => tracing::warn!(cause = %other, "the connection to the gateway was lost"),
            }
            if welcomed {
                pauses = backoff.build();
            }
            sleep(pauses.next().unwrap_or(longest)).await;
        }
    }
}
