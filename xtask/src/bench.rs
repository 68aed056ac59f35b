//! `cargo xtask bench`: builds what is measured and what measures, and runs it.

mod runner;

use std::{ffi::OsString, fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{command, images::Binaries, tools};

/// Parts that can be measured, and the binary of each with the variable that tells the bench where it is.
const PARTS: &[(&str, &str, &str)] = &[
    ("operator", "agentic-operator", "OPERATOR_BINARY"),
    ("gateway", "agentic-gateway", "GATEWAY_BINARY"),
];

/// Runs the bench with these arguments, of which the first names the part that is measured.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let part = arguments.first().and_then(|part| part.to_str()).unwrap_or_default();
    if part == "runner" {
        return runner::run(&arguments[1..]);
    }
    let Some((_, binary, variable)) = PARTS.iter().find(|(name, ..)| *name == part) else {
        let names: Vec<_> = PARTS.iter().map(|(name, ..)| *name).chain(["runner"]).collect();
        bail!("{part:?} is not measured: give one of {}", names.join(", "));
    };
    tools::ensure(tools::Group::ControlPlane)?;
    let binaries = Binaries::build(&[binary, "bench"])?;
    // Copies: another clone may build over them while this runs.
    let folder = tools::Scratch::new(&format!("bench-{}", std::process::id()))?;
    for name in [binary, "bench"] {
        fs::copy(binaries.path(name), folder.path().join(name)).with_context(|| format!("failed to copy {name}"))?;
    }
    command::run(
        Command::new(folder.path().join("bench"))
            .env(variable, folder.path().join(binary))
            .args(arguments),
    )
}
