//! Repositories: real git, a real server with TLS and a token, and agents that mean harm.

mod cloned;
mod hostile;
mod memory;
mod pushed;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use protocol::names::RUNNER_SECRETS;
use protocol::spec::Repo;
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
        self.save_again(repo, name, false)
    }

    /// The same; `again`: it was lost in the middle of it before.
    fn save_again(&self, repo: &Repo, name: &str, again: bool) -> Result<Saved, GitError> {
        let workspace = self.path("workspace");
        let spawn = save::spawn(&self.repos(), repo, workspace.to_str().unwrap(), name, None, again).unwrap();
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
