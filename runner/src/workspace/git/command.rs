//! Running git: in a repository of the runner's own, with no configuration but ours, and to pinned addresses only.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process_group};
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Duration, Instant};

use super::remote::{Pinned, Scheme};
use super::{Credentials, Fault, GitError, Repos};
use crate::outlet::Outlet;

/// Longest part of what git said that is repeated.
const MAX_SAID: usize = 400;
/// Longest answer that is kept.
const MAX_OUTPUT: u64 = 1 << 20;
/// How often progress is shown.
const SHOWN: Duration = Duration::from_secs(2);

/// A git command to be run.
pub(super) struct Git {
    command: Command,
    configuration: Vec<(String, String)>,
    action: String,
    progress: Option<Progress>,
    /// What is added to which words of git's.
    advice: Vec<(&'static [&'static str], String)>,
}

/// Where progress is shown, and behind which name.
struct Progress {
    to: Arc<Outlet>,
    name: String,
}

/// What a command wrote to its stdout.
pub(super) type Output = String;

impl Git {
    /// `git` in the repository `dir`; `action` is what fails if it does.
    pub(super) fn new(dir: &Path, credentials: &Credentials, action: impl Into<String>) -> Self {
        let mut command = Command::new("git");
        command
            .env_clear()
            .env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()),
            )
            .env("HOME", credentials.private())
            .env("LC_ALL", "C")
            .env("GIT_DIR", dir)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_ATTR_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "/bin/false")
            .env("GIT_ALLOW_PROTOCOL", "https:ssh")
            .env("GIT_NO_REPLACE_OBJECTS", "1")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let fixed = [
            // Files, and what is tried to make packs smaller, are held in memory otherwise: of each thread, one for each
            // processor of the node. The runner's container has 512 MiB.
            ("core.bigFileThreshold", "16m"),
            ("core.deltaBaseCacheLimit", "32m"),
            ("pack.deltaCacheSize", "32m"),
            ("pack.threads", "2"),
            ("pack.windowMemory", "32m"),
            ("core.hooksPath", "/dev/null"),
            ("core.fsmonitor", "false"),
            ("credential.helper", ""),
            ("fetch.recurseSubmodules", "false"),
            ("fetch.unpackLimit", "1"),
            ("gc.auto", "0"),
            // Another host would be given what is for this one, and could be any.
            ("http.followRedirects", "false"),
            ("http.lowSpeedLimit", "500"),
            ("http.lowSpeedTime", "60"),
            ("maintenance.auto", "false"),
            // The claim's storage may say of every file that it is somebody else's.
            ("safe.directory", "*"),
            ("submodule.recurse", "false"),
        ];
        Self {
            command,
            configuration: fixed.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            action: action.into(),
            progress: None,
            advice: Vec::new(),
        }
    }

    /// Arguments.
    pub(super) fn args<T: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.command.args(arguments);
        self
    }

    /// A variable.
    pub(super) fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What it reads.
    pub(super) fn stdin(mut self, file: std::fs::File) -> Self {
        self.command.stdin(file);
        self
    }

    /// Shows progress behind a name.
    pub(super) fn progress(mut self, repos: &Repos, name: &str) -> Self {
        self.progress = repos.progress.clone().map(|to| Progress {
            to,
            name: name.to_owned(),
        });
        self
    }

    /// Lets it speak to one remote, with the credential for it.
    pub(super) fn to(mut self, pinned: &Pinned<'_>, credentials: &Credentials) -> Result<Self, GitError> {
        let Pinned { remote, addresses } = pinned;
        self.advice = credentials.advice(remote);
        match remote.scheme {
            Scheme::Https => {
                let list: Vec<String> = addresses.iter().map(|address| bracketed(address.ip())).collect();
                let host = remote.host.trim_start_matches('[').trim_end_matches(']');
                // An address needs no resolving, and curl does not take it here.
                if host.parse::<std::net::IpAddr>().is_err() {
                    let resolve = format!("{host}:{}:{}", remote.port, list.join(","));
                    self.configuration.push(("http.curloptResolve".to_owned(), resolve));
                }
                if let Some(header) = credentials.authorization(&remote.host, remote.port) {
                    let key = format!("http.https://{}:{}/.extraHeader", remote.host, remote.port);
                    self.configuration.push((key, header.expose_secret().to_owned()));
                }
                if let Some(file) = credentials.authorities()? {
                    self.configuration
                        .push(("http.sslCAInfo".to_owned(), file.display().to_string()));
                }
            }
            Scheme::Ssh => {
                let command = ssh(pinned, credentials.ssh()?);
                self.command
                    .env("GIT_SSH_COMMAND", command)
                    .env("GIT_SSH_VARIANT", "ssh");
            }
        }
        Ok(self)
    }

    /// Runs it to its end; gives what it wrote to stdout.
    pub(super) async fn run(self) -> Result<Output, GitError> {
        let mut kept = Vec::new();
        self.run_with(async |stdout| {
            let _ = stdout.take(MAX_OUTPUT).read_to_end(&mut kept).await;
        })
        .await?;
        Ok(String::from_utf8_lossy(&kept).trim_end().to_owned())
    }

    /// Runs it to its end and shows each line of its stdout.
    pub(super) async fn lines(self, mut see: impl FnMut(&str)) -> Result<(), GitError> {
        self.run_with(async |stdout| {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                see(&line);
            }
        })
        .await
    }

    async fn run_with(mut self, read: impl AsyncFnOnce(&mut tokio::process::ChildStdout)) -> Result<(), GitError> {
        self.command
            .env("GIT_CONFIG_COUNT", self.configuration.len().to_string());
        for (at, (key, value)) in self.configuration.iter().enumerate() {
            self.command
                .env(format!("GIT_CONFIG_KEY_{at}"), key)
                .env(format!("GIT_CONFIG_VALUE_{at}"), value);
        }
        let failed = |said: String| GitError::Git {
            action: self.action.clone(),
            said,
        };
        let mut group = Group(self.command.spawn().map_err(|error| failed(format!("git: {error}")))?);
        let (stdout, stderr) = (group.0.stdout.take(), group.0.stderr.take());
        let reading = async {
            if let Some(mut stdout) = stdout {
                read(&mut stdout).await;
                // Whatever is beyond what was wanted, so that git does not wait.
                let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
            }
        };
        let ((), said) = tokio::join!(reading, listen(stderr, self.progress.as_ref()));
        let status = group.0.wait().await.map_err(|error| failed(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        Err(failed(if said.is_empty() {
            status.to_string()
        } else {
            with_advice(said, &self.advice)
        }))
    }
}

fn with_advice(mut said: String, advice: &[(&[&str], String)]) -> String {
    for (words, advice) in advice {
        if words.iter().any(|word| said.contains(word)) {
            let _ = write!(said, "; {advice}");
        }
    }
    said
}

/// git starts others; all of them end with it.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // An id means that it was not waited for, so the group's number is still its own.
        if let Some(pid) = self.0.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Reads what git says: progress is shown, the rest is kept.
async fn listen(stderr: Option<impl AsyncRead + Unpin>, progress: Option<&Progress>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let mut said = Said::default();
    let mut shown = Instant::now();
    let mut buffer = [0; 4096];
    let mut line = Vec::new();
    // Behind the last byte the cursor went back: git writes its progress over itself, and ssh ends its lines so.
    let mut back = false;
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        for byte in &buffer[..count] {
            if std::mem::replace(&mut back, *byte == b'\r') && *byte != b'\n' {
                if let Some(progress) = progress
                    && shown.elapsed() >= SHOWN
                {
                    shown = Instant::now();
                    progress.show(&String::from_utf8_lossy(&line));
                }
                line.clear();
            }
            match byte {
                b'\r' => {}
                b'\n' => {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    if let Some(progress) = progress
                        && text.ends_with("done.")
                    {
                        progress.show(&text);
                    }
                    said.take(&text);
                    line.clear();
                }
                byte if line.len() < MAX_SAID => line.push(*byte),
                _ => {}
            }
        }
    }
    said.take(&String::from_utf8_lossy(&line));
    said.text()
}

