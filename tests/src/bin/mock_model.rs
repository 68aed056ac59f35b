//! The mock model API as a server.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use tests::model::{Shared, serve};
use tokio::net::TcpListener;

/// A mock of the Messages API. Prompts carry its script: `@mock {"steps":[{"text":"hello"}]}`.
#[derive(Parser)]
struct Arguments {
    /// Address to listen on.
    #[arg(long, env = "MOCK_MODEL_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Keys that are accepted, separated by commas; all others are refused with 401.
    #[arg(
        long = "key",
        env = "MOCK_MODEL_KEYS",
        value_delimiter = ',',
        required = true,
        hide_env_values = true
    )]
    keys: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("failed to listen on {}: choose another --listen", arguments.listen))?;
    tracing::info!(address = %listener.local_addr()?, keys = arguments.keys.len(), "mock model listens");
    serve(listener, Arc::new(Shared::new(arguments.keys))).await?;
    Ok(())
}
