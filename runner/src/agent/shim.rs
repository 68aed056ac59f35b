//! `runner agent`: the first process of the agent container. Starts the CLI, carries its streams, reaps, and kills.
//!
//! Agent processes run under the same user, so nothing may remain here that they could use: the socket is gone before the
//! first of them starts, and the shim cannot be traced.

pub(super) mod kill;
mod memory;
mod stdin;

use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Duration, timeout};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::frame::{FromShim, Hello, MAX_PIECE, ToShim, codec};
use super::{Exit, Spawn};
use stdin::Stdin;

/// How long what a dead process wrote may take to be read: something it left behind can hold the pipe open.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long the runner's end may take to be known to the container runtime.
const RUNNER_ENDS: Duration = Duration::from_millis(300);
/// Tools without which the CLI is of little use.
const NEEDED: [&str; 2] = ["bash", "git"];
/// What loads the CLI, which is linked to glibc. The shim is not: it starts in any image, and can say what is not there.
const LOADER: &str = if cfg!(target_arch = "aarch64") {
    "/lib/ld-linux-aarch64.so.1"
} else {
    "/lib64/ld-linux-x86-64.so.2"
};

/// Where the runner comes from.
pub enum Door<'a> {
    /// It connects to this socket.
    Socket(&'a Path),
    /// stdin is a socket, and the runner is at its other end.
    Inherited,
}

/// Why a shim does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The kernel said no.
    #[error("failed to {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ShimError {
    move |source| ShimError::Io {
        action,
        source: source.into(),
    }
}

/// Serves one runner, then ends: on its word, on SIGTERM, or because it is gone; nothing runs any more after that.
pub async fn serve(door: Door<'_>) -> Result<ExitCode, ShimError> {
    // Otherwise a tool could attach to the shim, or read its memory through /proc.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid tracing"))?;
    // What tools leave behind comes to us, also where we are not the first process.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(failed("become the reaper"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("wait for SIGTERM"))?;
    let runner = tokio::select! {
        runner = open(door) => runner?,
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
    };
    let end = tokio::select! {
        end = Shim::new(runner)?.run() => end,
        _ = terminate.recv() => End::Asked,
    };
    kill::everything().await;
    if matches!(end, End::RunnerGone) && rustix::process::getpid() == Pid::INIT {
        // The kubelet ends a sidecar only after it has seen the main container's end, and looks once a second. Ending on
        // our own spares the pod one look; ending before the runner's own end is known would have us started again.
        let _ = timeout(RUNNER_ENDS, terminate.recv()).await;
    }
    Ok(ExitCode::SUCCESS)
}

async fn open(door: Door<'_>) -> Result<UnixStream, ShimError> {
    match door {
        Door::Inherited => {
            use std::os::fd::AsFd as _;
            let fd = io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map_err(failed("take the inherited socket"))?;
            let stream = std::os::unix::net::UnixStream::from(fd);
            stream
                .set_nonblocking(true)
                .map_err(failed("take the inherited socket"))?;
            UnixStream::from_std(stream).map_err(failed("take the inherited socket"))
        }
        Door::Socket(path) => {
            // Left by a shim that was killed.
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove the old socket")(error));
                }
                _ => {}
            }
            let listener = UnixListener::bind(path).map_err(failed("listen for the runner"))?;
            let (stream, _) = listener.accept().await.map_err(failed("accept the runner"))?;
            std::fs::remove_file(path).map_err(failed("remove the socket"))?;
            Ok(stream)
        }
    }
}

/// Why serving ended.
enum End {
    Asked,
    RunnerGone,
}

type Frames = Framed<UnixStream, LengthDelimitedCodec>;

/// Takes requests, and never waits for the runner to take an answer: the runner may be waiting for us to take a request.
struct Shim {
    requests: SplitStream<Frames>,
    /// What processes write; bounded, so that a process is as fast as the runner.
    output: mpsc::Sender<FromShim>,
    answers: mpsc::UnboundedSender<Answer>,
    writer: tokio::task::JoinHandle<()>,
    process: Option<Process>,
}

