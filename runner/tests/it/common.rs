//! A session without Kubernetes: the real runner, the real CLI, the mock model.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use protocol::{Kind, Record, Report};
use runner::control::client::ask;
use runner::control::{Reply, Request};
use runner::spool::Spool;
use runner::status::{Phase, Status};
use serde_json::{Value, json};
use tests::model::{FAKE_KEY, Logged, MockModel};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

/// How long anything may take that should take seconds.
pub const DEADLINE: Duration = Duration::from_mins(1);

/// A session's folders and its model API.
pub struct Session {
    dir: tempfile::TempDir,
    pub model: MockModel,
    key: Option<String>,
}

/// How a runner ended.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Session {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = MockModel::start().await.unwrap();
        Self {
            dir,
            model,
            key: Some(FAKE_KEY.to_owned()),
        }
    }

    pub fn with_key(mut self, key: Option<&str>) -> Self {
        self.key = key.map(str::to_owned);
        self
    }

    pub fn workspace(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The runner, to be started.
    pub fn command(&self, prompt: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        command
            .args(["--local", "--name", "hello", "--prompt", prompt])
            .arg("--workspace")
            .arg(self.workspace())
            .arg("--state")
            .arg(self.state())
            .args(more)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("ANTHROPIC_BASE_URL", self.model.url())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if !more.contains(&"--cli") {
            command.arg("--cli").arg(xtask::claude_cli().unwrap());
        }
        if let Some(key) = &self.key {
            command.env("ANTHROPIC_API_KEY", key);
        }
        command
    }

    pub fn start(&self, prompt: &str, more: &[&str]) -> Child {
        self.command(prompt, more).spawn().unwrap()
    }

    pub async fn run(&self, prompt: &str, more: &[&str]) -> Ended {
        ended(self.start(prompt, more)).await
    }

    pub fn report(&self) -> Report {
        self.try_report().expect("a report")
    }

    /// The report, if there is one yet.
    pub fn try_report(&self) -> Option<Report> {
        let text = std::fs::read_to_string(self.state().join("report.json")).ok()?;
        Report::from_message(&text).ok()
    }

    /// Says something to the running session on its control socket.
    pub async fn ask(&self, request: &Request) -> Reply {
        let socket = self.state().join("control.sock");
        timeout(DEADLINE, ask(&socket, request))
            .await
            .expect("an answer comes")
            .unwrap()
    }

    /// Sends a message and expects it to be taken.
    pub async fn send(&self, text: &str) {
        let request = Request::Send {
            text: text.to_owned(),
            id: None,
        };
        let reply = self.ask(&request).await;
        assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    }

    /// Waits until the session's figures satisfy `wanted`.
    pub async fn status(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        let socket = self.state().join("control.sock");
        let deadline = Instant::now() + DEADLINE;
        let mut last = None;
        while Instant::now() < deadline {
            if let Ok(Reply::Status(status)) = ask(&socket, &Request::Status).await {
                if wanted(&status) {
                    return *status;
                }
                last = Some(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("in time: {what}; last: {last:?}");
    }

    /// Waits until the turn is over and the session waits for a message.
    pub async fn idle(&self, turn: u32) -> Status {
        self.status("the turn is over", |status| {
            status.phase == Phase::Idle && status.turn == turn
        })
        .await
    }

    /// All records that are on disk, in order.
    pub fn records(&self) -> Vec<Record> {
        // Opening a spool cuts a torn end: not where a runner may be writing it.
        let copy = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(self.state().join("spool"))
            .into_iter()
            .flatten()
            .flatten()
        {
            std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
        let mut records = Vec::new();
        Spool::open(copy.path(), |record| records.push(record.clone())).unwrap();
        records
    }

    /// Bodies of the records of a kind.
    pub fn bodies(&self, kind: Kind) -> Vec<Value> {
        let of_kind = |record: &Record| record.kind == kind;
        let parse = |record: Record| serde_json::from_str(record.body.get()).unwrap();
        self.records().into_iter().filter(of_kind).map(parse).collect()
    }

    /// Events of a name in the session's records.
    pub fn events(&self, name: &str) -> Vec<Value> {
        self.bodies(Kind::Session)
            .into_iter()
            .filter(|body| body["event"] == name)
            .collect()
    }

    /// Waits for a request that satisfies `wanted`.
    pub async fn request(&self, wanted: impl Fn(&Logged) -> bool) -> Logged {
        self.model.request(DEADLINE, wanted).await.expect("the request comes")
    }

    /// In every request the prompt is in exactly one user message.
    pub fn assert_prompt_once(&self, marker: &str) {
        let requests = self.model.requests();
        let asked: Vec<_> = requests.iter().filter(|request| request.asks_for_message()).collect();
        assert!(!asked.is_empty());
        for request in asked {
            assert_eq!(request.user_messages_with(marker), 1, "{:#?}", request.messages());
        }
    }

    /// Whether anything runs that works in the workspace.
    pub fn is_at_work(&self) -> bool {
        anybody_in(&self.workspace())
    }

    /// Nothing runs any more that worked in the workspace.
    pub async fn assert_nothing_left(&self) {
        let workspace = self.workspace();
        eventually("nothing is left running", || !anybody_in(&workspace)).await;
    }
}

fn anybody_in(folder: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| std::fs::read_link(entry.path().join("cwd")).ok())
        .any(|cwd| cwd.starts_with(folder))
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for a runner's end.
pub async fn ended(child: Child) -> Ended {
    ended_within(child, DEADLINE).await
}

/// Waits for the end of a runner that may take so long.
pub async fn ended_within(child: Child, patience: Duration) -> Ended {
    let begun = Instant::now();
    let output = timeout(patience, child.wait_with_output())
        .await
        .expect("the runner ends")
        .unwrap();
    let ended = Ended {
        code: code(output.status),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: begun.elapsed(),
    };
    eprintln!(
        "--- runner ended with {:?} after {:?}\n{}{}",
        ended.code, ended.took, ended.stdout, ended.stderr
    );
    ended
}

fn code(status: ExitStatus) -> Option<i32> {
    status.code()
}

/// Sends a signal to a runner.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A prompt that makes the mock answer with these steps; `marker` stands in front.
pub fn script(marker: &str, steps: &[Value]) -> String {
    format!("{marker} @mock {}", json!({ "steps": steps }))
}

/// A step that has a shell command run.
pub fn bash(command: &str) -> Value {
    json!({ "tools": [{ "name": "Bash", "input": { "command": command, "description": "test" } }] })
}

/// A step that says something.
pub fn text(text: &str) -> Value {
    json!({ "text": text })
}

/// Shell commands by which a tool of the agent asks the model for something itself; they print the answer.
pub fn asks_the_model(prompt: &str) -> String {
    let body = json!({
        "model": "claude-opus-5-5", "max_tokens": 1_000, "stream": true,
        "messages": [{ "role": "user", "content": prompt }],
    })
    .to_string();
    let head = [
        "POST /v1/messages HTTP/1.1",
        "host: x",
        "x-api-key: %s",
        "anthropic-version: 2023-06-01",
        "content-type: application/json",
        "connection: close",
    ]
    .join(r"\r\n");
    format!(
        r#"address=${{ANTHROPIC_BASE_URL#http://}}
exec 3<>/dev/tcp/${{address%:*}}/${{address#*:}}
printf '{head}\r\ncontent-length: {}\r\n\r\n%s' "$ANTHROPIC_API_KEY" '{body}' >&3
cat <&3"#,
        body.len(),
    )
}

/// Looks into every file below the folder for what must not be there.
pub fn assert_nowhere(folder: &Path, secrets: &[&str]) {
    let mut open = vec![folder.to_owned()];
    let mut files = 0;
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
                continue;
            }
            files += 1;
            let bytes = std::fs::read(entry.path()).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            for secret in secrets {
                assert!(!text.contains(secret), "{secret} is in {}", entry.path().display());
            }
        }
    }
    assert!(files > 5, "{files} files were looked into");
}
