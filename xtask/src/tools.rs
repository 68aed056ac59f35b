//! The tools that clusters and checks are made of, built once from pinned sources.
//!
//! Each lies in `<cache>/<tool>-<hash of its pin>/<tool>`: a changed pin is a new folder, a broken build leaves none.

mod pins;

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use self::pins::{
    ADMISSION, CHART, CONTROL_PLANE, COREDNS, ETCD, HELM, KUBERNETES, KUEUE, KWOK, LOCAL_PATH, Module,
    NEWEST_KUBERNETES, NODE, OLDEST_KUBERNETES, PODS, PRETENDED_NODES, SCHEDULER, Tool,
};
use crate::{command, paths, progress};

/// Which tools are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// API server, controller manager, etcd and kubectl.
    ControlPlane,
    /// What a node needs beyond the control plane.
    Node,
    /// Scheduler and kwok: nodes that only a benchmark takes for nodes, beside a control plane.
    PretendedNodes,
    /// Kueue, which admits Jobs.
    Admission,
    /// helm.
    Chart,
    /// cargo-deny.
    Checks,
    /// Everything.
    All,
}

/// Which Kubernetes clusters are made of: `oldest`, `newest`, or the usual one.
pub const KUBERNETES_VERSION: &str = "AGENTIC_KUBERNETES";

fn kubernetes() -> &'static Module {
    match std::env::var(KUBERNETES_VERSION).as_deref() {
        Ok("oldest") => &OLDEST_KUBERNETES,
        Ok("newest") => &NEWEST_KUBERNETES,
        Ok(_) | Err(_) => &KUBERNETES,
    }
}

impl Tool {
    fn module(&self) -> &'static Module {
        if self.module.folder == KUBERNETES.folder {
            kubernetes()
        } else {
            self.module
        }
    }
}

/// Builds what is missing of a group.
pub fn ensure(group: Group) -> Result<()> {
    let lists: &[&[Tool]] = match group {
        Group::ControlPlane => &[CONTROL_PLANE],
        Group::Node => &[CONTROL_PLANE, SCHEDULER, NODE],
        Group::PretendedNodes => &[SCHEDULER, PRETENDED_NODES],
        Group::Admission => &[ADMISSION],
        Group::Chart => &[CHART],
        Group::Checks => &[],
        Group::All => &[CONTROL_PLANE, SCHEDULER, NODE, PRETENDED_NODES, ADMISSION, CHART],
    };
    let wanted: Vec<&Tool> = lists.iter().copied().flatten().collect();
    for module in [&ETCD, kubernetes(), &COREDNS, &LOCAL_PATH, &PODS, &KWOK, &KUEUE, &HELM] {
        let of_module: Vec<&Tool> = wanted
            .iter()
            .copied()
            .filter(|tool| tool.module().folder == module.folder)
            .collect();
        ensure_module(module, &of_module)?;
    }
    if matches!(group, Group::Checks | Group::All) {
        cargo_deny()?;
    }
    Ok(())
}

/// Where a tool is once [`ensure`] has built its group.
pub fn path(name: &str) -> Result<PathBuf> {
    let tool = tool(name)?;
    Ok(place(tool.name, &pin_of(tool.module())?)?.join(tool.name))
}

/// Where the source of a tool lies, at its pinned version: what a cluster needs of it beside the program. Fetched when it is missing.
pub(crate) fn source(name: &str) -> Result<PathBuf> {
    #[derive(serde::Deserialize)]
    struct Downloaded {
        #[serde(rename = "Dir")]
        folder: PathBuf,
    }
    let tool = tool(name)?;
    // Commands are in the module's folder `cmd`.
    let (module, _) = tool.package.split_once("/cmd/").context("the tool is no command")?;
    let mut go = Command::new("go");
    go.current_dir(module_folder(tool.module()))
        .args(["mod", "download", "-json", module]);
    let said = command::output(&mut go).with_context(|| format!("failed to find the source of {name}"))?;
    let downloaded: Downloaded = serde_json::from_str(&said)?;
    Ok(downloaded.folder)
}

fn tool(name: &str) -> Result<&'static Tool> {
    [CONTROL_PLANE, SCHEDULER, NODE, PRETENDED_NODES, ADMISSION, CHART]
        .into_iter()
        .flatten()
        .find(|tool| tool.name == name)
        .with_context(|| format!("no tool is called {name}"))
}

fn place(name: &str, pin: &str) -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("{name}-{pin}")))
}

/// A hash over all that decides what comes out of a build.
fn pin_of(module: &Module) -> Result<String> {
    let mut hash = Sha256::new();
    for file in files_below(&module_folder(module))? {
        let bytes = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hash.update(module.linker_flags);
    hash.update(module.tags);
    hash.update(std::env::consts::ARCH);
    Ok(hex::encode(&hash.finalize()[..6]))
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files_below(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn module_folder(module: &Module) -> PathBuf {
    paths::workspace().join("cluster/tools").join(module.folder)
}

fn ensure_module(module: &Module, tools: &[&Tool]) -> Result<()> {
    let pin = pin_of(module)?;
    if missing(tools, &pin)?.is_empty() {
        return Ok(());
    }
    // Several test binaries may start at once; one builds, the others find it done.
    let _lock = lock(&format!("build-{}", module.folder))?;
    let missing = missing(tools, &pin)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|tool| tool.name).collect();
    progress::step(&format!("building {} from Go modules (once)", names.join(", ")), || {
        let scratch = Scratch::new(&format!("building-{}", module.folder))?;
        let log = paths::cache()?.join(format!("build-{}.log", module.folder));
        go_build(module, &missing, scratch.path(), &log)?;
        missing.iter().try_for_each(|tool| publish(scratch.path(), tool, &pin))
    })
}

fn missing<'a>(tools: &[&'a Tool], pin: &str) -> Result<Vec<&'a Tool>> {
    let mut missing = Vec::new();
    for tool in tools {
        if !place(tool.name, pin)?.join(tool.name).is_file() {
            missing.push(*tool);
        }
    }
    Ok(missing)
}

