//! What is pushed, where to, and what is not.

use protocol::spec::RepoOutput;
use runner::workspace::git::save::Saved;
use runner::workspace::git::{Repos, bundle, clone};

use super::{Scene, refused};

#[tokio::test]
async fn what_an_agent_changed_is_pushed_to_the_sessions_own_branch() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let work = scene.work("one");
    assert_eq!(std::fs::read_to_string(work.join("README.md")).unwrap(), "hello\n");
    assert_eq!(scene.pushed(&repo).await.unwrap(), None, "nothing was changed");
    std::fs::write(work.join("README.md"), "hello, world\n").unwrap();
    std::fs::write(work.join("new.txt"), "new\n").unwrap();
    std::fs::remove_file(work.join("src/main.rs")).unwrap();
    let commit = scene.pushed(&repo).await.unwrap().unwrap();
    let server = |arguments: &[&str]| scene.server.git("one", arguments).unwrap();
    let branch = "refs/heads/sessions/hello-6fa459ea";
    assert_eq!(server(&["rev-parse", branch]), commit);
    assert_eq!(server(&["show", &format!("{commit}:new.txt")]), "new");
    assert_eq!(
        server(&["diff", "--name-status", "main", branch]),
        "M\tREADME.md\nA\tnew.txt\nD\tsrc/main.rs"
    );
    let people = server(&[
        "log",
        "-1",
        "--format=%an <%ae>, %cn, %(trailers:key=Agentic-Session,valueonly)",
        branch,
    ]);
    assert_eq!(people, "Ann <ann@test.example>, agentic-operator, team/hello");
    assert_eq!(
        server(&["for-each-ref", "--format=%(refname)"]),
        format!("refs/heads/main\n{branch}"),
        "and to no other"
    );
    // The second run of the session: more on top, and then a rewrite of what was pushed.
    std::fs::write(work.join("new.txt"), "newer\n").unwrap();
    let second = scene.pushed(&repo).await.unwrap().unwrap();
    assert_eq!(server(&["rev-parse", &format!("{second}^")]), commit);
    scene.agent("one", &["reset", "--quiet", "--soft", "HEAD~2"]);
    let third = scene.pushed(&repo).await.unwrap().unwrap();
    assert_eq!(server(&["rev-parse", branch]), third);
    // After a crash between push and record it is pushed again.
    assert_eq!(scene.pushed(&repo).await.unwrap().unwrap(), third);
}

#[tokio::test]
async fn a_push_that_is_refused_says_what_the_server_said() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    scene
        .server
        .refuse_pushes("one", "main is frozen until Monday")
        .unwrap();
    std::fs::write(scene.work("one").join("README.md"), "x").unwrap();
    refused(scene.pushed(&repo).await, "main is frozen until Monday");
    assert_eq!(
        std::fs::read_to_string(scene.work("one").join("README.md")).unwrap(),
        "x"
    );
    std::fs::remove_file(scene.server.path("one").join("hooks/pre-receive")).unwrap();
    assert!(scene.pushed(&repo).await.unwrap().is_some(), "the work is still there");
}

#[tokio::test]
async fn a_declared_branch_is_only_moved_forward() {
    let scene = Scene::new().await;
    let mut repo = scene.cloned("one").await;
    repo.output = Some(RepoOutput {
        url: None,
        branch: Some("main".into()),
    });
    std::fs::write(scene.work("one").join("README.md"), "ours").unwrap();
    let commit = scene.pushed(&repo).await.unwrap().unwrap();
    assert_eq!(scene.server.git("one", &["rev-parse", "main"]).unwrap(), commit);
    // Somebody else goes on.
    let tree = scene.server.git("one", &["rev-parse", "main^{tree}"]).unwrap();
    let theirs = scene
        .server
        .git("one", &["commit-tree", &tree, "-p", &commit, "-m", "theirs"])
        .unwrap();
    scene
        .server
        .git("one", &["update-ref", "refs/heads/main", &theirs])
        .unwrap();
    std::fs::write(scene.work("one").join("README.md"), "ours again").unwrap();
    refused(scene.pushed(&repo).await, "rejected");
    assert_eq!(scene.server.git("one", &["rev-parse", "main"]).unwrap(), theirs);
}

#[tokio::test]
async fn what_somebody_else_pushed_to_the_sessions_branch_stays() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let main = scene.server.git("one", &["rev-parse", "main"]).unwrap();
    let branch = "refs/heads/sessions/hello-6fa459ea";
    scene.server.git("one", &["update-ref", branch, &main]).unwrap();
    std::fs::write(scene.work("one").join("README.md"), "ours").unwrap();
    refused(scene.pushed(&repo).await, "rejected");
    assert_eq!(scene.server.git("one", &["rev-parse", branch]).unwrap(), main);
}

#[tokio::test]
async fn another_repository_can_be_the_target() {
    let scene = Scene::new().await;
    let mut repo = scene.cloned("one").await;
    scene.server.repository("fork", &[]).unwrap();
    repo.output = Some(RepoOutput {
        url: Some(scene.server.url("fork")),
        branch: Some("work".into()),
    });
    std::fs::write(scene.work("one").join("README.md"), "ours").unwrap();
    let commit = scene.pushed(&repo).await.unwrap().unwrap();
    assert_eq!(scene.server.git("fork", &["rev-parse", "work"]).unwrap(), commit);
}

