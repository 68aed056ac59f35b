//! A network between runner and gateway that can be cut.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards connections to wherever the gateway is now.
pub struct Network {
    pub address: SocketAddr,
    target: watch::Sender<Option<SocketAddr>>,
    /// Counts cuts.
    cuts: watch::Sender<u64>,
    forwarding: tokio::task::JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.forwarding.abort();
    }
}

impl Network {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, leads_to) = watch::channel(None);
        let (cuts, cut) = watch::channel(0);
        let forwarding = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let to = *leads_to.borrow();
                tokio::spawn(forward(stream, to, cut.clone()));
            }
        });
        Self {
            address,
            target,
            cuts,
            forwarding,
        }
    }

    pub fn lead_to(&self, address: SocketAddr) {
        self.target.send_replace(Some(address));
    }

    /// Ends all connections, with whatever is on its way.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

async fn forward(mut runner: TcpStream, to: Option<SocketAddr>, mut cut: watch::Receiver<u64>) -> Option<()> {
    cut.mark_unchanged();
    let mut gateway = TcpStream::connect(to?).await.ok()?;
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut runner, &mut gateway) => {}
        _ = cut.changed() => {}
    }
    Some(())
}
