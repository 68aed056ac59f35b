//! The TCP connection below the WebSocket. A long message is one frame, and nothing is heard while it leaves; that the other
//! end still takes of it, or says something, shows here.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// When something was taken last from a socket that had been full, or came while it was. What a socket takes while it has room
/// shows nothing: there may be nobody at the other end.
#[derive(Clone)]
pub(super) struct Taken(Arc<Mutex<Instant>>);

impl Taken {
    pub(super) fn at(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// See the module.
pub(super) struct Line {
    stream: TcpStream,
    full: bool,
    /// Bytes that had come and were not read when it was looked last.
    unread: u64,
    taken: Taken,
}

impl Line {
    /// Connects to a host, which may be an IPv6 address in brackets.
    pub(super) async fn open(host: &str, port: u16) -> io::Result<Self> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            full: false,
            unread: 0,
            taken: Taken(Arc::new(Mutex::new(Instant::now()))),
        })
    }

    pub(super) fn taken(&self) -> Taken {
        self.taken.clone()
    }

    /// The gateway takes nothing of a long frame before it is that frame's turn, but it says that it is there. Nobody reads that
    /// while the frame leaves.
    fn look(&mut self) {
        let unread = rustix::io::ioctl_fionread(&self.stream).unwrap_or_default();
        if unread > self.unread {
            self.taken.now();
        }
        self.unread = unread;
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.unread = 0;
        Pin::new(&mut this.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        match &written {
            Poll::Pending => {
                this.full = true;
                this.look();
            }
            Poll::Ready(Ok(1..)) if this.full => {
                this.full = false;
                this.taken.now();
            }
            Poll::Ready(_) => {}
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
