//! The gateway's process.

mod args;

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Parser as _;
use gateway::{
    Gateway, compat::keeper, connection, log_format::Flat, metrics, origin::Origins, retention, server, store,
    tls::Certificate, waiting,
};
use kube::Client;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use args::{Args, Command};

/// How long requests under way may take to end.
const END_WITHIN: Duration = Duration::from_secs(15);

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(args.log_level.as_str()));
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match args.log_format.as_str() {
        "flat" => log.event_format(Flat).init(),
        "json" => log.with_writer(std::io::stderr).json().init(),
        _ => log.with_writer(std::io::stderr).init(),
    }
    // Fails only when a provider is installed already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(run(args))
}

async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Command::Migrate) = args.command {
        return migrate(&args).await;
    }
    let config = kube::Config::infer()
        .await
        .context("failed to find the cluster: run in a pod or set KUBECONFIG")?;
    let client = Client::try_from(connection::bounded(config)).context("failed to make a client for the cluster")?;
    let api = listen(args.listen()).await?;
    let mut stop = pin!(stop_asked()?);
    let log = tokio::select! {
        log = waiting::open(args.location(api.local_addr()?)?, &api) => log?,
        () = stop.as_mut() => return Ok(()),
    };
    let shutdown = CancellationToken::new();
    let settings = args.compat.settings()?;
    let gateway = Gateway::serving(client, log, shutdown.clone(), settings);
    gateway.use_key(args.compat.key());
    if args.rate_per_minute > 0 {
        gateway.rates.limit(args.rate_per_minute);
    }
    let metrics_listener = listen(args.metrics_address).await?;
    tracing::info!(address = %api.local_addr()?, metrics = %metrics_listener.local_addr()?, "listening");

    let watch = tokio::spawn({
        let gateway = gateway.clone();
        async move { gateway.watched.run(&gateway.sessions).await }
    });
    if let Some(path) = args.api_keys {
        gateway.keys.load(&path)?;
        let gateway = gateway.clone();
        gateway
            .tasks
            .clone()
            .spawn(async move { gateway.keys.follow(&path, &gateway.shutdown).await });
    }
    let limits = args.retention.limits();
    gateway.tasks.spawn({
        let gateway = gateway.clone();
        async move { retention::run(&gateway, limits).await }
    });
    gateway.tasks.spawn(gateway::commands::run(gateway.clone()));
    gateway.tasks.spawn(keeper::run(gateway.clone()));
    gateway.tasks.spawn({
        let gateway = gateway.clone();
        async move { gateway::news::run(&gateway).await }
    });
    let metrics = metrics::router(gateway.metrics.clone());
    let tasks = gateway.tasks.clone();
    tasks.spawn(server::serve(
        metrics_listener,
        metrics,
        64,
        shutdown.clone(),
        tasks.clone(),
    ));
    let router = gateway::router_for(gateway.clone(), &Origins::new(args.allow_origins));
    if let (Some(address), Some(certificate), Some(key)) = (args.tls_listen, args.tls_certificate, args.tls_key) {
        let certificate = Certificate::load(&certificate, &key)?;
        let listener = listen(address).await?;
        tracing::info!(address = %listener.local_addr()?, "listening with TLS");
        tasks.spawn(server::serve_tls(
            listener,
            certificate.acceptor(),
            router.clone(),
            args.max_connections,
            shutdown.clone(),
            tasks.clone(),
        ));
        let shutdown = shutdown.clone();
        tasks.spawn(async move { certificate.follow(&shutdown).await });
    }
    tasks.spawn(server::serve(
        api,
        router,
        args.max_connections,
        shutdown.clone(),
        tasks.clone(),
    ));

    stop.await;
    tracing::info!("stopping");
    // Whoever sends requests here may not have heard yet that this gateway ends.
    tokio::time::sleep(Duration::from_secs(args.linger_seconds)).await;
    shutdown.cancel();
    tasks.close();
    if tokio::time::timeout(END_WITHIN, tasks.wait()).await.is_err() {
        tracing::warn!("requests cut off");
    }
    watch.abort();
    // The log ends when the last holder lets go of it: what is queued is committed first.
    drop(Arc::into_inner(gateway));
    Ok(())
}

async fn migrate(args: &Args) -> anyhow::Result<()> {
    let (Some(database), store::Location::File(file)) = (args.database(), &args.data) else {
        bail!("failed to move the event log: give the file with --data and the database with DATABASE_URL");
    };
    let moved = waiting::until_there(async || store::postgres::migrate(file, &database).await).await?;
    if file.exists() {
        let mut name = file.clone().into_os_string();
        name.push(".moved");
        std::fs::rename(file, &name).with_context(|| format!("failed to rename {}", file.display()))?;
    }
    let store::postgres::Moved {
        sessions,
        records,
        known,
    } = moved;
    tracing::info!(sessions, records, known, "the event log is in PostgreSQL");
    Ok(())
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("failed to listen on {address}"))
}

fn stop_asked() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
