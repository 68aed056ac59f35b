//! From a request to the first line of its answer, on a node: the end-to-end test that tells it, more often.

use std::{ffi::OsString, fs};

use anyhow::{Context as _, Result};
use clap::Parser;

use super::runner::table;
use crate::{
    e2e::{self, Afterwards},
    paths, tools,
};

const TEST: &str = "first_token::the_time_from_a_request_to_its_first_line_is_told_step_by_step";

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Options {
    /// Requests of each kind.
    #[arg(long, default_value_t = 20)]
    requests: usize,
    /// Put the table into docs/benchmarks.md.
    #[arg(long)]
    write: bool,
}

pub(super) fn run(arguments: &[OsString]) -> Result<()> {
    let Options { requests, write } = Options::parse_from(arguments);
    let folder = tools::Scratch::new(&format!("first-token-{}", std::process::id()))?;
    let file = folder.path().join("table.md");
    let environment = [
        ("FIRST_TOKEN_REQUESTS", OsString::from(requests.to_string())),
        ("FIRST_TOKEN_TABLE", file.clone().into_os_string()),
    ];
    let test = ["--exact", TEST, "--nocapture"].map(OsString::from);
    e2e::run_with(Afterwards::Remove, &test, &environment)?;
    let said = fs::read_to_string(&file).context("the test left no table")?;
    if !write {
        return Ok(());
    }
    let report = format!(
        "## Request → first line\n\n`cargo xtask bench first-token [--requests N] [--write]`: a request of the claude-code API on a warm node (images \
         present), step by step, until the first line of its answer; beside it a session with a claim, made over REST and followed by its events. The \
         model is a mock that answers at once; the CLI is the real one. Steps of ours are **bold**. {requests} requests of each kind, taking turns; \
         medians.\n\n{said}"
    );
    table::write(&paths::workspace().join("docs/benchmarks.md"), "first-token", &report)
}
