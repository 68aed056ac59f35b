//! Cloning: into the runner's own repository first, then as a fresh folder into the workspace.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{RenameFlags, fstatvfs, renameat_with, syncfs};

use super::command::Git;
use super::remote::Remote;
use super::store::{BASE, PUSHED, Placed, Store};
use super::{GitError, Repos};
use crate::workspace::beneath;
use protocol::spec::Repo;

/// Commits of history that an agent gets to see.
const DEPTH: &str = "--depth=50";
/// What must be left on the volume beside the copies.
const SPARE: u64 = 64 << 20;

/// A clone that is in the workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cloned {
    /// Branch and commit.
    pub placed: Placed,
    /// Address without credentials.
    pub url: String,
    /// It was there already.
    pub before: bool,
    /// Commit that was pushed last.
    pub pushed: Option<String>,
    /// What people should know.
    pub notes: Vec<String>,
}

/// Clones a repository unless it is in the workspace already. May be dropped while it runs, and be called again.
pub async fn clone(repos: &Repos, repo: &Repo) -> Result<Cloned, GitError> {
    let store = Store::new(repos, repo)?;
    let remote = Remote::parse(&repo.url)?;
    let mut cloned = Cloned {
        url: remote.url.clone(),
        ..Cloned::default()
    };
    if let Some(placed) = store.placed() {
        cloned.placed = placed;
        cloned.before = true;
        cloned.pushed = store.commit(PUSHED).await;
        return Ok(cloned);
    }
    store.prepare().await?;
    crate::kill_point::pass("prepared");
    let branch = fetch(&store, &remote).await?;
    crate::kill_point::pass("fetched");
    let commit = store.commit(BASE).await.unwrap_or_default();
    cloned.placed = Placed { branch, commit };
    room(&store).await?;
    let work = Work::make(&store, &remote, &cloned.placed).await?;
    if !work.place().await? {
        cloned.notes.push(format!(
            "The workspace has a folder {} already; it stays as it is.",
            repo.name
        ));
    }
    cloned.notes.extend(notes(&store, &cloned.placed).await);
    store.mark(&cloned.placed)?;
    Ok(cloned)
}

/// Fetches what is to be cloned; gives the branch. What is here is not fetched again.
async fn fetch(store: &Store<'_>, remote: &Remote) -> Result<String, GitError> {
    let credentials = &store.repos.credentials;
    if store.commit(BASE).await.is_some() {
        let head = store
            .git("read the repository of")
            .args(["symbolic-ref", "--short", "HEAD"]);
        return head.run().await;
    }
    let pinned = remote.pin(store.repos).await?;
    let branch = match store.repo.branch.clone().filter(|branch| !branch.is_empty()) {
        Some(branch) => branch,
        None => match default_branch(store, &pinned).await? {
            Some(branch) => branch,
            // A repository without a commit: the agent begins it.
            None => return Ok("main".to_owned()),
        },
    };
    store
        .git("use the branch of")
        .args(["check-ref-format", &format!("refs/heads/{branch}")])
        .run()
        .await
        .map_err(|_| GitError::Unfit(format!("{branch:?} cannot be the name of a branch")))?;
    // The branch is on record before the commit that says that all is here.
    store
        .git("write to the repository of")
        .args(["symbolic-ref", "HEAD", &format!("refs/heads/{branch}")])
        .run()
        .await?;
    store
        .git("clone")
        .args(["fetch", DEPTH, "--no-tags", "--no-write-fetch-head", "--progress", "--"])
        .args([remote.url.as_str(), &format!("+refs/heads/{branch}:{BASE}")])
        .progress(store.repos, &store.repo.name)
        .to(&pinned, credentials)?
        .run()
        .await?;
    Ok(branch)
}

