//! Files of a session's workspace, through its runner: no second pod opens the volume.

mod download;
mod upload;

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, Request, State},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use http::Method;
use jiff::Timestamp;
use protocol::frame::{FileChunk, FileEntry, FileKind, FileOperation, MAX_CHUNK, NOT_FOUND, REFUSED};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use super::{
    ApiError, Get, OfSession,
    forward::{Place, to_the_runner},
    openapi::{self, Api},
    projects::existing,
};
use crate::{
    Gateway,
    files::{Conversation, Error, Question, Reply},
    live::Channel,
    room::{Taken, Tenant},
    sessions::{Target, View},
};

/// Longest path, bytes.
const MAX_PATH: usize = 4096;
/// Longest list of a folder.
const MAX_LIST: usize = 4 << 20;
/// Longest answer that takes no room.
const SHORT: usize = 64 << 10;
/// What a long list takes while it is answered: its bytes, what is read from them and what is made of it.
const LIST: usize = 4 * MAX_LIST;
/// How long a long list may wait for room.
const ROOM_WITHIN: Duration = Duration::from_secs(20);

/// The routes.
pub fn routes(api: Api) -> Api {
    let root = openapi::get("listWorkspace", "The workspace's top folder", root)
        .says("While a runner is there: see `readWorkspace`.")
        .answers::<Folder>(200, "The folder", folder_example())
        .refuses(&[409, 502, 504]);
    let read = openapi::get("readWorkspace", "A file of the workspace, or what is in a folder", read)
        .says(
            "While the session has a runner; else 409 with what to do. Links are not followed. One range of bytes may be \
             asked for.",
        )
        .header("Range", "The bytes wanted of a file.", "bytes=0-1023")
        .answers_with(200, "The file's bytes; of a folder, JSON as of `listWorkspace`", &["application/octet-stream", "application/json"])
        .answers_with(206, "The bytes asked for", &["application/octet-stream"])
        .refuses(&[400, 409, 416, 502, 504]);
    let write = openapi::put("writeWorkspace", "Write a file of the workspace", upload::write)
        .says(
            "The file changes as a whole or not at all; missing folders are made. After 502 or 504 it holds its old or its new \
             bytes: write it again.",
        )
        .bytes()
        .answers::<Written>(200, "The file is on the workspace's disk", json!({"path": "notes/today.md", "size": 12}))
        .refuses(&[409, 502, 504]);
    let workspace = "/api/projects/{project}/agentic-sessions/{session}/workspace";
    api.route(workspace, [root])
        .route(&format!("{workspace}/{{*path}}"), [read, write])
}

/// Whether a request's answer may take as long as its body does: its own steps are bounded.
pub fn is_upload(request: &Request) -> bool {
    request.method() == Method::PUT && request.uri().path().contains("/workspace/")
}

/// What is in a folder.
#[derive(Serialize, JsonSchema)]
struct Folder {
    /// Its files and folders.
    items: Vec<Entry>,
}

/// A file or folder.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Entry {
    /// Its name.
    name: String,
    /// Its path below the workspace.
    path: String,
    /// Whether it is a folder.
    is_dir: bool,
    /// `file`, `folder`, `link` or `other`; only the first two can be read.
    kind: &'static str,
    /// Bytes.
    size: u64,
    /// When it was changed last.
    modified_at: Timestamp,
}

/// That a file was written.
#[derive(Serialize, JsonSchema)]
struct Written {
    /// Its path below the workspace.
    path: String,
    /// Its bytes.
    size: u64,
}

fn folder_example() -> serde_json::Value {
    json!({"items": [{
        "name": "haiku.txt", "path": "haiku.txt", "isDir": false, "kind": "file", "size": 62,
        "modifiedAt": "2026-01-02T03:04:05Z",
    }]})
}

/// A path below the workspace. The runner opens it beneath the workspace and follows no link; what cannot be a path there is
/// refused here already.
fn checked(path: &str) -> Result<String, ApiError> {
    let path = path.strip_suffix('/').unwrap_or(path);
    let wrong = |why: &str| Err(ApiError::bad_request(format!("the path {path:?} {why}")));
    if path.len() > MAX_PATH {
        return wrong("is longer than 4096 bytes");
    }
    if path.contains('\0') {
        return wrong("contains the NUL character");
    }
    if path.starts_with('/') {
        return wrong("must be relative to the workspace");
    }
    if !path.is_empty() && path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return wrong("must not have empty parts, `.` or `..`");
    }
    Ok(path.to_owned())
}

async fn root(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Get>,
    request: Request,
) -> Result<Response, ApiError> {
    let (channel, view, _) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    let room = gateway.answers.of(&caller.identity.user);
    let folder = list(channel, &room, "").await;
    folder.map_err(|error| refusal(error, &target, &view))
}