fn go_build(module: &Module, tools: &[&Tool], into: &Path, log: &Path) -> Result<()> {
    let mut go = Command::new("go");
    go.current_dir(module_folder(module))
        .env("CGO_ENABLED", "0")
        .args([
            "build",
            "-mod=readonly",
            "-trimpath",
            "-tags",
            module.tags,
            "-ldflags",
            module.linker_flags,
            "-o",
        ])
        .arg(format!("{}/", into.display()))
        .args(tools.iter().map(|tool| tool.package));
    command::logged(&mut go, log).context("failed to build with Go: is Go 1.26 or newer installed?")
}

/// Moves one built program to its place; a reader sees the whole folder or none.
fn publish(built: &Path, tool: &Tool, pin: &str) -> Result<()> {
    // `go build` names a program after its package's last element, or the one before a version element such as v3.
    let elements: Vec<&str> = tool.package.rsplit('/').collect();
    let program = if elements[0].starts_with('v') && elements[0][1..].parse::<u32>().is_ok() {
        elements[1]
    } else {
        elements[0]
    };
    let ready = built.join(format!("{}.ready", tool.name));
    fs::create_dir(&ready)?;
    fs::rename(built.join(program), ready.join(tool.name))
        .with_context(|| format!("failed to find {program} among the built programs"))?;
    let place = place(tool.name, pin)?;
    if place.exists() {
        fs::remove_dir_all(&place)?;
    }
    fs::rename(&ready, &place).with_context(|| format!("failed to put {} in place", place.display()))
}

/// cargo-deny at its pinned version; built on first use.
pub fn cargo_deny() -> Result<PathBuf> {
    cargo_tool("cargo-deny", "0.19.9")
}

/// cargo-mutants at its pinned version; built on first use.
pub fn cargo_mutants() -> Result<PathBuf> {
    cargo_tool("cargo-mutants", "27.1.0")
}

fn cargo_tool(name: &str, version: &str) -> Result<PathBuf> {
    let place = place(name, version)?;
    let program = place.join("bin").join(name);
    if program.is_file() {
        return Ok(program);
    }
    let _lock = lock(&format!("build-{name}"))?;
    if program.is_file() {
        return Ok(program);
    }
    progress::step(&format!("building {name} {version} (once)"), || {
        let scratch = Scratch::new(&format!("building-{name}"))?;
        let mut install = Command::new("cargo");
        install
            .env("CARGO_TARGET_DIR", scratch.path().join("target"))
            .args(["install", "--locked", "--version", version, name, "--root"])
            .arg(scratch.path().join("root"));
        command::logged(&mut install, &paths::cache()?.join(format!("build-{name}.log")))?;
        fs::rename(scratch.path().join("root"), &place).with_context(|| format!("failed to put {name} in place"))
    })?;
    Ok(program)
}

/// Holds `<cache>/<name>.lock`, which is gone again when this is dropped.
pub struct Lock {
    path: PathBuf,
    _held: File,
}

/// Waits until no other process holds the lock of that name.
pub fn lock(name: &str) -> Result<Lock> {
    let cache = paths::cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("failed to create {}", cache.display()))?;
    let path = cache.join(format!("{name}.lock"));
    loop {
        let held = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
        held.lock().with_context(|| format!("failed to lock {name}"))?;
        // Who held it before removed the file: a lock on what has no name any more keeps nobody out.
        let named = fs::metadata(&path).is_ok_and(|named| {
            held.metadata()
                .is_ok_and(|held| (held.dev(), held.ino()) == (named.dev(), named.ino()))
        });
        if named {
            return Ok(Lock { path, _held: held });
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still locked: nobody else can have made it theirs.
        let _ = fs::remove_file(&self.path);
    }
}

/// A folder in the cache that is gone when dropped; a leftover of a killed run is emptied first.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Callers hold the lock for `name`, so nobody else is in there.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let folder = paths::cache()?.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn one_at_a_time_holds_a_lock_and_its_file_is_gone_with_the_last() {
        let name = format!("lock-test-{}", std::process::id());
        let first = lock(&name).unwrap();
        let path = first.path.clone();
        let (taken, second) = mpsc::channel();
        let waiting = thread::spawn({
            let name = name.clone();
            move || taken.send(lock(&name).unwrap()).unwrap()
        });
        assert!(
            second.recv_timeout(Duration::from_millis(200)).is_err(),
            "two hold the lock"
        );
        drop(first);
        let second = second.recv_timeout(Duration::from_mins(1)).unwrap();
        waiting.join().unwrap();
        assert!(path.exists(), "the second's lock has no file");
        drop(second);
        assert!(!path.exists());
    }
}
