//! A session's messages in pages, and its whole transcript as a file.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use protocol::Record;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;

use super::{
    ApiError, Get, OfSession,
    events::{CURSOR_FORM, after},
    openapi::{self, Api, Operation},
    projects::existing,
};
use crate::{
    Gateway,
    project::{
        messages::{Message, long, messages},
        transcript,
    },
    room::{Taken, Tenant},
    sessions::View,
    store::{Content, EventLog, PageSize, StoreError, StoredRecord},
};

/// Records of a page, when the client does not say.
const DEFAULT_LIMIT: usize = 200;
/// Records of a page at most.
const MAX_LIMIT: usize = 1000;
/// Bytes of records read at once.
const PAGE_BYTES: usize = 1 << 20;
/// What a page takes while it is made: its records, what is read from them and what is said of them.
const PAGE_ROOM: usize = 3 * PAGE_BYTES;
/// Bytes of a transcript read at once.
const PIECE: usize = 256 << 10;
/// The same when there is no room: no number of readers keeps another from reading.
const LEAST: usize = 4 << 10;
/// How long a text, whose records must be read as a whole, may wait for room.
const ROOM_WITHIN: Duration = Duration::from_secs(20);

/// Which messages.
#[derive(Deserialize, JsonSchema)]
struct Page {
    /// `cursor` of the page before; from the start when absent.
    after: Option<String>,
    /// Records to look at, at most 1000; 200 when absent.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<usize>,
}

/// Messages of a session.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct MessagePage {
    /// The messages, in order.
    messages: Vec<Message>,
    /// Where the next page begins: give it as `after`, or to the events as `Last-Event-ID`.
    cursor: String,
    /// More are stored already.
    has_more: bool,
}

/// Which form of the transcript.
#[derive(Deserialize, JsonSchema)]
struct Form {
    /// `jsonl` (every record as it was written, one a line) or `text` (for people); `jsonl` when absent.
    format: Option<Format>,
}

#[derive(Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Jsonl,
    Text,
}

/// The operation that lists messages.
pub(super) fn list() -> Operation {
    openapi::get("listMessages", "What people and agent said, and what was done", page)
        .says("A page of at most 1 MiB of records. The events give the same as it happens.")
        .query::<Page>()
        .answers::<MessagePage>(
            200,
            "The messages",
            json!({
                "messages": [{
                    "seq": 7, "type": "agent.message", "timestamp": "2026-01-02T03:04:05Z", "turn": 1,
                    "payload": {"type": "agent_message", "content": {"type": "text_block", "text": "Done."}},
                }],
                "cursor": "6c5f4f2e-0d51-4f0a-8f6b-3f1f5a0f7c11/7", "hasMore": false,
            }),
        )
        .refuses(&[400])
}

/// The routes.
pub fn routes(api: Api) -> Api {
    let transcript = openapi::get("getTranscript", "All that was recorded, as a file", transcript)
        .says("What is stored so far: of a session that runs, the transcript ends where it now is.")
        .query::<Form>()
        .answers_with(200, "The transcript", &["application/x-ndjson", "text/plain"])
        .looks(
            "application/x-ndjson",
            json!("{\"seq\":1,\"attempt\":1,\"turn\":1,\"ts\":\"2026-01-02T03:04:05Z\",\"kind\":\"user\",\"body\":{\"command\":\"prompt\",\"text\":\"Fix the tests.\"}}\n"),
        )
        .refuses(&[400]);
    api.route(
        "/api/projects/{project}/agentic-sessions/{session}/transcript",
        [transcript],
    )
}

#[expect(clippy::needless_pass_by_value, reason = "the form of `map_err`")]
pub(super) fn wrong_query(rejection: QueryRejection) -> ApiError {
    ApiError::bad_request(format!("the query is not understood: {}", rejection.body_text()))
}

async fn page(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Get>,
    query: Result<Query<Page>, QueryRejection>,
) -> Result<Json<MessagePage>, ApiError> {
    let Query(Page { after: cursor, limit }) = query.map_err(wrong_query)?;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::bad_request(format!("limit must be 1 to {MAX_LIMIT}")));
    }
    let view = View::from(&existing(&gateway, &target).await?);
    let cursor = cursor.as_deref().unwrap_or_default();
    let seq = after(cursor, &view.uid)
        .ok_or_else(|| ApiError::bad_request(format!("after {cursor:?} is no cursor: {CURSOR_FORM}")))?;
    let size = PageSize {
        records: limit,
        bytes: PAGE_BYTES,
    };
    let _room = gateway.answers.of(&caller.identity.user).take(PAGE_ROOM).await;
    let records = gateway.log.read(&view.uid, seq, size).await?;
    let last = records.last().map_or(seq, |record| record.seq);
    let progress = gateway.log.state(&view.uid).await?.progress;
    Ok(Json(MessagePage {
        messages: records.iter().flat_map(of_record).collect(),
        cursor: format!("{}/{last}", view.uid),
        has_more: progress.acked > last,
    }))
}

