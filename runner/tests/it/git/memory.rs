//! Large files: the runner's container has 512 MiB of memory, and git shares them.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use runner::workspace::git::save::Saved;
use runner::workspace::git::{bundle, clone};

use super::Scene;
use crate::common::DEADLINE;

/// Says to a process of this test that the runner's git may have little memory there.
const SMALL: &str = "RUNNER_TEST_GIT_OF_LITTLE_MEMORY";
/// More than git may have.
const LARGE: usize = 192 << 20;

/// Found in place of git: the runner's own, told from all others by its configuration, may map less than the large file.
const GIT: &str = r#"#!/bin/sh
PATH=${PATH#*:}
[ -z "$GIT_CONFIG_COUNT" ] || ulimit -v 180000
exec git "$@"
"#;

#[tokio::test]
async fn files_larger_than_the_memory_of_the_runners_git_are_cloned_and_handed_over() {
    if std::env::var_os(SMALL).is_some() {
        return large_files().await;
    }
    let dir = tempfile::tempdir().unwrap();
    let git = dir.path().join("git");
    std::fs::write(&git, GIT).unwrap();
    std::fs::set_permissions(&git, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let name = "git::memory::files_larger_than_the_memory_of_the_runners_git_are_cloned_and_handed_over";
    let test = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("PATH", path)
        .env(SMALL, "1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(2 * DEADLINE, test)
        .await
        .expect("it ends")
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

async fn large_files() {
    let scene = Scene::new().await;
    scene
        .server
        .repository("one", &[("large", &"a".repeat(LARGE))])
        .unwrap();
    let repo = scene.repo("one");
    clone::clone(&scene.repos(), &repo).await.unwrap();
    let large = scene.work("one").join("large");
    assert_eq!(std::fs::metadata(&large).unwrap().len(), LARGE as u64);
    std::fs::write(&large, "b".repeat(LARGE)).unwrap();
    assert_eq!(scene.save(&repo, ".b.bundle").unwrap(), Saved::Bundle);
    bundle::take(&scene.repos(), &repo, ".b.bundle").await.unwrap();
}
