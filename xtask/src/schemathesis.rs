//! Schemathesis, which asks an API what its own document says can be asked, in the cache.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, packages, paths, progress, tools};

const VERSION: &str = "4.32.5";

/// The program; installed on first use.
pub fn schemathesis() -> Result<PathBuf> {
    let folder = paths::cache()?.join(format!("schemathesis-{VERSION}"));
    let (program, done) = (folder.join("bin/schemathesis"), folder.join("complete"));
    let _lock = tools::lock("schemathesis")?;
    if !done.exists() {
        packages::ensure_python()?;
        progress::step(&format!("installing schemathesis {VERSION}"), || -> Result<()> {
            command::quiet(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
            let mut pip = Command::new(folder.join("bin/python"));
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
                .arg(format!("schemathesis=={VERSION}"));
            command::quiet(&mut pip)?;
            fs::write(&done, "")?;
            Ok(())
        })
        .context("schemathesis needs python3 with venv, and PyPI")?;
    }
    Ok(program)
}
