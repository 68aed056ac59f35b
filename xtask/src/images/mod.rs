//! The product's images as OCI archives, built on this machine without Docker.

mod binaries;
mod buildah;
pub(crate) mod pods;
mod roots;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

pub(crate) use self::binaries::{Binaries, SMALL_PROFILE, linked_as_shipped, operator_as_shipped};
use self::{
    buildah::Build,
    roots::{AGENT, BARE, Root, SMALL, SSH},
};
use crate::{claude_cli, packages, paths, progress, tools::Scratch};

/// Registry of the images' names: none that exists, so nothing can ever be pulled by accident.
pub const REGISTRY: &str = "localhost";
/// Tag of the images built here.
pub const TAG: &str = "dev";

/// How many builds of an image are kept.
const KEPT: usize = 2;

struct Image {
    name: &'static str,
    dockerfile: &'static str,
    root: &'static Root,
    binaries: &'static [&'static str],
    has_cli: bool,
}

const IMAGES: &[Image] = &[
    Image {
        name: "agentic-operator",
        dockerfile: "Dockerfile.operator",
        root: &SMALL,
        binaries: &["agentic-operator"],
        has_cli: false,
    },
    Image {
        name: "agentic-gateway",
        dockerfile: "Dockerfile.gateway",
        root: &SMALL,
        binaries: &["agentic-gateway"],
        has_cli: false,
    },
    Image {
        name: "agentic-runner",
        dockerfile: "Dockerfile.runner",
        root: &AGENT,
        binaries: &["runner"],
        has_cli: true,
    },
    Image {
        name: "agentic-test-tools",
        dockerfile: "tests/Dockerfile",
        root: &SMALL,
        binaries: &["mock-model", "trace-collector", "git-server"],
        has_cli: false,
    },
    Image {
        name: "agentic-test-ssh",
        dockerfile: "tests/Dockerfile.ssh",
        root: &SSH,
        binaries: &[],
        has_cli: false,
    },
    // What users bring for their agents: one that has all that is needed, and one that has next to nothing.
    Image {
        name: "agentic-test-toolchain",
        dockerfile: "tests/Dockerfile.toolchain",
        root: &AGENT,
        binaries: &[],
        has_cli: false,
    },
    Image {
        name: "agentic-test-bare",
        dockerfile: "tests/Dockerfile.toolchain",
        root: &BARE,
        binaries: &[],
        has_cli: false,
    },
];

/// Builds what has changed and returns the archives of all images.
pub fn ensure() -> Result<Vec<PathBuf>> {
    packages::ensure_images()?;
    let wanted: Vec<&str> = IMAGES.iter().flat_map(|image| image.binaries).copied().collect();
    let binaries = Binaries::build(&wanted)?;
    let _lock = crate::tools::lock("images")?;
    IMAGES
        .iter()
        .map(|image| {
            image
                .ensure(&binaries)
                .with_context(|| format!("failed to build the image {}", image.name))
        })
        .collect()
}

impl Image {
    fn ensure(&self, binaries: &Binaries) -> Result<PathBuf> {
        let base = self.root.ensure()?;
        let dockerfile = paths::workspace().join(self.dockerfile);
        let folder = paths::cache()?.join("images");
        fs::create_dir_all(&folder)?;
        let archive = folder.join(format!(
            "{}-{}.tar",
            self.name,
            self.inputs(&base, &dockerfile, binaries)?
        ));
        if !archive.is_file() {
            progress::step(&format!("building image {}", self.name), || {
                self.build(&base, &dockerfile, binaries, &archive)
            })?;
        }
        prune(&folder, self.name, &archive)?;
        Ok(archive)
    }

