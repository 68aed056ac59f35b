//! Looks at the headers of WebSocket frames as they come in: a long frame is not read before there is room for it.
//!
//! The WebSocket library reserves a frame's whole length when it has its header, and keeps that memory for the life of the
//! connection. So a long frame's header is held back until its length is taken from the budget, nothing behind it is read
//! together with it, and the socket is made anew after it (see [`super::peer`]).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncWrite, BufReader, ReadBuf},
    time::Instant,
};

use protocol::frame::MAX_BATCH;

use crate::{
    Gateway,
    room::{Taken, Tenant},
};

/// Frames up to this length need no room: as much as a connection costs anyway.
const FREE: usize = 16 << 10;
/// Bytes read ahead, so that a short frame costs one read.
const AHEAD: usize = 4 << 10;
/// How long a long frame may take to arrive once there is room for it, whatever its length.
const LONG_FRAME_WITHIN: Duration = Duration::from_mins(1);
/// Bytes a second that it must have beyond that: a slow link must not keep the others waiting for its room.
const SLOWEST: u64 = 256 << 10;
/// Longest header: two bytes, eight of length, four of mask.
const MAX_HEADER: usize = 14;

/// Why a peer is cut off: in the text of the error, because the library between us hides its type.
const TOO_LONG: &str = "the frame is longer than allowed";
const IN_PARTS: &str = "a message must be one frame";

/// Where frames of one namespace take their room: long ones are in the way of long ones only.
#[derive(Clone)]
pub(super) struct Rooms {
    usual: Tenant,
    long: Tenant,
}

impl Rooms {
    /// Those of this namespace.
    pub(super) fn of(gateway: &Gateway, namespace: &str) -> Self {
        Self {
            usual: gateway.frames.of(namespace),
            long: gateway.long_frames.of(namespace),
        }
    }

    async fn take(self, length: usize) -> Taken {
        // A batch and what is around it.
        let room = if length <= 2 * MAX_BATCH { self.usual } else { self.long };
        room.take(length).await
    }
}

/// See the module.
pub(super) struct Gate<S> {
    inner: BufReader<S>,
    rooms: Rooms,
    limit: usize,
    state: State,
    taken: Option<(Taken, Instant)>,
    /// When something came of a frame.
    came: Option<Instant>,
    /// Bytes that have come of the frame that has its room.
    bytes: u64,
}

enum State {
    /// Reading a header.
    Header(Header),
    /// Waiting for room for the frame of this header.
    Waiting(BoxFuture<'static, Taken>, Header, usize),
    /// Handing on a header, from this byte.
    Passing(Header, usize, usize),
    /// Handing on a payload of which this much is left.
    Payload(usize),
}

#[derive(Clone, Copy, Default)]
struct Header {
    bytes: [u8; MAX_HEADER],
    have: usize,
}

impl Header {
    /// Bytes that the header has, as far as the ones that are there tell.
    fn length(&self) -> usize {
        if self.have < 2 {
            return 2;
        }
        let mask = if self.bytes[1] & 0x80 == 0 { 0 } else { 4 };
        let extended = match self.bytes[1] & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + extended + mask
    }

    /// Bytes of the payload.
    fn payload(&self) -> u64 {
        match self.bytes[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes([self.bytes[2], self.bytes[3]])),
            127 => self.bytes[2..10]
                .iter()
                .fold(0, |length, byte| length << 8 | u64::from(*byte)),
            short => u64::from(short),
        }
    }

    /// Whether it is one of several frames of a message. Control frames (opcode 8 and above) never are.
    fn is_part(&self) -> bool {
        let (last, opcode) = (self.bytes[0] & 0x80 != 0, self.bytes[0] & 0x0f);
        opcode == 0 || !last
    }
}

impl<S: AsyncRead> Gate<S> {
    /// Lets frames of at most `limit` bytes through.
    pub(super) fn new(inner: S, rooms: Rooms, limit: usize) -> Self {
        Self {
            inner: BufReader::with_capacity(AHEAD, inner),
            rooms,
            limit,
            state: State::Header(Header::default()),
            taken: None,
            came: None,
            bytes: 0,
        }
    }

    /// Changes the limit for the frames to come.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Whether a frame waits for room: then the peer's silence is our doing.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting(..))
    }

    /// When a part of a frame came last, if one did.
    pub(super) fn came(&self) -> Option<Instant> {
        self.came
    }

    /// Whether a long frame for which there is room comes more slowly than others can wait for that room.
    pub(super) fn is_stuck(&self) -> bool {
        let within = LONG_FRAME_WITHIN + Duration::from_secs(self.bytes / SLOWEST);
        self.taken.as_ref().is_some_and(|(_, since)| since.elapsed() > within)
    }

    /// Gives the room of the last long frame back. Whether there was one.
    pub(super) fn release(&mut self) -> bool {
        self.taken.take().is_some()
    }

    fn judge(&mut self, header: Header) -> io::Result<State> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        let Ok(length) = usize::try_from(header.payload()) else {
            return refused(TOO_LONG);
        };
        if length > self.limit {
            return refused(TOO_LONG);
        }
        if header.is_part() {
            return refused(IN_PARTS);
        }
        if length <= FREE {
            return Ok(State::Passing(header, 0, length));
        }
        let taken = self.rooms.clone().take(length).boxed();
        Ok(State::Waiting(taken, header, length))
    }
}

impl<S: AsyncRead + Unpin> Gate<S> {
    /// Reads to the end and keeps nothing.
    pub(super) async fn discard(&mut self) {
        while let Ok(there) = self.inner.fill_buf().await
            && !there.is_empty()
        {
            let count = there.len();
            self.inner.consume(count);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Header(header) if header.have < header.length() => {
                    let there = ready!(Pin::new(&mut this.inner).poll_fill_buf(cx))?;
                    if there.is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    let count = there.len().min(header.length() - header.have);
                    header.bytes[header.have..header.have + count].copy_from_slice(&there[..count]);
                    header.have += count;
                    Pin::new(&mut this.inner).consume(count);
                }
                State::Header(header) => {
                    let header = *header;
                    this.state = this.judge(header)?;
                }
                State::Waiting(room, header, length) => {
                    let taken = ready!(room.poll_unpin(cx));
                    this.taken = Some((taken, Instant::now()));
                    this.bytes = 0;
                    this.state = State::Passing(*header, 0, *length);
                }
                State::Passing(header, from, length) => {
                    let count = into.remaining().min(header.have - *from);
                    into.put_slice(&header.bytes[*from..*from + count]);
                    *from += count;
                    if *from == header.have {
                        this.state = match *length {
                            0 => State::Header(Header::default()),
                            left => State::Payload(left),
                        };
                    }
                    return Poll::Ready(Ok(()));
                }
                State::Payload(left) => {
                    let most = into.remaining().min(*left);
                    let mut part = ReadBuf::new(into.initialize_unfilled_to(most));
                    ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
                    let count = part.filled().len();
                    into.advance(count);
                    *left -= count;
                    if count > 0 {
                        this.came = Some(Instant::now());
                        this.bytes += count as u64;
                    }
                    if *left == 0 {
                        this.state = State::Header(Header::default());
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