fn of_record(stored: &StoredRecord) -> Vec<Message> {
    match &stored.content {
        Content::Whole(bytes) => {
            serde_json::from_slice::<Record>(bytes).map_or_else(|_| Vec::new(), |record| messages(&record))
        }
        Content::Long(length) => vec![long(stored.seq, stored.kind, *length)],
    }
}

async fn transcript(
    State(gateway): State<Arc<Gateway>>,
    OfSession { target, caller, .. }: OfSession<Get>,
    query: Result<Query<Form>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(Form { format }) = query.map_err(wrong_query)?;
    let format = format.unwrap_or_default();
    let view = View::from(&existing(&gateway, &target).await?);
    let (media, ending) = match format {
        Format::Jsonl => ("application/x-ndjson", "jsonl"),
        Format::Text => ("text/plain; charset=utf-8", "txt"),
    };
    let name = format!("attachment; filename=\"{}.{ending}\"", target.name());
    let until = gateway.log.state(&view.uid).await?.progress.acked;
    let whole = match format {
        Format::Jsonl => None,
        Format::Text => {
            let share = gateway.answers.of(&caller.identity.user);
            let room = timeout(ROOM_WITHIN, share.take(2 * PIECE)).await;
            Some(room.map_err(|_| ApiError::too_many("you read too many transcripts at once: try again later", 1))?)
        }
    };
    let reader = Reader {
        log: gateway.log.clone(),
        room: gateway.streams.of(&caller.identity.user),
        whole,
        session: view.uid,
        format,
        until,
        cursor: 0,
        long: None,
    };
    let headers = [(CONTENT_TYPE, media.to_owned()), (CONTENT_DISPOSITION, name)];
    Ok((headers, Body::from_stream(reader.stream())).into_response())
}

/// Reads a log page by page, and what is long piece by piece, as fast as its client takes it.
struct Reader {
    log: Arc<dyn EventLog>,
    room: Tenant,
    /// For records that are read as a whole.
    whole: Option<Taken>,
    session: String,
    format: Format,
    until: u64,
    cursor: u64,
    /// A record whose pieces are being read: seq, next byte, length.
    long: Option<(u64, usize, usize)>,
}

impl Reader {
    fn stream(self) -> impl Stream<Item = Result<Bytes, StoreError>> {
        futures::stream::try_unfold(self, |mut reader| async move {
            Ok(reader.next().await?.map(|text| (text, reader)))
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            if let Some(long) = self.long.take() {
                return self.piece(long).await.map(Some);
            }
            if self.cursor >= self.until {
                return Ok(None);
            }
            let (bytes, room) = self.pieces();
            let size = PageSize {
                records: MAX_LIMIT,
                bytes,
            };
            let page = self.log.read(&self.session, self.cursor, size).await?;
            if page.is_empty() {
                return Ok(None);
            }
            let mut text = BytesMut::new();
            for record in page.iter().take_while(|record| record.seq <= self.until) {
                self.cursor = record.seq;
                match (&record.content, self.format) {
                    (Content::Whole(bytes), Format::Jsonl) => line(&mut text, bytes, true),
                    (Content::Whole(bytes), Format::Text) => {
                        let record = serde_json::from_slice::<Record>(bytes);
                        text.put(
                            record
                                .map(|record| transcript::text(&record))
                                .unwrap_or_default()
                                .as_bytes(),
                        );
                    }
                    (Content::Long(length), Format::Text) => {
                        text.put(transcript::long(record.seq, record.kind, *length).as_bytes());
                    }
                    (Content::Long(length), Format::Jsonl) => {
                        self.long = Some((record.seq, 0, *length));
                        break;
                    }
                }
            }
            if page.last().is_some_and(|record| record.seq > self.until) {
                self.cursor = self.until;
            }
            if !text.is_empty() {
                return Ok(Some(in_room(room, text)));
            }
        }
    }

    /// Bytes to read at once, and their room.
    fn pieces(&self) -> (usize, Option<Arc<Taken>>) {
        match self.whole {
            Some(_) => (PIECE, None),
            None => self.room.length(&[PIECE], 2, LEAST),
        }
    }

    async fn piece(&mut self, (seq, next, length): (u64, usize, usize)) -> Result<Bytes, StoreError> {
        let (bytes, room) = self.pieces();
        let piece = self.log.piece(&self.session, seq, next, bytes).await?;
        if piece.is_empty() {
            // Removed meanwhile: the body is cut off, so that its reader sees that something is missing.
            return Err(StoreError::Stopped);
        }
        let next = next + piece.len();
        let mut text = BytesMut::with_capacity(piece.len() + 1);
        line(&mut text, &piece, next >= length);
        if next < length {
            self.long = Some((seq, next, length));
        }
        Ok(in_room(room, text))
    }
}

fn in_room(room: Option<Arc<Taken>>, text: BytesMut) -> Bytes {
    match room {
        Some(room) => room.hold(text.freeze()),
        None => text.freeze(),
    }
}

/// A record as a line: JSON may have line breaks between its tokens, where a space is as good.
fn line(text: &mut BytesMut, bytes: &[u8], ends: bool) {
    text.extend(
        bytes
            .iter()
            .map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }),
    );
    if ends {
        text.put_u8(b'\n');
    }
}
