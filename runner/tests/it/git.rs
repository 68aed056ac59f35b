//! Repositories: real git, a real server with TLS and a token, and agents that mean harm.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use protocol::names::RUNNER_SECRETS;
use protocol::spec::{Repo, RepoOutput};
use runner::address::Allowed;
use runner::workspace::git::save::Saved;
use runner::workspace::git::{Credentials, Fault, GitError, Identity, Repos, bundle, clone, push, save};
use secrecy::SecretString;
use tests::git::GitServer;

const TOKEN: &str = "ghp_fake_token_of_the_tests";

/// A claim with a workspace, and a server.
pub struct Scene {
    dir: tempfile::TempDir,
    pub server: GitServer,
}

impl Scene {
    pub async fn new() -> Self {
        let server = GitServer::start(Some(TOKEN)).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        for folder in ["git", "workspace", "private"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let secret = dir.path().join("secrets").join(RUNNER_SECRETS[0]);
        std::fs::create_dir_all(&secret).unwrap();
        std::fs::write(secret.join("ca.crt"), &server.ca).unwrap();
        std::fs::write(secret.join("GITHUB_TOKEN"), TOKEN).unwrap();
        std::fs::write(secret.join("GITHUB_HOST"), server.address.to_string()).unwrap();
        Self { dir, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn secret(&self, name: &str) -> PathBuf {
        self.path("secrets").join(RUNNER_SECRETS[0]).join(name)
    }

    /// The folder of Secrets.
    pub fn secrets(&self) -> PathBuf {
        self.path("secrets")
    }

    /// The runner's private folder.
    pub fn private(&self) -> PathBuf {
        self.path("private")
    }

    pub fn repos(&self) -> Repos {
        Repos {
            folder: self.path("git"),
            workspace: self.path("workspace"),
            ..repos(self.secrets(), self.private())
        }
    }

    fn repo(&self, name: &str) -> Repo {
        Repo {
            url: self.server.url(name),
            name: name.to_owned(),
            push: true,
            ..Repo::default()
        }
    }

    /// A repository of two files that is in the workspace.
    async fn cloned(&self, name: &str) -> Repo {
        let files = [("README.md", "hello\n"), ("src/main.rs", "fn main() {}\n")];
        self.server.repository(name, &files).unwrap();
        let repo = self.repo(name);
        clone::clone(&self.repos(), &repo).await.unwrap();
        repo
    }

    fn work(&self, name: &str) -> PathBuf {
        self.path("workspace").join(name)
    }

    /// What the agent container does at the end.
    fn save(&self, repo: &Repo, name: &str) -> Result<Saved, GitError> {
        let workspace = self.path("workspace");
        let spawn = save::spawn(&self.repos(), repo, workspace.to_str().unwrap(), name).unwrap();
        let output = Command::new(&spawn.argv[0])
            .args(&spawn.argv[1..])
            .env_clear()
            .envs(spawn.env_default)
            .env("HOME", self.dir.path())
            .envs(spawn.env)
            .current_dir(spawn.cwd)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        save::saved(&repo.name, &String::from_utf8(output.stdout).unwrap())
    }

    /// All of what a normal end does; the commit that was pushed.
    async fn pushed(&self, repo: &Repo) -> Result<Option<String>, GitError> {
        match self.save(repo, ".b.bundle")? {
            Saved::Same => return Ok(None),
            Saved::Bundle => {}
        }
        let commit = bundle::take(&self.repos(), repo, ".b.bundle").await?;
        bundle::remove(&self.repos(), ".b.bundle");
        push::push(&self.repos(), repo, &commit).await?;
        Ok(Some(commit))
    }

    /// git, as the agent uses it.
    fn agent(&self, name: &str, arguments: &[&str]) -> String {
        tests::git::git(
            &self.work(name).join(".git"),
            &[&["-c", "core.bare=false"], arguments].concat(),
        )
        .unwrap()
    }
}

/// Repositories of a session without any.
pub fn repos(secrets: PathBuf, private: PathBuf) -> Repos {
    Repos {
        allowed: Allowed::new(&["127.0.0.1".to_owned()]),
        credentials: Credentials::new(secrets, private, |_| None::<SecretString>),
        author: Identity {
            name: "Ann".into(),
            email: "ann@test.example".into(),
        },
        branch: "sessions/hello-6fa459ea".into(),
        session: "team/hello".into(),
        ..Repos::default()
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, GitError>, words: &str) {
    let error = result.unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(error.fault(), Fault::Refused, "{error}");
}

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
    let mut open = vec![scene.path("workspace"), scene.path("git")];
    let mut files = 0;
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
                continue;
            }
            files += 1;
            let bytes = std::fs::read(entry.path()).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            assert!(!text.contains("fake_token"), "{}", entry.path().display());
            assert!(!text.contains("Authorization"), "{}", entry.path().display());
        }
    }
    assert!(files > 10);
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

#[tokio::test]
async fn a_clone_that_was_cut_is_gone_on_with_and_one_that_is_there_stays() {
    let scene = Scene::new().await;
    scene.server.repository("one", &[("a", "1")]).unwrap();
    let repo = scene.repo("one");
    // What runners leave that are killed at bad moments.
    std::fs::create_dir_all(scene.path("git/one.work/.git")).unwrap();
    std::fs::create_dir_all(scene.path("git/one/objects/pack")).unwrap();
    for file in [
        "one/shallow.lock",
        "one/objects/pack/tmp_pack_x",
        "one.work/.git/index.lock",
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
    std::fs::remove_file(scene.path("git/one.placed")).unwrap();
    std::fs::remove_dir_all(scene.work("one")).unwrap();
    assert_eq!(clone::clone(&scene.repos(), &repo).await.unwrap().placed, cloned.placed);
    assert_eq!(scene.server.asked().len(), asked);
    // Placed, and killed before that was written down.
    std::fs::remove_file(scene.path("git/one.placed")).unwrap();
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
    for name in ["..", "a/b", "../x", ".git", "", "-x", "x.work", "x\n"] {
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
    let bundle = scene.path("workspace/.b.bundle");
    scene.agent(
        "one",
        &[
            "bundle",
            "create",
            bundle.to_str().unwrap(),
            "HEAD",
            &format!("^{parent}"),
        ],
    );
    refused(bundle::take(&scene.repos(), &repo, ".b.bundle").await, "not sound");
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
    let bundle = scene.path("workspace/.b.bundle");
    scene.agent(
        "one",
        &[
            "bundle",
            "create",
            bundle.to_str().unwrap(),
            "HEAD",
            &format!("^{first}"),
        ],
    );
    refused(bundle::take(&scene.repos(), &repo, ".b.bundle").await, "not sound");
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
