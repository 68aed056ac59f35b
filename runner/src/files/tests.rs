use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::frame::{FileEntry, FileKind};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rstest::rstest;
use tokio::time::{Duration, timeout};

use super::*;

/// A workspace with something outside of it that nobody may see.
struct Scene {
    dir: tempfile::TempDir,
    files: Files,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("workspace/sub")).unwrap();
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        let files = Files::new(Some(dir.path().join("workspace")));
        Self { dir, files }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("workspace").join(name)
    }

    async fn next(&mut self) -> RunnerFrame {
        timeout(Duration::from_secs(20), self.files.next())
            .await
            .expect("an answer")
    }

    async fn ask(&mut self, op: FileOperation, path: &str, offset: u64, length: u64) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let refused = self.files.request(request("r", op, path, offset, length));
        let mut frame = match refused {
            Some(frame) => frame,
            None => self.next().await,
        };
        loop {
            let RunnerFrame::FileChunk(chunk) = frame else {
                panic!("a chunk: {frame:?}")
            };
            assert_eq!(chunk.id, "r");
            if let Some(error) = chunk.error {
                return Err(error);
            }
            let piece = STANDARD.decode(chunk.data).unwrap();
            assert!(piece.len() <= MAX_CHUNK);
            let begins = if op == FileOperation::Read { offset } else { 0 };
            assert_eq!(chunk.offset, begins + bytes.len() as u64);
            bytes.extend(piece);
            if chunk.eof {
                return Ok(bytes);
            }
            frame = self.next().await;
        }
    }

    async fn write(&mut self, path: &str, bytes: &[u8]) -> Result<(), String> {
        if let Some(frame) = self.files.request(request("w", FileOperation::Write, path, 0, 0)) {
            return result(frame);
        }
        let mut at = 0;
        for piece in bytes.chunks(MAX_CHUNK).chain(std::iter::once(&[][..])) {
            self.files.chunk(chunk("w", at, piece, piece.is_empty())).await;
            at += piece.len() as u64;
        }
        let frame = self.next().await;
        result(frame)
    }
}

fn request(id: &str, op: FileOperation, path: &str, offset: u64, length: u64) -> FileRequest {
    FileRequest {
        id: id.into(),
        op,
        path: path.into(),
        offset,
        length,
    }
}

fn chunk(id: &str, offset: u64, bytes: &[u8], eof: bool) -> FileChunk {
    FileChunk {
        id: id.into(),
        offset,
        data: STANDARD.encode(bytes),
        eof,
        error: None,
    }
}

