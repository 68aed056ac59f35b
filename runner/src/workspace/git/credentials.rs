//! Tokens and keys of repositories: read again for each use, bound to their hosts.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use protocol::names::env;
use secrecy::{ExposeSecret as _, SecretString};

use super::GitError;
use super::remote::{Remote, Scheme};
use crate::redact::Vault;
use crate::secrets::Secrets;

/// Key of a Secret of the type `kubernetes.io/ssh-auth`.
const SSH_KEY: &str = "ssh-privatekey";
/// Key of a Secret with the hosts' own keys; without it the first one seen is kept.
const KNOWN_HOSTS: &str = "known_hosts";
/// Where the public authorities are on Debian and its like.
const PUBLIC_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A token's variable, the variable with the hosts that it is for, the host without that, and the user to give it with.
const TOKENS: [(&str, &str, &str, &str); 2] = [
    (env::GITHUB_TOKEN, env::GITHUB_HOST, "github.com", "x-access-token"),
    (env::GITLAB_TOKEN, env::GITLAB_HOST, "gitlab.com", "oauth2"),
];

/// Where credentials are.
#[derive(Clone)]
pub struct Credentials {
    secrets: Secrets,
    /// The runner's private folder.
    private: PathBuf,
}

impl Default for Credentials {
    fn default() -> Self {
        Self::new(PathBuf::new(), PathBuf::new(), |_| None)
    }
}

impl Credentials {
    /// Credentials in files below `secrets` or, where there is no such file, in variables.
    pub fn new(
        secrets: PathBuf,
        private: PathBuf,
        variables: impl Fn(&str) -> Option<SecretString> + Send + Sync + 'static,
    ) -> Self {
        Self {
            secrets: Secrets::new(secrets, variables),
            private,
        }
    }

    /// The same, and `vault` is told of each value before it is used.
    #[must_use]
    pub fn telling(self, vault: Vault) -> Self {
        Self {
            secrets: self.secrets.telling(vault),
            private: self.private,
        }
    }

    /// The runner's private folder.
    pub(super) fn private(&self) -> &Path {
        &self.private
    }

    /// The `Authorization` header for a host, when there is a token for it.
    pub(super) fn authorization(&self, host: &str, port: u16) -> Option<SecretString> {
        let (name, user) = self.token_for(host, port)?;
        let token = self.value(name)?;
        let pair = format!("{user}:{}", token.expose_secret());
        let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
        self.secrets.tell(name, &encoded);
        Some(format!("Authorization: Basic {encoded}").into())
    }

    /// What people can do when a host refuses us: git's words, and what to add to them.
    pub(super) fn advice(&self, remote: &Remote) -> Vec<(&'static [&'static str], String)> {
        match remote.scheme {
            Scheme::Ssh => vec![
                (&["Permission denied"], self.about_the_key()),
                (&["Host key verification failed"], self.about_the_host()),
            ],
            Scheme::Https => vec![(
                &[
                    "Authentication failed",
                    "could not read Username",
                    "error: 401",
                    "error: 403",
                ],
                self.about_the_token(remote),
            )],
        }
    }

    fn about_the_key(&self) -> String {
        match self.secrets.holder(SSH_KEY) {
            Some(secret) => format!("the host does not take {SSH_KEY} of the Secret {secret}"),
            None => format!("no Secret of spec.runnerSecrets has an entry {SSH_KEY}: put the key for this host there"),
        }
    }

    fn about_the_host(&self) -> String {
        match self.secrets.holder(KNOWN_HOSTS) {
            Some(secret) => format!("the host does not show a key that is in {KNOWN_HOSTS} of the Secret {secret}"),
            None => format!(
                "the host shows another key than before: put its key as {KNOWN_HOSTS} into a Secret of spec.runnerSecrets"
            ),
        }
    }

    fn about_the_token(&self, remote: &Remote) -> String {
        match self.token_for(&remote.host, remote.port) {
            Some((name, _)) if self.value(name).is_some() => {
                let from = self
                    .secrets
                    .holder(name)
                    .map_or_else(String::new, |secret| format!(" of the Secret {secret}"));
                format!("the host does not take {name}{from} for this repository")
            }
            Some((name, _)) => {
                format!("no Secret of spec.runnerSecrets has an entry {name}, which is what this host would be given")
            }
            None => format!(
                "no token is for {}: put {} or {} into a Secret of spec.runnerSecrets, and the host's name as {} or {}",
                remote.host,
                env::GITHUB_TOKEN,
                env::GITLAB_TOKEN,
                env::GITHUB_HOST,
                env::GITLAB_HOST,
            ),
        }
    }

    /// The variable of the token that is for a host, and the user to give it with.
    fn token_for(&self, host: &str, port: u16) -> Option<(&'static str, &'static str)> {
        TOKENS.iter().find_map(|(token, hosts, host_of_all, user)| {
            let hosts = self.value(hosts);
            let hosts = hosts.as_ref().map_or(*host_of_all, |hosts| hosts.expose_secret());
            let its = hosts.split([',', ' ']).any(|named| is_named(named, host, port));
            its.then_some((*token, *user))
        })
    }

    /// A file with all authorities, when there are others than the public ones.
    pub(super) fn authorities(&self) -> Result<Option<PathBuf>, GitError> {
        let Some(own) = self.secrets.authorities() else {
            return Ok(None);
        };
        let mut all = fs::read(PUBLIC_CA).unwrap_or_default();
        all.push(b'\n');
        all.extend(own);
        let path = self.private.join("git-ca.crt");
        written(&path, &all).map_err(GitError::io("write", &path))?;
        Ok(Some(path))
    }

    /// What ssh is told of keys; the files are in the private folder.
    pub(super) fn ssh(&self) -> Result<Vec<String>, GitError> {
        let mut options = Vec::new();
        if let Some(key) = self.secrets.file(SSH_KEY) {
            let key = as_ssh_reads_it(&key);
            let path = self.private.join("git-ssh-key");
            written(&path, &key).map_err(GitError::io("write", &path))?;
            options.push(format!("IdentityFile={}", path.display()));
        }
        let path = self.private.join("git-known-hosts");
        if let Some(hosts) = self.secrets.file(KNOWN_HOSTS) {
            written(&path, &hosts).map_err(GitError::io("write", &path))?;
            options.push("StrictHostKeyChecking=yes".to_owned());
        } else {
            options.push("StrictHostKeyChecking=accept-new".to_owned());
        }
        options.push(format!("UserKnownHostsFile={}", path.display()));
        Ok(options)
    }

    fn value(&self, name: &str) -> Option<SecretString> {
        self.secrets.value(name)
    }
}

