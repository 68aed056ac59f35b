//! `cargo xtask`: the developer's commands. `cargo xtask help` lists them.

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::tools;

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
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Tools { group } => tools::ensure(group),
    }
}
