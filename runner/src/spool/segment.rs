//! The files of a spool: their format, and reading them back after whatever happened to the writer.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use protocol::Record;
use protocol::record::{MAX_RECORD, checksum};
use uuid::Uuid;

use super::SpoolError;

/// First bytes of a segment, before the spool's id.
const MAGIC: &[u8; 8] = b"AGSPOOL1";
/// Magic and id.
pub(super) const HEADER: u64 = 8 + 36;
/// Length and checksum.
pub(super) const ENTRY_HEADER: usize = 8;
/// Longest entry: a record's body of the greatest length, with room for its envelope.
const MAX_ENTRY: usize = MAX_RECORD + (1 << 20);

/// What a [`Scanner`] found.
pub(super) struct Scan {
    pub id: String,
    pub next_seq: u64,
    /// The segment to go on writing to, with its length.
    pub segment: Option<(PathBuf, u64)>,
    /// Seqs that are damaged in the middle of the spool, first and last.
    pub missing: Vec<(u64, u64)>,
}

/// Path of the segment that begins with `seq`.
pub(super) fn path(dir: &Path, seq: u64) -> PathBuf {
    dir.join(format!("{seq:020}.spool"))
}

/// Bytes kept free for the record that closes an attempt on a full disk, and for what the file system needs with it.
const RESERVE: u64 = 64 << 10;

/// Path of the reserve.
pub(super) fn reserve(dir: &Path) -> PathBuf {
    dir.join("reserve")
}

/// Keeps room for the last record. On a disk that is full already there is none to keep.
pub(super) fn keep_reserve(dir: &Path) {
    let path = reserve(dir);
    if fs::metadata(&path).is_ok_and(|found| found.len() >= RESERVE) {
        return;
    }
    // Written, not only asked for: not every file system keeps what it promises.
    let written = File::create(&path).and_then(|mut file| {
        crate::kill_point::pass("reserve-created");
        file.write_all(&vec![0x5a; RESERVE as usize])?;
        file.sync_all()
    });
    if let Err(error) = written {
        tracing::warn!(%error, "no room can be reserved for the end of the attempt");
        let _ = fs::remove_file(&path);
    }
}

/// The segments of a spool: first seq and path, in order.
pub(super) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, SpoolError> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir).map_err(SpoolError::io("list", dir))? {
        let path = entry.map_err(SpoolError::io("list", dir))?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if let (Some("spool"), Some(Ok(seq))) = (path.extension().and_then(|e| e.to_str()), stem.map(str::parse)) {
            segments.push((seq, path));
        }
    }
    segments.sort();
    Ok(segments)
}

/// Makes a segment: header written, file and folder synced, so that a crash leaves either none or a good one.
pub(super) fn create(dir: &Path, seq: u64, id: &str) -> Result<(PathBuf, File), SpoolError> {
    let path = path(dir, seq);
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&path)
        .map_err(SpoolError::io("create", &path))?;
    crate::kill_point::pass("segment-created");
    file.write_all(MAGIC)
        .and_then(|()| file.write_all(id.as_bytes()))
        .and_then(|()| file.sync_all())
        .map_err(SpoolError::io("write", &path))?;
    crate::kill_point::pass("segment-synced");
    sync_dir(dir)?;
    crate::kill_point::pass("segment");
    Ok((path, file))
}

fn sync_dir(dir: &Path) -> Result<(), SpoolError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(SpoolError::io("sync", dir))
}

/// Reads the header; `None` when it is not whole.
pub(super) fn read_header(file: &mut impl Read) -> io::Result<Option<String>> {
    let mut header = [0; HEADER as usize];
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (magic, id) = header.split_at(MAGIC.len());
    Ok((magic == MAGIC).then(|| String::from_utf8_lossy(id).into_owned()))
}

/// Reads the next entry; `None` at the end, and at an entry that is not whole or not what was written.
pub(super) fn read_entry(file: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut head = [0; ENTRY_HEADER];
    if !read_whole(file, &mut head)? {
        return Ok(None);
    }
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let sum = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    if length == 0 || length > MAX_ENTRY {
        return Ok(None);
    }
    // Grows as it is read: a damaged length must not reserve what is not there.
    let mut bytes = Vec::new();
    file.take(length as u64).read_to_end(&mut bytes)?;
    Ok((bytes.len() == length && checksum(&bytes) == sum).then_some(bytes))
}

