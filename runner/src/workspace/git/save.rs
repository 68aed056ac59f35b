//! What is run in the agent container at the end: commit what is there, and put it into one file for the runner.
//!
//! The repository is the agent's, and so are its hooks, filters and configuration: whatever they do, they do it where the
//! agent could have done it, too.

use protocol::spec::Repo;

use super::store::Store;
use super::{GitError, Identity, Repos};
use crate::agent::Spawn;

/// What the script says before it begins to change anything.
pub const FIT: &str = "fit";

/// Commits and bundles. Says `fit` when it begins, and in the end one line: `unfit <why>`, `same`, `lfs`, or `bundle`.
const SCRIPT: &str = r#"
unfit() { echo "unfit $1"; exit 0; }
cd -- "$REPOSITORY" 2>/dev/null || unfit "its folder is gone"
command -v git >/dev/null || unfit "there is no git in the agent's image"
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
g() { git -c safe.directory='*' -c core.hooksPath=/dev/null -c core.fsmonitor=false -c commit.gpgSign=false -c gc.auto=0 -c maintenance.auto=false "$@"; }
lfs() { while IFS= read -rd '' path && IFS= read -rd '' name && IFS= read -rd '' value; do [ "$value" = lfs ] && return 0; done; return 1; }
[ -e .git ] && dir=$(g rev-parse --git-dir 2>/dev/null) || unfit "there is no repository any more"
for lock in index.lock HEAD.lock config.lock; do
    [ -e "$dir/$lock" ] || continue
    [ -n "$AGAIN" ] || unfit "$dir/$lock is there: a git command was killed"
    rm -f -- "$dir/$lock"
done
# A commit locks HEAD's branch together with HEAD.
[ -z "$AGAIN" ] || rm -f -- "$(g rev-parse --git-path "$(g symbolic-ref --quiet HEAD).lock")"
[ -e "$dir/MERGE_HEAD" ] && unfit "a merge is in progress"
[ -e "$dir/rebase-merge" ] || [ -e "$dir/rebase-apply" ] && unfit "a rebase is in progress"
[ -e "$dir/CHERRY_PICK_HEAD" ] && unfit "a cherry-pick is in progress"
[ -e "$dir/REVERT_HEAD" ] && unfit "a revert is in progress"
echo fit
error=$(g add --all -- . ':(exclude,top,glob)**/.agentic-*' 2>&1) || unfit "git add failed: $error"
if ! g diff --cached --quiet 2>/dev/null || ! g rev-parse --quiet --verify HEAD >/dev/null; then
    if [ -n "$(g ls-files | head -n 1)" ] || g rev-parse --quiet --verify HEAD >/dev/null; then
        error=$(g commit --quiet --no-verify --message "$SUBJECT" --message "$TRAILER" 2>&1) || unfit "git commit failed: $error"
    fi
fi
head=$(g rev-parse --quiet --verify HEAD) || { echo same; exit 0; }
[ "$head" = "$BASE" ] || [ "$head" = "$PUSHED" ] && { echo same; exit 0; }
if [ -n "$BASE" ]; then
    g diff --name-only -z --diff-filter=d "$BASE" HEAD 2>/dev/null | g check-attr -z --stdin filter | lfs && { echo lfs; exit 0; }
    error=$(g bundle create "$BUNDLE" HEAD "^$BASE" 2>&1) || unfit "git bundle failed: $error"
else
    error=$(g bundle create "$BUNDLE" HEAD 2>&1) || unfit "git bundle failed: $error"
fi
echo bundle
"#;

/// What the agent container has of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// Nothing that was not cloned or pushed before.
    Same,
    /// A file with what is new.
    Bundle,
}

/// What to run in the agent container. `workspace` is the folder's name there; `bundle` the file to make in it; `pushed` the commit that
/// was pushed last: where nothing came since, others may have gone on. `again`: it had begun and was lost with its container,
/// so that what locks the repository is its own.
pub fn spawn(
    repos: &Repos,
    repo: &Repo,
    workspace: &str,
    bundle: &str,
    pushed: Option<&str>,
    again: bool,
) -> Result<Spawn, GitError> {
    let store = Store::new(repos, repo)?;
    let base = store.placed().map(|placed| placed.commit).unwrap_or_default();
    let (name, session) = (&repo.name, &repos.session);
    let (author, committer) = (&repos.author, Identity::committer());
    let env = [
        ("REPOSITORY", format!("{workspace}/{name}")),
        ("BASE", base),
        ("AGAIN", if again { "1" } else { "" }.to_owned()),
        ("PUSHED", pushed.unwrap_or_default().to_owned()),
        ("BUNDLE", format!("{workspace}/{bundle}")),
        ("SUBJECT", format!("Work of agentic session {session}")),
        ("TRAILER", format!("Agentic-Session: {session}")),
        ("GIT_AUTHOR_NAME", author.name.clone()),
        ("GIT_AUTHOR_EMAIL", author.email.clone()),
        ("GIT_COMMITTER_NAME", committer.name),
        ("GIT_COMMITTER_EMAIL", committer.email),
        ("GIT_TERMINAL_PROMPT", "0".to_owned()),
        ("LC_ALL", "C".to_owned()),
    ];
    Ok(Spawn {
        argv: ["bash", "-c", SCRIPT].map(str::to_owned).into(),
        env: env.map(|(name, value)| (name.to_owned(), value)).into(),
        env_default: vec![("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned())],
        cwd: "/".to_owned(),
    })
}

/// Reads what the script said.
pub fn saved(name: &str, stdout: &str) -> Result<Saved, GitError> {
    let line = stdout.trim();
    let line = line.strip_prefix(FIT).map_or(line, str::trim_start);
    let unfit = |why: &str| Err(GitError::Unfit(format!("{name} cannot be pushed: {why}")));
    match line.split_once(' ').unwrap_or((line, "")) {
        ("same", _) => Ok(Saved::Same),
        ("bundle", _) => Ok(Saved::Bundle),
        ("lfs", _) => unfit("files of Git LFS were changed, which is not supported (LfsUnsupported)"),
        ("unfit", why) => {
            let why: String = why
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(300)
                .collect();
            unfit(&why)
        }
        _ => unfit("the agent container did not say what became of it"),
    }
}

impl Identity {
    /// Who commits what an agent made.
    pub(super) fn committer() -> Self {
        Self {
            name: "agentic-operator".to_owned(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(said: &str) -> String {
        saved("server", said).unwrap_err().to_string()
    }

    #[test]
    fn what_the_agent_container_said_is_one_of_four_words_or_nothing() {
        assert_eq!(saved("server", "same\n").unwrap(), Saved::Same);
        assert_eq!(saved("server", " bundle\n").unwrap(), Saved::Bundle);
        assert_eq!(saved("server", "fit\nbundle\n").unwrap(), Saved::Bundle);
        assert!(refused("fit\nunfit git add failed: no\n").ends_with("git add failed: no"));
        assert!(refused("fit\n").ends_with("did not say what became of it"));
        assert!(refused("lfs\n").contains("LfsUnsupported"));
        assert!(refused("unfit a merge is in progress\n").ends_with("a merge is in progress"));
        for said in ["", "bundles", "done same"] {
            assert!(refused(said).ends_with("did not say what became of it"), "{said}");
        }
    }

    #[test]
    fn what_the_agent_container_says_more_is_short_and_on_one_line() {
        let said = refused(&format!("unfit a\u{1b}b\n{}", "x".repeat(1_000)));
        assert!(said.contains("a b x"), "{said}");
        assert_eq!(said.matches('x').count(), 300 - "a b ".len());
    }
}
