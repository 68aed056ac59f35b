//! Passes a streamed answer on as it comes, while the meter reads it.

use std::{
    io::{self, BufReader, Read, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use super::{
    Metered,
    answer::{self, Body},
    credential::Authorization,
    forward::Shared,
    headers,
    meter::{Meter, Step},
    sse,
};
use crate::limits::{Amount, Permit};

/// Pieces between the API's connection and the agent's: one being written, one that was read.
const PIECES: usize = 2;
/// Bytes that are unpacked at once: gzip makes a thousand times as many of them at most.
const PACKED: usize = 512;
/// Most bytes of the text of a whole answer that are read.
const MAX_TEXT: u64 = 64 << 20;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Plain,
    /// Sent by some gateways though `identity` was asked.
    Gzip,
}

/// An encoding that the meter cannot read.
#[derive(Debug)]
pub struct UnknownEncoding;

/// The encoding of an answer with these headers.
pub fn encoding(headers: &HeaderMap) -> Result<Encoding, UnknownEncoding> {
    match headers.get(header::CONTENT_ENCODING).map(header::HeaderValue::as_bytes) {
        None | Some(b"identity" | b"") => Ok(Encoding::Plain),
        Some(b"gzip" | b"x-gzip") => Ok(Encoding::Gzip),
        Some(_) => Err(UnknownEncoding),
    }
}

impl Encoding {
    /// The text of a whole answer, which is never in memory as a whole: what it unpacks to has no bound of its own.
    pub fn text(self, body: &[u8]) -> Box<dyn Read + '_> {
        match self {
            Self::Plain => Box::new(body),
            Self::Gzip => Box::new(BufReader::new(MultiGzDecoder::new(body).take(MAX_TEXT))),
        }
    }
}

/// Decodes what comes in pieces. What is not gzip gives nothing.
struct Gunzip(flate2::write::MultiGzDecoder<Vec<u8>>);

impl Default for Gunzip {
    fn default() -> Self {
        Self(flate2::write::MultiGzDecoder::new(Vec::new()))
    }
}

impl Gunzip {
    /// What these bytes unpack to, in pieces of half a MiB or little more.
    fn pieces<'a>(&'a mut self, packed: &'a [u8]) -> impl Iterator<Item = Vec<u8>> {
        packed.chunks(PACKED).map(|packed| self.next(packed))
    }

    fn next(&mut self, bytes: &[u8]) -> Vec<u8> {
        let _ = self.0.write_all(bytes).and_then(|()| self.0.flush());
        std::mem::take(self.0.get_mut())
    }
}

/// Puts the opening record of a response on disk; false: that failed, and nothing may reach the agent.
pub async fn open(shared: &Shared, meter: &Meter) -> bool {
    let (durable, written) = oneshot::channel();
    let opening = Metered {
        body: meter.opening(),
        durable: Some(durable),
    };
    let opened = shared.events.send(opening).await.is_ok() && written.await.is_ok();
    crate::kill_point::pass("opened");
    opened
}

/// Tells the closing record of a response and what it has cost.
pub async fn close(shared: &Shared, meter: &Meter, permit: &mut Permit) {
    let body = meter.closing(Timestamp::now());
    permit.charge = Amount {
        cost: body.cost_usd.unwrap_or_default(),
        tokens: body.usage.total(),
    };
    // A receiver that is gone means that the runner ends; nobody is left to be told.
    let _ = shared.events.send(Metered { body, durable: None }).await;
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The API ended it.
    Finished,
    /// The connection to the API broke.
    Broken,
    /// The agent hung up.
    AgentGone,
    /// The runner is ending, or has no spool any more.
    Cut,
}

/// Passes the answer on until either side ends it; the closing record is told in every case.
pub async fn pass(
    shared: &Shared,
    (mut response, used): (reqwest::Response, Authorization),
    mut meter: Meter,
    mut permit: Permit,
    head: oneshot::Sender<Response<Body>>,
) {
    let Ok(encoding) = encoding(response.headers()) else {
        let message = "the model API's gateway compresses its answers in a way that cannot be metered; turn that off";
        // The API charges for it all the same, and the next attempt must know.
        meter.given_up();
        close(shared, &meter, &mut permit).await;
        let _ = head.send(answer::error(StatusCode::BAD_GATEWAY, message));
        return;
    };
    let (pieces, received) = mpsc::channel(PIECES);
    let complete = Arc::new(AtomicBool::new(false));
    let headers = headers::to_agent(response.headers(), used.secret());
    let answer = answer::with_headers(response.status(), headers, body(received, Arc::clone(&complete)));
    let mut pump = Pump {
        shared,
        meter,
        permit,
        parser: sse::Parser::default(),
        gunzip: (encoding == Encoding::Gzip).then(Gunzip::default),
        pieces,
        closed: false,
        failed: false,
    };
    let end = match head.send(answer) {
        Err(_) => End::AgentGone,
        Ok(()) => pump.run(&mut response).await,
    };
    pump.finish(end, &complete).await;
}