fn read_whole(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts an entry at the end of `batch`.
pub(super) fn encode(batch: &mut Vec<u8>, record: &[u8]) {
    batch.extend_from_slice(&(record.len() as u32).to_le_bytes());
    batch.extend_from_slice(&checksum(record).to_le_bytes());
    batch.extend_from_slice(record);
}

/// Reads a spool from its beginning, one record after another.
pub(super) struct Scanner {
    dir: PathBuf,
    /// With their numbers, from 0.
    segments: std::iter::Enumerate<std::vec::IntoIter<(u64, PathBuf)>>,
    /// The segment that is read. In `scan` stands where its intact entries end.
    file: Option<BufReader<File>>,
    scan: Scan,
}

impl Scanner {
    pub(super) fn of(dir: &Path) -> Result<Self, SpoolError> {
        Ok(Self {
            dir: dir.to_owned(),
            segments: list(dir)?.into_iter().enumerate(),
            file: None,
            scan: Scan {
                id: String::new(),
                next_seq: 1,
                segment: None,
                missing: Vec::new(),
            },
        })
    }

    /// The next record that is intact, with its bytes; `None` at the end of the spool.
    pub(super) fn next(&mut self) -> Result<Option<(Record, Vec<u8>)>, SpoolError> {
        loop {
            if let (Some(file), Some((path, end))) = (&mut self.file, &mut self.scan.segment) {
                let bytes = read_entry(file).map_err(SpoolError::io("read", path))?;
                // The checksum was right, so only a foreign file can fail here; it is treated like damage.
                let record = bytes.and_then(|bytes| Some((serde_json::from_slice::<Record>(&bytes).ok()?, bytes)));
                if let Some((record, bytes)) = record.filter(|(record, _)| record.seq >= self.scan.next_seq) {
                    self.scan.next_seq = record.seq + 1;
                    *end += (ENTRY_HEADER + bytes.len()) as u64;
                    return Ok(Some((record, bytes)));
                }
            }
            match self.segments.next() {
                Some((number, (first, path))) => self.open(number > 0, first, path)?,
                None => return Ok(None),
            }
        }
    }

    fn open(&mut self, later: bool, first: u64, path: PathBuf) -> Result<(), SpoolError> {
        let file = File::open(&path).map_err(SpoolError::io("open", &path))?;
        let mut file = BufReader::with_capacity(256 << 10, file);
        let header = read_header(&mut file).map_err(SpoolError::io("read", &path))?;
        let Some(id) = header else {
            // Torn before its header was synced: nothing was ever in it.
            self.file = None;
            return drop_segment(&self.dir, &path);
        };
        let scan = &mut self.scan;
        if scan.id.is_empty() {
            scan.id = id;
        }
        if later && first > scan.next_seq && !starts_with_gap(&path)? {
            scan.missing.push((scan.next_seq, first - 1));
        }
        scan.next_seq = scan.next_seq.max(first);
        scan.segment = Some((path, HEADER));
        self.file = Some(file);
        Ok(())
    }

    /// Cuts the torn tail.
    pub(super) fn finish(mut self) -> Result<Scan, SpoolError> {
        if self.scan.id.is_empty() {
            self.scan.id = Uuid::new_v4().to_string();
        }
        if let Some((path, end)) = &self.scan.segment {
            cut(path, *end)?;
        }
        Ok(self.scan)
    }
}

/// A jump in seq that the spool made itself begins its segment with the gap record that explains it.
fn starts_with_gap(path: &Path) -> Result<bool, SpoolError> {
    let read = || -> io::Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(HEADER))?;
        read_entry(&mut file)
    };
    let entry = read().map_err(SpoolError::io("read", path))?;
    let record = entry.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
    Ok(record.is_some_and(|record| record.kind == protocol::Kind::Gap))
}

fn cut(path: &Path, end: u64) -> Result<(), SpoolError> {
    let file = File::options()
        .write(true)
        .open(path)
        .map_err(SpoolError::io("open", path))?;
    let length = file.metadata().map_err(SpoolError::io("read", path))?.len();
    if length > end {
        tracing::warn!(path = %path.display(), bytes = length - end, "torn tail of the spool cut");
        file.set_len(end).map_err(SpoolError::io("cut", path))?;
    }
    // What was read may never have been synced by the process that wrote it, and counts as durable from here on.
    file.sync_all().map_err(SpoolError::io("sync", path))?;
    crate::kill_point::pass("scanned");
    Ok(())
}

fn drop_segment(dir: &Path, path: &Path) -> Result<(), SpoolError> {
    fs::remove_file(path).map_err(SpoolError::io("remove", path))?;
    sync_dir(dir)
}
