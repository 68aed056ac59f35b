//! `cargo xtask`: the developer's commands. `cargo xtask help` lists them.

mod cluster_command;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::{images, tools};

#[derive(Parser)]
#[command(about = "Builds, generates and runs what a developer needs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the pinned tools that are missing.
    Tools {
        /// Which ones.
        #[arg(value_enum, default_value = "all")]
        group: tools::Group,
    },
    /// Build the product's images that are not current, and print their OCI archives.
    Images,
    /// Run a Kubernetes cluster without Docker.
    Cluster(cluster_command::Arguments),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match Arguments::parse().command {
        Command::Tools { group } => tools::ensure(group),
        Command::Images => {
            for archive in images::ensure()? {
                println!("{}", archive.display());
            }
            Ok(())
        }
        Command::Cluster(arguments) => cluster_command::run(arguments),
    }
}
