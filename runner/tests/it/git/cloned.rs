//! What is cloned, from where, and what it leaves behind.

use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use protocol::spec::{Repo, RepoOutput};
use runner::address::Allowed;
use runner::workspace::git::{Fault, Repos, clone, push};
use tests::git::GitServer;

use super::{Scene, TOKEN, refused};
use crate::common::{DEADLINE, assert_nowhere, eventually};

#[tokio::test]
async fn nothing_of_the_credential_is_in_the_agents_copy_or_in_the_runners_repository() {
    let scene = Scene::new().await;
    scene.cloned("one").await;
    assert!(
        scene
            .server
            .asked()
            .iter()
            .any(|asked| asked.token.as_deref() == Some(TOKEN))
    );
    for folder in ["workspace", "git"] {
        assert_nowhere(&scene.path(folder), &["fake_token", "Authorization"]);
    }
}

#[tokio::test]
async fn no_object_is_shared_between_the_two_copies() {
    use std::os::unix::fs::MetadataExt as _;
    let scene = Scene::new().await;
    scene.cloned("one").await;
    let packs = |folder: PathBuf| {
        std::fs::read_dir(folder.join("objects/pack"))
            .unwrap()
            .flatten()
            .collect::<Vec<_>>()
    };
    let (ours, theirs) = (packs(scene.path("git/one")), packs(scene.work("one").join(".git")));
    assert!(!theirs.is_empty() && ours.len() == theirs.len());
    for entry in ours.iter().chain(&theirs) {
        assert_eq!(entry.metadata().unwrap().nlink(), 1);
    }
    assert!(!scene.work("one").join(".git/objects/info/alternates").exists());
}

/// Its lease would run out, and it would be taken for one that stands still.
#[tokio::test]
async fn a_runner_goes_on_while_a_copy_waits_for_the_volume() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    std::fs::remove_file(scene.path("git/.one.placed")).unwrap();
    std::fs::remove_dir_all(scene.work("one")).unwrap();
    // In the place of a file that comes slowly.
    let slow = scene.path("git/one/objects/slow");
    let made = std::process::Command::new("mkfifo").arg(&slow).status().unwrap();
    assert!(made.success());
    let (goes_on, told) = std::sync::mpsc::channel();
    let comes = |slow: &Path| {
        let mut pipe = std::fs::File::options();
        // Fails unless somebody waits at the other end.
        let pipe = pipe
            .write(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
        pipe.open(slow).is_ok()
    };
    let file = slow.clone();
    let waiting = std::thread::spawn(move || {
        let went_on = told.recv_timeout(DEADLINE).is_ok();
        went_on || !comes(&file)
    });
    let repos = scene.repos();
    let others = async {
        eventually("the copy waits", || comes(&slow)).await;
        let _ = goes_on.send(());
    };
    let (cloned, ()) = tokio::join!(clone::clone(&repos, &repo), others);
    assert!(waiting.join().unwrap(), "nothing else was done until the file came");
    let error = cloned.unwrap_err().to_string();
    assert!(error.contains("failed to copy"), "{error}");
}

#[tokio::test]
async fn a_clone_that_was_cut_is_gone_on_with_and_one_that_is_there_stays() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    let repo = scene.repo("one");
    // What runners leave that are killed at bad moments.
    std::fs::create_dir_all(scene.path("git/.one.work/.git")).unwrap();
    std::fs::create_dir_all(scene.path("git/one/objects/pack")).unwrap();
    for file in [
        "one/shallow.lock",
        "one/objects/pack/tmp_pack_x",
        ".one.work/.git/index.lock",
    ] {
        std::fs::write(scene.path("git").join(file), "").unwrap();
    }
    scene.server.down(1);
    let error = clone::clone(&scene.repos(), &repo).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Unreachable, "{error}");
    let cloned = clone::clone(&scene.repos(), &repo).await.unwrap();
    assert!(!cloned.before);
    assert_eq!(cloned.placed.branch, "main");
    std::fs::write(scene.work("one").join("a"), "2").unwrap();
    let asked = scene.server.asked().len();
    let again = clone::clone(&scene.repos(), &repo).await.unwrap();
    assert!(again.before);
    assert_eq!(again.placed, cloned.placed);
    assert_eq!(scene.server.asked().len(), asked, "nobody is asked again");
    assert_eq!(std::fs::read_to_string(scene.work("one").join("a")).unwrap(), "2");
    // Fetched and not placed: it is not fetched again.
    std::fs::remove_file(scene.path("git/.one.placed")).unwrap();
    std::fs::remove_dir_all(scene.work("one")).unwrap();
    assert_eq!(clone::clone(&scene.repos(), &repo).await.unwrap().placed, cloned.placed);
    assert_eq!(scene.server.asked().len(), asked);
    // Placed, and killed before that was written down.
    std::fs::remove_file(scene.path("git/.one.placed")).unwrap();
    let cloned = clone::clone(&scene.repos(), &repo).await.unwrap();
    assert!(cloned.notes[0].contains("stays as it is"));
}

#[tokio::test]
async fn a_token_is_read_again_and_a_wrong_one_is_said() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    std::fs::write(scene.secret("GITHUB_TOKEN"), "ghp_fake_old").unwrap();
    let error = clone::clone(&scene.repos(), &scene.repo("one")).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Refused);
    assert!(!error.to_string().contains("ghp_fake_old"), "{error}");
    assert!(error.to_string().contains("failed to clone one: "), "{error}");
    std::fs::write(scene.secret("GITHUB_TOKEN"), TOKEN).unwrap();
    clone::clone(&scene.repos(), &scene.repo("one")).await.unwrap();
}