/// ssh refuses a key without a last line break, which editors forget, and one whose lines end as on Windows.
fn as_ssh_reads_it(key: &[u8]) -> Vec<u8> {
    let mut key: Vec<u8> = key.iter().copied().filter(|byte| *byte != b'\r').collect();
    if !key.ends_with(b"\n") {
        key.push(b'\n');
    }
    key
}

/// Whether `named`, a host with or without a port, is this one.
fn is_named(named: &str, host: &str, port: u16) -> bool {
    let named = named.trim().to_ascii_lowercase();
    named == format!("{host}:{port}") || (named == host && port == 443)
}

/// Replaces a file that only we can read.
fn written(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = path.with_extension("next");
    let _ = fs::remove_file(&next);
    let mut file = File::options().create_new(true).write(true).mode(0o600).open(&next)?;
    file.write_all(bytes)?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    use protocol::names::RUNNER_SECRETS;

    use super::*;

    fn header(credentials: &Credentials, host: &str, port: u16) -> Option<String> {
        credentials.authorization(host, port).map(|header| {
            let text = header
                .expose_secret()
                .strip_prefix("Authorization: Basic ")
                .unwrap()
                .to_owned();
            String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text).unwrap()).unwrap()
        })
    }

    #[test]
    fn a_token_goes_to_its_hosts_and_to_no_other() {
        let variables = |name: &str| match name {
            "GITHUB_TOKEN" => Some(SecretString::from("hub")),
            "GITLAB_TOKEN" => Some(SecretString::from("lab")),
            "GITLAB_HOST" => Some(SecretString::from("git.corp.example, git.corp.example:8443")),
            _ => None,
        };
        let credentials = Credentials::new(PathBuf::new(), PathBuf::new(), variables);
        assert_eq!(
            header(&credentials, "github.com", 443).as_deref(),
            Some("x-access-token:hub")
        );
        assert_eq!(
            header(&credentials, "git.corp.example", 443).as_deref(),
            Some("oauth2:lab")
        );
        assert_eq!(
            header(&credentials, "git.corp.example", 8443).as_deref(),
            Some("oauth2:lab")
        );
        for (host, port) in [
            ("gitlab.com", 443),
            ("github.com", 8443),
            ("github.com.evil.example", 443),
            ("evil-github.com", 443),
            ("api.github.com", 443),
            ("git.corp.example", 444),
        ] {
            assert_eq!(header(&credentials, host, port), None, "{host}:{port}");
        }
    }

    #[test]
    fn a_file_is_read_again_for_each_use_and_comes_before_a_variable() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(RUNNER_SECRETS[0]);
        fs::create_dir(&folder).unwrap();
        let variables = |name: &str| (name == "GITHUB_TOKEN").then(|| SecretString::from("old"));
        let credentials = Credentials::new(dir.path().into(), PathBuf::new(), variables);
        assert_eq!(
            header(&credentials, "github.com", 443).as_deref(),
            Some("x-access-token:old")
        );
        for token in ["one", "two\n"] {
            fs::write(folder.join("GITHUB_TOKEN"), token).unwrap();
            let expected = format!("x-access-token:{}", token.trim());
            assert_eq!(header(&credentials, "github.com", 443), Some(expected));
        }
    }

    #[test]
    fn a_key_is_kept_where_only_we_can_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("secrets/deploy-key");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(SSH_KEY), "fake key").unwrap();
        let credentials = Credentials::new(dir.path().join("secrets"), dir.path().into(), |_| None);
        let options = credentials.ssh().unwrap();
        assert!(
            options.contains(&"StrictHostKeyChecking=accept-new".to_owned()),
            "{options:?}"
        );
        let key = dir.path().join("git-ssh-key");
        assert_eq!(fs::read_to_string(&key).unwrap(), "fake key\n");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(folder.join(KNOWN_HOSTS), "h ssh-ed25519 AAAA").unwrap();
        let options = credentials.ssh().unwrap();
        assert!(options.contains(&"StrictHostKeyChecking=yes".to_owned()), "{options:?}");
    }
}
