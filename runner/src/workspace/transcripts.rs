//! Asking the CLI's transcripts whether a message arrived. The agent can write them, so they are asked only about messages
//! that the spool knows to be sent and not to be taken.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType};
use serde::Deserialize;
use uuid::Uuid;

use super::beneath;

/// Largest transcript that is read.
const MAX_FILE: u64 = 1 << 30;
/// Longest line that is looked at: the CLI's own are no longer than what it was sent. A file of one gigabyte takes no room on
/// the agent's disk when there is nothing in it, and would take as much memory here.
const MAX_LINE: usize = 64 << 20;
/// Most bytes that are read in all.
const MAX_BYTES: u64 = 4 << 30;
/// Most entries that are looked at: the folder is the agent's.
const MAX_ENTRIES: usize = 10_000;
/// Depth of `<folder of the workspace>/<session>/subagents`, and one more.
const MAX_DEPTH: usize = 4;

/// Messages that a transcript has, each with the conversation whose transcript that is.
pub type Arrived = HashMap<Uuid, Option<Uuid>>;

/// Those of the messages that are a user line or a queued command in any transcript below `folder`. How long it takes is for the
/// agent to say.
pub fn arrived(folder: &Path, messages: &[Uuid]) -> Arrived {
    crate::kill_point::pass("searching");
    let mut arrived = Arrived::new();
    for uuid in messages {
        match find(folder, uuid) {
            Ok(Some(file)) => {
                let stem = file.file_stem().and_then(|stem| stem.to_str());
                arrived.insert(*uuid, stem.and_then(|stem| stem.parse().ok()));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the transcripts could not be searched"),
        }
    }
    arrived
}

/// Name of the transcript.
fn find(folder: &Path, uuid: &Uuid) -> io::Result<Option<PathBuf>> {
    let root = match beneath::root(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let needle = uuid.to_string();
    let mut budget = Budget {
        entries: MAX_ENTRIES,
        bytes: MAX_BYTES,
    };
    search(&root, &needle, MAX_DEPTH, &mut budget)
}

/// What may still be looked at.
struct Budget {
    entries: usize,
    bytes: u64,
}

fn search(folder: &OwnedFd, needle: &str, depth: usize, budget: &mut Budget) -> io::Result<Option<PathBuf>> {
    for entry in Dir::read_from(folder.as_fd())? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if budget.entries == 0 || budget.bytes == 0 {
            tracing::warn!("too much among the transcripts; the rest was not searched");
            return Ok(None);
        }
        budget.entries -= 1;
        let path = PathBuf::from(std::ffi::OsStr::new(&*String::from_utf8_lossy(name)));
        let found = match entry.file_type() {
            FileType::Directory if depth > 0 => {
                beneath::folder(folder, &path).and_then(|below| search(&below, needle, depth - 1, budget))
            }
            FileType::RegularFile if name.ends_with(b".jsonl") => {
                in_file(folder, &path, needle, &mut budget.bytes).map(|holds| holds.then(|| path.clone()))
            }
            _ => Ok(None),
        };
        match found {
            Ok(Some(file)) => return Ok(Some(file)),
            Ok(None) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "a transcript could not be searched"),
        }
    }
    Ok(None)
}

fn in_file(folder: &OwnedFd, path: &Path, needle: &str, bytes: &mut u64) -> io::Result<bool> {
    let file = beneath::open(folder, path, MAX_FILE)?.take(MAX_FILE.min(*bytes));
    let mut file = BufReader::with_capacity(64 << 10, file);
    let mut line = Vec::new();
    let mut found = false;
    while !found && read_line(&mut file, &mut line)? {
        found = names(&line, needle);
    }
    let left = file.get_ref().limit();
    *bytes -= MAX_FILE.min(*bytes) - left;
    Ok(found)
}

/// Reads a line; one that is too long is read over and empty. False: there is none.
fn read_line(file: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let limit = MAX_LINE as u64;
    if file.by_ref().take(limit).read_until(b'\n', line)? == 0 {
        return Ok(false);
    }
    if line.len() == MAX_LINE && line.last() != Some(&b'\n') {
        line.clear();
        file.skip_until(b'\n')?;
    }
    Ok(true)
}