/// What is said in the order in which it happened.
enum Answer {
    Now(FromShim),
    /// The process ended; what it wrote is said first.
    Exit(JoinSet<()>, Exit),
}

/// The CLI.
struct Process {
    pid: Pid,
    stdin: Option<Stdin>,
    pumps: JoinSet<()>,
    oom_kills_before: u64,
}

impl Shim {
    fn new(runner: UnixStream) -> Result<Self, ShimError> {
        let (sink, requests) = Framed::new(runner, codec()).split();
        let (output, queue) = mpsc::channel(16);
        let (answers, in_order) = mpsc::unbounded_channel();
        let writer = tokio::spawn(write(sink, queue));
        let hello = Hello {
            boot_id: uuid::Uuid::new_v4().to_string(),
            missing: missing(),
            oom_kills: memory::oom_kills(),
        };
        output
            .try_send(FromShim::Hello(hello))
            .map_err(|_| failed("greet")(io::Error::from(io::ErrorKind::Other)))?;
        tokio::spawn(answer(in_order, output.clone()));
        Ok(Self {
            requests,
            output,
            answers,
            writer,
            process: None,
        })
    }

    async fn run(mut self) -> End {
        let Ok(mut children) = signal(SignalKind::child()) else {
            return End::RunnerGone;
        };
        loop {
            tokio::select! {
                request = self.requests.next() => {
                    let Some(Ok(frame)) = request else { return End::RunnerGone };
                    match ToShim::decode(frame.freeze()) {
                        Ok(ToShim::Quit) => return End::Asked,
                        Ok(request) => self.obey(request).await,
                        Err(_) => return End::RunnerGone,
                    }
                }
                _ = children.recv() => self.reap(),
                _ = &mut self.writer => return End::RunnerGone,
            }
        }
    }

    async fn obey(&mut self, request: ToShim) {
        match request {
            ToShim::Spawn(_) if self.process.is_some() => {
                self.answer(FromShim::SpawnFailed("a process runs already".to_owned()));
            }
            ToShim::Spawn(spawn) => match start(&spawn, &self.output) {
                Ok(process) => self.process = Some(process),
                Err(why) => self.answer(FromShim::SpawnFailed(why)),
            },
            ToShim::Stdin(bytes) => self.feed(bytes),
            ToShim::CloseStdin => {
                if let Some(process) = &mut self.process {
                    process.stdin = None;
                }
            }
            ToShim::Signal(number) => {
                if let (Some(process), Some(signal)) = (&self.process, Signal::from_named_raw(number)) {
                    let _ = rustix::process::kill_process(process.pid, signal);
                }
            }
            ToShim::KillAll => {
                let last = kill::everything_but(self.process.as_ref().map(|process| process.pid)).await;
                self.reaped(last);
                self.answer(FromShim::Killed);
            }
            ToShim::Quit => {}
        }
    }

    /// A process that closed its stdin does not want it; one that leaves too much unread is not worth waiting for.
    fn feed(&self, bytes: Bytes) {
        let Some(process) = &self.process else { return };
        let full = process.stdin.as_ref().is_some_and(|stdin| !stdin.take(bytes));
        if full {
            let _ = rustix::process::kill_process(process.pid, Signal::KILL);
        }
    }

    /// Reaps whatever has ended; most of it are things that tools left behind.
    fn reap(&mut self) {
        let main = self.process.as_ref().map(|process| process.pid);
        let mut ended = None;
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if Some(pid) == main {
                ended = Some(ExitStatus::from_raw(status.as_raw()));
            }
        }
        self.reaped(ended);
    }

    fn reaped(&mut self, ended: Option<ExitStatus>) {
        let (Some(status), Some(process)) = (ended, self.process.take_if(|_| ended.is_some())) else {
            return;
        };
        let exit = Exit {
            code: status.code(),
            signal: status.signal(),
            oom_kills: memory::oom_kills().saturating_sub(process.oom_kills_before),
        };
        // A task that is gone has met a writer that is, which ends the loop.
        let _ = self.answers.send(Answer::Exit(process.pumps, exit));
    }

    fn answer(&self, answer: FromShim) {
        let _ = self.answers.send(Answer::Now(answer));
    }
}

