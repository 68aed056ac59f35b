//! The log in PostgreSQL: what is stored a second beside bare inserts into the same tables, and how soon a client of one gateway has
//! what came to the other.

use anyhow::{Context as _, Result};
use tokio::{task::JoinHandle, time::Instant};
use tokio_postgres::{Client, NoTls};
use xtask::postgres::Postgres;

use super::{
    CORE, Options, TEXT, WINDOW, cluster, median,
    peers::{self, Process, Runner, Watcher},
    shown,
};
use crate::bench::table::Table;

/// The gateway's own layout.
const LAYOUT: &str = include_str!("../../../../gateway/src/store/postgres/migrations/V1__log.sql");
const INSERT: &str = "INSERT INTO records (session, seq, kind, attempt, turn, ts, checksum, bytes)
    SELECT 1, seq, 'cli', 1, 1, 1767323045678, 305419896, bytes FROM unnest($1::bigint[], $2::bytea[]) AS record (seq, bytes)";

/// All of it, on a server of its own.
pub(super) async fn measure(options: &Options, table: &mut Table) -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start).await??;
    for batch in [100, 1000] {
        durable(options, &server, batch, table).await?;
    }
    across(options, &server, table).await
}

struct Connected {
    client: Client,
    _driver: JoinHandle<Result<(), tokio_postgres::Error>>,
}

async fn connect(database: &str) -> Result<Connected> {
    let (client, connection) = tokio_postgres::connect(database, NoTls).await?;
    Ok(Connected {
        client,
        _driver: tokio::spawn(connection),
    })
}

/// Bare inserts a second: `batch` of them in a statement, each statement a commit.
async fn bare(server: &Postgres, records: u64, batch: u64) -> Result<f64> {
    let Connected { client, _driver } = connect(&server.database()?).await?;
    client.batch_execute(LAYOUT).await?;
    client.batch_execute("SET synchronous_commit = on").await?;
    let insert = client.prepare(INSERT).await?;
    let text = "x".repeat(TEXT);
    let all: Vec<_> = (1..=records)
        .map(|seq| peers::record(seq, &text).into_bytes())
        .collect();
    let (begun, mut next) = (Instant::now(), 1_i64);
    for batch in all.chunks(batch as usize) {
        let seqs: Vec<_> = (next..next + batch.len() as i64).collect();
        let bytes: Vec<_> = batch.iter().map(Vec::as_slice).collect();
        client.execute(&insert, &[&seqs, &bytes]).await?;
        next += batch.len() as i64;
    }
    Ok(records as f64 / begun.elapsed().as_secs_f64())
}

async fn started(options: &Options, database: &str, core: Option<usize>) -> Result<(Process, tempfile::TempDir)> {
    let folder = tempfile::tempdir()?;
    let cluster = cluster::start(1).await?;
    let arguments = [format!("--database-url={database}")];
    let process = Process::start_with(&options.gateway, folder.path(), cluster, core, &arguments).await?;
    Ok((process, folder))
}

async fn durable(options: &Options, server: &Postgres, batch: u64, table: &mut Table) -> Result<()> {
    let text = "x".repeat(TEXT);
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for _ in 0..options.turns {
        raw.push(bare(server, options.records, batch).await?);
        let (process, _folder) = started(options, &server.database()?, Some(CORE)).await?;
        let mut runner = Runner::connect(process.address, 0).await?;
        let begun = Instant::now();
        runner.deliver(options.records, batch, WINDOW, &text).await?;
        ours.push(options.records as f64 / begun.elapsed().as_secs_f64());
    }
    let ratios = ours.iter().zip(&raw).map(|(ours, raw)| ours / raw).collect();
    table.tell(
        &format!("PostgreSQL: acknowledged records a second, {batch} a frame; bare inserts, as many a commit; ratio"),
        format!(
            "{:.0}; {:.0}; {:.1} %",
            median(ours),
            median(raw),
            median(ratios) * 100.0
        ),
    );
    Ok(())
}

/// From a runner's send at one gateway to the receipt of a client of the other, beside one of the same.
async fn across(options: &Options, server: &Postgres, table: &mut Table) -> Result<()> {
    let database = server.database()?;
    let (here, _folder) = started(options, &database, None).await?;
    let (there, _other) = started(options, &database, None).await?;
    let mut runner = Runner::connect(here.address, 0).await?;
    let (mut told, mut last) = (Vec::new(), 0);
    for (whose, address) in [("same", here.address), ("other", there.address)] {
        let watcher = Watcher::connect(address, 0).await?;
        let (first, end) = (last + 1, last + options.shown);
        let [p50, p99] = shown(&mut runner, vec![watcher], first..=end).await.context(whose)?;
        told.push(format!("{whose} gateway: {p50:.1} ms, {p99:.1} ms"));
        last = end;
    }
    table.tell(
        "PostgreSQL: record sent → a watcher, commit included: p50, p99",
        told.join("; "),
    );
    Ok(())
}