/// Whether the line is the message itself or its place in the queue; answers and results name it, too, but later.
fn names(line: &[u8], needle: &str) -> bool {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow, rename = "type")]
        kind: std::borrow::Cow<'a, str>,
    }
    let Ok(text) = std::str::from_utf8(line) else {
        return false;
    };
    text.contains(needle)
        && serde_json::from_str::<Line<'_>>(text)
            .is_ok_and(|line| matches!(line.kind.as_ref(), "user" | "attachment" | "queue-operation"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn holds(folder: &Path, uuid: &Uuid) -> bool {
        arrived(folder, &[*uuid]).contains_key(uuid)
    }

    #[test]
    fn a_message_is_found_in_any_file_and_only_as_a_user_line() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("-workspace/s/subagents");
        std::fs::create_dir_all(&below).unwrap();
        let (sent, answered, other) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let lines = format!(
            "{{\"type\":\"summary\"}}\n{{\"type\":\"assistant\",\"parentUuid\":\"{answered}\"}}\n{{\"type\":\"user\",\"uuid\":\"{sent}\"}}\n"
        );
        std::fs::write(below.join("a.jsonl"), lines).unwrap();
        assert!(holds(dir.path(), &sent));
        assert!(!holds(dir.path(), &answered));
        assert!(!holds(dir.path(), &other));
        assert!(!holds(&dir.path().join("absent"), &sent));
    }

    #[test]
    fn the_conversation_of_a_message_is_that_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("-workspace");
        std::fs::create_dir_all(&below).unwrap();
        let (sent, conversation_id) = (Uuid::new_v4(), Uuid::new_v4());
        let line = format!("{{\"type\":\"user\",\"uuid\":\"{sent}\"}}\n");
        std::fs::write(below.join(format!("{conversation_id}.jsonl")), line).unwrap();
        let other = Uuid::new_v4();
        let expected = Arrived::from([(sent, Some(conversation_id))]);
        assert_eq!(arrived(dir.path(), &[other, sent]), expected);
    }

    #[test]
    fn a_giant_without_lines_is_passed_over_and_what_is_behind_a_long_line_is_found() {
        use std::io::{Seek as _, SeekFrom, Write as _};
        let dir = tempfile::tempdir().unwrap();
        let sent = Uuid::new_v4();
        let giant = File::create(dir.path().join("giant.jsonl")).unwrap();
        giant.set_len(MAX_FILE).unwrap();
        assert!(!holds(dir.path(), &sent));
        let mut peak = Vec::new();
        let mut lines = BufReader::new(giant_for_reading(dir.path()));
        assert!(read_line(&mut lines, &mut peak).unwrap());
        assert!(peak.capacity() <= 2 * MAX_LINE, "{} bytes are held", peak.capacity());

        let mut long = File::create(dir.path().join("long.jsonl")).unwrap();
        long.seek(SeekFrom::Start(MAX_LINE as u64 + 10)).unwrap();
        write!(long, "\n{{\"type\":\"user\",\"uuid\":\"{sent}\"}}\n").unwrap();
        assert!(holds(dir.path(), &sent));
    }

    fn giant_for_reading(folder: &Path) -> File {
        File::open(folder.join("giant.jsonl")).unwrap()
    }

    #[test]
    fn all_transcripts_together_are_read_only_so_far() {
        let dir = tempfile::tempdir().unwrap();
        let root = beneath::root(dir.path()).unwrap();
        std::fs::write(dir.path().join("a.jsonl"), "x\n".repeat(50)).unwrap();
        let mut left = 130;
        for after in [30, 0, 0] {
            assert!(!in_file(&root, Path::new("a.jsonl"), "needle", &mut left).unwrap());
            assert_eq!(left, after);
        }
    }

    #[test]
    fn neither_pipes_nor_links_in_the_place_of_transcripts_are_read() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let (projects, outside) = (dir.path().join("projects"), dir.path().join("outside"));
        std::fs::create_dir_all(&projects).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        let sent = Uuid::new_v4();
        let line = format!("{{\"type\":\"user\",\"uuid\":\"{sent}\"}}\n");
        std::fs::write(outside.join("x.jsonl"), line).unwrap();
        symlink(outside.join("x.jsonl"), projects.join("link.jsonl")).unwrap();
        symlink(&outside, projects.join("folder")).unwrap();
        symlink("/dev/zero", projects.join("endless.jsonl")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let pipe = projects.join("pipe.jsonl");
        rustix::fs::mknodat(rustix::fs::CWD, pipe, FileType::Fifo, mode, 0).unwrap();
        assert!(!holds(&projects, &sent));
        // In the place of the folder itself, too.
        symlink(&outside, dir.path().join("moved")).unwrap();
        assert!(!holds(&dir.path().join("moved"), &sent));
    }
}