impl Progress {
    fn show(&self, line: &str) {
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        let line = format!("  {}: {}\n", self.name, line.trim_start_matches("remote: "));
        self.to.say(line.as_bytes());
    }
}

/// The lines that explain a failure; of those the last ones.
#[derive(Default)]
struct Said(Vec<String>);

impl Said {
    fn take(&mut self, line: &str) {
        let line = line.trim();
        let noise = ["hint:", "To ", "warning: no threads", "Pushing to ", "Done"];
        let progress = line.ends_with("done.") || line.contains("% (") || line.starts_with("Total ");
        if line.is_empty() || progress || noise.iter().any(|prefix| line.starts_with(prefix)) {
            return;
        }
        self.0.push(line.chars().filter(|c| !c.is_control()).collect());
        if self.0.len() > 12 {
            self.0.remove(0);
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for line in &self.0 {
            let separator = if text.is_empty() { "" } else { "; " };
            let _ = write!(text, "{separator}{line}");
        }
        let mut from = text.len().saturating_sub(MAX_SAID);
        while !text.is_char_boundary(from) {
            from += 1;
        }
        text.split_off(from)
    }
}

fn bracketed(address: std::net::IpAddr) -> String {
    match address {
        std::net::IpAddr::V4(v4) => v4.to_string(),
        std::net::IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

fn ssh(pinned: &Pinned<'_>, mut options: Vec<String>) -> String {
    let Pinned { remote, addresses } = pinned;
    // Keys are kept under the name that the author wrote, as ssh itself would.
    let alias = if remote.port == 22 {
        remote.host.clone()
    } else {
        format!("[{}]:{}", remote.host, remote.port)
    };
    options.extend(addresses.first().map(|address| format!("HostName={}", address.ip())));
    options.push(format!("HostKeyAlias={alias}"));
    for fixed in [
        "BatchMode=yes",
        "CheckHostIP=no",
        "ConnectTimeout=15",
        "ForwardAgent=no",
        "GlobalKnownHostsFile=/dev/null",
        "IdentitiesOnly=yes",
        "LogLevel=ERROR",
        "PermitLocalCommand=no",
        "ProxyCommand=none",
        "ServerAliveInterval=15",
        "UpdateHostKeys=no",
    ] {
        options.push(fixed.to_owned());
    }
    let mut command = "ssh -F /dev/null".to_owned();
    for option in options {
        let _ = write!(command, " -o {}", quoted(&option));
    }
    command
}

/// git gives the command to a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What git's words mean. It has no codes for this.
pub(super) fn fault(said: &str) -> Fault {
    let full = ["No space left on device", "Disk quota exceeded"];
    let network = [
        "Could not resolve",
        "Couldn't resolve",
        "Failed to connect",
        "Connection refused",
        "Connection reset",
        "Connection timed out",
        "Connection closed by",
        "Operation timed out",
        "Operation too slow",
        "Network is unreachable",
        "No route to host",
        "early EOF",
        "unexpected disconnect",
        "the remote end hung up unexpectedly",
        "RPC failed",
        "returned error: 429",
        "returned error: 5",
        "Recv failure",
        "Send failure",
        "Empty reply from server",
        "gnutls_handshake() failed: The TLS connection was non-properly terminated",
    ];
    // These come with the words of a lost connection, too.
    let refused = [
        "Permission denied",
        "Host key verification failed",
        "not found",
        "remote rejected",
        "[rejected]",
        "Authentication failed",
        "could not read Username",
    ];
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&full) {
        Fault::DiskFull
    } else if !says(&refused) && says(&network) {
        Fault::Unreachable
    } else {
        Fault::Refused
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        "fatal: unable to access 'https://h/r/': Could not resolve host: h",
        Fault::Unreachable
    )]
    #[case(
        "fatal: unable to access 'https://h/r/': The requested URL returned error: 503",
        Fault::Unreachable
    )]
    #[case(
        "fatal: unable to access 'https://h/r/': The requested URL returned error: 403",
        Fault::Refused
    )]
    #[case(
        "git@h: Permission denied (publickey).; fatal: Could not read from remote repository.",
        Fault::Refused
    )]
    #[case("fatal: the remote end hung up unexpectedly", Fault::Unreachable)]
    #[case("! [remote rejected] x -> x (pre-receive hook declined)", Fault::Refused)]
    #[case(
        "fatal: write error: No space left on device; fatal: the remote end hung up unexpectedly",
        Fault::DiskFull
    )]
    fn what_git_says_is_understood(#[case] said: &str, #[case] expected: Fault) {
        assert_eq!(fault(said), expected);
    }

    #[tokio::test]
    async fn a_line_that_ssh_ends_is_kept_and_progress_is_written_over() {
        let said =
            "Receiving objects:  10%\rReceiving objects:  20%\rgit@h: Permission denied (publickey).\r\nfatal: x\n";
        let said = listen(Some(said.as_bytes()), None).await;
        assert_eq!(said, "git@h: Permission denied (publickey).; fatal: x");
    }

    #[tokio::test]
    async fn progress_that_nobody_reads_holds_up_nothing_and_is_there_for_who_reads_later() {
        let (reader, writer) = std::io::pipe().unwrap();
        let progress = Progress {
            to: Arc::new(Outlet::to(writer, |lines| format!("{lines} missing\n"))),
            name: "one".to_owned(),
        };
        // More than a pipe holds.
        let said = "remote: Counting objects: 100% (3/3), done.\n".repeat(3_000);
        assert_eq!(listen(Some(said.as_bytes()), Some(&progress)).await, "");
        let read = std::thread::spawn(move || std::io::read_to_string(reader));
        drop(progress);
        let shown = read.join().unwrap().unwrap();
        assert_eq!(shown, "  one: Counting objects: 100% (3/3), done.\n".repeat(3_000));
    }

    #[test]
    fn what_a_shell_must_not_read_is_quoted() {
        assert_eq!(quoted("a b'c$(d)"), r"'a b'\''c$(d)'");
    }
}
