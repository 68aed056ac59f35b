//! Images, built by buildah in a store of our own, kept as OCI archives.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{command, paths};

/// What one image is built from.
pub(crate) struct Build<'a> {
    /// Full name with tag.
    pub(crate) name: &'a str,
    pub(crate) dockerfile: &'a Path,
    pub(crate) context: &'a Path,
    /// `KEY=value` for the Dockerfile's `ARG`s.
    pub(crate) arguments: &'a [&'a str],
}

/// Builds without pulling anything and writes the OCI archive; `log` holds what buildah said.
pub(crate) fn build(build: &Build<'_>, archive: &Path, log: &Path) -> Result<()> {
    let mut bud = buildah()?;
    bud.args([
        "bud",
        "--pull-never",
        "--format=oci",
        "--timestamp=0",
        "--tag",
        build.name,
        "--file",
    ])
    .arg(build.dockerfile);
    for argument in build.arguments {
        bud.args(["--build-arg", argument]);
    }
    command::logged(bud.arg(build.context), log)?;
    push(build.name, archive)?;
    // Stages leave containers, and the build before this one has lost its name; nothing else would ever delete them.
    command::quiet(buildah()?.args(["rm", "--all"]))?;
    command::quiet(buildah()?.args(["rmi", "--prune"]))
}

/// Makes `archive` an image called `name` of one layer, for others to build on.
pub(crate) fn import_root(name: &str, archive: &Path) -> Result<()> {
    let container = command::output(buildah()?.args(["from", "scratch"]))?;
    let container = container.trim();
    command::quiet(buildah()?.args(["add", "--quiet", container]).arg(archive).arg("/"))?;
    command::quiet(buildah()?.args(["commit", "--quiet", "--rm", "--timestamp=0", container, name]))
}

/// Whether the store has an image.
pub(crate) fn has(name: &str) -> Result<bool> {
    Ok(command::quiet(buildah()?.args(["inspect", "--type=image", name])).is_ok())
}

fn push(name: &str, archive: &Path) -> Result<()> {
    // Takes a third of the time of the default, gzip, to write and to load.
    let unfinished = archive.with_extension("unfinished");
    // buildah adds to an archive that exists.
    let _ = fs::remove_file(&unfinished);
    let target = format!("oci-archive:{}:{name}", unfinished.display());
    command::quiet(buildah()?.args(["push", "--quiet", "--compression-format=zstd", name, &target]))?;
    fs::rename(&unfinished, archive).with_context(|| format!("failed to put {} in place", archive.display()))
}

/// `chroot` isolation: nothing but a chroot is needed to build, not even a container runtime.
fn buildah() -> Result<Command> {
    let mut buildah = Command::new("buildah");
    buildah
        .env("BUILDAH_ISOLATION", "chroot")
        // Otherwise the store becomes a mount that outlives us, and the cache could not be deleted.
        .args(["--storage-driver=overlay", "--storage-opt=overlay.skip_mount_home=true"])
        .arg("--root")
        .arg(store()?)
        .arg("--runroot")
        .arg(store()?.join("run"));
    Ok(buildah)
}

fn store() -> Result<PathBuf> {
    let store = paths::cache()?.join("image-store");
    fs::create_dir_all(&store).with_context(|| format!("failed to create {}", store.display()))?;
    Ok(store)
}
