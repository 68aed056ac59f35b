//! A session's events as SSE.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{FutureExt as _, Stream};
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
        kubernetes::{Caller, Refusal, Verb},
    },
    follow::{CloseReason, Follower, Gap, Item},
    metrics::Counted,
    room::Tenant,
    sessions::{Target, View},
    store::{Content, MAX_SEQ, StoredRecord},
};

/// Proxies cut connections that say nothing for a minute.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often it is asked whether the caller may still read.
const RECHECK: Duration = Duration::from_mins(1);
/// Text written at once for which no room is needed: no number of readers keeps another from reading.
const LEAST: usize = 4 << 10;
/// Text written at once when there is room for it.
const CHUNK: usize = 64 << 10;
/// The same of a record that is too long for a page.
const PIECE: usize = 256 << 10;
/// What the beginning of an event may take.
const HEAD: usize = 256;

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

/// An event of which pieces are being written.
struct Rest {
    source: Source,
    next: usize,
    length: usize,
}

#[derive(Clone)]
enum Source {
    Here(Bytes),
    /// In the record of this seq.
    Stored(u64),
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
    rest: Option<Rest>,
    /// A record could not be written to its end: nothing may follow.
    broken: bool,
    room: Tenant,
    _counted: Counted,
}

/// The stream as a response.
pub(super) fn response(client: Client) -> Response<Body> {
    let headers = [
        (CONTENT_TYPE.as_str(), "text/event-stream"),
        (CACHE_CONTROL.as_str(), "no-cache, no-transform"),
        // nginx would hold events back.
        ("x-accel-buffering", "no"),
    ];
    (headers, Body::from_stream(chunks(client))).into_response()
}

