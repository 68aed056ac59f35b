//! A Python with `websockets` and `requests`, for the client guides' examples.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{command::output, paths, progress, tools};

const WEBSOCKETS: &str = "15.0.1";
const REQUESTS: &str = "2.32.5";

/// The Python, installed into the cache when it is not there.
pub fn python_websockets() -> Result<PathBuf> {
    let folder = paths::cache()?.join(format!("python-clients-{WEBSOCKETS}-{REQUESTS}"));
    let (python, done) = (folder.join("bin/python"), folder.join("complete"));
    let _lock = tools::lock("python-clients")?;
    if !done.exists() {
        progress::step(
            &format!("installing websockets {WEBSOCKETS} and requests {REQUESTS} for Python"),
            || -> Result<()> {
                output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
                let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
                let packages = [format!("websockets=={WEBSOCKETS}"), format!("requests=={REQUESTS}")];
                output(Command::new(&python).args(pip).args(packages))?;
                fs::write(&done, "")?;
                Ok(())
            },
        )
        .context("the client guides' tests need python3 with venv, and PyPI")?;
    }
    Ok(python)
}
