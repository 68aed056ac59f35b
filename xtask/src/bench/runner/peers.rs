//! What is compared, and how each is started.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::{made, output};
use crate::{claude_cli, paths, progress, tools};

/// The SDK's version; its source distribution, which does not bring a second CLI.
pub(super) const SDK: &str = "0.2.186";
/// A key that the mock takes.
pub(super) const KEY: &str = "sk-ant-fake-bench-key";

/// Who drives the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Alone,
    Runner,
    Sdk,
}

impl Peer {
    pub(super) const ALL: [Self; 3] = [Self::Alone, Self::Runner, Self::Sdk];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Alone => "the CLI alone",
            Self::Runner => "runner",
            Self::Sdk => "claude-agent-sdk",
        }
    }
}

/// Everything that the runs need.
pub(super) struct Bench {
    pub(super) runner: PathBuf,
    pub(super) cli: PathBuf,
    fake_cli: PathBuf,
    python: PathBuf,
    pub(super) python_version: String,
    sdk: PathBuf,
    model: Child,
    address: String,
    _scratch: tools::Scratch,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.model.kill();
        let _ = self.model.wait();
    }
}

impl Bench {
    pub(super) fn prepare() -> Result<Self> {
        let scratch = tools::Scratch::new(&format!("bench-{}", std::process::id()))?;
        let [runner, mock] = build(scratch.path())?;
        let python = python()?;
        let python_version =
            output(Command::new(&python).args(["-c", "import platform; print(platform.python_version())"]))?;
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let path = scratch.path().join(name);
            fs::write(&path, text).with_context(|| format!("failed to write {name}"))?;
            Ok(path)
        };
        let sdk = write("sdk.py", include_str!("../sdk.py"))?;
        let shebang = format!("#!{} -SE\n", python.display());
        let fake_cli = write("claude", &(shebang + include_str!("../fake_cli.py")))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&fake_cli, mode)?;
        let (model, address) = mock_model(&mock)?;
        Ok(Self {
            runner,
            cli: claude_cli::claude_cli()?,
            fake_cli,
            python_version: python_version.trim().to_owned(),
            python,
            sdk,
            model,
            address,
            _scratch: scratch,
        })
    }

    pub(super) fn model_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The command that has `peer` drive `cli` in a home of its own.
    pub(super) fn command(&self, peer: Peer, cli: &Path, home: &Path, prompt: &str) -> Result<Started> {
        let work = home.join("work");
        made(&work)?;
        made(&home.join("config"))?;
        let (mut command, stdin) = match peer {
            Peer::Alone => (alone(cli), Some(user_line(prompt))),
            Peer::Runner => {
                let mut command = Command::new(&self.runner);
                command
                    .args(["--local", "--name", "bench", "--prompt", prompt, "--cli"])
                    .arg(cli);
                command
                    .arg("--workspace")
                    .arg(&work)
                    .arg("--state")
                    .arg(home.join("state"));
                command.env("LOG_FORMAT", "json");
                (command, None)
            }
            Peer::Sdk => {
                let mut command = Command::new(&self.python);
                command
                    .arg(&self.sdk)
                    .env("BENCH_PROMPT", prompt)
                    .env("BENCH_CLI", cli)
                    .env("BENCH_WORK", &work);
                (command, None)
            }
        };
        command
            .current_dir(&work)
            .env("HOME", home)
            .env("CLAUDE_CONFIG_DIR", home.join("config"))
            .env("ANTHROPIC_BASE_URL", self.model_url())
            .env("ANTHROPIC_API_KEY", KEY)
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS", "1")
            .env("IS_SANDBOX", "1");
        Ok(Started { command, stdin })
    }

    /// The same with the CLI that only writes.
    pub(super) fn fake(&self, peer: Peer, home: &Path, says: &str) -> Result<Started> {
        let started = self.command(peer, &self.fake_cli, home, "go")?;
        // A file, because the runner passes nothing of its environment on.
        fs::write(home.join("work/says"), says)?;
        Ok(started)
    }
}

/// A command, and what it is given on stdin.
pub(super) struct Started {
    pub(super) command: Command,
    pub(super) stdin: Option<String>,
}

/// The CLI as the runner starts it, with nobody between.
fn alone(cli: &Path) -> Command {
    let mut command = Command::new(cli);
    command.args([
        "-p",
        "--input-format",
        "stream-json",
        "--output-format",
        "stream-json",
        "--verbose",
    ]);
    command.args(["--replay-user-messages", "--strict-mcp-config", "--setting-sources", ""]);
    command.args([
        "--settings",
        r#"{"skipWebFetchPreflight":true}"#,
        "--permission-mode",
        "bypassPermissions",
    ]);
    command
}

fn user_line(prompt: &str) -> String {
    let message = serde_json::json!({
        "type": "user", "uuid": "6fa459ea-ee8a-3ca4-894e-db77e160355e",
        "message": { "role": "user", "content": prompt },
    });
    format!("{message}\n")
}

/// The runner as it is shipped, optimised across crates, and the mock.
/// Builds the runner as its Dockerfile does, and the mock; copies both.
fn build(to: &Path) -> Result<[PathBuf; 2]> {
    let target = paths::cache()?.join("target");
    let build = |package: &str, name: &str, profile: &str| {
        let mut cargo = Command::new(crate::e2e::env_cargo());
        cargo
            .current_dir(paths::workspace())
            .env("CARGO_TARGET_DIR", &target)
            .args(["build", "--locked", "--quiet", "--profile", profile])
            .args(["--package", package, "--bin", name]);
        let built = crate::images::linked_as_shipped(&mut cargo, profile)?;
        progress::step(&format!("building {name}"), || crate::command::run(&mut cargo))?;
        // Another clone may build over it while this runs.
        let copy = to.join(name);
        fs::copy(target.join(built).join(name), &copy).with_context(|| format!("failed to copy {name}"))?;
        Ok::<_, anyhow::Error>(copy)
    };
    Ok([
        build("runner", "runner", crate::images::SMALL_PROFILE)?,
        build("tests", "mock-model", "release")?,
    ])
}

/// A Python with the SDK, in the cache.
fn python() -> Result<PathBuf> {
    let folder = paths::cache()?.join(format!("claude-agent-sdk-{SDK}"));
    let python = folder.join("bin/python");
    let done = folder.join("complete");
    if !done.exists() {
        progress::step("installing the Python SDK", || -> Result<()> {
            output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
            let pip = ["-m", "pip", "install", "--quiet", "--no-binary", "claude-agent-sdk"];
            output(Command::new(&python).args(pip).arg(format!("claude-agent-sdk=={SDK}")))?;
            fs::write(&done, "")?;
            Ok(())
        })
        .context("the bench needs python3 with venv, and PyPI")?;
    }
    Ok(python)
}

fn mock_model(program: &Path) -> Result<(Child, String)> {
    // A port that was free a moment ago; the mock says so when it is not any more.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let mut model = Command::new(program)
        .args(["--listen", &address, "--key", KEY])
        .stderr(Stdio::piped())
        .spawn()
        .context("failed to start the mock model")?;
    let stderr = model.stderr.take().context("the mock has no stderr")?;
    let mut first = String::new();
    let mut lines = BufReader::new(stderr);
    lines.read_line(&mut first)?;
    anyhow::ensure!(first.contains("listens"), "the mock model does not start: {first}");
    // It must not wait for somebody to read on.
    std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
    Ok((model, address))
}