/// The branch that the remote's HEAD names; none: it has no commit.
async fn default_branch(store: &Store<'_>, pinned: &super::remote::Pinned<'_>) -> Result<Option<String>, GitError> {
    let answer = store
        .git("clone")
        .args(["ls-remote", "--symref", "--", &pinned.remote.url, "HEAD"])
        .to(pinned, &store.repos.credentials)?
        .run()
        .await?;
    let named = answer.lines().find_map(|line| {
        let target = line.strip_prefix("ref: ")?.split_once('\t')?.0;
        target.strip_prefix("refs/heads/").map(str::to_owned)
    });
    let has_commit = answer
        .lines()
        .any(|line| !line.starts_with("ref: ") && line.ends_with("\tHEAD"));
    match (named, has_commit) {
        (Some(branch), true) => Ok(Some(branch)),
        (_, false) => Ok(None),
        (None, true) => Err(GitError::Unfit(format!(
            "the HEAD of {} is on no branch: name a branch in the session's repos",
            pinned.remote.url
        ))),
    }
}

/// Whether the volume takes the agent's copy beside ours.
async fn room(store: &Store<'_>) -> Result<(), GitError> {
    let mut files = 0;
    if store.commit(BASE).await.is_some() {
        store
            .git("measure")
            .args(["ls-tree", "-r", "--long", BASE])
            .lines(|line| {
                // `<mode> blob <id> <size>\t<path>`
                let size = line.split('\t').next().and_then(|head| head.split_whitespace().last());
                files += size
                    .and_then(|size| size.parse::<u64>().ok())
                    .unwrap_or(0)
                    .next_multiple_of(4096);
            })
            .await?;
    }
    let objects = size_of(&store.dir.join("objects")).map_err(GitError::io("measure", &store.dir))?;
    let folder = beneath::root(&store.repos.folder).map_err(GitError::io("open", &store.repos.folder))?;
    let volume = fstatvfs(&folder).map_err(|error| GitError::io("measure", &store.repos.folder)(error.into()))?;
    let free = volume.f_bavail.saturating_mul(volume.f_frsize);
    let needed = files.saturating_add(objects).saturating_add(SPARE);
    if needed <= free {
        return Ok(());
    }
    Err(GitError::NoRoom {
        name: store.repo.name.clone(),
        needed: needed.div_ceil(1 << 20),
        free: free >> 20,
    })
}

fn size_of(folder: &Path) -> io::Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        size += if metadata.is_dir() {
            size_of(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(size)
}

/// The agent's copy while it is still among the runner's own folders.
struct Work<'a> {
    store: &'a Store<'a>,
    path: PathBuf,
}

impl<'a> Work<'a> {
    async fn make(store: &'a Store<'a>, remote: &Remote, placed: &Placed) -> Result<Self, GitError> {
        let path = store.repos.folder.join(format!(".{}.work", store.repo.name));
        let work = Self { store, path };
        aside(&work.path, |path| {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(GitError::io("remove", path)(error));
                }
                _ => {}
            }
            fs::create_dir(path).map_err(GitError::io("create", path))
        })
        .await?;
        let first = format!("--initial-branch={}", placed.branch);
        work.git()
            .args(["init", "--quiet", "--template=", &first])
            .run()
            .await?;
        if !placed.commit.is_empty() {
            work.copy().await?;
            let (local, theirs) = (
                format!("refs/heads/{}", placed.branch),
                format!("refs/remotes/origin/{}", placed.branch),
            );
            for name in [&local, &theirs] {
                work.git().args(["update-ref", name, &placed.commit]).run().await?;
            }
            work.git().args(["reset", "--quiet", "--hard"]).run().await?;
        }
        work.configure(remote, placed).await?;
        Ok(work)
    }

    fn git(&self) -> Git {
        Git::new(
            &self.path.join(".git"),
            &self.store.repos.credentials,
            format!("make the agent's copy of {}", self.store.repo.name),
        )
        .env("GIT_WORK_TREE", &self.path)
    }

    /// Byte by byte: an object that both had would be the agent's to change.
    async fn copy(&self) -> Result<(), GitError> {
        let to = self.path.join(".git");
        aside(&self.store.dir, move |store| {
            let (from, shallow) = (store.join("objects"), store.join("shallow"));
            copy_folder(&from, &to.join("objects")).map_err(GitError::io("copy", &from))?;
            if shallow.exists() {
                fs::copy(&shallow, to.join("shallow")).map_err(GitError::io("copy", &shallow))?;
            }
            Ok(())
        })
        .await
    }

    /// What a clone has, and who commits.
    async fn configure(&self, remote: &Remote, placed: &Placed) -> Result<(), GitError> {
        let author = &self.store.repos.author;
        let (of_remote, of_merge) = (
            format!("branch.{}.remote", placed.branch),
            format!("branch.{}.merge", placed.branch),
        );
        let merge = format!("refs/heads/{}", placed.branch);
        let committer = super::Identity::committer();
        for (key, value) in [
            ("remote.origin.url", remote.url.as_str()),
            ("remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*"),
            (&of_remote, "origin"),
            (&of_merge, &merge),
            ("user.name", &author.name),
            ("user.email", &author.email),
            ("author.name", &author.name),
            ("author.email", &author.email),
            ("committer.name", &committer.name),
            ("committer.email", &committer.email),
        ] {
            self.git().args(["config", key, value]).run().await?;
        }
        Ok(())
    }

    /// Moves it into the workspace as a whole; false: there is something of its name.
    async fn place(self) -> Result<bool, GitError> {
        let (folder, workspace) = (self.store.repos.folder.clone(), self.store.repos.workspace.clone());
        let name = self.store.repo.name.clone();
        aside(&self.path, move |path| place(path, &folder, &workspace, &name)).await
    }
}