struct Pump<'a> {
    shared: &'a Shared,
    meter: Meter,
    permit: Permit,
    parser: sse::Parser,
    gunzip: Option<Gunzip>,
    pieces: mpsc::Sender<Bytes>,
    /// The closing record is told.
    closed: bool,
    /// The API reported an error in the stream.
    failed: bool,
}

impl Pump<'_> {
    async fn run(&mut self, response: &mut reqwest::Response) -> End {
        loop {
            let chunk = tokio::select! {
                biased;
                () = self.shared.cut.cancelled() => return End::Cut,
                () = self.pieces.closed() => return End::AgentGone,
                chunk = response.chunk() => chunk,
            };
            let end = match chunk {
                Err(_) => Err(End::Broken),
                Ok(None) => Err(End::Finished),
                Ok(Some(chunk)) => self.chunk(chunk).await,
            };
            if let Err(end) = end {
                return end;
            }
        }
    }

    /// Reads a piece and passes it on; what stands behind the start of the message waits for the opening record.
    async fn chunk(&mut self, chunk: Bytes) -> Result<(), End> {
        let Some(mut gunzip) = self.gunzip.take() else {
            let sent = self.read(&chunk, Some(&chunk)).await?;
            return self.send(chunk.slice(sent..)).await;
        };
        for text in gunzip.pieces(&chunk) {
            self.read(&text, None).await?;
            // A little may unpack to very much, and others want to be served meanwhile.
            tokio::task::yield_now().await;
            if self.shared.cut.is_cancelled() {
                return Err(End::Cut);
            }
        }
        self.gunzip = Some(gunzip);
        self.send(chunk).await
    }

    /// Reads a piece of the text. `passed`: these bytes are what the agent is sent, too, and go as far as an opening record
    /// allows; returns how far they went.
    async fn read(&mut self, text: &[u8], passed: Option<&Bytes>) -> Result<usize, End> {
        let (mut at, mut sent) = (0, 0);
        while at < text.len() {
            let (used, event) = self.parser.next(&text[at..]);
            at += used;
            let Some(event) = event else { continue };
            match self.meter.event(&event, Timestamp::now()) {
                Step::Nothing => {}
                Step::Opened => {
                    // Positions in a decoded text are none in the bytes that are passed on.
                    if let Some(chunk) = passed {
                        self.send(chunk.slice(sent..at)).await?;
                        sent = at;
                    }
                    self.open().await?;
                }
                // Told before the last bytes flow: whoever sees the message complete finds its numbers.
                Step::Ended => self.close().await,
                Step::Failed(status) => {
                    self.failed = true;
                    self.shared.seen.answered(status, None);
                }
            }
        }
        Ok(sent)
    }

    async fn open(&self) -> Result<(), End> {
        tokio::select! {
            biased;
            () = self.shared.cut.cancelled() => Err(End::Cut),
            () = self.pieces.closed() => Err(End::AgentGone),
            durable = open(self.shared, &self.meter) => if durable { Ok(()) } else { Err(End::Cut) },
        }
    }

    async fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            close(self.shared, &self.meter, &mut self.permit).await;
        }
    }

    async fn send(&self, piece: Bytes) -> Result<(), End> {
        if piece.is_empty() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.shared.cut.cancelled() => Err(End::Cut),
            sent = self.pieces.send(piece) => sent.map_err(|_| End::AgentGone),
        }
    }

    async fn finish(mut self, end: End, complete: &AtomicBool) {
        let whole = self.closed;
        if self.meter.is_open() {
            self.close().await;
        } else if self.failed {
            // The API answered with nothing but an error, and charges nothing for it.
            self.permit.charge = Amount::default();
        } else if end == End::AgentGone {
            self.meter.given_up();
            self.close().await;
        }
        if matches!(end, End::Broken) || (end == End::Finished && !whole && !self.failed) {
            self.shared.seen.unreachable();
        }
        if end == End::Finished {
            complete.store(true, Ordering::Release);
        }
        // Dropping the sender ends the agent's response: as broken, unless it is complete.
    }
}

/// The body as the agent sees it. When the pieces end and the answer is not complete, the connection breaks, so that the
/// CLI does not take a cut stream for a finished one.
fn body(mut pieces: mpsc::Receiver<Bytes>, complete: Arc<AtomicBool>) -> Body {
    let mut ended = false;
    let frames = futures::stream::poll_fn(move |context| {
        if ended {
            return std::task::Poll::Ready(None);
        }
        pieces.poll_recv(context).map(|piece| {
            if let Some(piece) = piece {
                return Some(Ok(Frame::data(piece)));
            }
            ended = true;
            (!complete.load(Ordering::Acquire)).then(|| Err(io::ErrorKind::ConnectionAborted.into()))
        })
    });
    StreamBody::new(frames).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_that_unpacks_to_very_much_does_so_in_pieces() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(&vec![b'x'; 8 << 20]).unwrap();
        let packed = gzip.finish().unwrap();
        assert!(packed.len() < 10_000, "{}", packed.len());
        let lengths: Vec<usize> = Gunzip::default().pieces(&packed).map(|text| text.len()).collect();
        assert_eq!(lengths.iter().sum::<usize>(), 8 << 20);
        assert!(lengths.iter().all(|length| *length <= 1 << 20), "{lengths:?}");
    }
}
