//! Files of a session's workspace, through its runner: no second pod opens the volume.

use std::{ops::Range, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Path, Request, State},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::{
    HeaderMap, Method, StatusCode,
    header::{ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE},
};
use jiff::Timestamp;
use protocol::frame::{FileChunk, FileEntry, FileKind, FileOperation, MAX_CHUNK, NOT_FOUND, REFUSED};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use super::{
    ApiError, Get, OfSession, Update,
    forward::{Place, to_the_runner},
    openapi::{self, Api},
    projects::existing,
};
use crate::{
    Gateway,
    files::{Conversation, Error, Reply, WINDOW},
    live::Channel,
    sessions::{Target, View},
};

/// Longest path, bytes.
const MAX_PATH: usize = 4096;
/// Longest file that can be written.
const MAX_WRITE: u64 = 1 << 30;
/// Longest list of a folder.
const MAX_LIST: usize = 4 << 20;
/// How long a client may take for its next bytes.
const CLIENT_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);

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
    let write = openapi::put("writeWorkspace", "Write a file of the workspace", write)
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
    OfSession { target, .. }: OfSession<Get>,
    request: Request,
) -> Result<Response, ApiError> {
    let (channel, view, _) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    list(channel, "").await.map_err(|error| refusal(error, &target, &view))
}

