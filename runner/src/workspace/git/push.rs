//! Pushing what was taken in: exactly the declared branch, and nobody else's commits are lost.

use protocol::spec::Repo;

use super::remote::{Pinned, Remote};
use super::store::{PUSHED, PUSHING, Store};
use super::{GitError, Repos};

/// Where a repository is pushed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Address without credentials.
    pub url: String,
    /// Branch.
    pub branch: String,
    /// The branch is the session's own: the spec names none.
    pub own: bool,
}

/// Where a repository is pushed to.
pub fn target(repos: &Repos, repo: &Repo) -> Result<Target, GitError> {
    let store = Store::new(repos, repo)?;
    let (branch, own) = store.target();
    let url = Remote::parse(store.target_url())?.url;
    Ok(Target { url, branch, own })
}

/// Pushes a commit that was taken in.
pub async fn push(repos: &Repos, repo: &Repo, commit: &str) -> Result<(), GitError> {
    let store = Store::new(repos, repo)?;
    let remote = Remote::parse(store.target_url())?;
    let (branch, own) = store.target();
    let name = format!("refs/heads/{branch}");
    store
        .git("use the branch of")
        .args(["check-ref-format", &name])
        .run()
        .await
        .map_err(|_| GitError::Unfit(format!("{branch:?} cannot be the name of a branch")))?;
    let pinned = remote.pin(repos).await?;
    let mut push = store.git("push");
    if own {
        push = push.args(["push", &lease(&store, &pinned, &name).await?]);
    } else {
        push = push.args(["push"]);
    }
    // If we die while it is under way, what is there afterwards is known to be ours.
    store.set(PUSHING, commit).await?;
    crate::kill_point::pass("pushing");
    push.args([
        "--no-verify",
        "--progress",
        "--",
        &remote.url,
        &format!("{commit}:{name}"),
    ])
    .progress(repos, &repo.name)
    .to(&pinned, &repos.credentials)?
    .run()
    .await?;
    crate::kill_point::pass("pushed");
    store.set(PUSHED, commit).await?;
    crate::kill_point::pass("push-known");
    Ok(())
}

/// On the session's own branch an agent may have rewritten what it pushed before; what others pushed there stays.
async fn lease(store: &Store<'_>, pinned: &Pinned<'_>, name: &str) -> Result<String, GitError> {
    let answer = store
        .git("push")
        .args(["ls-remote", "--", &pinned.remote.url, name])
        .to(pinned, &store.repos.credentials)?
        .run()
        .await?;
    // The remote is asked for a pattern, not for a name.
    let exact = answer.lines().filter_map(|line| line.split_once('\t'));
    let there = exact
        .filter(|(_, found)| *found == name)
        .map(|(id, _)| id)
        .next()
        .unwrap_or_default();
    let ours = [store.commit(PUSHED).await, store.commit(PUSHING).await];
    let expected = if ours.iter().flatten().any(|own| own == there) {
        there.to_owned()
    } else {
        ours.into_iter().next().flatten().unwrap_or_default()
    };
    Ok(format!("--force-with-lease={name}:{expected}"))
}
