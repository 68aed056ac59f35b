//! A session's events as SSE.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::{
    HeaderMap,
    header::{CACHE_CONTROL, CONTENT_TYPE},
};
use serde_json::json;
use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::ApiError;
use crate::{
    Gateway,
    auth::{
        Credential,
        kubernetes::{Refusal, Verb},
    },
    follow::{CloseReason, Follower, Item},
    metrics::Counted,
    sessions::{Target, View},
    store::{Content, MAX_SEQ, StoredRecord},
};

/// Proxies cut connections that say nothing for a minute.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often it is asked whether the caller may still read.
const RECHECK: Duration = Duration::from_mins(1);
/// Bytes of a long record written at once.
const PIECE: usize = 256 << 10;
/// Items written at once when they are there.
const CHUNK: usize = 64;

/// The seq after which a client wants to go on, by `Last-Event-ID`.
pub fn cursor(headers: &HeaderMap, uid: &str) -> Result<u64, ApiError> {
    let Some(id) = headers.get("last-event-id") else {
        return Ok(0);
    };
    after(id.to_str().unwrap_or("?"), uid)
        .ok_or_else(|| ApiError::bad_request(format!("Last-Event-ID {id:?} is not an event's id: {CURSOR_FORM}")))
}

/// The form of a cursor, for people.
pub(super) const CURSOR_FORM: &str =
    "send the id of the last event as it was received, `<session uid>/<seq>`, or nothing to begin at the start";

/// The seq of a cursor if it is of this session, else the start; `None` when it is no cursor. Browsers send an empty one
/// when they have seen no id.
pub(super) fn after(cursor: &str, uid: &str) -> Option<u64> {
    if cursor.is_empty() {
        return Some(0);
    }
    let (session, seq) = cursor.rsplit_once('/')?;
    let seq: u64 = seq
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| seq.parse().ok())??;
    (!session.is_empty() && seq <= MAX_SEQ).then_some(if session == uid { seq } else { 0 })
}

/// A long record of which pieces are being written.
struct Long {
    seq: u64,
    next: usize,
    length: usize,
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As server-sent events.
    Sse,
    /// Each as one JSON object.
    Json,
}

/// A part of an event, or all of it.
pub(super) struct Part {
    pub(super) bytes: Bytes,
    pub(super) begins: bool,
    pub(super) ends: bool,
}

impl Part {
    fn whole(bytes: Bytes) -> Self {
        Self {
            bytes,
            begins: true,
            ends: true,
        }
    }
}

/// A client that follows a session.
pub(super) struct Client {
    form: Form,
    gateway: Arc<Gateway>,
    follower: Follower,
    target: Target,
    credential: Credential,
    uid: String,
    heartbeat: Interval,
    recheck: Interval,
    long: Option<Long>,
    _counted: Counted,
}

/// The stream as a response.
pub fn response(gateway: Arc<Gateway>, follower: Follower, target: Target, credential: Credential) -> Response<Body> {
    let client = Client::new(Form::Sse, gateway, follower, target, credential);
    let headers = [
        (CONTENT_TYPE.as_str(), "text/event-stream"),
        (CACHE_CONTROL.as_str(), "no-cache, no-transform"),
        // nginx would hold events back.
        ("x-accel-buffering", "no"),
    ];
    (headers, Body::from_stream(chunks(client))).into_response()
}

