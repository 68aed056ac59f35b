//! Writing a file of a workspace.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Path, Request, State},
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures::StreamExt as _;
use protocol::frame::{FileChunk, FileOperation};
use tokio::time::timeout;

use super::{
    super::{ApiError, OfSession, Update},
    Found, Written, checked, found, refusal,
};
use crate::{
    Gateway,
    files::{Conversation, Error, Question, Reply},
    room::Tenant,
    sessions::{Target, View},
};

/// Longest file that can be written.
const MAX_WRITE: u64 = 1 << 30;
/// Bytes sent at once: the buffer of a runner's socket stays as long as its longest frame.
const PIECE: usize = 32 << 10;
/// What a byte of a file takes here, until it has left for the runner.
const COPIES: usize = 3;
/// How long a client may take for its next bytes.
const CLIENT_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);

pub(super) async fn write(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Update>,
    Path((.., path)): Path<(String, String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = checked(&path)?;
    let (channel, view, request) = match found(&gateway, &target, request).await? {
        Found::Here(channel, view, request) => (channel, view, request),
        Found::Elsewhere(answer) => return Ok(answer),
    };
    let question = Question {
        op: FileOperation::Write,
        path: &path,
        offset: 0,
        length: 0,
        most: 0,
    };
    let conversation = Conversation::begin(channel, question).await;
    let room = gateway.streams.of(&caller.identity.user);
    let mut conversation = conversation.map_err(|error| refusal(error, &target, &view))?;
    let size = upload(&conversation, &room, (*request).into_body())
        .await
        .map_err(|error| error.into_answer(&target, &view))?;
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

/// Why an upload ends early.
enum Broken {
    Body(ApiError),
    Runner(Error),
}

impl Broken {
    fn into_answer(self, target: &Target, view: &View) -> ApiError {
        match self {
            Self::Body(error) => error,
            Self::Runner(error) => refusal(error, target, view),
        }
    }
}

/// Passes a body on as it comes. Who goes away before its end has written nothing: the last piece says that it is.
async fn upload(conversation: &Conversation, room: &Tenant, body: Body) -> Result<u64, Broken> {
    let mut body = body.into_data_stream();
    let mut sent = 0;
    loop {
        let next = timeout(CLIENT_WITHIN, body.next()).await.map_err(|_| {
            let why = "the body stopped arriving: the file is as it was";
            Broken::Body(ApiError::request_timeout(why))
        })?;
        let eof = next.is_none();
        let bytes = next
            .transpose()
            .map_err(|error| Broken::Body(ApiError::bad_request(format!("the body broke off: {error}"))))?
            .unwrap_or_default();
        if sent + bytes.len() as u64 > MAX_WRITE {
            let why = format!("a file may have at most {MAX_WRITE} bytes");
            return Err(Broken::Body(ApiError::too_large(why)));
        }
        for piece in bytes.chunks(PIECE) {
            let taken = timeout(CLIENT_WITHIN, room.take(piece.len() * COPIES)).await;
            let taken = taken.map_err(|_| Broken::Runner(Error::NoRoom))?;
            let chunk = conversation.chunk(sent, STANDARD.encode(piece), false, Some(taken));
            chunk.await.map_err(Broken::Runner)?;
            sent += piece.len() as u64;
        }
        if eof {
            let last = conversation.chunk(sent, String::new(), true, None).await;
            last.map_err(Broken::Runner)?;
            return Ok(sent);
        }
    }
}
