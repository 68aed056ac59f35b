//! Reading records back while the spool is written to.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::path::PathBuf;

use protocol::Record;
use serde_json::value::RawValue;

use super::{SpoolError, segment};

/// A record as it travels, with its seq.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its seq.
    pub seq: u64,
    /// Its bytes, verbatim.
    pub bytes: Box<RawValue>,
}

/// Reads records in seq order, never beyond what the caller knows to be durable.
pub struct Reader {
    dir: PathBuf,
    /// First seq that is wanted.
    next: u64,
    open: Option<Open>,
}

struct Open {
    first: u64,
    file: File,
    path: PathBuf,
    /// Where the next entry begins.
    at: u64,
}

impl Reader {
    pub(super) fn new(dir: PathBuf, next: u64) -> Self {
        Self { dir, next, open: None }
    }

    /// Seq from which it goes on.
    pub fn next_seq(&self) -> u64 {
        self.next
    }

    /// Records up to `durable`: as many as fit in `bytes`, but one at least when there is one.
    pub fn read(&mut self, durable: u64, bytes: usize) -> Result<Vec<Stored>, SpoolError> {
        let mut found = Vec::new();
        let mut size = 0;
        while self.next <= durable && size < bytes {
            let Some((at, record)) = self.entry(durable)? else {
                break;
            };
            if size > 0 && size + record.bytes.get().len() > bytes {
                self.seek_back(at);
                break;
            }
            size += record.bytes.get().len();
            self.next = record.seq + 1;
            found.push(record);
        }
        Ok(found)
    }

    /// The record with this seq.
    pub fn record(&mut self, seq: u64) -> Result<Option<Record>, SpoolError> {
        self.next = seq;
        self.open = None;
        let found = self.read(seq, 1)?;
        Ok(found
            .first()
            .filter(|stored| stored.seq == seq)
            .and_then(|stored| serde_json::from_str(stored.bytes.get()).ok()))
    }

    fn seek_back(&mut self, at: u64) {
        if let Some(open) = &mut self.open {
            open.at = at;
        }
    }

    /// The next entry with a seq that is wanted and durable, and where it began.
    fn entry(&mut self, durable: u64) -> Result<Option<(u64, Stored)>, SpoolError> {
        loop {
            let Some(open) = self.open()? else { return Ok(None) };
            let at = open.at;
            open.file
                .seek(SeekFrom::Start(at))
                .map_err(SpoolError::io("read", &open.path))?;
            let entry = segment::read_entry(&mut open.file).map_err(SpoolError::io("read", &open.path))?;
            let Some(bytes) = entry else {
                // The end of this segment, or of what is written so far.
                let first = open.first;
                if !self.next_segment(first)? {
                    return Ok(None);
                }
                continue;
            };
            let head: protocol::RecordHead = match serde_json::from_slice(&bytes) {
                Ok(head) => head,
                Err(_) => return Ok(None),
            };
            if head.seq > durable {
                return Ok(None);
            }
            open.at = at + (segment::ENTRY_HEADER + bytes.len()) as u64;
            if head.seq < self.next {
                continue;
            }
            let text = String::from_utf8(bytes).unwrap_or_default();
            return Ok(RawValue::from_string(text)
                .ok()
                .map(|bytes| (at, Stored { seq: head.seq, bytes })));
        }
    }

    fn open(&mut self) -> Result<Option<&mut Open>, SpoolError> {
        if self.open.is_none() {
            let segments = segment::list(&self.dir)?;
            // The last one that begins at or before the wanted seq; a seq in no segment: the first one behind it.
            let behind = segments.partition_point(|(first, _)| *first <= self.next);
            let Some((first, path)) = segments.get(behind.saturating_sub(1)) else {
                return Ok(None);
            };
            self.open = Some(Open::new(*first, path.clone())?);
        }
        Ok(self.open.as_mut())
    }

    fn next_segment(&mut self, after: u64) -> Result<bool, SpoolError> {
        let segments = segment::list(&self.dir)?;
        let Some((first, path)) = segments.into_iter().find(|(first, _)| *first > after) else {
            return Ok(false);
        };
        self.open = Some(Open::new(first, path)?);
        Ok(true)
    }
}

impl Open {
    fn new(first: u64, path: PathBuf) -> Result<Self, SpoolError> {
        let file = File::open(&path).map_err(SpoolError::io("open", &path))?;
        Ok(Self {
            first,
            file,
            path,
            at: segment::HEADER,
        })
    }
}
