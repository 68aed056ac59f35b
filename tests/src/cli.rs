//! The real Claude CLI as a child process, without the product around it: what the product builds on is shown with this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time;

use crate::model::FAKE_KEY;

/// A home, a working folder and transcripts, gone when dropped.
#[derive(Debug)]
pub struct Home(tempfile::TempDir);

impl Home {
    /// An empty home.
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir().context("failed to make a folder for the CLI")?;
        for name in ["work", "config", "tmp"] {
            fs::create_dir(dir.path().join(name)).with_context(|| format!("failed to make {name}"))?;
        }
        Ok(Self(dir))
    }

    /// The working folder.
    pub fn work(&self) -> PathBuf {
        self.0.path().join("work")
    }

    /// The transcript's lines of the CLI session, in whatever project folder it is; empty before the CLI wrote it.
    pub fn transcript(&self, session: &str) -> Vec<Value> {
        let mut folders = fs::read_dir(self.0.path().join("config/projects"))
            .into_iter()
            .flatten()
            .flatten();
        let text = folders.find_map(|folder| fs::read_to_string(folder.path().join(format!("{session}.jsonl"))).ok());
        text.unwrap_or_default()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }
}

/// A running CLI that takes and gives JSON lines.
#[derive(Debug)]
pub struct Cli {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines<BufReader<ChildStdout>>,
    /// Every line that was read so far.
    pub seen: Vec<Value>,
}

impl Cli {
    /// Starts the pinned CLI with nothing inherited but what it needs; `arguments` and `environment` come on top.
    pub fn start(home: &Home, base_url: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Self> {
        let root: &Path = home.0.path();
        let mut child = Command::new(xtask::claude_cli()?)
            .args([
                "-p",
                "--input-format",
                "stream-json",
                "--output-format",
                "stream-json",
                "--verbose",
            ])
            .args([
                "--permission-mode",
                "bypassPermissions",
                "--strict-mcp-config",
                "--setting-sources",
                "",
            ])
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", root)
            .env("CLAUDE_CONFIG_DIR", root.join("config"))
            .env("CLAUDE_CODE_TMPDIR", root.join("tmp"))
            // Tests run as root here and there; the CLI then wants to be told that it is contained.
            .env("IS_SANDBOX", "1")
            .env("ANTHROPIC_API_KEY", FAKE_KEY)
            .env("ANTHROPIC_BASE_URL", base_url)
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS", "1")
            .env("CLAUDE_CODE_MAX_RETRIES", "1")
            .envs(environment.iter().copied())
            .current_dir(home.work())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .context("failed to start the CLI")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("the CLI has no stdout")?;
        Ok(Self {
            child,
            stdin,
            stdout: BufReader::new(stdout).lines(),
            seen: Vec::new(),
        })
    }

    /// Gives the CLI a user message.
    pub async fn user(&mut self, uuid: &str, text: &str) -> Result<()> {
        self.send(&json!({ "type": "user", "uuid": uuid, "message": { "role": "user", "content": text } }))
            .await
    }

    /// Writes a line.
    pub async fn send(&mut self, line: &Value) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin was closed")?;
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .await
            .context("failed to write to the CLI")
    }

    /// Reads on until a line satisfies `wanted`.
    pub async fn until(&mut self, deadline: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let reading = async {
            while let Some(line) = self.stdout.next_line().await.context("failed to read from the CLI")? {
                let line: Value = serde_json::from_str(&line).context("the CLI wrote a line that is not JSON")?;
                self.seen.push(line.clone());
                if wanted(&line) {
                    return Ok(line);
                }
            }
            bail!("the CLI ended its output")
        };
        let found = time::timeout(deadline, reading)
            .await
            .unwrap_or_else(|_| bail!("no such line in {deadline:?}"));
        found.with_context(|| format!("the lines so far: {:#?}", self.summary()))
    }

    /// Reads on until the result of a turn.
    pub async fn result(&mut self, deadline: Duration) -> Result<Value> {
        self.until(deadline, |line| line["type"] == "result").await
    }

    /// Kills the CLI as the kernel would: no farewell.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("failed to kill the CLI")
    }

    /// Closes stdin and waits for the end of the process.
    pub async fn finish(mut self, deadline: Duration) -> Result<ExitStatus> {
        drop(self.stdin.take());
        let ending = async {
            while self.stdout.next_line().await?.is_some() {}
            self.child.wait().await
        };
        let ended = time::timeout(deadline, ending)
            .await
            .with_context(|| format!("no end in {deadline:?}"))?;
        ended.context("failed to wait for the CLI")
    }

    fn summary(&self) -> Vec<String> {
        self.seen
            .iter()
            .map(|line| line.to_string().chars().take(300).collect())
            .collect()
    }
}
