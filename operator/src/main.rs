//! The operator's process: arguments, logging, signals.

use anyhow::Context as _;
use clap::Parser as _;
use kube::client::ClientBuilder;
use operator::{Counted, Settings, uninstall};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Turns `AgenticSession`s into Jobs and records what became of them.
#[derive(clap::Parser)]
#[command(name = "agentic-operator", version)]
enum Command {
    /// Runs sessions until told to stop.
    Run(Settings),
    /// Stops the operator and all sessions and frees their pods; the chart's pre-delete hook.
    Uninstall(uninstall::Args),
}

/// What is logged: `RUST_LOG`, else `info`. Spans of the controllers' runtime are left out unless it names them: they cost at every
/// step, and our own events say which session they are about.
fn filter() -> EnvFilter {
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let spans = if asked.contains("kube_runtime") {
        ""
    } else {
        ",kube_runtime::controller=warn"
    };
    let asked = if asked.is_empty() { "info" } else { &asked };
    EnvFilter::try_new(format!("{asked}{spans}")).unwrap_or_else(|_| EnvFilter::new("info"))
}

/// One thread: what the operator does is to wait for answers, and threads that wake each other up cost more than they win.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let command = Command::parse();
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_env_filter(filter())
        .init();
    // The one provider: with two in the graph rustls would not choose. An error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = kube::Config::infer()
        .await
        .context("failed to find the cluster: give a kubeconfig or run in a pod")?;
    let client =
        ClientBuilder::try_from(operator::bounded(config)).context("failed to make a client for the cluster")?;
    match command {
        Command::Run(settings) => {
            tracing::info!(
                version = env!("CARGO_PKG_VERSION"),
                image = settings.pod.runner_image,
                "starting"
            );
            let stop = CancellationToken::new();
            tokio::spawn(on_signal(stop.clone()));
            operator::run(Counted::build(client), settings, stop).await?;
        }
        Command::Uninstall(args) => uninstall::run(client.build(), args).await?,
    }
    Ok(())
}

/// The first signal stops gracefully; the second has its default effect no more, so it ends the process.
async fn on_signal(stop: CancellationToken) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    let mut once = async || tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} };
    once().await;
    tracing::info!("stopping");
    stop.cancel();
    once().await;
    std::process::exit(130);
}