/// Ticks from one period on.
pub(super) fn every(period: Duration) -> Interval {
    let mut interval = interval_at(tokio::time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn chunks(client: Client) -> impl Stream<Item = Result<Bytes, Infallible>> {
    futures::stream::unfold(client, |mut client| async move {
        let chunk = client.chunk().await?;
        Some((Ok(chunk), client))
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
        caller: &Caller,
    ) -> Self {
        Self {
            form,
            room: gateway.streams.of(&caller.identity.user),
            uid: follower.session().to_owned(),
            _counted: gateway.metrics.stream(),
            gateway,
            follower,
            target,
            credential,
            heartbeat: every(HEARTBEAT),
            recheck: every(RECHECK),
            rest: None,
            broken: false,
        }
    }

    /// What is there of the next parts, as far as there is room for it.
    async fn chunk(&mut self) -> Option<Bytes> {
        let first = self.next(LEAST).await?.bytes;
        if !self.is_ready() || first.len() > LEAST {
            return Some(first);
        }
        let (most, room) = self.room.length(&[CHUNK], 1, LEAST);
        let mut text = BytesMut::from(&first[..]);
        while text.len() + HEAD < most && self.is_ready() {
            let Some(Some(part)) = self.next(most - text.len() - HEAD).now_or_never() else {
                break;
            };
            text.extend_from_slice(&part.bytes);
        }
        let text = text.freeze();
        Some(match room {
            Some(room) => room.hold(text),
            None => text,
        })
    }

    fn is_ready(&self) -> bool {
        match &self.rest {
            Some(rest) => matches!(rest.source, Source::Here(_)),
            None => self.follower.is_ready(),
        }
    }

    /// The next part of what it is told, of hardly more than `most` bytes unless it holds room for them; an empty one says
    /// that nothing happened for a while. `None`: the stream is over. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self, most: usize) -> Option<Part> {
        if self.rest.is_some() {
            return self.piece(most).await;
        }
        if self.broken {
            return None;
        }
        loop {
            tokio::select! {
                biased;
                _ = self.recheck.tick() => if self.is_forbidden().await {
                    let close = self.follower.close(CloseReason::Forbidden);
                    return Some(self.begin(close, most));
                },
                item = self.follower.next() => return Some(self.begin(item?, most)),
                _ = self.heartbeat.tick() => return Some(Part::whole(match self.form {
                    Form::Sse => Bytes::from_static(b": heartbeat\n\n"),
                    Form::Json => Bytes::new(),
                })),
            }
        }
    }

    /// An event, or the beginning of one that is written in pieces.
    fn begin(&mut self, item: Item, most: usize) -> Part {
        let (seq, name, data) = match item {
            Item::Record(StoredRecord { seq, kind, content }) => match content {
                Content::Whole(bytes) => (Some(seq), kind.as_str(), bytes),
                Content::Long(length) => return self.begin_long(Some(seq), kind.as_str(), Source::Stored(seq), length),
            },
            other => told(&self.uid, other),
        };
        if data.len() > most {
            let length = data.len();
            return self.begin_long(seq, name, Source::Here(data), length);
        }
        let id = seq.map(|seq| (self.uid.as_str(), seq));
        Part::whole(event(self.form, id, name, &data))
    }

    fn begin_long(&mut self, seq: Option<u64>, name: &str, source: Source, length: usize) -> Part {
        self.rest = Some(Rest {
            source,
            next: 0,
            length,
        });
        let id = seq.map(|seq| (self.uid.as_str(), seq));
        Part {
            bytes: begin(self.form, id, name, 0).freeze(),
            begins: true,
            ends: false,
        }
    }

    /// The next piece; `None` ends the stream, and the client asks for the record again.
    async fn piece(&mut self, most: usize) -> Option<Part> {
        let Some(Rest { source, next, length }) = &self.rest else {
            return None;
        };
        let (source, next, length) = (source.clone(), *next, *length);
        let (piece, room) = match source {
            Source::Here(bytes) => (bytes.slice(next..length.min(next + most.max(1))), None),
            Source::Stored(seq) => {
                // A frame of a socket is copied into its buffer, which stays as long as the longest.
                let lengths: &[usize] = if self.form == Form::Sse { &[PIECE] } else { &[] };
                let (most, room) = self.room.length(lengths, 1, LEAST);
                (self.read(seq, next, most).await, room)
            }
        };
        if piece.is_empty() {
            (self.rest, self.broken) = (None, true);
            return None;
        }
        let end = next + piece.len();
        let mut text = BytesMut::with_capacity(piece.len() + 2);
        lines(self.form, &mut text, &piece);
        let ends = end >= length;
        if ends {
            text.put(self.form.end());
            self.rest = None;
        } else if let Some(rest) = &mut self.rest {
            rest.next = end;
        }
        let bytes = text.freeze();
        Some(Part {
            bytes: match room {
                Some(room) => room.hold(bytes),
                None => bytes,
            },
            begins: false,
            ends,
        })
    }

    /// Bytes of a record; none when they are not there any more, or cannot be read.
    async fn read(&self, seq: u64, from: usize, length: usize) -> Bytes {
        let piece = self.gateway.log.piece(&self.uid, seq, from, length).await;
        piece.unwrap_or_else(|error| {
            tracing::error!(session_uid = self.uid, seq, %error, "stream ended");
            Bytes::new()
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

/// What is no record: the seq of its id, its name and its data.
fn told(uid: &str, item: Item) -> (Option<u64>, &'static str, Bytes) {
    let (seq, name, body) = match item {
        Item::Delta(delta) => return (None, "delta", delta),
        // Told by itself.
        Item::Record(StoredRecord { seq, kind, .. }) => return (Some(seq), kind.as_str(), Bytes::new()),
        Item::Phase(View {
            phase,
            reason,
            message,
            attempt,
            ..
        }) => {
            let body = json!({"phase": phase, "reason": reason, "message": message, "attempt": attempt});
            (None, "phase", body)
        }
        Item::Gap(Gap { known, last }) => {
            let last = last.map_or_else(|| json!("unknown"), |last| json!(last));
            let body = json!({"known": known, "final": last, "cursor": format!("{uid}/{known}")});
            (None, "gap", body)
        }
        Item::Removed { from, to } => (Some(to), "gap", json!({"from": from, "to": to, "reason": "removed"})),
        Item::Close(close) => {
            let body = json!({"reason": close.reason.as_str(), "lastSeq": close.last});
            (None, "close", body)
        }
    };
    (seq, name, body.to_string().into())
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
