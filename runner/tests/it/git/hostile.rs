//! Agents that mean harm: what they configure, and what they hand over.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use protocol::spec::Repo;
use runner::workspace::git::save::Saved;
use runner::workspace::git::{bundle, push};

use super::{Scene, refused};

/// All that a repository can run, set by the agent; each leaves a mark when it is run by the runner.
#[tokio::test]
async fn nothing_that_the_agent_configures_is_run_by_the_runner() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let (work, mark) = (scene.work("one"), scene.path("mark"));
    let script = scene.path("script.sh");
    std::fs::write(&script, format!("#!/bin/sh\nenv >> {}\ncat\n", mark.display())).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = script.to_str().unwrap();
    for hook in [
        "pre-commit",
        "post-commit",
        "pre-push",
        "reference-transaction",
        "post-index-change",
    ] {
        std::fs::create_dir_all(work.join(".git/hooks")).unwrap();
        std::fs::copy(&script, work.join(".git/hooks").join(hook)).unwrap();
    }
    std::fs::write(scene.path("included"), format!("[core]\n\tsshCommand = {run}\n")).unwrap();
    std::fs::write(work.join(".gitattributes"), "* filter=evil diff=evil merge=evil\n").unwrap();
    std::fs::write(work.join("README.md"), "changed").unwrap();
    let included = scene.path("included");
    for (key, value) in [
        ("core.fsmonitor", run),
        ("core.sshCommand", run),
        ("core.gitProxy", run),
        ("core.hooksPath", work.join(".git/hooks").to_str().unwrap()),
        ("filter.evil.clean", run),
        ("filter.evil.smudge", run),
        ("filter.evil.process", run),
        ("diff.evil.textconv", run),
        ("credential.helper", run),
        ("remote.origin.uploadpack", run),
        ("remote.origin.receivepack", run),
        ("include.path", included.to_str().unwrap()),
        ("url.ext::sh.insteadOf", "https://"),
        ("http.proxy", "http://127.0.0.1:1"),
    ] {
        scene.agent("one", &["config", key, value]);
    }
    scene.agent("one", &["config", "--unset", "filter.evil.process"]);
    let saved = scene.save(&repo, ".b.bundle").unwrap();
    assert_eq!(saved, Saved::Bundle);
    // The filter ran, in the agent's place and with nothing of ours in its environment.
    let env = std::fs::read_to_string(&mark).unwrap();
    assert!(!env.contains("fake_token") && !env.contains("Authorization"));
    std::fs::remove_file(&mark).unwrap();
    let commit = bundle::take(&scene.repos(), &repo, ".b.bundle").await.unwrap();
    push::push(&scene.repos(), &repo, &commit).await.unwrap();
    assert!(!mark.exists(), "{}", std::fs::read_to_string(&mark).unwrap_or_default());
    assert_eq!(
        scene
            .server
            .git("one", &["show", &format!("{commit}:README.md")])
            .unwrap(),
        "changed"
    );
}

#[tokio::test]
async fn what_the_agents_repository_borrows_is_in_the_bundle_and_the_runner_borrows_nothing() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let (work, elsewhere) = (scene.work("one"), scene.path("elsewhere.git"));
    tests::git::repository(&elsewhere, &[("borrowed", "from elsewhere\n")]).unwrap();
    let alternates = work.join(".git/objects/info/alternates");
    std::fs::create_dir_all(alternates.parent().unwrap()).unwrap();
    std::fs::write(&alternates, format!("{}\n", elsewhere.join("objects").display())).unwrap();
    // The object is there already, so git does not write it into the agent's repository.
    std::fs::write(work.join("borrowed"), "from elsewhere\n").unwrap();
    assert_eq!(scene.save(&repo, ".b.bundle").unwrap(), Saved::Bundle);
    let own = scene.agent("one", &["count-objects", "-v"]);
    std::fs::rename(&elsewhere, scene.path("gone.git")).unwrap();
    let commit = bundle::take(&scene.repos(), &repo, ".b.bundle").await.unwrap();
    push::push(&scene.repos(), &repo, &commit).await.unwrap();
    let server = scene.server.git("one", &["show", &format!("{commit}:borrowed")]);
    assert_eq!(server.unwrap(), "from elsewhere", "{own}");
    assert!(!scene.path("git/one/objects/info/alternates").exists());
}