async fn read(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Get>,
    Path((.., path)): Path<(String, String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = checked(&path)?;
    let (channel, view, request) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    let refused = |error| refusal(error, &target, &view);
    let entry = stat(channel.clone(), &path).await.map_err(refused)?;
    match entry.kind {
        FileKind::Folder => list(channel, &path).await.map_err(refused),
        FileKind::File => file(channel, path, entry.size, request.headers()),
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

async fn stat(channel: Arc<Channel>, path: &str) -> Result<FileEntry, Error> {
    let json = whole(channel, FileOperation::Stat, path).await?;
    serde_json::from_slice(&json).map_err(|error| Error::Garbled(error.to_string()))
}

async fn list(channel: Arc<Channel>, path: &str) -> Result<Response, Error> {
    let json = whole(channel, FileOperation::List, path).await?;
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

/// The whole answer to a request of which the answer is short.
async fn whole(channel: Arc<Channel>, op: FileOperation, path: &str) -> Result<Bytes, Error> {
    let mut conversation = Conversation::begin(channel, op, path, 0, 0).await?;
    let mut answer = BytesMut::new();
    loop {
        let (bytes, eof) = chunk(conversation.reply().await?, answer.len() as u64)?;
        answer.extend_from_slice(&bytes);
        if answer.len() > MAX_LIST {
            return Err(Error::Refused("the folder has too many entries to list".to_owned()));
        }
        if eof {
            return Ok(answer.freeze());
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

fn file(channel: Arc<Channel>, path: String, size: u64, headers: &HeaderMap) -> Result<Response, ApiError> {
    let asked = headers.get(RANGE).and_then(|range| range.to_str().ok());
    let range = match asked.map(|asked| ranged(asked, size)) {
        None | Some(Asked::All) => None,
        Some(Asked::Part(range)) => Some(range),
        Some(Asked::Nothing) => {
            let mut response = ApiError::no_such_range(format!("the file has {size} bytes")).into_response();
            if let Ok(value) = format!("bytes */{size}").parse() {
                response.headers_mut().insert(CONTENT_RANGE, value);
            }
            return Ok(response);
        }
    };
    let wanted = range.clone().unwrap_or(0..size);
    let mut response = Response::builder()
        .header(ACCEPT_RANGES, "bytes")
        .header(CONTENT_TYPE, "application/octet-stream")
        // What an agent wrote must not run in the browser of who looks at it.
        .header(CONTENT_DISPOSITION, "attachment")
        .header("x-content-type-options", "nosniff")
        .header(CONTENT_LENGTH, wanted.end - wanted.start);
    if let Some(Range { start, end }) = range {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(CONTENT_RANGE, format!("bytes {start}-{}/{size}", end - 1));
    }
    response
        .body(Body::from_stream(pieces(channel, path, wanted)))
        .map_err(|error| ApiError::unavailable(error.to_string()))
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Everything: it is not understood, or has several ranges.
    All,
    Part(Range<u64>),
    /// Bytes that there are not.
    Nothing,
}

fn ranged(header: &str, size: u64) -> Asked {
    let Some((first, last)) = header
        .strip_prefix("bytes=")
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Asked::All;
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(length)) if first.is_empty() => size.saturating_sub(length)..size,
        _ => return Asked::All,
    };
    if range.is_empty() {
        Asked::Nothing
    } else {
        Asked::Part(range)
    }
}

/// A file's bytes, asked for as the client takes them: a window at a time.
fn pieces(channel: Arc<Channel>, path: String, range: Range<u64>) -> impl Stream<Item = Result<Bytes, Error>> {
    let state = (channel, path, range, None::<Conversation>);
    futures::stream::try_unfold(state, |(channel, path, mut range, conversation)| async move {
        if range.is_empty() {
            return Ok(None);
        }
        let mut conversation = if let Some(conversation) = conversation {
            conversation
        } else {
            let length = WINDOW.min(range.end - range.start);
            Conversation::begin(channel.clone(), FileOperation::Read, &path, range.start, length).await?
        };
        let (bytes, eof) = chunk(conversation.reply().await?, range.start)?;
        if bytes.is_empty() || bytes.len() as u64 > range.end - range.start {
            // Its length was said already: the body is cut off, so that the client sees it.
            return Err(Error::Garbled("the file has changed while it was read".to_owned()));
        }
        range.start += bytes.len() as u64;
        let state = (channel, path, range, (!eof).then_some(conversation));
        Ok(Some((bytes.into(), state)))
    })
}

async fn write(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, .. }: OfSession<Update>,
    Path((.., path)): Path<(String, String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = checked(&path)?;
    let (channel, view, request) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    let conversation = Conversation::begin(channel, FileOperation::Write, &path, 0, 0).await;
    let mut conversation = conversation.map_err(|error| refusal(error, &target, &view))?;
    let size = upload(&mut conversation, (*request).into_body(), &target, &view).await?;
    loop {
        match conversation.reply().await {
            Ok(Reply::Result(result)) => {
                return match result.error {
                    None => Ok(Json(Written { path, size }).into_response()),
                    Some(error) => Err(refusal(Error::Refused(error), &target, &view)),
                };
            }
            Ok(Reply::Chunk(FileChunk { error: Some(error), .. })) => {
                return Err(refusal(Error::Refused(error), &target, &view));
            }
            Ok(Reply::Chunk(_)) => {}
            Err(error) => return Err(refusal(error, &target, &view)),
        }
    }
}

/// Passes a body on as it comes. Who goes away before its end has written nothing: the last piece says that it is.
async fn upload(conversation: &mut Conversation, body: Body, target: &Target, view: &View) -> Result<u64, ApiError> {
    let mut body = body.into_data_stream();
    let mut sent = 0;
    loop {
        let next = timeout(CLIENT_WITHIN, body.next())
            .await
            .map_err(|_| ApiError::request_timeout("the body stopped arriving: the file is as it was"))?;
        let eof = next.is_none();
        let bytes = next
            .transpose()
            .map_err(|error| ApiError::bad_request(format!("the body broke off: {error}")))?
            .unwrap_or_default();
        if sent + bytes.len() as u64 > MAX_WRITE {
            return Err(ApiError::too_large(format!(
                "a file may have at most {MAX_WRITE} bytes"
            )));
        }
        for piece in bytes.chunks(MAX_CHUNK) {
            let chunk = conversation.chunk(sent, STANDARD.encode(piece), false).await;
            chunk.map_err(|error| refusal(error, target, view))?;
            sent += piece.len() as u64;
        }
        if eof {
            let last = conversation.chunk(sent, String::new(), true).await;
            last.map_err(|error| refusal(error, target, view))?;
            return Ok(sent);
        }
    }
}

/// The runner's words for what is not there, and for what it will not open.
fn refusal(error: Error, target: &Target, view: &View) -> ApiError {
    match error {
        Error::NoRunner => ApiError::conflict(no_runner(target, view)),
        Error::Busy => ApiError::too_many(error.to_string(), 1),
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

    #[rstest]
    #[case("bytes=0-3", Asked::Part(0..4))]
    #[case("bytes=8-", Asked::Part(8..10))]
    #[case("bytes=-3", Asked::Part(7..10))]
    #[case("bytes=-30", Asked::Part(0..10))]
    #[case("bytes=8-99999999999999", Asked::Part(8..10))]
    #[case("bytes=10-", Asked::Nothing)]
    #[case("bytes=-0", Asked::Nothing)]
    #[case("bytes=5-3", Asked::All)]
    #[case("bytes=0-1,4-5", Asked::All)]
    #[case("lines=1-2", Asked::All)]
    fn a_range_is_of_the_bytes_that_there_are(#[case] header: &str, #[case] expected: Asked) {
        assert_eq!(ranged(header, 10), expected);
    }
}
