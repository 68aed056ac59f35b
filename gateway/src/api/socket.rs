//! A session's events on a WebSocket: the objects of the server-sent events, one a message.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Extension, Query, Request, State, rejection::QueryRejection},
    response::Response,
};
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use hyper_util::rt::TokioIo;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{
            CloseFrame, Role, WebSocketConfig,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};

use super::{
    ApiError, Get, OfSession,
    events::{CURSOR_FORM, Client, Form, Part, after},
    messages::wrong_query,
    openapi::{self, Api},
    projects::{existing, follower},
};
use crate::{Gateway, ingest::upgrade, server::Place, sessions::View};

/// Name of what is spoken, for pages: they must offer it beside their token.
pub const EVENTS: &str = "events.agentic.v1";
/// Longest message that a client may send: it has nothing to say but pongs.
const MAX_SENT: usize = 4 << 10;
/// How long a client may take for a message: that of a connection that nobody reads.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);
/// Pings without a word from the client after which it is taken for gone.
const MAX_UNANSWERED: u32 = 3;
/// How long a close may take to be answered.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// Bytes of a message in one frame: the buffer in which frames are written stays as long as the longest.
const PART: usize = 4 << 10;
/// What a connection costs at least.
const READ_BUFFER: usize = 4 << 10;

/// Where to begin.
#[derive(Deserialize, JsonSchema)]
struct Begin {
    /// The `id` of the last message that was received; from the start when absent.
    cursor: Option<String>,
}

/// The route.
pub fn routes(api: Api) -> Api {
    let follow = openapi::get("followSessionSocket", "The events of a session on a WebSocket", connect)
        .says(
            "Messages are `{\"event\": …, \"id\": …, \"data\": …}` with the events of `followSession`; the last one has the event \
             `close`. What a client sends is not looked at. Pages, which cannot set headers, offer two subprotocols: \
             `events.agentic.v1`, and `base64url.bearer.authorization.k8s.io.` with their token in base64url behind it.",
        )
        .query::<Begin>()
        .answers_with(101, "The socket", &[])
        .refuses(&[400]);
    api.route("/api/projects/{project}/agentic-sessions/{session}/ws", [follow])
}

async fn connect(
    State(gateway): State<Arc<Gateway>>,
    OfSession {
        target,
        credential,
        caller,
        ..
    }: OfSession<Get>,
    query: Result<Query<Begin>, QueryRejection>,
    place: Option<Extension<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let Query(Begin { cursor }) = query.map_err(wrong_query)?;
    let view = View::from(&existing(&gateway, &target).await?);
    let cursor = cursor.as_deref().unwrap_or_default();
    let seq = after(cursor, &view.uid)
        .ok_or_else(|| ApiError::bad_request(format!("cursor {cursor:?} is none: {CURSOR_FORM}")))?;
    let (response, upgrade) = upgrade::accept(request, EVENTS)?;
    let held = (gateway.tasks.token(), place);
    let follower = follower(&gateway, &target, view, seq, &caller.identity.user);
    let client = Client::new(Form::Json, gateway, follower, target, credential, &caller);
    tokio::spawn(async move {
        let _held = held;
        let Ok(upgraded) = upgrade.await else { return };
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .max_message_size(Some(MAX_SENT))
            .max_frame_size(Some(MAX_SENT));
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
        serve(client, socket).await;
    });
    Ok(response)
}

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

async fn serve(mut client: Client, mut socket: Socket) {
    let mut unanswered = 0;
    loop {
        tokio::select! {
            part = client.next(PART) => {
                let Some(part) = part else { break };
                unanswered += u32::from(part.bytes.is_empty());
                if unanswered > MAX_UNANSWERED || !sent(&mut socket, part).await {
                    return;
                }
            }
            message = socket.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => unanswered = 0,
            },
        }
    }
    let close = CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    let closed = async {
        let _ = socket.close(Some(close)).await;
        while let Some(Ok(_)) = socket.next().await {}
    };
    let _ = timeout(CLOSE_WITHIN, closed).await;
}

/// Writes a part of an event as a frame: a long record is one message of many frames, never in memory as a whole.
async fn sent(socket: &mut Socket, part: Part) -> bool {
    let Part { bytes, begins, ends } = part;
    let message = if bytes.is_empty() {
        Message::Ping(Bytes::new())
    } else {
        let data = if begins { Data::Text } else { Data::Continue };
        Message::Frame(Frame::message(bytes, OpCode::Data(data), ends))
    };
    matches!(timeout(TAKEN_WITHIN, socket.send(message)).await, Ok(Ok(())))
}
