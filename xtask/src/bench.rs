//! `cargo xtask bench`: builds what is measured and what measures, and runs it.

mod first_token;
mod runner;

use std::{
    ffi::OsString,
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command,
    images::{Binaries, operator_as_shipped},
    paths, tools,
};

/// Parts that can be measured, the binary of each with the variable that tells the bench where it is, and what is measured.
const PARTS: &[(&str, &str, &str, &str)] = &[
    (
        "operator",
        "agentic-operator",
        "OPERATOR_BINARY",
        "beside a bare client that makes the same objects",
    ),
    (
        "gateway",
        "agentic-gateway",
        "GATEWAY_BINARY",
        "what it stores a second beside bare inserts into the same SQLite with the same layout, commits and `synchronous=FULL`, how soon \
         clients have a record, what catching up takes, and its memory; the same rates on PostgreSQL, and how soon a client of another gateway has a record",
    ),
];

/// Runs the bench with these arguments, of which the first names the part that is measured.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let part = arguments.first().and_then(|part| part.to_str()).unwrap_or_default();
    if part == "runner" {
        return runner::run(&arguments[1..]);
    }
    if part == "first-token" {
        return first_token::run(&arguments[1..]);
    }
    let Some((_, binary, variable, what)) = PARTS.iter().find(|(name, ..)| *name == part) else {
        let names: Vec<_> = PARTS
            .iter()
            .map(|(name, ..)| *name)
            .chain(["runner", "first-token"])
            .collect();
        bail!("{part:?} is not measured: give one of {}", names.join(", "));
    };
    tools::ensure(tools::Group::ControlPlane)?;
    let (binaries, measured) = if part == "operator" {
        tools::ensure(tools::Group::PretendedNodes)?;
        (Binaries::build(&["bench"])?, operator_as_shipped()?)
    } else {
        let binaries = Binaries::build(&[binary, "bench"])?;
        let measured = binaries.path(binary);
        (binaries, measured)
    };
    // Copies: another clone may build over them while this runs.
    let folder = tools::Scratch::new(&format!("bench-{}", std::process::id()))?;
    for (name, built) in [(*binary, measured), ("bench", binaries.path("bench"))] {
        fs::copy(&built, folder.path().join(name)).with_context(|| format!("failed to copy {name}"))?;
    }
    let write = arguments.iter().any(|argument| argument == "--write");
    let mut bench = Command::new(folder.path().join("bench"));
    bench
        .env(variable, folder.path().join(binary))
        .args(arguments.iter().filter(|argument| *argument != "--write"));
    if !write {
        return command::run(&mut bench);
    }
    let done = bench
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start the bench")?;
    if !done.status.success() {
        bail!("the bench ended with {}", done.status);
    }
    let (said, title) = (
        String::from_utf8_lossy(&done.stdout),
        part[..1].to_uppercase() + &part[1..],
    );
    println!("{said}");
    let report = format!("## {title}\n\n`cargo xtask bench {part} [--write]`: {what}.\n{said}");
    runner::table::write(&paths::workspace().join("docs/benchmarks.md"), part, &report)
}
