//! Reading a file of a workspace.

use std::{ops::Range, sync::Arc};

use axum::{
    body::Body,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::Stream;
use http::{
    HeaderMap, StatusCode,
    header::{ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE},
};
use protocol::frame::FileOperation;

use super::{super::ApiError, chunk};
use crate::{
    files::{Conversation, Error, Question},
    live::Channel,
    room::{Taken, Tenant},
};

/// Bytes asked for at once, as there is room.
const WINDOWS: [usize; 2] = [1 << 20, 128 << 10];
/// The same when there is none: no number of readers keeps another from reading.
const LEAST: usize = 4 << 10;
/// What a byte of a file takes here: as it comes, in base64, and as it goes.
const COPIES: usize = 2;

/// A file's bytes, or the range of them that is asked for. What was not taken yet holds room.
pub(super) fn file(
    channel: Arc<Channel>,
    room: Tenant,
    path: String,
    size: u64,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
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
        .body(Body::from_stream(pieces(channel, room, path, wanted)))
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

/// A file that is being read.
struct Download {
    channel: Arc<Channel>,
    room: Tenant,
    path: String,
    range: Range<u64>,
    /// What was asked for last and did not come yet, and its room.
    window: Option<(Conversation, Option<Arc<Taken>>)>,
}

/// A file's bytes, asked for as the client takes them: a window at a time.
fn pieces(
    channel: Arc<Channel>,
    room: Tenant,
    path: String,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes, Error>> {
    let download = Download {
        channel,
        room,
        path,
        range,
        window: None,
    };
    futures::stream::try_unfold(download, |mut download| async move {
        if download.range.is_empty() {
            return Ok(None);
        }
        let bytes = download.next().await?;
        Ok(Some((bytes, download)))
    })
}

impl Download {
    async fn next(&mut self) -> Result<Bytes, Error> {
        let (mut conversation, room) = match self.window.take() {
            Some(window) => window,
            None => self.ask().await?,
        };
        let (bytes, eof) = chunk(conversation.reply().await?, self.range.start)?;
        if bytes.is_empty() || bytes.len() as u64 > self.range.end - self.range.start {
            // Its length was said already: the body is cut off, so that the client sees it.
            return Err(Error::Garbled("the file has changed while it was read".to_owned()));
        }
        self.range.start += bytes.len() as u64;
        let bytes = match &room {
            Some(room) => room.hold(bytes.into()),
            None => bytes.into(),
        };
        self.window = (!eof).then_some((conversation, room));
        Ok(bytes)
    }

    async fn ask(&self) -> Result<(Conversation, Option<Arc<Taken>>), Error> {
        let (most, room) = self.room.length(&WINDOWS, COPIES, LEAST);
        let most = (self.range.end - self.range.start).min(most as u64);
        let question = Question {
            op: FileOperation::Read,
            path: &self.path,
            offset: self.range.start,
            length: most,
            most: most as usize,
        };
        Ok((Conversation::begin(self.channel.clone(), question).await?, room))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

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
