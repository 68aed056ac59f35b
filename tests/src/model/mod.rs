//! A mock of the Messages API, good enough for the real Claude CLI.

pub mod answer;
pub mod log;
pub mod refuse;
pub mod script;
mod sending;
mod server;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time;

pub use log::{End, Logged};
pub use server::{Shared, router, serve};

/// A key that every test may use.
pub const FAKE_KEY: &str = "sk-ant-fake-000000000000000000000000000000000000";

/// A mock that runs on a loopback port until it is dropped.
#[derive(Debug)]
pub struct MockModel {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl MockModel {
    /// Starts a mock that accepts [`FAKE_KEY`].
    pub async fn start() -> io::Result<Self> {
        Self::accepting(vec![FAKE_KEY.to_owned()]).await
    }

    /// Starts a mock that accepts these keys and no others.
    pub async fn accepting(keys: Vec<String>) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::new(keys));
        let app = router(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            // An error here shows as a refused connection in the test.
            let _ = axum::serve(server::prompt(listener), app).await;
        });
        Ok(Self {
            address,
            shared,
            serving,
        })
    }

    /// What `ANTHROPIC_BASE_URL` has to be.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far, oldest first.
    pub fn requests(&self) -> Vec<Logged> {
        self.shared.log.all()
    }

    /// Lets every answer on that holds for `name`, now and later.
    pub fn release(&self, name: &str) {
        self.shared.release(name);
    }

    /// Forgets requests, releases and counts.
    pub fn reset(&self) {
        self.shared.reset();
    }

    /// The first request that satisfies `wanted`, waiting for it at most `deadline`. `None`: it did not come.
    pub async fn request(&self, deadline: Duration, wanted: impl Fn(&Logged) -> bool) -> Option<Logged> {
        let mut changes = self.shared.log.watch();
        let found = async {
            loop {
                changes.borrow_and_update();
                if let Some(found) = self.requests().into_iter().find(&wanted) {
                    return Some(found);
                }
                changes.changed().await.ok()?;
            }
        };
        time::timeout(deadline, found).await.ok().flatten()
    }
}

impl Drop for MockModel {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
