//! The shim in the agent container, reached over the socket in the folder that the two containers share.

use std::path::Path;

use tokio::net::UnixStream;
use tokio::time::{Duration, Instant, sleep};

use super::{Agent, AgentError};

/// How long the container may take to start, or to start again.
const PATIENCE: Duration = Duration::from_mins(1);
/// Between two tries. The folder cannot be watched more cheaply than this costs.
const PAUSE: Duration = Duration::from_millis(20);

/// Connects, as soon as somebody listens.
pub async fn connect(path: &Path) -> Result<Agent, AgentError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Agent::greet(stream, None).await,
            Err(source) if Instant::now() >= deadline => {
                return Err(AgentError::Connect {
                    path: path.to_owned(),
                    source,
                });
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}
