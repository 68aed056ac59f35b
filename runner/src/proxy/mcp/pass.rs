//! A server's answer on its way to the agent, without the credential that it was asked with.

use std::io;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Body;

/// What a server may say to the agent: nothing that would have the CLI ask for a credential of its own.
const TO_THE_AGENT: [&str; 5] = [
    "cache-control",
    "content-type",
    "mcp-protocol-version",
    "mcp-session-id",
    "retry-after",
];
/// Pieces of an answer that wait for the agent.
const PIECES: usize = 4;

/// The answer as it comes, without the credential.
pub(super) fn pass(mut answered: reqwest::Response, secret: Vec<u8>, cut: CancellationToken) -> Response<Body> {
    let status = answered.status();
    let mut headers = HeaderMap::new();
    for name in TO_THE_AGENT.map(HeaderName::from_static) {
        let value = answered.headers().get(&name);
        if let Some(value) = value.filter(|value| find(value.as_bytes(), &secret).is_none()) {
            headers.insert(name, value.clone());
        }
    }
    let (pieces, mut received) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    tokio::spawn(async move {
        let mut scrub = Scrub::new(secret);
        loop {
            let chunk = tokio::select! {
                biased;
                () = cut.cancelled() => return,
                () = pieces.closed() => return,
                chunk = answered.chunk() => chunk,
            };
            let piece = match chunk {
                Ok(Some(chunk)) => Ok(scrub.next(&chunk)),
                Ok(None) => {
                    let _ = pieces.send(Ok(scrub.rest())).await;
                    return;
                }
                Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
            };
            let broken = piece.is_err();
            if pieces.send(piece).await.is_err() || broken {
                return;
            }
        }
    });
    let frames = futures::stream::poll_fn(move |context| {
        received
            .poll_recv(context)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Takes a value out of bytes that come in pieces; holds back only what may be its beginning.
struct Scrub {
    secret: Vec<u8>,
    held: Vec<u8>,
}

impl Scrub {
    fn new(secret: Vec<u8>) -> Self {
        Self {
            // A value as short as a word would tear every answer.
            secret: if secret.len() < 8 { Vec::new() } else { secret },
            held: Vec::new(),
        }
    }

    fn next(&mut self, chunk: &[u8]) -> Bytes {
        if self.secret.is_empty() {
            return Bytes::copy_from_slice(chunk);
        }
        self.held.extend_from_slice(chunk);
        let mut out = Vec::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        while let Some(at) = find(rest, &self.secret) {
            out.extend_from_slice(&rest[..at]);
            out.extend_from_slice(b"[redacted]");
            rest = &rest[at + self.secret.len()..];
        }
        let keep = (1..self.secret.len().min(rest.len() + 1))
            .rev()
            .find(|length| rest.ends_with(&self.secret[..*length]))
            .unwrap_or(0);
        let (now, later) = rest.split_at(rest.len() - keep);
        out.extend_from_slice(now);
        self.held = later.to_vec();
        out.into()
    }

    fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.held).into()
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    if part.is_empty() {
        return None;
    }
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_taken_out_wherever_the_answer_is_cut_into_pieces() {
        let text = b"data: fake-fake-token and fake-fake-fake-token, fake-";
        for size in 1..text.len() {
            let mut scrub = Scrub::new(b"fake-fake-token".to_vec());
            let mut out: Vec<u8> = text.chunks(size).flat_map(|chunk| scrub.next(chunk)).collect();
            out.extend(scrub.rest());
            assert_eq!(out, b"data: [redacted] and fake-[redacted], fake-", "pieces of {size}");
        }
    }

    #[test]
    fn what_cannot_be_the_credential_is_not_held_back() {
        let mut scrub = Scrub::new(b"fake-fake-token".to_vec());
        assert_eq!(scrub.next(b"data: {}\n\n"), "data: {}\n\n");
    }
}