/// Says what is to be said in its order.
async fn answer(mut answers: mpsc::UnboundedReceiver<Answer>, output: mpsc::Sender<FromShim>) {
    while let Some(next) = answers.recv().await {
        let next = match next {
            Answer::Now(answer) => answer,
            Answer::Exit(mut pumps, exit) => {
                let _ = timeout(LAST_WORDS, async { while pumps.join_next().await.is_some() {} }).await;
                // What was left behind and still writes is not heard any more.
                pumps.shutdown().await;
                FromShim::Exit(exit)
            }
        };
        if output.send(next).await.is_err() {
            return;
        }
    }
}

async fn write(mut sink: SplitSink<Frames, Bytes>, mut queue: mpsc::Receiver<FromShim>) {
    while let Some(answer) = queue.recv().await {
        if sink.send(answer.encode()).await.is_err() {
            return;
        }
    }
}

/// Starts it in its folder, or says why not.
fn start(spawn: &Spawn, output: &mpsc::Sender<FromShim>) -> Result<Process, String> {
    // The agent may have removed it, or moved it elsewhere; the CLI needs one to go on in.
    std::fs::create_dir_all(&spawn.cwd)
        .map_err(|error| format!("failed to make the working folder {}: {error}", spawn.cwd))?;
    started(spawn, output).map_err(|error| {
        let program = spawn.argv.first().map_or("nothing", String::as_str);
        format!("failed to start {program}: {error}")
    })
}

fn started(spawn: &Spawn, output: &mpsc::Sender<FromShim>) -> io::Result<Process> {
    let Some((program, arguments)) = spawn.argv.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let defaults = spawn
        .env_default
        .iter()
        .filter(|(name, _)| std::env::var_os(name).is_none());
    let oom_kills_before = memory::oom_kills();
    remove_pipe(spawn);
    // Not tokio's: everything is waited for in one place, and its reaper would race with ours.
    let mut child = Command::new(program)
        .args(arguments)
        .envs(defaults.map(|(name, value)| (name, value)))
        .envs(spawn.env.iter().map(|(name, value)| (name, value)))
        .current_dir(&spawn.cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let mut pumps = JoinSet::new();
    if let Some(stdout) = child.stdout.take() {
        pumps.spawn(pump(ChildStdout::from_std(stdout)?, output.clone(), FromShim::Stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        pumps.spawn(pump(ChildStderr::from_std(stderr)?, output.clone(), FromShim::Stderr));
    }
    let stdin = child.stdin.take().map(ChildStdin::from_std).transpose()?.map(Stdin::of);
    let pid = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::Other)?;
    Ok(Process {
        pid,
        stdin,
        pumps,
        oom_kills_before,
    })
}

/// The CLI reads a file of its own before it does anything, and would wait for ever for what a pipe in its place has to say.
fn remove_pipe(spawn: &Spawn) {
    let Some((_, folder)) = spawn.env.iter().find(|(name, _)| name == "CLAUDE_CONFIG_DIR") else {
        return;
    };
    let file = Path::new(folder).join(".claude.json");
    if file.metadata().is_ok_and(|found| !found.is_file()) {
        let _ = std::fs::remove_file(file);
    }
}

/// Carries a stream to the runner, which is slower only when its disk is.
async fn pump(mut from: impl AsyncRead + Unpin, to: mpsc::Sender<FromShim>, name: fn(Bytes) -> FromShim) {
    let mut buffer = vec![0; MAX_PIECE];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if to.send(name(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
            return;
        }
    }
}

fn missing() -> Vec<String> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    let there = |tool: &&str| folders.iter().any(|folder| folder.join(tool).is_file());
    let tools = NEEDED.iter().filter(|tool| !there(tool)).copied();
    let loader = (!Path::new(LOADER).exists()).then_some("glibc");
    loader.into_iter().chain(tools).map(str::to_owned).collect()
}
