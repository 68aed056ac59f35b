//! Records the real CLI against the mock model, for the tests that read its lines: `cargo xtask record-cli`.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result};
use runner::cli::command::{Conversation, Start, spawn};
use runner::cli::options::Options;
use runner::cli::stdin;
use secrecy::SecretString;
use serde_json::{Value, json};
use tests::model::script::prompt;
use tests::model::{FAKE_KEY, MockModel};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::time::{Duration, timeout};
use uuid::Uuid;

/// How long a line may take.
const DEADLINE: Duration = Duration::from_mins(1);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recordings");
    std::fs::create_dir_all(&folder)?;
    for (name, options, says) in scenarios() {
        let lines = recorded(&options, says)
            .await
            .with_context(|| format!("failed to record {name}"))?;
        std::fs::write(folder.join(format!("{name}.jsonl")), lines)?;
    }
    Ok(())
}

/// A step that has a shell command run.
fn bash(command: &str) -> Value {
    json!({ "tools": [{ "name": "Bash", "input": { "command": command, "description": "test" } }] })
}

/// A step that says something.
fn text(text: &str) -> Value {
    json!({ "text": text })
}

/// What is said to the CLI, and when.
enum Say {
    /// A message of this number.
    Message(u128, String),
    /// Stop the turn.
    Interrupt,
    /// Wait until a line has this in it.
    Until(&'static str),
}

fn scenarios() -> Vec<(&'static str, Options, Vec<Say>)> {
    let message = |n, steps: &[Value]| Say::Message(n, prompt("MARK", &json!(steps)));
    let asking = Options {
        interactive: true,
        tools: protocol::spec::Tools {
            permission_mode: protocol::spec::PermissionMode::Default,
            ..protocol::spec::Tools::default()
        },
        ..Options::default()
    };
    let idle = || Say::Until(r#""state":"idle""#);
    let write = json!({ "tools": [{ "name": "Write", "input": { "file_path": "out.txt", "content": "x" } }] });
    let agent = json!({ "tools": [{ "name": "Agent", "input": {
        "description": "look", "subagent_type": "general-purpose", "run_in_background": false,
        "prompt": prompt("SUB", &json!([bash("echo below"), text("Looked.")])),
    } }] });
    vec![
        (
            "tools",
            Options::default(),
            vec![message(1, &[bash("echo hi"), bash("exit 3"), text("Done.")]), idle()],
        ),
        (
            "subagent",
            Options::default(),
            vec![message(1, &[agent, text("Done.")]), idle()],
        ),
        (
            "interrupt",
            Options::default(),
            vec![
                message(1, &[bash("sleep 100"), text("Not said.")]),
                Say::Until("tool_use"),
                Say::Interrupt,
                idle(),
                message(2, &[text("Next.")]),
                idle(),
            ],
        ),
        (
            "folded",
            Options::default(),
            vec![
                message(1, &[bash("sleep 1"), text("Done."), text("Done.")]),
                Say::Until("tool_use"),
                Say::Message(2, "FOLLOW".into()),
                idle(),
            ],
        ),
        (
            "question",
            asking,
            vec![
                message(1, &[write, text("Done.")]),
                Say::Until("can_use_tool"),
                Say::Interrupt,
                idle(),
            ],
        ),
        (
            "clear",
            Options::default(),
            vec![
                message(1, &[text("One.")]),
                idle(),
                Say::Message(2, "/clear".into()),
                idle(),
                message(3, &[text("Two.")]),
                idle(),
            ],
        ),
        (
            "overloaded",
            Options::default(),
            vec![message(1, &[json!({ "error": { "status": 529 } })]), idle()],
        ),
        (
            "background",
            Options::default(),
            vec![
                message(
                    1,
                    &[
                        json!({ "tools": [{ "name": "Bash", "input": { "command": "sleep 1; echo late", "description": "t", "run_in_background": true } }] }),
                        text("Started."),
                        text("Heard."),
                    ],
                ),
                Say::Until("task_notification"),
                idle(),
            ],
        ),
    ]
}

async fn recorded(options: &Options, says: Vec<Say>) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let home = dir.path().to_str().context("a folder whose name is no text")?;
    let work = format!("{home}/work");
    std::fs::create_dir_all(&work)?;
    let model = MockModel::start().await?;
    let url = model.url();
    let cli = xtask::claude_cli()?.display().to_string();
    let start = Start {
        cli: &cli,
        workspace: &work,
        home,
        config_dir: home,
        options,
        deltas: false,
        conversation: Conversation::New(Uuid::from_u128(0xc0)),
        proxy: url.trim_start_matches("http://").parse()?,
        token: &SecretString::from(FAKE_KEY),
        vertex: None,
    };
    let spawn = spawn(&start);
    let (program, arguments) = spawn.argv.split_first().context("no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(spawn.env)
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir(&work)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let mut out = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let mut kept = String::new();
    for say in says {
        match say {
            Say::Message(n, text) => write(&mut stdin, &stdin::user_message(Uuid::from_u128(n), &text)).await?,
            Say::Interrupt => write(&mut stdin, &stdin::interrupt("i", false)).await?,
            Say::Until(part) => loop {
                let line = timeout(DEADLINE, out.next_line()).await??;
                let line = line.with_context(|| format!("the CLI ended before it said {part}"))?;
                kept += &scrubbed(&line, home)?;
                kept.push('\n');
                if line.contains(part) {
                    break;
                }
            },
        }
    }
    drop(stdin);
    while let Some(line) = timeout(DEADLINE, out.next_line()).await?? {
        kept += &scrubbed(&line, home)?;
        kept.push('\n');
    }
    Ok(kept)
}

async fn write(stdin: &mut ChildStdin, line: &[u8]) -> Result<()> {
    stdin.write_all(line).await?;
    stdin.flush().await?;
    Ok(())
}

/// Without this machine's folders, and without the long lists of a beginning.
fn scrubbed(line: &str, home: &str) -> Result<String> {
    // The CLI names folders of its own after the working folder.
    let folder = home.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    let line = line.replace(home, "/scratch").replace(&folder, "-scratch");
    let mut value: Value = serde_json::from_str(&line)?;
    if value["subtype"] == "init" {
        for list in ["tools", "slash_commands", "skills", "agents", "plugins", "capabilities"] {
            if let Some(list) = value[list].as_array_mut() {
                list.truncate(2);
            }
        }
        value["memory_paths"] = json!({});
        value["messaging_socket_path"] = json!("");
        return Ok(value.to_string());
    }
    Ok(line)
}
