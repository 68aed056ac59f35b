//! The two images that every pod of the local cluster may need: the sandbox's, and the one that makes volumes.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use super::buildah::{self, Build};
use crate::{
    paths, progress,
    tools::{self, Scratch},
};

/// Builds the archives once for each pin of their programs, and returns them.
pub(crate) fn ensure() -> Result<Vec<PathBuf>> {
    // The path of each program in its image is fixed by who runs it.
    [("pause", "/pause"), ("volume-helper", "/bin/sh")]
        .into_iter()
        .map(|(name, path)| image(name, path).with_context(|| format!("failed to build the image {name}")))
        .collect()
}

fn image(name: &str, path: &str) -> Result<PathBuf> {
    let program = tools::path(name)?;
    let archive = program.with_file_name(format!("{name}.tar"));
    if archive.is_file() {
        return Ok(archive);
    }
    let _lock = tools::lock("images")?;
    progress::step(&format!("building image {name}"), || {
        let context = Scratch::new(&format!("building-image-{name}"))?;
        fs::copy(&program, context.path().join(name))?;
        let dockerfile = context.path().join("Dockerfile");
        fs::write(
            &dockerfile,
            format!("FROM scratch\nCOPY {name} {path}\nENTRYPOINT [\"{path}\"]\n"),
        )?;
        let tag = format!("localhost/{name}:1");
        let build = Build {
            name: &tag,
            dockerfile: &dockerfile,
            context: context.path(),
            arguments: &[],
        };
        buildah::build(&build, &archive, &paths::cache()?.join(format!("image-{name}.log")))
    })?;
    Ok(archive)
}
