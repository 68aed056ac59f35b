//! The demo's session: applied, watched while it runs, and shown.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Kubectl, SESSIONS, keys::Keys};
use crate::{command, paths, progress};

const EXAMPLE: &str = "docs/examples/hello.yaml";
const NAME: &str = "hello";
/// Images are on the node already and the session is small; whatever takes longer is broken.
const PATIENCE: Duration = Duration::from_mins(5);

/// Runs the example and prints what became of it; an error unless it is `Completed`.
pub(super) fn run(kubectl: &Kubectl<'_>, keys: &Keys) -> Result<()> {
    // A session runs once; the one of an earlier demo has to go first, with its volume.
    kubectl.run(&[
        "delete",
        "agenticsession",
        NAME,
        "--namespace",
        SESSIONS,
        "--ignore-not-found",
        "--timeout=120s",
    ])?;
    kubectl.run(&[
        "wait",
        "--for=delete",
        "pvc",
        &format!("ambient-workspace-{NAME}"),
        "--namespace",
        SESSIONS,
        "--timeout=120s",
    ])?;
    progress::say(&format!("applying {EXAMPLE}"));
    let example = paths::workspace().join(EXAMPLE);
    kubectl.run(&[
        "apply",
        "--namespace",
        SESSIONS,
        "--filename",
        &example.to_string_lossy(),
    ])?;
    let mut told = String::new();
    wait(kubectl, &mut told, |phase| phase != "Pending" && phase != "Creating")?;
    // Also of one that is over already: a short session is never seen running.
    transcript(kubectl)?;
    let phase = wait(kubectl, &mut told, |phase| {
        ["Completed", "Failed", "Stopped"].contains(&phase)
    })?;
    show(kubectl, keys)?;
    if phase != "Completed" {
        bail!("the session is {phase}: {}", field(kubectl, "message")?);
    }
    Ok(())
}

/// Follows the phase, with a line for each that was not `told` yet, until it is one that the caller waits for.
fn wait(kubectl: &Kubectl<'_>, told: &mut String, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let begun = Instant::now();
    loop {
        let phase = field(kubectl, "phase")?;
        if phase != *told {
            progress::say(&format!("session {NAME}: {phase}"));
            told.clone_from(&phase);
        }
        if wanted(&phase) {
            return Ok(phase);
        }
        if begun.elapsed() > PATIENCE {
            let description = kubectl.run(&["describe", "agenticsession", NAME, "--namespace", SESSIONS])?;
            bail!(
                "the session is still {phase} after {}:\n{description}",
                progress::seconds(PATIENCE)
            );
        }
        thread::sleep(Duration::from_millis(250));
    }
}

/// The runner's log until its container ends.
fn transcript(kubectl: &Kubectl<'_>) -> Result<()> {
    let pod = field(kubectl, "podName")?;
    if pod.is_empty() {
        // It failed before it had a pod; its message says why.
        return Ok(());
    }
    println!("----------------------------------------------------------------");
    let followed = command::run(&mut kubectl.command(&[
        "logs",
        "--follow",
        "--namespace",
        SESSIONS,
        "--container=runner",
        &pod,
    ])?);
    println!("----------------------------------------------------------------");
    followed.context("failed to follow the transcript")
}

fn show(kubectl: &Kubectl<'_>, keys: &Keys) -> Result<()> {
    println!("\n$ kubectl -n {SESSIONS} get as");
    print!("{}", kubectl.run(&["get", "agenticsessions", "--namespace", SESSIONS])?);
    println!("\nResult: {}", field(kubectl, "result")?);
    let cost = field(kubectl, "costUSD")?;
    println!(
        "Cost:   {}",
        if cost.is_empty() {
            "unknown, the model has no price".into()
        } else {
            format!("${cost}")
        }
    );
    let trace = field(kubectl, "traceId")?;
    println!(
        "Trace:  {}",
        if trace.is_empty() {
            "none".into()
        } else {
            keys.trace(&trace)
        }
    );
    Ok(())
}

fn field(kubectl: &Kubectl<'_>, name: &str) -> Result<String> {
    let path = format!("--output=jsonpath={{.status.{name}}}");
    kubectl.run(&["get", "agenticsession", NAME, "--namespace", SESSIONS, &path])
}
