//! The thread that writes and syncs.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use super::{Progress, SpoolError, Sums, segment};
use crate::workspace::state::Holding;

/// A segment is closed when it has grown beyond this.
const SEGMENT_BYTES: u64 = 8 << 20;
/// Bytes in one write and fsync, unless a single record is longer.
const BATCH_BYTES: usize = 4 << 20;

/// A record on its way to the disk.
pub(super) struct Entry {
    pub seq: u64,
    pub bytes: Vec<u8>,
    /// Sums with this record: where an attempt ends whose next ones the disk does not take.
    pub sums: Sums,
    /// Written although the disk is full, in the place of the reserve.
    pub last: bool,
}

/// See the module.
pub(super) struct Writer {
    dir: PathBuf,
    id: String,
    /// The segment to go on with, opened on the first write.
    segment: Option<(PathBuf, u64)>,
    file: Option<File>,
    next_seq: u64,
    progress: watch::Sender<Progress>,
    /// The disk was full: nothing but the last entry is written any more.
    full: bool,
    /// The lease under which it writes, where there is one.
    holding: Arc<OnceLock<Holding>>,
}

impl Writer {
    pub fn new(
        dir: PathBuf,
        id: String,
        segment: Option<(PathBuf, u64)>,
        progress: watch::Sender<Progress>,
        holding: Arc<OnceLock<Holding>>,
    ) -> Self {
        let next_seq = progress.borrow().durable + 1;
        Self {
            dir,
            id,
            segment,
            file: None,
            next_seq,
            progress,
            full: false,
            holding,
        }
    }

    /// Writes until the queue is closed and empty, or the disk refuses.
    pub fn run(mut self, queue: &Receiver<Entry>) {
        let mut carried = None;
        while let Some(first) = carried.take().or_else(|| queue.recv().ok()) {
            if self.full {
                if !first.last {
                    continue;
                }
                // What it held is room for this one.
                let _ = std::fs::remove_file(segment::reserve(&self.dir));
            }
            let (batch, next) = collect(first, queue);
            carried = next;
            if self.holding.get().is_some_and(|holding| !holding.is_held()) {
                // Nothing is cut either: what stands there may be another's by now.
                self.progress
                    .send_modify(|progress| progress.failed = Some(SpoolError::NotOurs));
                return;
            }
            if let Err(error) = self.write(&batch) {
                self.cut();
                let again = !self.full && error.outcome() == protocol::Outcome::DiskFull;
                self.full = again;
                self.progress.send_modify(|progress| progress.failed = Some(error));
                if again {
                    continue;
                }
                return;
            }
            crate::kill_point::reach("durable", batch.last_seq);
            self.next_seq = batch.last_seq + 1;
            self.progress.send_modify(|progress| {
                progress.durable = batch.last_seq;
                progress.synced_bytes += batch.record_bytes;
                progress.sums = batch.sums;
            });
        }
    }

    /// Takes back what was written in part, so that what comes next stands behind what is whole.
    fn cut(&mut self) {
        if let (Some((_, length)), Some(file)) = (&self.segment, &mut self.file)
            && let Err(error) = file.set_len(*length).and_then(|()| file.seek(SeekFrom::Start(*length)))
        {
            tracing::warn!(%error, "the torn end of the spool stays until the next start");
        }
    }

    fn write(&mut self, batch: &Batch) -> Result<(), SpoolError> {
        // A jump in seq begins a segment, so that a segment's name and order tell every seq in it.
        let full = self.segment.as_ref().is_none_or(|(_, length)| *length > SEGMENT_BYTES);
        if full || batch.first_seq != self.next_seq {
            let (path, file) = segment::create(&self.dir, batch.first_seq, &self.id)?;
            self.segment = Some((path, segment::HEADER));
            self.file = Some(file);
        }
        let Some((path, length)) = &mut self.segment else {
            return Err(SpoolError::Closed);
        };
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(
                File::options()
                    .append(true)
                    .open(&*path)
                    .map_err(SpoolError::io("open", path))?,
            ),
        };
        file.write_all(&batch.encoded).map_err(SpoolError::io("write", path))?;
        crate::kill_point::pass("written");
        file.sync_data().map_err(SpoolError::io("write", path))?;
        *length += batch.encoded.len() as u64;
        Ok(())
    }
}

/// Records that are written and synced together.
struct Batch {
    first_seq: u64,
    last_seq: u64,
    encoded: Vec<u8>,
    record_bytes: u64,
    /// Of the last of them.
    sums: Sums,
}

/// Takes what has come meanwhile; a record behind a jump in seq is left for the next batch.
fn collect(first: Entry, queue: &Receiver<Entry>) -> (Batch, Option<Entry>) {
    let mut batch = Batch {
        first_seq: first.seq,
        last_seq: first.seq,
        encoded: Vec::new(),
        record_bytes: 0,
        sums: Sums::default(),
    };
    let mut next = Some(first);
    while let Some(entry) = next.take() {
        if entry.seq > batch.last_seq + 1 {
            return (batch, Some(entry));
        }
        batch.last_seq = entry.seq;
        batch.record_bytes += entry.bytes.len() as u64;
        segment::encode(&mut batch.encoded, &entry.bytes);
        batch.sums = entry.sums;
        if batch.encoded.len() < BATCH_BYTES && !entry.last {
            next = queue.try_recv().ok();
        }
    }
    (batch, None)
}
