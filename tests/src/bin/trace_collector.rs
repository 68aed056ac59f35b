//! The trace collector as a server.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use tests::traces::{Keys, Shared, serve};
use tokio::net::TcpListener;

/// Takes OTLP traces as Langfuse does, keeps them in memory and answers as Langfuse's public API does.
#[derive(Parser)]
struct Arguments {
    /// Address to listen on.
    #[arg(long, env = "TRACE_COLLECTOR_LISTEN", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    /// Public key of the Basic authentication.
    #[arg(long, env = "LANGFUSE_PUBLIC_KEY")]
    public_key: String,
    /// Secret key of the Basic authentication.
    #[arg(long, env = "LANGFUSE_SECRET_KEY", hide_env_values = true)]
    secret_key: String,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let Arguments {
        listen,
        public_key,
        secret_key,
    } = Arguments::parse();
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("failed to listen on {listen}: choose another --listen"))?;
    tracing::info!(address = %listener.local_addr()?, "trace collector listens");
    serve(
        listener,
        Arc::new(Shared::new(&Keys {
            public: public_key,
            secret: secret_key,
        })),
    )
    .await?;
    Ok(())
}