fn place(path: &Path, folder: &Path, workspace: &Path, name: &str) -> Result<bool, GitError> {
    let open = |path: &Path| beneath::root(path).map_err(GitError::io("open", path));
    let (ours, theirs): (OwnedFd, OwnedFd) = (open(folder)?, open(workspace)?);
    // All of it is on disk before it has its name.
    syncfs(&ours).map_err(|error| GitError::io("sync", folder)(error.into()))?;
    crate::kill_point::pass("copied");
    let from = path.file_name().unwrap_or_default();
    let placed = match renameat_with(&ours, from, &theirs, name, RenameFlags::NOREPLACE) {
        Ok(()) => true,
        Err(rustix::io::Errno::EXIST) => {
            fs::remove_dir_all(path).map_err(GitError::io("remove", path))?;
            false
        }
        Err(error) => return Err(GitError::io("move into the workspace", path)(error.into())),
    };
    crate::kill_point::pass("moved");
    syncfs(&theirs).map_err(|error| GitError::io("sync", workspace)(error.into()))?;
    crate::kill_point::pass("placed");
    Ok(placed)
}

/// Does what may wait for the volume for long on a thread of its own: the lease is renewed, and orders are heard, meanwhile.
async fn aside<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce(&Path) -> Result<T, GitError> + Send + 'static,
) -> Result<T, GitError> {
    let own = path.to_owned();
    match tokio::task::spawn_blocking(move || work(&own)).await {
        Ok(done) => done,
        Err(error) => Err(GitError::io("work in", path)(io::Error::other(error))),
    }
}

fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// What will not work, said before anybody counts on it.
async fn notes(store: &Store<'_>, placed: &Placed) -> Vec<String> {
    let mut notes = Vec::new();
    if placed.commit.is_empty() {
        return notes;
    }
    let name = &store.repo.name;
    if store.commit(&format!("{BASE}:.gitmodules")).await.is_some() {
        notes.push(format!(
            "{name} has submodules; they are not cloned, and what is changed in them is not pushed."
        ));
    }
    let lfs = store
        .git("look for LFS in")
        .args(["grep", "--quiet", "-I", "-F", "-e", "filter=lfs", BASE, "--"])
        .args([":(top,glob)**/.gitattributes"]);
    if lfs.run().await.is_ok() {
        notes.push(format!(
            "{name} keeps files in Git LFS; the agent has their pointers only, and changes of such files are not pushed."
        ));
    }
    notes
}
