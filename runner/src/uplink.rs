//! The way to the gateway.

use protocol::record::Record;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::Gateway;
use crate::spool::{Progress, Reader};

/// What the uplink needs of the one who writes the spool.
#[derive(Debug)]
pub enum Request {
    /// Records above `after` have to get new seqs behind a gap; answered with the gap's seq.
    AppendAllAgain {
        /// Last seq that the gateway holds.
        after: u64,
        /// Where to go on sending.
        done: oneshot::Sender<u64>,
    },
    /// The seq of this record is taken; it gets a new one.
    AppendAgain(Box<Record>),
}

/// Placeholder.
pub struct Uplink {
    acked: watch::Receiver<u64>,
    requests: mpsc::Receiver<Request>,
}

impl Uplink {
    /// Placeholder.
    pub fn start(
        _gateway: Gateway,
        _hello: protocol::frame::Hello,
        _reader: Reader,
        _progress: watch::Receiver<Progress>,
    ) -> Self {
        Self {
            acked: watch::channel(0).1,
            requests: mpsc::channel(1).1,
        }
    }

    /// Last seq that the gateway acknowledged.
    pub fn acked(&self) -> u64 {
        *self.acked.borrow()
    }

    /// The next request.
    pub async fn request(&mut self) -> Option<Request> {
        self.requests.recv().await
    }

    /// Sends a piece that is live only.
    pub fn delta(&self, _delta: Box<RawValue>) {}

    /// Waits until `seq` is acknowledged.
    pub fn acknowledged(&self, _seq: u64) -> impl Future<Output = bool> + use<> {
        std::future::ready(true)
    }
}

/// The next request, if there is an uplink; without one, never.
pub async fn request(uplink: &mut Option<Uplink>) -> Option<Request> {
    match uplink {
        Some(uplink) => uplink.request().await,
        None => std::future::pending().await,
    }
}
