//! The API server's own record of all writes: the one clock for everybody who writes.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Seek as _, SeekFrom},
    path::PathBuf,
};

use anyhow::Result;
use jiff::Timestamp;
use serde::Deserialize;

/// A write that was answered with success.
#[derive(Clone, Debug)]
pub struct Write {
    /// When it was asked for.
    pub asked: Timestamp,
    /// When it was answered.
    pub at: Timestamp,
    /// Who wrote.
    pub user: String,
    /// Verb, such as `create`.
    pub verb: String,
    /// Resource, with its subresource behind a slash.
    pub resource: String,
    /// Name of the object.
    pub name: String,
}

impl Write {
    /// Neither of those that are counted apart.
    pub fn counts(&self) -> bool {
        self.resource != "events" && self.resource != "leases"
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    request_received_timestamp: Timestamp,
    stage_timestamp: Timestamp,
    verb: String,
    user: User,
    object_ref: Option<Object>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

#[derive(Deserialize, Default)]
struct Object {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    subresource: String,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Status {
    code: u16,
}

/// Reads what was written since it read last.
pub struct Audit {
    file: PathBuf,
    offset: u64,
}

impl Audit {
    /// From the log's beginning.
    pub fn new(file: PathBuf) -> Self {
        Self { file, offset: 0 }
    }

    /// All successful writes since the last call.
    pub fn read(&mut self) -> Result<Vec<Write>> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(file);
        let (mut writes, mut line) = (Vec::new(), String::new());
        while reader.read_line(&mut line)? > 0 && line.ends_with('\n') {
            self.offset += line.len() as u64;
            writes.extend(serde_json::from_str(&line).ok().and_then(write));
            line.clear();
        }
        Ok(writes)
    }
}

fn write(entry: Entry) -> Option<Write> {
    let status = entry.response_status.filter(|status| status.code < 300);
    let object = entry.object_ref.unwrap_or_default();
    status.map(|_| Write {
        asked: entry.request_received_timestamp,
        at: entry.stage_timestamp,
        user: entry.user.username,
        verb: entry.verb,
        resource: if object.subresource.is_empty() {
            object.resource
        } else {
            format!("{}/{}", object.resource, object.subresource)
        },
        name: object.name,
    })
}
