//! Bare inserts: the least that a durable log in SQLite can cost.

use std::time::Instant;

use anyhow::{Context as _, Result};
use rusqlite::{Connection, params};

use super::{super::machine, peers};

/// The gateway's own layout.
const LAYOUT: &str = include_str!("../../../../gateway/src/store/sqlite/migrations/V1__records.sql");

/// How much is inserted.
#[derive(Clone, Debug, clap::Args)]
pub struct RawOptions {
    #[arg(long)]
    records: u64,
    #[arg(long)]
    batch: u64,
}

/// Inserts, and prints how many a second and the microseconds of processor time of one.
pub fn raw_inserts(options: &RawOptions) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut connection = Connection::open(folder.path().join("events.db"))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.execute_batch(LAYOUT)?;
    let text = "x".repeat(super::TEXT);
    let records: Vec<_> = (1..=options.records).map(|seq| peers::record(seq, &text)).collect();
    let (begun, used) = (Instant::now(), machine::cpu(std::process::id())?);
    let mut key = 1_i64 << 32;
    for batch in records.chunks(options.batch as usize) {
        let tx = connection.transaction()?;
        {
            let mut insert = tx.prepare_cached(
                "INSERT INTO records (key, kind, attempt, turn, ts, checksum, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?;
            for record in batch {
                key += 1;
                insert.execute(params![
                    key,
                    "cli",
                    1,
                    1,
                    1_767_323_045_678_i64,
                    0x1234_5678,
                    record.as_bytes()
                ])?;
            }
        }
        tx.commit()?;
    }
    let rate = options.records as f64 / begun.elapsed().as_secs_f64();
    let used = machine::cpu(std::process::id())?.saturating_sub(used);
    println!("{rate} {}", used.as_secs_f64() * 1e6 / options.records as f64);
    Ok(())
}

/// [`raw_inserts`] in a process of its own, on one core: a second, and microseconds of one.
pub(super) async fn raw_rate(records: u64, batch: u64, core: usize) -> Result<(f64, f64)> {
    let output = peers::on_core(&peers::itself()?, Some(core))
        .args([
            "raw-inserts",
            "--records",
            &records.to_string(),
            "--batch",
            &batch.to_string(),
        ])
        .output()
        .await
        .context("failed to start the bare inserts")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = || format!("the bare inserts failed: {}", String::from_utf8_lossy(&output.stderr));
    let (rate, cpu) = said.trim().split_once(' ').with_context(failed)?;
    Ok((rate.parse().with_context(failed)?, cpu.parse().with_context(failed)?))
}