fn every(period: Duration) -> Interval {
    let mut interval = interval_at(tokio::time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn chunks(client: Client) -> impl Stream<Item = Result<Bytes, Infallible>> {
    futures::stream::unfold(client, |mut client| async move {
        let part = client.next().await?;
        Some((part.bytes, client))
    })
    .ready_chunks(CHUNK)
    .map(|mut texts| {
        if texts.len() == 1 {
            return Ok(texts.remove(0));
        }
        Ok(texts.concat().into())
    })
}

impl Client {
    /// Who is counted as a reader until it is dropped.
    pub(super) fn new(
        form: Form,
        gateway: Arc<Gateway>,
        follower: Follower,
        target: Target,
        credential: Credential,
    ) -> Self {
        Self {
            form,
            uid: follower.session().to_owned(),
            _counted: gateway.metrics.stream(),
            gateway,
            follower,
            target,
            credential,
            heartbeat: every(HEARTBEAT),
            recheck: every(RECHECK),
            long: None,
        }
    }

    /// The next part of what it is told; an empty one says that nothing happened for a while. `None`: the stream is over.
    pub(super) async fn next(&mut self) -> Option<Part> {
        if let Some(long) = self.long.take() {
            return self.piece(long).await;
        }
        let form = self.form;
        loop {
            tokio::select! {
                biased;
                _ = self.recheck.tick() => if self.is_forbidden().await {
                    let close = self.follower.close(CloseReason::Forbidden);
                    return Some(Part::whole(text(form, &self.uid, close)));
                },
                item = self.follower.next() => return Some(match item? {
                    Item::Record(StoredRecord { seq, kind, content: Content::Long(length) }) => {
                        self.long = Some(Long { seq, next: 0, length });
                        let bytes = begin(form, Some((&self.uid, seq)), kind.as_str(), 0).freeze();
                        Part { bytes, begins: true, ends: false }
                    }
                    item => Part::whole(text(form, &self.uid, item)),
                }),
                _ = self.heartbeat.tick() => return Some(Part::whole(match form {
                    Form::Sse => Bytes::from_static(b": heartbeat\n\n"),
                    Form::Json => Bytes::new(),
                })),
            }
        }
    }

    /// The next piece of a long record; `None` ends the stream, and the client asks for the record again.
    async fn piece(&mut self, long: Long) -> Option<Part> {
        let Long { seq, next, length } = long;
        let piece = self.gateway.log.piece(&self.uid, seq, next, PIECE).await;
        let piece = match piece {
            Ok(piece) if !piece.is_empty() => piece,
            Ok(_) => return None,
            Err(error) => {
                tracing::error!(session_uid = self.uid, seq, %error, "stream ended");
                return None;
            }
        };
        let next = next + piece.len();
        let mut text = BytesMut::with_capacity(piece.len() + 2);
        lines(self.form, &mut text, &piece);
        let ends = next >= length;
        if ends {
            text.put(self.form.end());
        } else {
            self.long = Some(Long { seq, next, length });
        }
        Some(Part {
            bytes: text.freeze(),
            begins: false,
            ends,
        })
    }

    async fn is_forbidden(&self) -> bool {
        let gateway = &self.gateway;
        let answer = async {
            let caller = gateway.authenticate(&self.credential).await?;
            gateway
                .authorize(&caller, Verb::Get, self.target.namespace(), Some(self.target.name()))
                .await
        };
        // An API server that cannot be asked takes no rights away.
        matches!(
            answer.await,
            Err(Refusal::Unauthenticated | Refusal::UnknownKey | Refusal::Forbidden { .. })
        )
    }
}

fn text(form: Form, uid: &str, item: Item) -> Bytes {
    match item {
        Item::Record(StoredRecord { seq, kind, content }) => match content {
            Content::Whole(bytes) => event(form, Some((uid, seq)), kind.as_str(), &bytes),
            // Written in pieces, see `Client::piece`.
            Content::Long(_) => Bytes::new(),
        },
        Item::Delta(delta) => event(form, None, "delta", &delta),
        Item::Phase(View {
            phase,
            reason,
            message,
            attempt,
            ..
        }) => {
            let body = json!({"phase": phase, "reason": reason, "message": message, "attempt": attempt});
            event(form, None, "phase", body.to_string().as_bytes())
        }
        Item::Gap(known) => {
            let body = json!({"known": known, "final": "unknown", "cursor": format!("{uid}/{known}")});
            event(form, None, "gap", body.to_string().as_bytes())
        }
        Item::Removed { from, to } => {
            let body = json!({"from": from, "to": to, "reason": "removed"});
            event(form, Some((uid, to)), "gap", body.to_string().as_bytes())
        }
        Item::Close(close) => {
            let body = json!({"reason": close.reason.as_str(), "lastSeq": close.last});
            event(form, None, "close", body.to_string().as_bytes())
        }
    }
}

/// One event.
fn event(form: Form, id: Option<(&str, u64)>, name: &str, data: &[u8]) -> Bytes {
    let mut text = begin(form, id, name, data.len());
    lines(form, &mut text, data);
    text.put(form.end());
    text.freeze()
}

impl Form {
    /// What ends an event.
    fn end(self) -> &'static [u8] {
        match self {
            Self::Sse => b"\n\n",
            Self::Json => b"}",
        }
    }
}

fn begin(form: Form, id: Option<(&str, u64)>, name: &str, length: usize) -> BytesMut {
    let mut text = BytesMut::with_capacity(length + 96);
    let id = id.map(|(uid, seq)| format!("{uid}/{seq}"));
    let head = match (form, id) {
        (Form::Sse, Some(id)) => format!("id: {id}\nevent: {name}\ndata: "),
        (Form::Sse, None) => format!("event: {name}\ndata: "),
        (Form::Json, Some(id)) => format!(r#"{{"event":"{name}","id":"{id}","data":"#),
        (Form::Json, None) => format!(r#"{{"event":"{name}","data":"#),
    };
    text.put(head.as_bytes());
    text
}

/// JSON needs no line breaks, but may have them between its tokens; in a server-sent event a line break would end the `data`
/// field, so each line becomes a field of its own, which the client joins again.
fn lines(form: Form, text: &mut BytesMut, data: &[u8]) {
    if form == Form::Json {
        text.put(data);
        return;
    }
    for (number, line) in data.split(|byte| matches!(byte, b'\n' | b'\r')).enumerate() {
        if number > 0 {
            text.put(&b"\ndata: "[..]);
        }
        text.put(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_its_id_its_kind_and_its_bytes() {
        let text = event(Form::Sse, Some(("u-1", 7)), "cli", br#"{"seq":7,  "x":1.0}"#);
        assert_eq!(text, "id: u-1/7\nevent: cli\ndata: {\"seq\":7,  \"x\":1.0}\n\n");
    }

    #[test]
    fn a_line_break_in_a_record_cannot_begin_an_event_of_its_own() {
        let text = event(Form::Sse, None, "cli", b"{\n\nevent: close\r\rdata: {}}");
        let text = std::str::from_utf8(&text).unwrap();
        assert!(
            text.lines()
                .skip(1)
                .all(|line| line.is_empty() || line.starts_with("data: ")),
            "{text}"
        );
        assert_eq!(text.matches("\n\n").count(), 1, "{text}");
    }

    #[test]
    fn a_cursor_of_another_session_means_from_the_start_and_garbage_is_refused() {
        let headers = |id: &str| HeaderMap::from_iter([("last-event-id".parse().unwrap(), id.parse().unwrap())]);
        assert_eq!(cursor(&headers("u-1/41"), "u-1"), Ok(41));
        assert_eq!(cursor(&headers("u-2/41"), "u-1"), Ok(0));
        assert_eq!(cursor(&headers(""), "u-1"), Ok(0));
        assert_eq!(cursor(&HeaderMap::new(), "u-1"), Ok(0));
        for garbage in [
            "41",
            "u-1/x",
            "u-1/-1",
            "u-1/+1",
            "/41",
            "u-1/",
            "u-1/99999999999999999999",
        ] {
            let refusal = format!("{:?}", cursor(&headers(garbage), "u-1").unwrap_err());
            assert!(refusal.contains("<session uid>/<seq>"), "{garbage}: {refusal}");
        }
    }
}