#[tokio::test]
async fn a_credential_goes_to_no_other_host_and_follows_no_redirect() {
    let scene = Scene::new().await;
    let other = GitServer::start(None).await.unwrap();
    other.repository("one", &[("a", "1")]).unwrap();
    scene.server.repository("one", &[("a", "1")]).unwrap();
    // Both authorities are known, so that TLS is not what stops it.
    std::fs::write(scene.secret("ca.crt"), format!("{}\n{}", scene.server.ca, other.ca)).unwrap();
    let elsewhere = Repo {
        url: other.url("one"),
        ..scene.repo("one")
    };
    clone::clone(&scene.repos(), &elsewhere).await.unwrap();
    assert!(other.asked().iter().all(|asked| asked.token.is_none()));
    let before = other.asked().len();
    let lured = scene.repo("two");
    scene.server.redirect(&format!("https://{}", other.address));
    refused(clone::clone(&scene.repos(), &lured).await, "302");
    assert_eq!(other.asked().len(), before, "nobody came");
}

#[tokio::test]
async fn a_name_or_address_that_leads_inside_is_refused_before_anybody_is_asked() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    let port = scene.server.address.port();
    let repos = Repos {
        allowed: Allowed::default(),
        ..scene.repos()
    };
    for url in [
        scene.server.url("one"),
        format!("https://localhost:{port}/one.git"),
        format!("https://[::ffff:127.0.0.1]:{port}/one.git"),
        "https://169.254.169.254/latest.git".to_owned(),
        "git@localhost:one.git".to_owned(),
        "https://10.1.2.3/one.git".to_owned(),
    ] {
        let repo = Repo {
            url,
            ..scene.repo("one")
        };
        refused(clone::clone(&repos, &repo).await, "allowedPrivateHosts");
    }
    assert!(scene.server.asked().is_empty());
    for url in [
        "ext::sh -c touch% /tmp/x",
        "file:///etc",
        "http://127.0.0.1/one.git",
        "git://127.0.0.1/one.git",
        "/etc",
    ] {
        let repo = Repo {
            url: url.into(),
            ..scene.repo("one")
        };
        refused(clone::clone(&scene.repos(), &repo).await, "failed to use the address");
        let output = RepoOutput {
            url: Some(url.into()),
            branch: None,
        };
        let repo = Repo {
            output: Some(output),
            ..scene.repo("one")
        };
        refused(
            push::push(&scene.repos(), &repo, &"0".repeat(40)).await,
            "failed to use the address",
        );
    }
}

#[tokio::test]
async fn a_name_is_pinned_to_the_address_that_was_judged() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    let port = scene.server.address.port();
    std::fs::write(scene.secret("GITHUB_HOST"), format!("localhost:{port}")).unwrap();
    let repos = Repos {
        allowed: Allowed::new(&["127.0.0.0/8".to_owned(), "::1".to_owned()]),
        ..scene.repos()
    };
    let repo = Repo {
        url: format!("https://localhost:{port}/one.git"),
        ..scene.repo("one")
    };
    clone::clone(&repos, &repo).await.unwrap();
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    for name in ["..", "a/b", "../x", ".git", "", "-x", "x\n"] {
        let repo = Repo {
            name: name.into(),
            ..scene.repo("one")
        };
        refused(clone::clone(&scene.repos(), &repo).await, "cannot be the name");
    }
    for branch in ["../x", "a b", "x..y", "-", "x.lock"] {
        let repo = Repo {
            branch: Some(branch.into()),
            name: "two".into(),
            ..scene.repo("one")
        };
        let error = clone::clone(&scene.repos(), &repo).await.unwrap_err();
        assert_eq!(error.fault(), Fault::Refused, "{branch}: {error}");
    }
}

/// What the runner keeps beside a repository has names that no repository can have.
#[tokio::test]
async fn a_repository_may_be_named_as_what_the_runner_keeps_of_another() {
    let scene = Scene::new().await;
    for name in ["x", "x.work", "x.placed", "x.next", "x.git"] {
        scene.server.repository(name, &[("a", name)]).unwrap();
        let cloned = clone::clone(&scene.repos(), &scene.repo(name)).await.unwrap();
        assert!(!cloned.before && cloned.notes.is_empty(), "{name}: {:?}", cloned.notes);
    }
    for name in ["x", "x.work", "x.placed", "x.next", "x.git"] {
        assert_eq!(std::fs::read_to_string(scene.work(name).join("a")).unwrap(), name);
        assert!(clone::clone(&scene.repos(), &scene.repo(name)).await.unwrap().before);
    }
}

/// A workspace that leads elsewhere does not lead the runner there.
#[tokio::test]
async fn a_folder_that_is_a_link_is_not_written_through() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    let outside = scene.path("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, scene.work("one")).unwrap();
    let cloned = clone::clone(&scene.repos(), &scene.repo("one")).await.unwrap();
    assert!(cloned.notes[0].contains("stays as it is"));
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    let is_link = |path: &Path| path.symlink_metadata().unwrap().is_symlink();
    assert!(is_link(&scene.work("one")));
}