    /// A hash over all that goes into the image.
    fn inputs(&self, base: &str, dockerfile: &Path, binaries: &Binaries) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(base);
        hash.update(fs::read(dockerfile).with_context(|| format!("failed to read {}", dockerfile.display()))?);
        for name in self.binaries {
            hash.update(fs::read(binaries.path(name))?);
        }
        if self.has_cli {
            hash.update(claude_cli::VERSION);
        }
        Ok(hex::encode(&hash.finalize()[..6]))
    }

    fn build(&self, base: &str, dockerfile: &Path, binaries: &Binaries, archive: &Path) -> Result<()> {
        let context = Scratch::new(&format!("building-{}", self.name))?;
        let dist = context.path().join("dist");
        fs::create_dir(&dist)?;
        for name in self.binaries {
            fs::copy(binaries.path(name), dist.join(name))?;
        }
        if self.has_cli {
            let cli = claude_cli::claude_cli()?;
            // Hundreds of megabytes; a link where context and cache are on one file system, as they are by default.
            fs::hard_link(&cli, dist.join("claude")).or_else(|_| fs::copy(&cli, dist.join("claude")).map(drop))?;
        }
        let build = Build {
            name: &format!("{REGISTRY}/{}:{TAG}", self.name),
            dockerfile,
            context: context.path(),
            arguments: &["BIN=prebuilt", &format!("BASE={base}")],
        };
        buildah::build(
            &build,
            archive,
            &paths::cache()?.join(format!("image-{}.log", self.name)),
        )
    }
}

/// Deletes all but the newest archives of an image, and never `current`.
fn prune(folder: &Path, name: &str, current: &Path) -> Result<()> {
    let mut archives = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let is_of_image = file
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|rest| {
                rest.strip_suffix(".tar")
                    .is_some_and(|hash| hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
            });
        if is_of_image && entry.path() != current {
            archives.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    archives.sort();
    archives.reverse();
    for (_, archive) in archives.iter().skip(KEPT - 1) {
        fs::remove_file(archive)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dockerfile_pins_the_cli_that_is_fetched_here() {
        let dockerfile = fs::read_to_string(paths::workspace().join("Dockerfile.runner")).unwrap();
        assert!(dockerfile.contains(&format!("ARG CLAUDE_CODE_VERSION={}\n", claude_cli::VERSION)));
        assert!(dockerfile.contains(&format!("ARG CLAUDE_CODE_SHA256={}\n", claude_cli::SHA256)));
    }

    #[test]
    fn the_runner_is_measured_as_its_dockerfile_builds_it() {
        let dockerfile = fs::read_to_string(paths::workspace().join("Dockerfile.runner")).unwrap();
        assert!(dockerfile.contains(&format!("cargo build --profile {SMALL_PROFILE} ")));
    }

    #[test]
    fn the_operator_is_measured_as_its_dockerfile_builds_it() {
        let dockerfile = fs::read_to_string(paths::workspace().join("Dockerfile.operator")).unwrap();
        let build = format!("cargo build --profile {SMALL_PROFILE} --locked --package operator");
        assert!(
            dockerfile.contains(&build) && dockerfile.contains(&format!("target/{SMALL_PROFILE}/agentic-operator"))
        );
    }

    #[test]
    fn the_dockerfiles_build_with_the_toolchain_that_is_pinned() {
        let pinned = fs::read_to_string(paths::workspace().join("rust-toolchain.toml")).unwrap();
        let version = pinned
            .lines()
            .find_map(|line| line.strip_prefix("channel = "))
            .unwrap()
            .trim_matches('"');
        for name in ["Dockerfile.operator", "Dockerfile.gateway", "Dockerfile.runner"] {
            let dockerfile = fs::read_to_string(paths::workspace().join(name)).unwrap();
            assert!(
                dockerfile.contains(&format!("FROM docker.io/library/rust:{version}-")),
                "{name}"
            );
        }
    }

    #[test]
    fn only_the_newest_builds_of_an_image_are_kept_and_other_images_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, seconds: u64| {
            let path = folder.path().join(name);
            let file = fs::File::create(&path).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds))
                .unwrap();
            path
        };
        let oldest = file("agentic-x-aa.tar", 1);
        let current = file("agentic-x-bb.tar", 2);
        let newest = file("agentic-x-cc.tar", 3);
        let other = file("agentic-x-tools-aa.tar", 1);
        prune(folder.path(), "agentic-x", &current).unwrap();
        assert_eq!(
            [&oldest, &current, &newest, &other].map(|path| path.exists()),
            [false, true, true, true]
        );
    }
}
