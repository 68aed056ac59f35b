//! Taking a bundle in: the only file of the agent's that the runner's git sees, and only as bytes on its stdin.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;

use protocol::spec::Repo;
use rustix::fs::Dir;
use uuid::Uuid;

use super::store::{HEAD, Store};
use super::{GitError, Repos};
use crate::workspace::beneath;

/// Largest bundle.
pub const MAX_BUNDLE: u64 = 2 << 30;
/// What the names of bundles begin and end with; the session stands between, because others may share its workspace.
const PREFIX: &str = ".agentic-";
const SUFFIX: &str = ".bundle";
/// Longest header: one line for each commit that is needed.
const MAX_HEADER: u64 = 1 << 20;

/// Takes the bundle of this name in the workspace into our own repository; gives the commit that it holds.
pub async fn take(repos: &Repos, repo: &Repo, name: &str) -> Result<String, GitError> {
    let store = Store::new(repos, repo)?;
    store.prepare().await?;
    let file = open(repos, name).map_err(|error| unfit(repo, &format!("its bundle cannot be used: {error}")))?;
    let (commit, file) = header(file).map_err(|error| unfit(repo, &format!("its bundle cannot be read: {error}")))?;
    let limit = format!("--max-input-size={MAX_BUNDLE}");
    let checked = |error: GitError| match error {
        GitError::Git { said, .. } if super::command::fault(&said) != super::Fault::DiskFull => {
            unfit(repo, &format!("what the agent made of it is not sound: {said}"))
        }
        other => other,
    };
    store
        .git("check the bundle of")
        .args(["index-pack", "--stdin", "--fix-thin", "--strict", &limit])
        .stdin(file)
        .run()
        .await
        .map_err(checked)?;
    // That the objects are there says nothing of those that they name.
    store
        .git("check the bundle of")
        .args(["rev-list", "--objects", "--quiet", &commit, "--not", "--all"])
        .run()
        .await
        .map_err(checked)?;
    store.set(HEAD, &commit).await?;
    Ok(commit)
}

/// Removes whatever has that name in the workspace, if it can be removed.
pub fn remove(repos: &Repos, name: &str) {
    if let Ok(root) = beneath::root(&repos.workspace) {
        let _ = rustix::fs::unlinkat(root.as_fd(), name, rustix::fs::AtFlags::empty());
    }
}

/// Removes what runners that were killed have left in the workspace, and what git leaves of a file that it did not finish.
pub fn remove_leftovers(repos: &Repos) {
    let Ok(root) = beneath::root(&repos.workspace) else {
        return;
    };
    let Ok(entries) = Dir::read_from(root.as_fd()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().is_ok_and(|name| is_ours(repos, name)) {
            let _ = rustix::fs::unlinkat(root.as_fd(), name, rustix::fs::AtFlags::empty());
        }
    }
}

/// A name that nobody has used, for a file of the workspace.
pub fn new_name(repos: &Repos) -> String {
    format!("{}{}{SUFFIX}", prefix(repos), Uuid::new_v4())
}

/// Whether this session has made a file of this name. Another one that shares the workspace may be handing over its own.
fn is_ours(repos: &Repos, name: &str) -> bool {
    let name = name.strip_suffix(".lock").unwrap_or(name);
    name.strip_prefix(&prefix(repos))
        .and_then(|rest| rest.strip_suffix(SUFFIX))
        .is_some_and(|id| Uuid::parse_str(id).is_ok())
}

fn prefix(repos: &Repos) -> String {
    format!("{PREFIX}{}-", repos.branch.replace('/', "-"))
}

fn unfit(repo: &Repo, why: &str) -> GitError {
    GitError::Unfit(format!("{} cannot be pushed: {why}", repo.name))
}

fn open(repos: &Repos, name: &str) -> io::Result<File> {
    beneath::open(beneath::root(&repos.workspace)?, Path::new(name), MAX_BUNDLE)
}

/// Reads the header; gives the one commit that the bundle holds, and the file where its pack begins.
fn header(file: File) -> io::Result<(String, File)> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut reader = BufReader::new(file.take(MAX_HEADER));
    let mut at = 0;
    let mut line = Vec::new();
    let mut next = |line: &mut Vec<u8>| -> io::Result<String> {
        line.clear();
        at += reader.read_until(b'\n', line)? as u64;
        if line.pop() != Some(b'\n') {
            return Err(bad("its header has no end"));
        }
        String::from_utf8(line.clone()).map_err(|_| bad("its header is not text"))
    };
    match next(&mut line)?.as_str() {
        "# v2 git bundle" => {}
        "# v3 git bundle" => {
            if next(&mut line)? != "@object-format=sha1" {
                return Err(bad("it has capabilities that are not supported"));
            }
        }
        _ => return Err(bad("it is not a bundle")),
    }
    let mut commit = None;
    loop {
        let text = next(&mut line)?;
        if text.is_empty() {
            break;
        }
        // What it needs is found missing by the checks of what it holds.
        if text.starts_with('-') {
            continue;
        }
        let (id, name) = text.split_once(' ').ok_or_else(|| bad("its header is damaged"))?;
        let is_id = id.len() == 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_id || name != "HEAD" || commit.replace(id.to_owned()).is_some() {
            return Err(bad("it holds something else than one HEAD"));
        }
    }
    let commit = commit.ok_or_else(|| bad("it holds no commit"))?;
    let mut file = reader.into_inner().into_inner();
    file.seek(SeekFrom::Start(at))?;
    Ok((commit, file))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const ID: &str = "0123456789012345678901234567890123456789";

    fn read(bytes: &[u8]) -> io::Result<(String, Vec<u8>)> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let (commit, mut file) = header(file)?;
        let mut rest = Vec::new();
        file.read_to_end(&mut rest)?;
        Ok((commit, rest))
    }

    #[test]
    fn the_pack_begins_behind_the_header() {
        let text = format!("# v2 git bundle\n-{ID} base\n{ID} HEAD\n\nPACKxyz");
        assert_eq!(read(text.as_bytes()).unwrap(), (ID.to_owned(), b"PACKxyz".to_vec()));
    }

    #[rstest]
    #[case("")]
    #[case("PACK")]
    #[case("# v2 git bundle\n\nPACK")]
    #[case("# v2 git bundle\n0123 HEAD\n\nPACK")]
    #[case("# v2 git bundle\n0123456789012345678901234567890123456789 refs/heads/x\n\nPACK")]
    #[case("# v2 git bundle\n0123456789012345678901234567890123456789 HEAD")]
    #[case("# v3 git bundle\n@filter=blob:none\n0123456789012345678901234567890123456789 HEAD\n\n")]
    fn another_header_is_refused(#[case] text: &str) {
        assert!(read(text.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
            let _ = read(&[b"# v2 git bundle\n".as_slice(), &bytes].concat());
        }
    }
}
