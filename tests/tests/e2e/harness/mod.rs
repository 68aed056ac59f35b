//! What the end-to-end tests share: the cluster, the installed product, a namespace for each test.

pub mod audit;
pub mod client;
pub mod collector;
pub mod command;
mod explain;
pub mod forward;
pub mod git;
mod install;
pub mod kill;
pub mod mock;
pub mod phases;
pub mod printed;
pub mod scene;
pub mod sse;
pub mod ssh;
pub mod volume;
pub mod wait;

use std::env;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

pub use install::{COLLECTOR_URL, COMPAT, MODEL_URL, SHELL_IMAGE, SSH_IMAGE, SYSTEM, TOOLS, TOOLS_IMAGE};
pub use scene::{Keys, Scene, disturbing, scene};

/// A variable of the environment without which nothing can be tested.
pub fn required(name: &str) -> Result<PathBuf> {
    let value = env::var_os(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from).with_context(|| {
        format!("{name} is not set: run the end-to-end tests with `cargo xtask e2e`, which starts a cluster and says where it is")
    })
}

/// The root of the source tree.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}
