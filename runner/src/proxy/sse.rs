//! Server-sent events, read piece by piece while they stream by.

use std::ops::Range;

/// Most bytes of one event that are kept; what is longer is only counted. The events that matter are a few hundred bytes.
const MAX_KEPT: usize = 1 << 20;

/// An event whose last byte was just read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Its `event` field; empty when it has none.
    pub name: String,
    /// Its `data`; empty when it was too long or of a name that [`is_kept`] does not list.
    pub data: Vec<u8>,
    /// Length of its data, kept or not.
    pub length: usize,
}

/// Reads events from a body that comes in pieces cut anywhere.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    /// Bytes of the current line, kept or not.
    line_length: usize,
    event: Event,
    /// Something was read since the last blank line.
    begun: bool,
    /// The last byte was a carriage return: a line feed right behind it belongs to it.
    after_return: bool,
}

/// Whether the data of events of this name is read: those without a name too, because their `type` must be looked at.
fn is_kept(name: &str) -> bool {
    matches!(name, "" | "message_start" | "message_delta" | "error")
}

impl Parser {
    /// Reads up to and with the end of the next event: how many bytes that took, and the event. `None`: all was read.
    pub fn next(&mut self, bytes: &[u8]) -> (usize, Option<Event>) {
        let mut at = 0;
        while let Some(end) = next_break(bytes, at) {
            let paired = self.after_return && end == 0 && bytes[0] == b'\n';
            self.keep(&bytes[at..end]);
            self.after_return = bytes[end] == b'\r';
            at = end + 1;
            if self.after_return && bytes.get(at) == Some(&b'\n') {
                self.after_return = false;
                at += 1;
            }
            if paired {
                continue;
            }
            if let Some(event) = self.end_line() {
                return (at, Some(event));
            }
        }
        if at < bytes.len() {
            self.after_return = false;
            self.keep(&bytes[at..]);
        }
        (bytes.len(), None)
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.line_length += bytes.len();
        if self.line_length <= MAX_KEPT {
            self.line.extend_from_slice(bytes);
        } else {
            self.line.truncate("data: ".len());
        }
    }

    fn end_line(&mut self) -> Option<Event> {
        let whole = self.line_length <= MAX_KEPT;
        let length = std::mem::take(&mut self.line_length);
        if length == 0 {
            return std::mem::take(&mut self.begun).then(|| std::mem::take(&mut self.event));
        }
        self.begun = true;
        let (field, value) = split(&self.line);
        match field {
            b"event" => self.event.name = String::from_utf8_lossy(&self.line[value]).into_owned(),
            b"data" => {
                self.event.length += length - value.start.min(length);
                if whole && is_kept(&self.event.name) && self.event.data.len() + value.len() <= MAX_KEPT {
                    if !self.event.data.is_empty() {
                        self.event.data.push(b'\n');
                    }
                    self.event.data.extend_from_slice(&self.line[value]);
                }
            }
            _ => {}
        }
        self.line.clear();
        None
    }
}

fn next_break(bytes: &[u8], from: usize) -> Option<usize> {
    bytes[from..]
        .iter()
        .position(|b| matches!(b, b'\n' | b'\r'))
        .map(|at| from + at)
}

/// A line's field, and where its value is.
fn split(line: &[u8]) -> (&[u8], Range<usize>) {
    let Some(colon) = line.iter().position(|b| *b == b':') else {
        return (line, line.len()..line.len());
    };
    let start = colon + 1 + usize::from(line.get(colon + 1) == Some(&b' '));
    (&line[..colon], start..line.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn all(pieces: &[&[u8]]) -> Vec<Event> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        for piece in pieces {
            let mut at = 0;
            while at < piece.len() {
                let (used, event) = parser.next(&piece[at..]);
                assert!(used > 0);
                at += used;
                events.extend(event);
            }
        }
        events
    }

    const STREAM: &str = "event: message_start\r\ndata: {\"a\":1}\r\n\r\n: ping\n\nevent: content_block_delta\ndata: {\"text\":\"é\"}\n\nevent:message_delta\rdata:{}\r\rdata: x\ndata: y\n\n";

    fn expected() -> Vec<Event> {
        let event = |name: &str, data: &str, length| Event {
            name: name.into(),
            data: data.into(),
            length,
        };
        vec![
            event("message_start", "{\"a\":1}", 7),
            event("", "", 0),
            event("content_block_delta", "", 13),
            event("message_delta", "{}", 2),
            event("", "x\ny", 2),
        ]
    }

    #[test]
    fn data_of_several_lines_is_kept_as_far_as_that_of_one() {
        let line = "x".repeat(2_000);
        let events = all(&[format!("event: error\ndata: {line}\ndata: {line}\n\n").as_bytes()]);
        assert_eq!(events[0].data, format!("{line}\n{line}").as_bytes());
    }

    #[test]
    fn a_stream_cut_at_every_byte_gives_the_same_events() {
        assert_eq!(all(&[STREAM.as_bytes()]), expected());
        for cut in 0..STREAM.len() {
            let (a, b) = STREAM.as_bytes().split_at(cut);
            assert_eq!(all(&[a, b]), expected(), "cut at {cut}");
        }
    }

    #[rstest]
    #[case::kept("message_start", MAX_KEPT - 6, true)]
    #[case::too_long("message_start", MAX_KEPT, false)]
    #[case::of_no_interest("content_block_delta", 10, false)]
    fn long_data_is_counted_and_not_kept(#[case] name: &str, #[case] length: usize, #[case] kept: bool) {
        let stream = format!("event: {name}\ndata: {}\n\n", "x".repeat(length));
        let events = all(&stream.as_bytes().chunks(1000).collect::<Vec<_>>());
        assert_eq!(events.len(), 1);
        assert_eq!((events[0].length, !events[0].data.is_empty()), (length, kept));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_give_the_same_events(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b' '), any::<u8>()], 0..200),
            size in 1..20_usize,
        ) {
            prop_assert_eq!(all(&bytes.chunks(size).collect::<Vec<_>>()), all(&[&bytes]));
        }
    }
}
