//! The shim as a child process: no container, the same frames. It ends with the runner, however that ends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::{Agent, AgentError, shim};

/// Variables that the agent gets from the runner's own environment; there may be secrets in all others.
const INHERITED: [&str; 8] = ["PATH", "LANG", "LC_ALL", "TERM", "TZ", "USER", "SHELL", "TMPDIR"];

/// Starts a shim.
pub async fn launch() -> Result<Agent, AgentError> {
    // What a shim leaves that had to be killed comes to us.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| AgentError::Launch(error.into()))?;
    let (ours, theirs) = pair().map_err(AgentError::Launch)?;
    let program = std::env::current_exe().map_err(AgentError::Launch)?;
    let child = Command::new(program)
        .args(["agent", "--inherited"])
        .env_clear()
        .envs(
            INHERITED
                .iter()
                .filter_map(|name| Some((*name, std::env::var_os(name)?))),
        )
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        // Ctrl-C in a terminal is for the runner, which then stops the agent its own way.
        .process_group(0)
        .spawn()
        .map_err(AgentError::Launch)?;
    Agent::greet(ours, Some(child)).await
}

/// Ends a shim that does not answer, as one that the agent has stopped, and everything that it had below it.
pub(super) async fn put_down(child: &mut Child) {
    // It takes effect on a stopped process too.
    let _ = child.kill().await;
    // Nothing of our own runs by now.
    shim::kill::everything().await;
}

fn pair() -> std::io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}
