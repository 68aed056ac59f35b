//! What the operator tells the runner beside the variables with names of their own.

use serde::{Deserialize, Serialize};

/// Content of `AGENTIC_SPEC_JSON`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgenticSpec {
    /// Run that the attempt belongs to, from 1.
    pub run: u32,
    /// Running time that earlier attempts of the run used, seconds; the runner's clock starts at its own start.
    #[serde(default)]
    pub used_seconds: u64,
    /// Who the session is for; goes to traces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
}

/// See [`AgenticSpec::user`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// Who.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_id: String,
    /// Their name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub display_name: String,
}

/// Content of the limits annotation and of its downward-API file: what may change while a pod runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LiveLimits {
    /// Running time over all attempts of the run, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}