#[tokio::test]
async fn an_empty_repository_is_begun_by_the_agent() {
    let scene = Scene::new().await;
    scene.server.repository("empty", &[]).unwrap();
    let repo = scene.repo("empty");
    let cloned = clone::clone(&scene.repos(), &repo).await.unwrap();
    assert_eq!(cloned.placed.commit, "");
    assert_eq!(scene.pushed(&repo).await.unwrap(), None);
    std::fs::write(scene.work("empty").join("a"), "1").unwrap();
    let commit = scene.pushed(&repo).await.unwrap().unwrap();
    let found = scene
        .server
        .git("empty", &["rev-parse", "refs/heads/sessions/hello-6fa459ea"]);
    assert_eq!(found.unwrap(), commit);
}

/// A commit that is killed leaves all of its locks.
#[tokio::test]
async fn what_the_first_try_locked_does_not_keep_the_second_from_it() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let git = scene.work("one").join(".git");
    std::fs::write(scene.work("one").join("README.md"), "x").unwrap();
    let branch = scene.agent("one", &["symbolic-ref", "HEAD"]);
    for lock in ["index.lock", "HEAD.lock", &format!("{}.lock", branch.trim())] {
        std::fs::write(git.join(lock), "").unwrap();
    }
    refused(scene.save(&repo, ".b.bundle"), "index.lock is there");
    assert_eq!(scene.save_again(&repo, ".b.bundle", true).unwrap(), Saved::Bundle);
}

#[tokio::test]
async fn what_cannot_be_pushed_is_named() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let git = scene.work("one").join(".git");
    std::fs::write(scene.work("one").join("README.md"), "x").unwrap();
    for (file, words) in [
        ("index.lock", "index.lock is there"),
        ("MERGE_HEAD", "a merge is in progress"),
        ("rebase-merge", "a rebase is in progress"),
        ("rebase-apply", "a rebase is in progress"),
        ("CHERRY_PICK_HEAD", "a cherry-pick is in progress"),
    ] {
        std::fs::write(git.join(file), "").unwrap();
        refused(scene.save(&repo, ".b.bundle"), words);
        std::fs::remove_file(git.join(file)).unwrap();
    }
    let moved = scene.path("moved");
    std::fs::rename(&git, &moved).unwrap();
    refused(scene.save(&repo, ".b.bundle"), "there is no repository any more");
    std::fs::rename(&moved, &git).unwrap();
    assert!(scene.pushed(&repo).await.unwrap().is_some());
    std::fs::remove_dir_all(scene.work("one")).unwrap();
    refused(scene.save(&repo, ".b.bundle"), "its folder is gone");
}

#[tokio::test]
async fn lfs_and_submodules_are_said_at_the_clone_and_changed_lfs_files_are_not_pushed() {
    let scene = Scene::new().await;
    let files = [
        (".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n"),
        (
            "a.bin",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        ),
        (
            ".gitmodules",
            "[submodule \"x\"]\n\tpath = x\n\turl = https://test.example/x\n",
        ),
        ("b.txt", "b"),
    ];
    scene.server.repository("one", &files).unwrap();
    let repo = scene.repo("one");
    let notes = clone::clone(&scene.repos(), &repo).await.unwrap().notes.join(" ");
    assert!(notes.contains("submodules") && notes.contains("Git LFS"), "{notes}");
    std::fs::write(scene.work("one").join("b.txt"), "bb").unwrap();
    assert!(scene.pushed(&repo).await.unwrap().is_some());
    std::fs::write(scene.work("one").join("a.bin"), "the real thing").unwrap();
    refused(scene.pushed(&repo).await, "LfsUnsupported");
}

#[tokio::test]
async fn files_of_any_name_are_pushed_and_a_name_alone_makes_no_lfs_file() {
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    let names = [
        "lfs",
        "two\nlfs\nlines",
        "-n",
        "gr\u{fc}n \u{1f33f}",
        "\"quoted\\\"",
        "\u{1b}[2J",
    ];
    for name in names {
        std::fs::write(scene.work("one").join(name), name).unwrap();
    }
    let commit = scene.pushed(&repo).await.unwrap().unwrap();
    let listed = scene
        .server
        .git("one", &["ls-tree", "-z", "--name-only", &commit])
        .unwrap();
    for name in names {
        assert!(listed.split('\0').any(|found| found == name), "{name:?} in {listed:?}");
    }
}

/// As on storage that gives every file to one user.
#[tokio::test]
async fn a_repository_whose_files_are_said_to_be_somebody_elses_is_pushed_all_the_same() {
    if !rustix::process::getuid().is_root() {
        eprintln!("not shown: only root can give files away");
        return;
    }
    let scene = Scene::new().await;
    let repo = scene.cloned("one").await;
    std::fs::write(scene.work("one").join("new"), "new").unwrap();
    for path in [scene.work("one"), scene.work("one").join(".git")] {
        std::os::unix::fs::chown(path, Some(65_534), Some(65_534)).unwrap();
    }
    assert!(scene.pushed(&repo).await.unwrap().is_some());
}

/// They may share it by a claim that both name.
#[tokio::test]
async fn a_session_leaves_what_another_hands_over_in_the_same_workspace() {
    let scene = Scene::new().await;
    let ours = scene.repos();
    let others = Repos {
        branch: "sessions/other-7fa459ea".into(),
        ..scene.repos()
    };
    let here = |name: &str| scene.path("workspace").join(name).exists();
    let names = [bundle::new_name(&ours), bundle::new_name(&others)];
    let locks = names.clone().map(|name| format!("{name}.lock"));
    for name in names.iter().chain(&locks) {
        std::fs::write(scene.path("workspace").join(name), "").unwrap();
    }
    bundle::remove_leftovers(&ours);
    assert_eq!([here(&names[0]), here(&locks[0])], [false, false]);
    assert_eq!([here(&names[1]), here(&locks[1])], [true, true]);
}
