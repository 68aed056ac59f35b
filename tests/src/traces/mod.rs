//! A collector of traces that takes OTLP as Langfuse does and answers as Langfuse's public API does.

pub mod observation;
mod server;
pub mod store;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use observation::Observation;
pub use server::{Fault, Keys, Shared, router, serve};
pub use store::Export;

/// Public key that every test may use.
pub const FAKE_PUBLIC_KEY: &str = "pk-lf-fake-0000";
/// Secret key that every test may use.
pub const FAKE_SECRET_KEY: &str = "sk-lf-fake-0000-5b0f2c6d9e7a";

/// A collector that runs on a loopback port until it is dropped; it accepts the fake keys.
#[derive(Debug)]
pub struct TraceCollector {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl TraceCollector {
    /// Starts a collector.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let keys = Keys {
            public: FAKE_PUBLIC_KEY.to_owned(),
            secret: FAKE_SECRET_KEY.to_owned(),
        };
        let shared = Arc::new(Shared::new(&keys));
        let app = router(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            // An error here shows as a refused connection in the test.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self {
            address,
            shared,
            serving,
        })
    }

    /// What `LANGFUSE_HOST` has to be.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes the next exports fail.
    pub fn fail(&self, fault: Fault) {
        self.shared.fail(fault);
    }

    /// Every export so far, oldest first.
    pub fn exports(&self) -> Vec<Export> {
        self.shared.store().exports.clone()
    }

    /// Every observation so far, in order of its start.
    pub fn observations(&self) -> Vec<Observation> {
        self.shared
            .store()
            .observations(|_| true)
            .into_iter()
            .cloned()
            .collect()
    }
}

impl Drop for TraceCollector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
