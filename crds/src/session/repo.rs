//! Repositories.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Most repositories of a session: what became of eight fits the termination report.
pub const MAX_REPOS: usize = 8;

/// A repository: `url` and `branch`, or the platform's older form `input` and `output`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.url) != has(self.input)").message("give a repository in exactly one of url and input"),
    validation = Rule::new("!has(self.input) || !has(self.branch)").message("with input, write the branch as input.branch")
)]
pub struct Repo {
    /// Where it is cloned from: `https://`, `ssh://` or `git@`. Credentials come from `runnerSecrets`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(https://[^/@]+/|ssh://[^/]+/|git@[^/:]+:)[!#-;=?-\\\\[\\\\]_a-z~]+$')")
            .message("url of a repository must begin with https://, ssh:// or git@ and hold no user or password for https: put credentials into a Secret of spec.runnerSecrets")
    )]
    pub url: Option<String>,
    /// Branch to clone; the repository's own default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 244))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9_][A-Za-z0-9._/+#@-]*$') && !self.contains('..') && !self.contains('//') && !self.contains('/.') && !self.contains('@{') && !self.endsWith('/') && !self.endsWith('.') && !self.endsWith('.lock')")
            .message("branch of a repository must be a name that git takes, of letters, digits and ._/+#@-")
    )]
    pub branch: Option<String>,
    /// Its folder in the workspace; made from the last part of the address when absent. Unique in the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]*$"))]
    pub name: Option<String>,
    /// The platform's older form of `url` and `branch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<RepoInput>,
    /// Where it is pushed to; the repository that was cloned, and a branch of the session's own, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<RepoOutput>,
    /// `true`: push it when the agent is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_push: Option<bool>,
}

/// The platform's older form of a repository's `url` and `branch`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RepoInput {
    /// Where it is cloned from: `https://`, `ssh://` or `git@`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(https://[^/@]+/|ssh://[^/]+/|git@[^/:]+:)[!#-;=?-\\\\[\\\\]_a-z~]+$')")
            .message("input.url of a repository must begin with https://, ssh:// or git@ and hold no user or password for https: put credentials into a Secret of spec.runnerSecrets")
    )]
    pub url: String,
    /// Branch to clone; the repository's own default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 244))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9_][A-Za-z0-9._/+#@-]*$') && !self.contains('..') && !self.contains('//') && !self.contains('/.') && !self.contains('@{') && !self.endsWith('/') && !self.endsWith('.') && !self.endsWith('.lock')")
            .message("input.branch of a repository must be a name that git takes, of letters, digits and ._/+#@-")
    )]
    pub branch: Option<String>,
}

/// Where a repository is pushed to.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RepoOutput {
    /// The repository; the one that was cloned when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(https://[^/@]+/|ssh://[^/]+/|git@[^/:]+:)[!#-;=?-\\\\[\\\\]_a-z~]+$')")
            .message("output.url of a repository must begin with https://, ssh:// or git@ and hold no user or password for https: put credentials into a Secret of spec.runnerSecrets")
    )]
    pub url: Option<String>,
    /// The branch; `sessions/<name>-<first 8 of the uid>` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 244))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z0-9_][A-Za-z0-9._/+#@-]*$') && !self.contains('..') && !self.contains('//') && !self.contains('/.') && !self.contains('@{') && !self.endsWith('/') && !self.endsWith('.') && !self.endsWith('.lock')")
            .message("output.branch of a repository must be a name that git takes, of letters, digits and ._/+#@-")
    )]
    pub branch: Option<String>,
}
