//! Measures the product beside something bare; `cargo xtask bench` builds what it needs and runs it.

use anyhow::Result;
use clap::Parser;
use tests::bench::operator;

/// Measures one part of the product and prints a table.
#[derive(Parser)]
enum Bench {
    /// The operator, beside a client that makes the same claim and Job for each session.
    Operator(operator::Options),
}

#[tokio::main]
async fn main() -> Result<()> {
    // The one provider; an error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Bench::parse() {
        Bench::Operator(options) => operator::run(options).await,
    }
}
