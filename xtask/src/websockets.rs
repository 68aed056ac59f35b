//! A Python with `websockets`, for the client guide's examples.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{command::output, paths, progress, tools};

const VERSION: &str = "15.0.1";

/// The Python, installed into the cache when it is not there.
pub fn python_websockets() -> Result<PathBuf> {
    let folder = paths::cache()?.join(format!("python-websockets-{VERSION}"));
    let (python, done) = (folder.join("bin/python"), folder.join("complete"));
    let _lock = tools::lock("python-websockets")?;
    if !done.exists() {
        progress::step(
            &format!("installing websockets {VERSION} for Python"),
            || -> Result<()> {
                output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
                let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
                output(Command::new(&python).args(pip).arg(format!("websockets=={VERSION}")))?;
                fs::write(&done, "")?;
                Ok(())
            },
        )
        .context("the client guide's test needs python3 with venv, and PyPI")?;
    }
    Ok(python)
}
