//! The whole operator, from its start to its end.

use std::{sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    backoff::Backoff,
    calls::Counted,
    clock,
    context::Context,
    events::Events,
    lease,
    metrics::Metrics,
    network,
    network::Network,
    nodes, orphans,
    orphans::Bare,
    pods,
    pods::Leaving,
    preflight, project_settings,
    project_settings::Projects,
    server,
    session::{Memory, Queue, controller},
    settings::Settings,
    strays,
    strays::Strays,
    tasks,
};

/// Why the operator ends other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster cannot run sessions.
    #[error(transparent)]
    Preflight(#[from] preflight::Error),
    /// The address for metrics and probes cannot be had.
    #[error("failed to listen on {address}: choose another --metrics-address")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The lease could not be kept; another process may work now.
    #[error(transparent)]
    Lease(#[from] lease::Error),
}

/// Within the grace period of the operator's own pod.
const LONGEST_GOODBYE: Duration = Duration::from_secs(20);

/// Runs until `stop`: serves probes, waits for the CRD and the lease, works, and gives the lease back.
pub async fn run(client: impl Into<Counted>, settings: Settings, stop: CancellationToken) -> Result<(), Error> {
    let Counted { client, writes, clock } = client.into();
    preflight::version(&client).await?;
    let address = settings.metrics_address;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| Error::Listen { address, source })?;
    let metrics = Metrics::new(writes);
    let under_way = TaskTracker::new();
    let context = Arc::new(Context {
        events: Events::new(client.clone(), &settings.lease.identity, under_way.clone()),
        metrics,
        clock,
        backoff: Backoff::default(),
        projects: Projects::default(),
        gate: Arc::default(),
        queue: Arc::new(Queue::new(settings.concurrency.into())),
        memory: Memory::default(),
        network: Network::default(),
        leaving: Leaving::default(),
        bare: Bare::default(),
        strays: Strays::default(),
        under_way,
        client: client.clone(),
        settings,
    });
    let (tell, mut waiting_for) = watch::channel(Some("the operator is starting".to_owned()));
    // Whoever drops this future ends what it started.
    let mut background = JoinSet::new();
    let probes = CancellationToken::new();
    background.spawn(preflight::watch_crds(client, tell));
    let serving = server::serve(listener, context.clone(), waiting_for.clone(), probes.clone());
    background.spawn(serving);

    let ready = async { waiting_for.wait_for(Option::is_none).await.is_ok() };
    let result = if until(&stop, ready).await == Some(true) {
        Box::pin(lead(context, &stop)).await
    } else {
        Ok(())
    };
    drop(waiting_for);
    probes.cancel();
    while background.join_next().await.is_some() {}
    result
}

/// Works for as long as the lease is held.
async fn lead(context: Arc<Context>, stop: &CancellationToken) -> Result<(), Error> {
    let mut candidate = lease::Candidate::new(context.client.clone(), context.settings.lease.clone());
    if !candidate.acquire(stop).await {
        return Ok(());
    }
    context.metrics.leader.set(1);
    let work = CancellationToken::new();
    // Dropped at the end: what then still runs ends as it would by SIGKILL, which is safe at every line.
    let working = async {
        tokio::join!(
            tasks::joined(controller::run(context.clone(), work.clone())),
            tasks::joined(pods::run(context.clone(), work.clone())),
            tasks::joined(strays::run(context.clone(), work.clone())),
            tasks::joined(orphans::run(context.clone(), work.clone())),
            tasks::joined(project_settings::run(context.clone(), work.clone())),
            tasks::joined(network::run(context.clone(), work.clone())),
            tasks::joined(nodes::run(context.clone(), work.clone())),
            clock::watch(&context.clock, &context.metrics, work.clone())
        )
    };
    let mut working = std::pin::pin!(working);
    let kept = tokio::select! {
        kept = candidate.keep(stop) => kept,
        _ = &mut working => Ok(()),
    };
    context.metrics.leader.set(0);
    work.cancel();
    match kept {
        Ok(()) => {
            // The lease is ours until the last write is done. A controller whose watches never came up would not end by itself.
            context.under_way.close();
            tokio::select! {
                () = context.under_way.wait() => {}
                () = tokio::time::sleep(LONGEST_GOODBYE) => {}
            }
            candidate.release().await;
            Ok(())
        }
        // Another may work already: nothing more is written. The process ends with this error.
        Err(lost) => Err(lost.into()),
    }
}

/// `None` when told to stop first.
async fn until<T>(stop: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        () = stop.cancelled() => None,
        done = work => Some(done),
    }
}
