//! The CLI's stdout, cut into lines that are kept as they came.

use protocol::record::MAX_RECORD;

/// A line of stdout as it was cut from the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum RawLine {
    /// Without its newline.
    Whole(Vec<u8>),
    /// Longer than a record can be: its length; the bytes were not kept.
    TooLong(u64),
}

/// Cuts the stream into lines, whatever the pieces it comes in.
#[derive(Default)]
pub struct Lines {
    buffer: Vec<u8>,
    /// Bytes of a line that is too long, dropped so far.
    dropped: u64,
}

impl Lines {
    /// Takes the next piece and hands each line that is complete with it to `each`.
    pub fn push(&mut self, mut piece: &[u8], mut each: impl FnMut(RawLine)) {
        while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
            self.take(&piece[..end]);
            piece = &piece[end + 1..];
            if let Some(line) = self.finish() {
                each(line);
            }
        }
        self.take(piece);
    }

    /// What is left when the stream has ended without a newline.
    pub fn finish(&mut self) -> Option<RawLine> {
        let dropped = std::mem::take(&mut self.dropped);
        let line = std::mem::take(&mut self.buffer);
        if dropped > 0 {
            return Some(RawLine::TooLong(dropped));
        }
        (!line.iter().all(u8::is_ascii_whitespace)).then_some(RawLine::Whole(line))
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.dropped > 0 || self.buffer.len() + bytes.len() > MAX_RECORD {
            self.dropped += (std::mem::take(&mut self.buffer).len() + bytes.len()) as u64;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<RawLine> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece, |line| found.push(line));
        }
        found.extend(lines.finish());
        found
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_the_pieces_they_come_in(text in "[a-c\n]{0,60}", cuts in prop::collection::vec(0_usize..60, 0..6)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let expected: Vec<_> = text.split('\n').filter(|line| !line.is_empty())
                .map(|line| RawLine::Whole(line.as_bytes().to_vec())).collect();
            prop_assert_eq!(lines(&pieces), expected);
        }
    }

    #[test]
    fn a_line_beyond_the_limit_is_counted_and_the_next_one_is_whole() {
        let long = vec![b'x'; MAX_RECORD + 5];
        assert_eq!(
            lines(&[&long, b"yy\nnext\n"]),
            [
                RawLine::TooLong(MAX_RECORD as u64 + 7),
                RawLine::Whole(b"next".to_vec())
            ]
        );
    }
}
