//! The session's repositories: cloned before the first turn, pushed at a normal end, with credentials that never leave the
//! runner.
//!
//! The runner runs git only in repositories of its own, below the claim's `git` folder, which the agent container does not
//! see. What goes to the agent is copied; what comes back is one bundle, of which nothing is trusted.

pub mod bundle;
pub mod clone;
mod command;
pub mod credentials;
pub mod push;
pub mod remote;
pub mod save;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::Outcome;
use protocol::spec::{Repo, User};

use crate::address::{AddressError, Allowed};
use crate::outlet::Outlet;

pub use credentials::Credentials;

/// The session's repositories, and what the runner needs for them.
#[derive(Clone, Default)]
pub struct Repos {
    /// What to clone, and where it goes.
    pub list: Vec<Repo>,
    /// The runner's own repositories.
    pub folder: PathBuf,
    /// The agent's workspace, as the runner sees it.
    pub workspace: PathBuf,
    /// Hosts that may be reached although their addresses are private.
    pub allowed: Allowed,
    /// Tokens and keys.
    pub credentials: Credentials,
    /// Who the work is for.
    pub author: Identity,
    /// Branch that is pushed to where the spec names none.
    pub branch: String,
    /// `<namespace>/<name>` of the session.
    pub session: String,
    /// Where progress is shown, if it is.
    pub progress: Option<Arc<Outlet>>,
}

/// Name and address of a commit's author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name.
    pub name: String,
    /// Address.
    pub email: String,
}

/// Address of those who have none.
const NO_ADDRESS: &str = "noreply@agentic-operator.invalid";

impl Default for Identity {
    fn default() -> Self {
        Self {
            name: "agent".to_owned(),
            email: NO_ADDRESS.to_owned(),
        }
    }
}

impl Identity {
    /// The author of commits of a session for `user`.
    pub fn of(user: Option<&User>) -> Self {
        // What git refuses in names.
        let clean = |text: &str| {
            let kept = text.chars().filter(|c| !c.is_control() && !matches!(c, '<' | '>'));
            kept.collect::<String>().trim().to_owned()
        };
        let agent = Self::default();
        let Some(user) = user else { return agent };
        let (id, name) = (clean(&user.user_id), clean(&user.display_name));
        let name = [name, id.clone(), agent.name].into_iter().find(|name| !name.is_empty());
        let has_address = id.contains('@') && !id.contains(char::is_whitespace);
        Self {
            name: name.unwrap_or_default(),
            email: if has_address { id } else { agent.email },
        }
    }
}

/// Why a repository could not be cloned or pushed.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// The address cannot be used.
    #[error("failed to use the address {url}: {reason}")]
    Url {
        /// The address, without credentials.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// git said no.
    #[error("failed to {action}: {said}")]
    Git {
        /// What was tried.
        action: String,
        /// What git and the remote said.
        said: String,
    },
    /// The file system said no.
    #[error("failed to {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// There is no room for the runner's copy and the agent's.
    #[error(
        "the volume has {free} MiB left and the repository {name} needs {needed} MiB: ask for a larger workspace.size"
    )]
    NoRoom {
        /// The repository.
        name: String,
        /// What is needed, MiB.
        needed: u64,
        /// What is left, MiB.
        free: u64,
    },
    /// The agent left something that cannot be pushed.
    #[error("{0}")]
    Unfit(String),
}

/// What a failure means for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another try may go better.
    Unreachable,
    /// It will be the same the next time.
    Refused,
    /// There is no room.
    DiskFull,
}

impl GitError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// See [`Fault`].
    pub fn fault(&self) -> Fault {
        match self {
            Self::NoRoom { .. } => Fault::DiskFull,
            Self::Io { source, .. } if super::is_full(source) => Fault::DiskFull,
            Self::Io { .. } => Fault::Unreachable,
            Self::Address(error) if error.is_transient() => Fault::Unreachable,
            Self::Git { said, .. } => command::fault(said),
            Self::Url { .. } | Self::Address(_) | Self::Unfit(_) => Fault::Refused,
        }
    }

    /// How an attempt ends whose clone failed so.
    pub fn clone_outcome(&self) -> Outcome {
        match self.fault() {
            Fault::Unreachable => Outcome::CloneUnreachable,
            Fault::Refused => Outcome::CloneRefused,
            Fault::DiskFull => Outcome::DiskFull,
        }
    }

    /// How an attempt ends whose push failed so.
    pub fn push_outcome(&self) -> Outcome {
        match self.fault() {
            Fault::Unreachable => Outcome::PushUnreachable,
            Fault::Refused => Outcome::PushRefused,
            Fault::DiskFull => Outcome::DiskFull,
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ann", "Ann <b>\n", ("Ann b", NO_ADDRESS))]
    #[case("ann@corp.example", "", ("ann@corp.example", "ann@corp.example"))]
    #[case("", "", ("agent", NO_ADDRESS))]
    fn commits_have_an_author_that_git_takes(#[case] id: &str, #[case] name: &str, #[case] expected: (&str, &str)) {
        let user = User {
            user_id: id.into(),
            display_name: name.into(),
            ..User::default()
        };
        let found = Identity::of(Some(&user));
        assert_eq!((found.name.as_str(), found.email.as_str()), expected);
        assert_eq!(Identity::of(None).name, "agent");
    }
}
