//! Measures the product beside something bare; `cargo xtask bench` builds what it needs and runs it.

use anyhow::Result;
use clap::Parser;
use tests::bench::{gateway, operator};

/// Measures one part of the product and prints a table.
#[derive(Parser)]
enum Bench {
    /// The operator, beside a client that makes the same claim and Job for each session.
    Operator(operator::Options),
    /// The gateway, beside bare inserts into the same SQLite.
    Gateway(gateway::Options),
    /// The bare inserts, as a process that can be bound to one core.
    #[command(hide = true)]
    RawInserts(gateway::RawOptions),
}

#[tokio::main]
async fn main() -> Result<()> {
    // The one provider; an error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Bench::parse() {
        Bench::Operator(options) => operator::run(options).await,
        Bench::Gateway(options) => gateway::run(options).await,
        Bench::RawInserts(options) => gateway::raw_inserts(&options),
    }
}
