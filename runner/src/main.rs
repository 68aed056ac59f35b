//! `runner`: drives a session's attempt; `runner agent`: the shim in the agent container.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use protocol::names::{env, path};
use runner::agent::shim::{self, Door};
use runner::config::{Config, LocalArgs, held_in_pod};
use runner::control::client::{self, Word};
use runner::drain::{DrainConfig, drain};
use runner::drive::{drive, refuse};
use runner::last_word::LastWord;
use runner::log;
use runner::secrets::held_in_files;
use runner::watchdog;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Duration;

/// Exit code for a configuration that cannot work, as in the table of outcomes.
const CONFIGURATION: u8 = 2;
/// How long the runtime may stand still: its lease is given up after as long.
const STANDS_STILL: Duration = Duration::from_secs(30);
/// How long it may take to say so.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Drives the Claude Code CLI: in a pod by the environment that the operator sets, elsewhere with --local.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    local: LocalArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the runner in the agent container.
    Agent {
        /// Socket to listen on.
        #[arg(long, default_value = path::SHIM_SOCKET)]
        socket: PathBuf,
        /// stdin is a socket with the runner at its other end.
        #[arg(long, conflicts_with = "socket")]
        inherited: bool,
    },
    /// Deliver the records that a dead attempt left on the session's claim.
    Drain,
    #[command(flatten)]
    Word(Word),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let _log = log::start();
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
        .and_then(|runtime| {
            let result = runtime.block_on(run(arguments));
            // A thread that waits for a volume which does not answer must not keep the process from ending.
            runtime.shutdown_background();
            result
        });
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::from(CONFIGURATION)
    })
}

async fn run(Arguments { command, local }: Arguments) -> anyhow::Result<ExitCode> {
    match command {
        Some(Command::Agent { socket, inherited }) => {
            let door = if inherited {
                Door::Inherited
            } else {
                Door::Socket(&socket)
            };
            return Ok(shim::serve(door).await?);
        }
        Some(Command::Word(word)) => {
            return Ok(match client::say(word).await {
                Ok(answer) => {
                    print!("{answer}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("{error}");
                    ExitCode::FAILURE
                }
            });
        }
        Some(Command::Drain) => {
            let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
            let config = DrainConfig::from_env(&var)?;
            return Ok(ExitCode::from(drain(&config, stop()?).await.exit_code()));
        }
        None => {}
    }
    // What the agent starts runs under the same user outside a pod; it shall not read our environment.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .context("failed to forbid tracing")?;
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let config = if local.local {
        Config::local(local, &var)?
    } else {
        match Config::from_env(&var) {
            Ok(config) => Config {
                secrets: held_in_pod(utf8_variables())
                    .into_iter()
                    .chain(
                        [path::SECRETS, path::MCP_CREDENTIALS]
                            .into_iter()
                            .flat_map(|folder| held_in_files(folder.as_ref())),
                    )
                    .collect(),
                ..config
            },
            Err(error) => {
                // Outside a pod there is nowhere to leave a report, and nobody to read it.
                if !Path::new(path::TERMINATION_LOG).exists() {
                    return Err(error.into());
                }
                let attempt = var(env::ATTEMPT).and_then(|number| number.parse().ok()).unwrap_or(0);
                return Ok(ExitCode::from(
                    refuse(path::TERMINATION_LOG.as_ref(), attempt, &error).exit_code(),
                ));
            }
        }
    };
    let last_word = Arc::new(LastWord::of(config.folders.report.clone(), config.attempt.unwrap_or(0)));
    let config = Config {
        last_word: Arc::clone(&last_word),
        ..config
    };
    watchdog::start(&config.pulse, STANDS_STILL, move |cause| {
        // Nothing may be waited for: the report may be on the volume, and whoever reads stderr may stand still as well.
        std::thread::spawn(move || {
            let message = cause.message(STANDS_STILL);
            last_word.say(cause, &message);
            eprintln!("{message}");
        });
        std::thread::sleep(LAST_WORD);
        std::process::exit(i32::from(cause.outcome().exit_code()));
    })
    .context("failed to start the watchdog")?;
    let outcome = Box::pin(drive(config, stop()?)).await;
    Ok(ExitCode::from(outcome.exit_code()))
}

/// Becomes true with the first SIGTERM, or Ctrl-C.
fn stop() -> anyhow::Result<watch::Receiver<bool>> {
    let (sender, stop) = watch::channel(false);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).context("failed to wait for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                sender.send_replace(true);
            }
        });
    }
    Ok(stop)
}

/// The environment; what is not UTF-8 cannot be a header or a token.
fn utf8_variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