async fn read(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Get>,
    Path((.., path)): Path<(String, String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = checked(&path)?;
    let (channel, view, request) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    let refused = |error| refusal(error, &target, &view);
    let user = &caller.identity.user;
    let answers = gateway.answers.of(user);
    let entry = stat(channel.clone(), &answers, &path).await.map_err(refused)?;
    match entry.kind {
        FileKind::Folder => list(channel, &answers, &path).await.map_err(refused),
        FileKind::File => download::file(channel, gateway.streams.of(user), path, entry.size, request.headers()),
        FileKind::Link | FileKind::Other => Err(ApiError::conflict(format!(
            "{path:?} is no file: links are not followed, and sockets, pipes and devices cannot be read"
        ))),
    }
}

enum Found {
    /// The session, and the way to its runner if there is one.
    Here(Arc<Channel>, View, Box<Request>),
    /// Another gateway has the runner, and answered.
    Elsewhere(Response),
}

async fn found(gateway: &Gateway, target: &Target, request: Request) -> Result<Found, ApiError> {
    let view = View::from(&existing(gateway, target).await?);
    let channel = gateway.live.channel(&view.uid);
    Ok(match to_the_runner(gateway, &channel, &view.uid, request).await? {
        Place::Here(request) => Found::Here(channel, view, request),
        Place::Elsewhere(answer) => Found::Elsewhere(answer),
    })
}

async fn stat(channel: Arc<Channel>, room: &Tenant, path: &str) -> Result<FileEntry, Error> {
    let (json, _room) = whole(channel, room, FileOperation::Stat, path, SHORT).await?;
    serde_json::from_slice(&json).map_err(|error| Error::Garbled(error.to_string()))
}

async fn list(channel: Arc<Channel>, room: &Tenant, path: &str) -> Result<Response, Error> {
    let (json, _room) = whole(channel, room, FileOperation::List, path, MAX_LIST).await?;
    let entries: Vec<FileEntry> = serde_json::from_slice(&json).map_err(|error| Error::Garbled(error.to_string()))?;
    let items = entries.into_iter().map(|entry| {
        let FileEntry {
            name,
            kind,
            size,
            modified,
        } = entry;
        Entry {
            path: if path.is_empty() {
                name.clone()
            } else {
                format!("{path}/{name}")
            },
            name,
            is_dir: kind == FileKind::Folder,
            kind: match kind {
                FileKind::File => "file",
                FileKind::Folder => "folder",
                FileKind::Link => "link",
                FileKind::Other => "other",
            },
            size,
            modified_at: modified,
        }
    });
    let folder = Folder { items: items.collect() };
    Ok(Json(folder).into_response())
}

/// The whole answer to a request of which the answer is short, and its room if it is not.
async fn whole(
    channel: Arc<Channel>,
    room: &Tenant,
    op: FileOperation,
    path: &str,
    most: usize,
) -> Result<(Bytes, Option<Taken>), Error> {
    let question = Question {
        op,
        path,
        offset: 0,
        length: 0,
        most,
    };
    let mut conversation = Conversation::begin(channel, question).await?;
    let (mut answer, mut taken) = (BytesMut::new(), None);
    loop {
        let (bytes, eof) = chunk(conversation.reply().await?, answer.len() as u64)?;
        answer.extend_from_slice(&bytes);
        if answer.len() > most {
            return Err(Error::Refused("the folder has too many entries to list".to_owned()));
        }
        if answer.len() > SHORT && taken.is_none() {
            let room = timeout(ROOM_WITHIN, room.take(LIST)).await;
            taken = Some(room.map_err(|_| Error::NoRoom)?);
        }
        if eof {
            return Ok((answer.freeze(), taken));
        }
    }
}

/// The bytes of a reply that must begin at `offset`, and whether it is the last.
fn chunk(reply: Reply, offset: u64) -> Result<(Vec<u8>, bool), Error> {
    match reply {
        Reply::Chunk(FileChunk { error: Some(error), .. }) => Err(Error::Refused(error)),
        Reply::Chunk(FileChunk {
            offset: at, data, eof, ..
        }) => {
            if at != offset && !data.is_empty() {
                return Err(Error::Garbled(format!("bytes from {at} on, not from {offset} on")));
            }
            let bytes = STANDARD
                .decode(data)
                .map_err(|error| Error::Garbled(error.to_string()))?;
            if bytes.len() > MAX_CHUNK || (bytes.is_empty() && !eof) {
                return Err(Error::Garbled(format!("a piece of {} bytes", bytes.len())));
            }
            Ok((bytes, eof))
        }
        Reply::Result(result) => Err(Error::Refused(
            result.error.unwrap_or_else(|| "the runner says it is done".to_owned()),
        )),
    }
}

/// The runner's words for what is not there, and for what it will not open.
fn refusal(error: Error, target: &Target, view: &View) -> ApiError {
    match error {
        Error::NoRunner => ApiError::conflict(no_runner(target, view)),
        Error::Busy | Error::NoRoom => ApiError::too_many(error.to_string(), 1),
        Error::Silent => ApiError::gateway_timeout(error.to_string()),
        Error::Left | Error::Garbled(_) => ApiError::bad_gateway(error.to_string()),
        Error::Refused(why) if why.starts_with(NOT_FOUND) => ApiError::not_found(why),
        Error::Refused(why) if why.starts_with(REFUSED) => ApiError::bad_request(why),
        Error::Refused(why) => ApiError::conflict(why),
    }
}

fn no_runner(target: &Target, view: &View) -> String {
    let start = format!(
        "POST /api/projects/{}/agentic-sessions/{}/start",
        target.namespace(),
        target.name()
    );
    if view.phase.is_terminal() && !view.starting {
        format!(
            "{target} is {} and has no runner that could open its workspace: start its next run with {start}, or keep it \
             running with `interactive: true`",
            view.phase
        )
    } else {
        format!(
            "{target} is {} and its runner is not connected (yet): try again when it is Running",
            view.phase
        )
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("a/b.txt", Some("a/b.txt"))]
    #[case("a/", Some("a"))]
    #[case("a..b", Some("a..b"))]
    #[case("../a", None)]
    #[case("a/../../b", None)]
    #[case("./a", None)]
    #[case("/etc/passwd", None)]
    #[case("a//b", None)]
    #[case("a\0b", None)]
    fn a_path_stays_below_the_workspace(#[case] path: &str, #[case] expected: Option<&str>) {
        assert_eq!(checked(path).ok().as_deref(), expected);
    }
}
