//! Files of the workspace for the gateway: listed, read and written while the agent works there, too.
//!
//! Requests are served beside the connection, a few at once, and their answers wait until it has nothing better to send.
//! So memory stays bounded by a few chunks, however large a file is and however slowly it is taken.

mod folder;

use std::collections::HashMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use protocol::frame::{CommandResult, FileChunk, FileOperation, FileRequest, MAX_CHUNK, RunnerFrame};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub use folder::{FileError, Folder, Written};

/// Requests that are served at once.
const AT_ONCE: usize = 4;
/// Answers that wait to be sent.
const WAITING: usize = 2;
/// Chunks that wait to be written.
const UNWRITTEN: usize = 4;

/// Serves the requests of one connection.
pub struct Files {
    root: Option<PathBuf>,
    answers: mpsc::Sender<RunnerFrame>,
    ready: mpsc::Receiver<RunnerFrame>,
    /// Chunks for the files that are being written.
    writes: HashMap<String, mpsc::Sender<FileChunk>>,
    served: JoinSet<()>,
}

impl Files {
    /// Serves files below `root`; without one, none.
    pub fn new(root: Option<PathBuf>) -> Self {
        let (answers, ready) = mpsc::channel(WAITING);
        Self {
            root,
            answers,
            ready,
            writes: HashMap::new(),
            served: JoinSet::new(),
        }
    }

    /// Begins to serve a request; gives the answer when that cannot be.
    pub fn request(&mut self, request: FileRequest) -> Option<RunnerFrame> {
        while self.served.try_join_next().is_some() {}
        self.writes.retain(|_, chunks| !chunks.is_closed());
        let Some(root) = self.root.clone() else {
            return Some(refusal(&request, "this session has no files to serve"));
        };
        if self.served.len() >= AT_ONCE || self.writes.contains_key(&request.id) {
            return Some(refusal(&request, "other files are being read and written: try again"));
        }
        let answers = self.answers.clone();
        if request.op == FileOperation::Write {
            let (chunks, queue) = mpsc::channel(UNWRITTEN);
            self.writes.insert(request.id.clone(), chunks);
            self.served.spawn(write(root, request, queue, answers));
        } else {
            self.served.spawn(read(root, request, answers));
        }
        None
    }

    /// Takes a piece of a file to write. Waits for the disk, not for the network.
    pub async fn chunk(&mut self, chunk: FileChunk) {
        let over = chunk.eof;
        let id = chunk.id.clone();
        // Who is not there any more has answered already.
        if let Some(chunks) = self.writes.get(&id)
            && (chunks.send(chunk).await.is_err() || over)
        {
            self.writes.remove(&id);
        }
    }

    /// The next answer. May be dropped while it waits.
    pub async fn next(&mut self) -> RunnerFrame {
        match self.ready.recv().await {
            Some(frame) => frame,
            // There is a sender as long as there is a receiver.
            None => std::future::pending().await,
        }
    }
}

fn refusal(request: &FileRequest, why: &str) -> RunnerFrame {
    let error = Some(why.to_owned());
    match request.op {
        FileOperation::Write => RunnerFrame::CommandResult(CommandResult {
            id: request.id.clone(),
            error,
            seq: None,
        }),
        FileOperation::List | FileOperation::Stat | FileOperation::Read => RunnerFrame::FileChunk(FileChunk {
            id: request.id.clone(),
            offset: request.offset,
            data: String::new(),
            eof: true,
            error,
        }),
    }
}

/// The disk has threads of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, FileError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(FileError::Refused("it was interrupted")),
    }
}

async fn read(root: PathBuf, request: FileRequest, answers: mpsc::Sender<RunnerFrame>) {
    let FileRequest {
        op,
        path,
        offset,
        length,
        ..
    } = request.clone();
    let opened = blocking(move || {
        let folder = Folder::open(&root)?;
        match op {
            FileOperation::List => Ok(Source::Bytes(json(&folder.list(&path)?))),
            FileOperation::Stat => Ok(Source::Bytes(json(&folder.stat(&path)?))),
            FileOperation::Read | FileOperation::Write => Ok(Source::File(folder.read(&path, offset, length)?)),
        }
    });
    let mut source = match opened.await {
        Ok(source) => source,
        Err(error) => {
            let _ = answers.send(refusal(&request, &error.to_string())).await;
            return;
        }
    };
    let mut at = if op == FileOperation::Read { offset } else { 0 };
    loop {
        // There is room for the answer before the bytes for it are read.
        let Ok(place) = answers.reserve().await else { return };
        let next = blocking(move || {
            let bytes = source.next()?;
            Ok((source, bytes))
        });
        let bytes = match next.await {
            Ok((rest, bytes)) => {
                source = rest;
                bytes
            }
            Err(error) => {
                place.send(refusal(&request, &error.to_string()));
                return;
            }
        };
        let eof = source.is_empty();
        let count = bytes.len() as u64;
        place.send(RunnerFrame::FileChunk(FileChunk {
            id: request.id.clone(),
            offset: at,
            data: STANDARD.encode(bytes),
            eof,
            error: None,
        }));
        at += count;
        if eof {
            return;
        }
    }
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    // Names, numbers and times always serialise.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Where the bytes of an answer come from.
enum Source {
    Bytes(Vec<u8>),
    File(folder::Piece),
}

impl Source {
    fn next(&mut self) -> Result<Vec<u8>, FileError> {
        match self {
            Self::Bytes(bytes) => {
                let rest = bytes.split_off(bytes.len().min(MAX_CHUNK));
                Ok(std::mem::replace(bytes, rest))
            }
            Self::File(piece) => piece.next(MAX_CHUNK),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Bytes(bytes) => bytes.is_empty(),
            Self::File(piece) => piece.is_empty(),
        }
    }
}

async fn write(
    root: PathBuf,
    request: FileRequest,
    mut chunks: mpsc::Receiver<FileChunk>,
    answers: mpsc::Sender<RunnerFrame>,
) {
    let written = receive(root, request.path.clone(), &mut chunks).await;
    // What still comes is not waited for.
    chunks.close();
    let answer = match written {
        Ok(()) => RunnerFrame::CommandResult(CommandResult {
            id: request.id.clone(),
            error: None,
            seq: None,
        }),
        Err(error) => refusal(&request, &error.to_string()),
    };
    let _ = answers.send(answer).await;
}

async fn receive(root: PathBuf, path: String, chunks: &mut mpsc::Receiver<FileChunk>) -> Result<(), FileError> {
    let mut file = blocking(move || Folder::open(&root)?.write(&path)).await?;
    loop {
        let Some(chunk) = chunks.recv().await else {
            return Err(FileError::Refused("the connection was lost before its end"));
        };
        if let Some(error) = chunk.error {
            return Err(FileError::Given(error));
        }
        let bytes = STANDARD
            .decode(&chunk.data)
            .map_err(|_| FileError::Refused("a piece of it is not base64"))?;
        let (offset, eof) = (chunk.offset, chunk.eof);
        file = blocking(move || {
            file.append(offset, &bytes)?;
            Ok(file)
        })
        .await?;
        if eof {
            return blocking(move || file.finish()).await;
        }
    }
}

#[cfg(test)]
mod tests;