#[tokio::test]
async fn what_is_no_bundle_is_refused() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let workspace = scene.path("workspace");
    let bundle = workspace.join(".b.bundle");
    let take = async || bundle::take(&scene.repos(), &repo, ".b.bundle").await;
    refused(take().await, "No such file");
    // A pipe that nobody writes to must not hold us up.
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &bundle,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    refused(take().await, "not a regular file");
    std::fs::remove_file(&bundle).unwrap();
    let good = scene.path("good.bundle");
    std::fs::write(scene.work("one").join("README.md"), "x").unwrap();
    scene.save(&repo, ".b.bundle").unwrap();
    std::fs::rename(&bundle, &good).unwrap();
    symlink(&good, &bundle).unwrap();
    refused(take().await, "cannot be used");
    std::fs::remove_file(&bundle).unwrap();
    std::fs::create_dir(&bundle).unwrap();
    refused(take().await, "not a regular file");
    std::fs::remove_dir(&bundle).unwrap();
    let giant = std::fs::File::create(&bundle).unwrap();
    giant.set_len(bundle::MAX_BUNDLE + 1).unwrap();
    refused(take().await, "too large");
    let mut bytes = std::fs::read(&good).unwrap();
    let last = bytes.len() - 30;
    bytes[last] ^= 1;
    std::fs::write(&bundle, &bytes).unwrap();
    refused(take().await, "not sound");
    std::fs::write(&bundle, &bytes[..bytes.len() / 2]).unwrap();
    refused(take().await, "cannot be pushed");
    std::fs::remove_file(&bundle).unwrap();
    std::fs::rename(&good, &bundle).unwrap();
    take().await.unwrap();
}

/// Has the agent bundle all but what this commit has; the runner must not take it.
async fn refused_without(scene: &Scene, repo: &Repo, commit: &str) {
    let bundle = scene.path("workspace/.b.bundle");
    let without = format!("^{commit}");
    scene.agent("one", &["bundle", "create", bundle.to_str().unwrap(), "HEAD", &without]);
    refused(bundle::take(&scene.repos(), repo, ".b.bundle").await, "not sound");
}

/// A bundle whose tree leads out of the work tree of everybody who checks it out.
#[tokio::test]
async fn objects_that_would_harm_who_clones_them_are_refused() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let git = scene.work("one").join(".git");
    let blob = scene.agent("one", &["rev-parse", "HEAD:README.md"]);
    // `git mktree` refuses such names itself, so the tree is written as bytes.
    let mut tree = b"100644 .git\0".to_vec();
    tree.extend(hex::decode(blob).unwrap());
    std::fs::write(scene.path("tree"), tree).unwrap();
    let tree = tests::git::git(
        &git,
        &[
            "hash-object",
            "-t",
            "tree",
            "-w",
            "--literally",
            scene.path("tree").to_str().unwrap(),
        ],
    )
    .unwrap();
    let parent = scene.agent("one", &["rev-parse", "HEAD"]);
    let commit = scene.agent("one", &["commit-tree", &tree, "-p", &parent, "-m", "evil"]);
    scene.agent("one", &["update-ref", "HEAD", &commit]);
    refused_without(&scene, &repo, &parent).await;
}

/// A bundle that names what the runner does not have.
#[tokio::test]
async fn a_bundle_with_missing_objects_is_refused() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    std::fs::write(scene.work("one").join("README.md"), "x").unwrap();
    scene.save(&repo, ".b.bundle").unwrap();
    let first = scene.agent("one", &["rev-parse", "HEAD"]);
    std::fs::write(scene.work("one").join("README.md"), "y").unwrap();
    scene.save(&repo, ".b.bundle").unwrap();
    refused_without(&scene, &repo, &first).await;
}
