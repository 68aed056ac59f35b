//! `cargo xtask`: the developer's commands. `cargo xtask help` lists them.

mod cluster_command;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::{
    bench, demo,
    e2e::{self, Afterwards},
    generate, images, long_runs, postgres, quality, tools,
};

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
    /// Write the files that are made from code.
    Generate {
        /// Only fail if they differ.
        #[arg(long)]
        check: bool,
    },
    /// Format, lints, generated files, licences and advisories.
    Check,
    /// All tests.
    Test,
    /// Install the product in a local cluster and run a session.
    Demo,
    /// Remove the clusters of the demo and of this clone's end-to-end tests.
    Clean {
        /// Leave the demo's.
        #[arg(long)]
        tests_only: bool,
    },
    /// The end-to-end tests, on a cluster of their own.
    E2e {
        /// Leave the cluster up afterwards.
        #[arg(long)]
        keep: bool,
        /// Arguments for the test binary, such as a test's name.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Kill runner, gateway and network again and again while records are written, and compare what was stored.
    NoRecordLost {
        /// Records at least.
        #[arg(long, default_value_t = 1_000_000)]
        records: u64,
        /// Kills and cuts at least.
        #[arg(long, default_value_t = 1_000)]
        kills: u32,
        /// What the dice begin with.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Record the pinned CLI against the mock model, for the tests that read its lines.
    RecordCli,
    /// Kill the runner at every point of a run, and the next one at another, and look how the session ends.
    KillPoints {
        /// Chooses where the next one dies.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Feed the runner with lines, frames and files that were changed at random.
    Fuzz {
        /// How many times as many cases as in CI.
        #[arg(long, default_value_t = 100)]
        times: u32,
        /// What the dice begin with.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Run the operator's component tests on the oldest and the newest Kubernetes that can be built; builds both the first time.
    KubernetesVersions,
    /// Run sessions through the queues of a real Kueue; builds it the first time.
    Kueue,
    /// Change sessions, their namespace and their children at random, and compare what comes of it with a clean namespace.
    RandomOperations {
        /// Operations at least.
        #[arg(long, default_value_t = 10_000)]
        operations: u32,
        /// What the dice begin with.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Change the operator's decisions one at a time, and name the changes that no test finds.
    Mutants {
        /// One part of so many, such as 0/8.
        #[arg(long)]
        shard: Option<String>,
        /// One file of those that decide, such as `transition/*.rs`.
        #[arg(long)]
        file: Option<String>,
    },
    /// Swap folders, files and links in a workspace while the runner serves files through them.
    FileRaces {
        /// How often.
        #[arg(long, default_value_t = 100_000)]
        tries: u32,
    },
    /// Measure a part of the product beside something bare, with the release binaries.
    Bench {
        /// The part and its options; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<OsString>,
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
        Command::Generate { check: true } => generate::check(),
        Command::Generate { check: false } => generate::write(),
        Command::Demo => demo::run(),
        Command::Clean { tests_only } => {
            if !tests_only {
                demo::remove()?;
            }
            postgres::sweep();
            e2e::remove_leftover(&e2e::cluster_name())
        }
        Command::Check => quality::check(),
        Command::Test => quality::test(),
        Command::E2e { keep, arguments } => {
            e2e::run(if keep { Afterwards::Keep } else { Afterwards::Remove }, &arguments)
        }
        Command::NoRecordLost { records, kills, seed } => long_runs::no_record_lost(records, kills, seed),
        Command::RecordCli => long_runs::record_cli(),
        Command::KillPoints { seed } => long_runs::kill_points(seed),
        Command::Fuzz { times, seed } => long_runs::fuzz(times, seed),
        Command::KubernetesVersions => long_runs::kubernetes_versions(),
        Command::Kueue => long_runs::kueue(),
        Command::RandomOperations { operations, seed } => long_runs::random_operations(operations, seed),
        Command::Mutants { shard, file } => long_runs::mutants(shard.as_deref(), file.as_deref()),
        Command::FileRaces { tries } => long_runs::file_races(tries),
        Command::Bench { arguments } => bench::run(&arguments),
        Command::Images => {
            for archive in images::ensure()? {
                println!("{}", archive.display());
            }
            Ok(())
        }
        Command::Cluster(arguments) => cluster_command::run(arguments),
    }
}