fn result(frame: RunnerFrame) -> Result<(), String> {
    let RunnerFrame::CommandResult(result) = frame else {
        panic!("a result: {frame:?}")
    };
    assert_eq!(result.id, "w");
    result.error.map_or(Ok(()), Err)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_is_not_there_and_what_is_not_served_are_told_apart() {
    let mut scene = Scene::new();
    std::fs::write(scene.path("file"), "x").unwrap();
    symlink("file", scene.path("link")).unwrap();
    symlink("..", scene.path("out")).unwrap();
    for (path, begins) in [
        ("nothing", protocol::frame::NOT_FOUND),
        ("sub/nothing/at/all", protocol::frame::NOT_FOUND),
        ("file/within", protocol::frame::NOT_FOUND),
        ("link", protocol::frame::REFUSED),
        ("out/outside", protocol::frame::REFUSED),
        ("sub", protocol::frame::REFUSED),
        ("../outside", protocol::frame::REFUSED),
    ] {
        let error = scene.ask(FileOperation::Read, path, 0, 0).await.unwrap_err();
        assert!(error.starts_with(begins), "{path}: {error}");
    }
    let error = scene.ask(FileOperation::Stat, "nothing", 0, 0).await.unwrap_err();
    assert!(error.starts_with(protocol::frame::NOT_FOUND), "{error}");
}

#[tokio::test]
async fn a_file_is_read_in_chunks_and_in_part() {
    let mut scene = Scene::new();
    let bytes: Vec<u8> = (0..MAX_CHUNK * 2 + 77).map(|at| (at % 251) as u8).collect();
    std::fs::write(scene.path("sub/f"), &bytes).unwrap();
    std::fs::write(scene.path("empty"), "").unwrap();
    let whole = scene.ask(FileOperation::Read, "sub/f", 0, 0).await.unwrap();
    assert!(whole == bytes);
    let part = scene.ask(FileOperation::Read, "./sub/./f", 100, 50).await.unwrap();
    assert_eq!(part, bytes[100..150]);
    assert_eq!(scene.ask(FileOperation::Read, "empty", 0, 0).await.unwrap(), b"");
    assert_eq!(scene.ask(FileOperation::Read, "empty", 99, 5).await.unwrap(), b"");
}

#[tokio::test]
async fn folders_are_listed_with_what_is_in_them_and_links_are_not_followed() {
    let mut scene = Scene::new();
    std::fs::write(scene.path("b.txt"), "12345").unwrap();
    symlink("/etc/passwd", scene.path("a-link")).unwrap();
    for root in ["", ".", "./"] {
        let listed = scene.ask(FileOperation::List, root, 0, 0).await.unwrap();
        let listed: Vec<FileEntry> = serde_json::from_slice(&listed).unwrap();
        let found: Vec<_> = listed.iter().map(|entry| (entry.name.as_str(), entry.kind)).collect();
        assert_eq!(
            found,
            [
                ("a-link", FileKind::Link),
                ("b.txt", FileKind::File),
                ("sub", FileKind::Folder)
            ]
        );
        assert_eq!(listed[1].size, 5);
    }
    let stat = scene.ask(FileOperation::Stat, "b.txt", 0, 0).await.unwrap();
    let stat: FileEntry = serde_json::from_slice(&stat).unwrap();
    assert_eq!((stat.name.as_str(), stat.kind, stat.size), ("b.txt", FileKind::File, 5));
    let link = scene.ask(FileOperation::Stat, "a-link", 0, 0).await.unwrap();
    assert_eq!(serde_json::from_slice::<FileEntry>(&link).unwrap().kind, FileKind::Link);
    let root = scene.ask(FileOperation::Stat, "", 0, 0).await.unwrap();
    assert_eq!(
        serde_json::from_slice::<FileEntry>(&root).unwrap().kind,
        FileKind::Folder
    );
}

#[tokio::test]
async fn a_file_is_written_as_a_whole_or_not_at_all() {
    let mut scene = Scene::new();
    std::fs::write(scene.path("f"), "old").unwrap();
    std::fs::set_permissions(scene.path("f"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let bytes = vec![7; MAX_CHUNK * 3 + 5];
    scene.write("f", &bytes).await.unwrap();
    assert!(std::fs::read(scene.path("f")).unwrap() == bytes);
    let mode = std::fs::metadata(scene.path("f")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755, "it stays as executable as it was");
    scene.write("new/deep/f", b"x").await.unwrap();
    assert_eq!(std::fs::read(scene.path("new/deep/f")).unwrap(), b"x");

    // A piece is missing, or the sender gives up, or the connection is lost.
    scene.files.request(request("w", FileOperation::Write, "f", 0, 0));
    scene.files.chunk(chunk("w", 5, b"x", true)).await;
    let frame = scene.next().await;
    assert!(result(frame).unwrap_err().contains("missing"));
    scene.files.request(request("w", FileOperation::Write, "f", 0, 0));
    scene.files.chunk(chunk("w", 0, b"half", false)).await;
    let given_up = FileChunk {
        error: Some("the client left".into()),
        ..chunk("w", 4, b"", true)
    };
    scene.files.chunk(given_up).await;
    let frame = scene.next().await;
    assert!(result(frame).unwrap_err().contains("the client left"));
    scene.files.request(request("w", FileOperation::Write, "f", 0, 0));
    scene.files.chunk(chunk("w", 0, b"half", false)).await;
    let folder = scene.path("");
    scene.files = Files::new(None);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while names(&folder) != ["f", "new", "sub"] {
        assert!(std::time::Instant::now() < deadline, "{:?}", names(&folder));
        tokio::task::yield_now().await;
    }
    assert!(
        std::fs::read(scene.path("f")).unwrap() == bytes,
        "the old one is still there"
    );
}

#[rstest]
#[case("../outside")]
#[case("sub/../../outside")]
#[case("/etc/passwd")]
#[case("link")]
#[case("up/outside")]
#[case("pipe")]
#[case("sub")]
#[case("absent")]
#[case("a\0b")]
#[tokio::test]
async fn what_is_not_a_file_below_the_workspace_is_not_read_or_written(#[case] path: &str) {
    let mut scene = Scene::new();
    symlink("../outside", scene.path("link")).unwrap();
    symlink("..", scene.path("up")).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, scene.path("pipe"), fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    let read = scene.ask(FileOperation::Read, path, 0, 0).await;
    assert!(read.is_err(), "{read:?}");
    let written = scene.write(path, b"evil").await;
    assert_eq!(written.is_err(), path != "absent", "{written:?}");
    assert_eq!(
        std::fs::read_to_string(scene.dir.path().join("outside")).unwrap(),
        "secret"
    );
    assert!(scene.path("link").symlink_metadata().unwrap().is_symlink());
    let unfinished = names(&scene.path(""))
        .into_iter()
        .any(|name| name.starts_with(folder::UNFINISHED));
    assert!(!unfinished);
}

#[tokio::test]
async fn a_slow_reader_costs_a_few_chunks_and_others_are_told_to_come_again() {
    let mut scene = Scene::new();
    std::fs::File::create(scene.path("big"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    for n in 0..AT_ONCE {
        assert!(
            scene
                .files
                .request(request(&n.to_string(), FileOperation::Read, "big", 0, 0))
                .is_none()
        );
    }
    let RunnerFrame::FileChunk(refused) = scene
        .files
        .request(request("x", FileOperation::Read, "big", 0, 0))
        .unwrap()
    else {
        panic!("a chunk")
    };
    assert!(refused.error.unwrap().contains("try again"));
    // Nobody takes the answers: no more than these are made.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while scene.files.ready.len() < WAITING {
        assert!(std::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert_eq!(scene.files.ready.len(), WAITING);
}

/// How often a race is tried: `RACE_TRIES` says it for the long run.
fn tries() -> u32 {
    std::env::var("RACE_TRIES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1_000)
}

/// The agent swaps folder and link, file and link, while files are read and written through the same paths.
#[test]
fn whatever_is_swapped_meanwhile_nothing_outside_is_read_or_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (workspace, outside) = (dir.path().join("workspace"), dir.path().join("outside"));
    for folder in [&workspace.join("d"), &workspace.join("e"), &outside] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("f"), "inside").unwrap();
    }
    std::fs::write(outside.join("f"), "secret").unwrap();
    symlink(&outside, workspace.join("l")).unwrap();
    symlink(outside.join("f"), workspace.join("lf")).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (over, workspace) = (Arc::clone(&over), workspace.clone());
        std::thread::spawn(move || {
            let mut dice = StdRng::seed_from_u64(11);
            let mut swaps = 0_u64;
            while !over.load(Ordering::Relaxed) {
                let (one, other) = if dice.random() { ("d", "l") } else { ("e/f", "lf") };
                let (one, other) = (workspace.join(one), workspace.join(other));
                let cwd = rustix::fs::CWD;
                let swapped = rustix::fs::renameat_with(cwd, &one, cwd, &other, rustix::fs::RenameFlags::EXCHANGE);
                swaps += u64::from(swapped.is_ok());
            }
            swaps
        })
    };
    let folder = Folder::open(&workspace).unwrap();
    let (mut read, mut written, mut refused) = (0, 0, 0);
    for n in 0..tries() {
        let path = if n % 2 == 0 { "d/f" } else { "e/f" };
        match folder.read(path, 0, 0).and_then(|mut piece| piece.next(100)) {
            Ok(bytes) => {
                assert_ne!(bytes, b"secret");
                read += 1;
            }
            Err(_) => refused += 1,
        }
        let put = folder.write(path).and_then(|mut file| {
            file.append(0, b"inside")?;
            file.finish()
        });
        written += u32::from(put.is_ok());
        assert_eq!(std::fs::read(outside.join("f")).unwrap(), b"secret");
    }
    over.store(true, Ordering::Relaxed);
    let swaps = swapping.join().unwrap();
    assert_eq!(names(&outside), ["f"], "nothing was made there");
    eprintln!(
        "seed 11, {} tries: {read} read, {written} written, {refused} refused, {swaps} swaps",
        tries()
    );
    assert!(read > 0 && refused > 0 && written > 0 && swaps > 100);
}
