//! What takes too long for every change: the long forms of tests that run shortly in CI.

use std::process::Command;

use anyhow::Result;

use crate::{command, e2e::env_cargo, paths, progress, tools};

/// Runner, gateway and network die again and again while records are written; nothing may be lost or doubled.
pub fn no_record_lost(records: u64, kills: u32, seed: u64) -> Result<()> {
    let step = format!("writing {records} records through {kills} kills and cuts, seed {seed}");
    progress::step(&step, || {
        command::run(
            Command::new(env_cargo())
                .current_dir(paths::workspace())
                .env("NO_RECORD_LOST", format!("{records},{kills},{seed}"))
                .args([
                    "test",
                    "--release",
                    "--locked",
                    "--package",
                    "gateway",
                    "--test",
                    "component",
                    "--",
                ])
                .args(["no_record_is_lost_or_doubled_whatever_dies", "--nocapture"]),
        )
    })
}

/// The CLI's lines as the tests read them, anew.
pub fn record_cli() -> Result<()> {
    progress::step("recording the CLI", || {
        command::run(Command::new(env_cargo()).current_dir(paths::workspace()).args([
            "run",
            "--locked",
            "--quiet",
            "--package",
            "runner",
            "--example",
            "record",
        ]))
    })
}

/// The runner dies behind each of its writes, syncs, renames and sends, and the next one comes to the same end.
pub fn kill_points(seed: u64) -> Result<()> {
    progress::step(&format!("killing the runner at every point, seed {seed}"), || {
        command::run(
            Command::new(env_cargo())
                .current_dir(paths::workspace())
                .env("RUNNER_EVERY_KILL", "1")
                .env("RUNNER_SEED", seed.to_string())
                .args(["test", "--locked", "--package", "runner", "--test", "it", "--"])
                .args(["kill::", "resume::", "--nocapture"]),
        )
    })
}

/// Everything of the runner that reads what others wrote is fed with what was changed at random.
pub fn fuzz(times: u32, seed: u64) -> Result<()> {
    progress::step(
        &format!("fuzzing the runner, {times} times as long as CI, seed {seed}"),
        || {
            command::run(
                Command::new(env_cargo())
                    .current_dir(paths::workspace())
                    .env("RUNNER_FUZZ", times.to_string())
                    .env("RUNNER_SEED", seed.to_string())
                    .args(["test", "--locked", "--package", "runner", "--test", "it", "--"])
                    .args(["fuzz::", "--nocapture"]),
            )
        },
    )
}

/// An agent swaps folders, files and links while the runner serves files through them.
pub fn file_races(tries: u32) -> Result<()> {
    progress::step(
        &format!("reading and writing {tries} times through what is swapped"),
        || {
            command::run(
                Command::new(env_cargo())
                    .current_dir(paths::workspace())
                    .env("RACE_TRIES", tries.to_string())
                    .args(["test", "--locked", "--package", "runner", "--lib", "--"])
                    .args(["whatever_is_swapped_meanwhile", "--nocapture"]),
            )
        },
    )
}

/// Sessions are changed at random; each sequence must end as it would have on a clean namespace.
pub fn random_operations(operations: u32, seed: u64) -> Result<()> {
    let step = format!("trying {operations} random operations, seed {seed}");
    component_tests(&step, "random::", |cargo| {
        cargo
            .env("RANDOM_OPERATIONS", operations.to_string())
            .env("RANDOM_SEED", seed.to_string());
    })
}

/// What the operator decides by, without client or clock.
const DECISIONS: &[&str] = &[
    "deadline.rs",
    "decide.rs",
    "decide/*.rs",
    "drain.rs",
    "outcome.rs",
    "transition.rs",
    "transition/*.rs",
];

/// Changes what the operator decides, one thing at a time, and runs the tests that should find it.
pub fn mutants(shard: Option<&str>, file: Option<&str>) -> Result<()> {
    let tool = tools::cargo_mutants()?;
    progress::step(
        "looking for changes of the operator's decisions that no test finds",
        || {
            let mut mutants = Command::new(tool);
            mutants
                .current_dir(paths::workspace())
                // A failure is shown as it is found: what is the shortest does not matter, and is not kept.
                .env("PROPTEST_MAX_SHRINK_ITERS", "0")
                .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "true")
                .args([
                    "mutants",
                    "--package",
                    "operator",
                    "--output",
                    "target",
                    "--timeout",
                    "600",
                ]);
            for part in DECISIONS.iter().filter(|part| file.is_none_or(|file| file == **part)) {
                mutants.arg("--file").arg(format!("operator/src/session/{part}"));
            }
            if let Some(shard) = shard {
                mutants.args(["--shard", shard]);
            }
            command::run(mutants.args(["--", "--lib", "session::"]))
        },
    )
}

/// The operator's component tests on other Kubernetes than the usual one.
pub fn kubernetes_versions() -> Result<()> {
    for version in ["oldest", "newest"] {
        component_tests(
            &format!("running the operator's component tests on the {version} Kubernetes"),
            "",
            |cargo| {
                cargo.env(tools::KUBERNETES_VERSION, version);
            },
        )?;
    }
    Ok(())
}

/// The operator beside Kueue itself.
pub fn kueue() -> Result<()> {
    component_tests("running sessions through Kueue", "kueue::", |cargo| {
        cargo.arg("--ignored");
    })
}

fn component_tests(step: &str, filter: &str, prepare: impl FnOnce(&mut Command)) -> Result<()> {
    progress::step(step, || {
        let mut cargo = Command::new(env_cargo());
        cargo.current_dir(paths::workspace()).args([
            "test",
            "--locked",
            "--package",
            "operator",
            "--test",
            "component",
            "--",
            "--nocapture",
        ]);
        cargo.args(Some(filter).filter(|filter| !filter.is_empty()));
        prepare(&mut cargo);
        command::run(&mut cargo)
    })
}
