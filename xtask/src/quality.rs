//! `make check` and `make test`.

use std::{env, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::{
    claude_cli::claude_cli,
    command,
    e2e::{self, Afterwards, env_cargo},
    generate, paths, progress, tools,
};

/// Format, lints, generated files, licences, bans, sources, advisories. Runs all, then fails if any did.
pub fn check() -> Result<()> {
    let results = [
        progress::step("checking the format", || cargo(&["fmt", "--all", "--check"])),
        progress::step("checking with clippy", || {
            cargo(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--all-features",
                "--locked",
                "--",
                "-D",
                "warnings",
            ])
        }),
        progress::step("checking that generated files are current", generate::check),
        dependencies(),
    ];
    let failures: Vec<String> = results
        .into_iter()
        .filter_map(Result::err)
        .map(|error| format!("{error:#}"))
        .collect();
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

fn dependencies() -> Result<()> {
    let deny = tools::cargo_deny()?;
    progress::step("checking licences, bans and sources of dependencies", || {
        command::run(&mut deny_command(
            &deny,
            &["check", "--hide-inclusion-graph", "bans", "licenses", "sources"],
        ))
    })?;
    // The only step that may be left out: its data changes without us, and a machine may be unable to fetch it.
    let log = paths::cache()?.join("advisories.log");
    if command::logged(&mut deny_command(&deny, &["fetch", "db"]), &log).is_err() {
        progress::say(&format!(
            "SKIPPED: advisories, because their database cannot be fetched; see {}",
            log.display()
        ));
        return Ok(());
    }
    progress::step("checking advisories", || {
        command::run(&mut deny_command(&deny, &["check", "--disable-fetch", "advisories"]))
    })
}

fn deny_command(deny: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(deny);
    command
        .current_dir(paths::workspace())
        .args(["--all-features", "--workspace"])
        .args(words);
    command
}

/// Unit, property and component tests, then the end-to-end tests.
pub fn test() -> Result<()> {
    tools::ensure(tools::Group::ControlPlane)?;
    tools::ensure(tools::Group::Chart)?;
    progress::step("finding the pinned Claude Code CLI", claude_cli)?;
    let units = progress::step("running unit, property and component tests", || {
        cargo(&["test", "--workspace", "--locked", "--no-fail-fast"])
    });
    let end_to_end = match e2e::possible() {
        Ok(()) => e2e::run(Afterwards::Remove, &[]),
        Err(reason) if env::var_os("CI").is_some() => Err(reason.context("nothing may be skipped here")),
        Err(reason) => {
            progress::say(&format!("SKIPPED: {reason:#}"));
            Ok(())
        }
    };
    units.and(end_to_end)
}

fn cargo(words: &[&str]) -> Result<()> {
    command::run(Command::new(env_cargo()).current_dir(paths::workspace()).args(words))
}
