//! The runner's own repository of one of the session's: bare, and in a folder that the agent container does not see.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use protocol::spec::Repo;
use serde::{Deserialize, Serialize};

use super::command::Git;
use super::{GitError, Repos};

/// Commit that was cloned.
pub(super) const BASE: &str = "refs/agentic/base";
/// Commit that came from the agent last.
pub(super) const HEAD: &str = "refs/agentic/head";
/// Commit that is about to be pushed.
pub(super) const PUSHING: &str = "refs/agentic/pushing";
/// Commit that was pushed last.
pub(super) const PUSHED: &str = "refs/agentic/pushed";

/// What is known of a clone that is in the workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Placed {
    /// Branch that was cloned.
    pub branch: String,
    /// Its commit; empty: the repository had none.
    pub commit: String,
}

/// See the module.
pub(super) struct Store<'a> {
    pub(super) repos: &'a Repos,
    pub(super) repo: &'a Repo,
    /// The bare repository.
    pub(super) dir: PathBuf,
}

impl<'a> Store<'a> {
    pub(super) fn new(repos: &'a Repos, repo: &'a Repo) -> Result<Self, GitError> {
        checked(&repo.name)?;
        Ok(Self {
            dir: repos.folder.join(&repo.name),
            repos,
            repo,
        })
    }

    pub(super) fn git(&self, action: &str) -> Git {
        Git::new(
            &self.dir,
            &self.repos.credentials,
            format!("{action} {}", self.repo.name),
        )
    }

    /// Makes it, or what a killed runner left of it good again. The session's lock is ours, so nobody works in it.
    pub(super) async fn prepare(&self) -> Result<(), GitError> {
        fs::create_dir_all(&self.dir).map_err(GitError::io("create", &self.dir))?;
        remove_leftovers(&self.dir).map_err(GitError::io("clean", &self.dir))?;
        self.git("prepare the repository for")
            .args(["init", "--bare", "--quiet", "--template="])
            .run()
            .await?;
        Ok(())
    }

    /// The commit of a reference of ours.
    pub(super) async fn commit(&self, name: &str) -> Option<String> {
        let found = self
            .git("read the repository of")
            .args(["rev-parse", "--quiet", "--verify", name])
            .run()
            .await;
        found.ok().filter(|commit| !commit.is_empty())
    }

    pub(super) async fn set(&self, name: &str, commit: &str) -> Result<(), GitError> {
        self.git("write to the repository of")
            .args(["update-ref", name, commit])
            .run()
            .await
            .map(drop)
    }

    fn marker(&self) -> PathBuf {
        // No repository's name begins with a dot.
        self.repos.folder.join(format!(".{}.placed", self.repo.name))
    }

    /// What is in the workspace, once it is.
    pub(super) fn placed(&self) -> Option<Placed> {
        serde_json::from_slice(&fs::read(self.marker()).ok()?).ok()
    }

    pub(super) fn mark(&self, placed: &Placed) -> Result<(), GitError> {
        let path = self.marker();
        let next = path.with_extension("next");
        // Two strings always serialise.
        let text = serde_json::to_vec(placed).unwrap_or_default();
        let write = || -> io::Result<()> {
            let mut file = File::create(&next)?;
            file.write_all(&text)?;
            file.sync_all()?;
            crate::kill_point::pass("mark-synced");
            fs::rename(&next, &path)?;
            File::open(&self.repos.folder)?.sync_all()?;
            crate::kill_point::pass("marked");
            Ok(())
        };
        write().map_err(GitError::io("write", &path))
    }

    /// Branch that is pushed to, and whether it is the session's own.
    pub(super) fn target(&self) -> (String, bool) {
        let declared = self.repo.output.as_ref().and_then(|output| output.branch.clone());
        match declared.filter(|branch| !branch.is_empty()) {
            Some(branch) => (branch, false),
            None => (self.repos.branch.clone(), true),
        }
    }

    /// Where it is pushed to.
    pub(super) fn target_url(&self) -> &str {
        let declared = self.repo.output.as_ref().and_then(|output| output.url.as_deref());
        declared.filter(|url| !url.is_empty()).unwrap_or(&self.repo.url)
    }
}

/// A name that is one folder, in the workspace and among our own.
fn checked(name: &str) -> Result<(), GitError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !name.is_empty() && name.len() <= 100 && !name.starts_with(['.', '-']) && name.chars().all(fine) {
        return Ok(());
    }
    Err(GitError::Unfit(format!(
        "{name:?} cannot be the name of a repository: letters, digits, '.', '_' and '-' are allowed, and it begins with a letter or digit"
    )))
}

/// Locks and half-written packs.
fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for folder in [dir.to_owned(), dir.join("objects/pack"), dir.join("refs/agentic")] {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.extension().is_some_and(|end| end == "lock")
                || name.starts_with("tmp_")
                || name.starts_with(".tmp-")
            {
                fs::remove_file(&path)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("server", true)]
    #[case("a.b_c-1", true)]
    #[case("", false)]
    #[case("..", false)]
    #[case(".git", false)]
    #[case("-rf", false)]
    #[case("a/b", false)]
    #[case("a b", false)]
    fn a_repository_has_the_name_of_one_folder(#[case] name: &str, #[case] fine: bool) {
        assert_eq!(checked(name).is_ok(), fine);
    }

    #[test]
    fn the_name_of_a_repository_has_a_hundred_characters_at_most() {
        assert!(checked(&"x".repeat(100)).is_ok() && checked(&"x".repeat(101)).is_err());
    }
}
