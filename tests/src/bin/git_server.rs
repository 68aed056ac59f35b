//! A git server over TLS as a program: `git http-backend` behind a token, with an authority of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use tests::git::GitServer;
use tokio::time::sleep;

/// Serves repositories that it makes, each with a readme on `main`. Needs `git`.
#[derive(Parser)]
struct Arguments {
    /// Puts this program there and ends: for images with `git` and without this program.
    #[arg(long)]
    copy_to: Option<PathBuf>,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// What is asked for as a password.
    #[arg(long, env = "GIT_SERVER_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Names of the repositories.
    #[arg(long = "repository")]
    repositories: Vec<String>,
    /// Where its authority's certificate and a link `repositories` to their folder are written.
    #[arg(long, default_value = ".")]
    show: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(to) = arguments.copy_to {
        let this = std::env::current_exe()?;
        std::fs::copy(this, &to).with_context(|| format!("failed to write {}", to.display()))?;
        return Ok(());
    }
    let server = GitServer::listen(arguments.listen, arguments.token.as_deref()).await?;
    for name in &arguments.repositories {
        server.repository(name, &[("README.md", "First line.\n")])?;
    }
    let folder = server.path("any");
    let folder = folder.parent().context("repositories are in a folder")?;
    std::os::unix::fs::symlink(folder, arguments.show.join("repositories"))?;
    // Last: who sees it may use the server.
    std::fs::write(arguments.show.join("ca.crt"), &server.ca)?;
    let mut shown = 0;
    loop {
        let asked = server.asked();
        for asked in &asked[shown..] {
            let with = if asked.token.is_some() { "with" } else { "without" };
            println!("{} {} {with} a token", asked.status, asked.line);
        }
        shown = asked.len();
        sleep(Duration::from_millis(200)).await;
    }
}
