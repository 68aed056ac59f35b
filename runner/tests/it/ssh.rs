//! Repositories over ssh: a real sshd, the key of a Secret, and hosts that are checked.

use protocol::Outcome;
use protocol::spec::Repo;
use runner::config::Config;
use runner::workspace::git::{Fault, GitError, Repos, clone};
use tests::ssh::SshServer;

use crate::common::{Session, assert_nowhere, bash, script, text};
use crate::pod::{agent_container, config, drive};

/// Name of the Secret with the key.
const SECRET: &str = "deploy-key";

struct Scene {
    dir: tempfile::TempDir,
    server: SshServer,
}

impl Scene {
    /// A server with a repository, and a Secret with the key for it.
    async fn new() -> Self {
        let server = tokio::task::spawn_blocking(SshServer::start).await.unwrap().unwrap();
        server.repository("one.git", &[("README.md", "hello\n")]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for folder in ["git", "workspace", "private", "secrets/deploy-key"] {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        let scene = Self { dir, server };
        scene.secret("ssh-privatekey", &scene.server.key().unwrap());
        scene.secret("known_hosts", &scene.server.known_host().unwrap());
        scene
    }

    fn secret(&self, entry: &str, value: &str) {
        std::fs::write(self.dir.path().join("secrets").join(SECRET).join(entry), value).unwrap();
    }

    fn without(&self, entry: &str) {
        std::fs::remove_file(self.dir.path().join("secrets").join(SECRET).join(entry)).unwrap();
    }

    fn repos(&self) -> Repos {
        let path = |name: &str| self.dir.path().join(name);
        Repos {
            folder: path("git"),
            workspace: path("workspace"),
            ..crate::git::repos(path("secrets"), path("private"))
        }
    }

    fn repo(&self) -> Repo {
        Repo {
            url: self.server.url("one.git"),
            name: "one".into(),
            push: true,
            ..Repo::default()
        }
    }

    async fn clone(&self) -> Result<clone::Cloned, GitError> {
        clone::clone(&self.repos(), &self.repo()).await
    }

    /// Forgets the clone, but not the private folder.
    fn forget(&self) {
        for folder in ["git", "workspace"] {
            std::fs::remove_dir_all(self.dir.path().join(folder)).unwrap();
            std::fs::create_dir(self.dir.path().join(folder)).unwrap();
        }
    }
}

fn refused(result: Result<clone::Cloned, GitError>, words: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.fault(), Fault::Refused, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn an_agent_works_in_a_clone_over_ssh_and_its_work_is_pushed_with_a_key_that_it_never_sees() {
    let (scene, session) = (Scene::new().await, Session::new().await);
    let key = scene.server.key().unwrap();
    let secret_line = key.lines().nth(1).unwrap().to_owned();
    // Where an agent would look, and that there is no agent of ssh's either.
    let look = "git fetch 2>&1 | tail -1; env; cat ~/.ssh/* 2>&1; git config --list; echo more > new.txt";
    let prompt = script("MARK", &[bash(look), text("Done.")]);
    let base = config(&session, &prompt);
    let folder = session.state().join("git");
    std::fs::create_dir_all(&folder).unwrap();
    let config = Config {
        repos: Repos {
            list: vec![scene.repo()],
            folder: folder.clone(),
            workspace: session.workspace(),
            ..scene.repos()
        },
        agent: runner::config::AgentConfig {
            workspace: session.workspace().join("one").display().to_string(),
            ..base.agent
        },
        ..base
    };
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded, "{}", session.report().message);
    let pushed = scene
        .server
        .git("one.git", &["rev-parse", "sessions/hello-6fa459ea"])
        .unwrap();
    let report = session.report();
    assert_eq!((report.repos[0].pushed, &report.repos[0].commit), (true, &pushed));
    assert_eq!(
        scene
            .server
            .git("one.git", &["show", &format!("{pushed}:new.txt")])
            .unwrap(),
        "more"
    );
    assert!(
        scene.server.log().unwrap().contains("Accepted publickey"),
        "the key was what opened it"
    );
    let records = format!("{:?}", session.records());
    assert!(!records.contains(&secret_line));
    assert!(!records.contains("SSH_AUTH_SOCK") && !records.contains("GIT_SSH_COMMAND"));
    assert_nowhere(&session.workspace(), &[&secret_line]);
    assert_nowhere(&folder, &[&secret_line]);
}

#[tokio::test]
async fn a_refused_key_is_said_with_the_secret_that_holds_it() {
    let scene = Scene::new().await;
    scene.secret("ssh-privatekey", &scene.server.other_key().unwrap());
    refused(
        scene.clone().await,
        &[
            "failed to clone one",
            "Permission denied",
            "ssh-privatekey of the Secret deploy-key",
        ],
    );
    scene.without("ssh-privatekey");
    refused(
        scene.clone().await,
        &[
            "Permission denied",
            "no Secret of spec.runnerSecrets has an entry ssh-privatekey",
        ],
    );
    // Put right while the runner waits for its next attempt; saved by an editor of another system.
    let key = scene.server.key().unwrap();
    scene.secret("ssh-privatekey", key.trim_end().replace('\n', "\r\n").as_str());
    scene.clone().await.unwrap();
}

#[tokio::test]
async fn a_host_must_show_the_key_that_the_secret_names() {
    let mut scene = Scene::new().await;
    scene.clone().await.unwrap();
    scene.forget();
    scene.server.change_host_key().unwrap();
    let logged = scene.server.log().unwrap().matches("Accepted publickey").count();
    refused(
        scene.clone().await,
        &["Host key verification failed", "known_hosts of the Secret deploy-key"],
    );
    scene.secret(
        "known_hosts",
        "another.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFake\n",
    );
    refused(scene.clone().await, &["Host key verification failed"]);
    let now = scene.server.log().unwrap().matches("Accepted publickey").count();
    assert_eq!(now, logged, "the key was not tried");
    scene.secret("known_hosts", &scene.server.known_host().unwrap());
    scene.clone().await.unwrap();
}

#[tokio::test]
async fn without_known_hosts_the_first_key_of_a_host_is_kept_and_another_one_is_refused() {
    let mut scene = Scene::new().await;
    scene.without("known_hosts");
    scene.clone().await.unwrap();
    scene.forget();
    scene.clone().await.unwrap();
    scene.forget();
    scene.server.change_host_key().unwrap();
    refused(
        scene.clone().await,
        &["Host key verification failed", "another key than before"],
    );
}
