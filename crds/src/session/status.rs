//! What became of a session.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Phase;

/// What became of the session. Written by the operator alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgenticSessionStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the session is.
    #[serde(default)]
    pub phase: Phase,
    /// Why it is there, one word. Example: `Timeout`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it is there, for people, naming the object concerned and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What is known in detail.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When the current run began to work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the current run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Job of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_name: Option<String>,
    /// Pod of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// UID of the pod that may speak for the session now.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "podUID")]
    pub pod_uid: Option<String>,
    /// Number of the current run, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub run: Option<u32>,
    /// Number of the current attempt, from 1, counted through all runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub attempt: Option<u32>,
    /// Number from which the run's attempts are counted: its first, or later when a queue took attempts back; with `attempt` and
    /// `freeRetries` it says how many tries are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub first_attempt: Option<u32>,
    /// How many of the run's attempts were ended by the cluster (eviction, preemption, a lost node) and do not count as tries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub free_retries: Option<u32>,
    /// Seconds that the run's ended attempts worked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub running_seconds: Option<u64>,
    /// When the next attempt is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_time: Option<Time>,
    /// Value of the annotation `ambient-code.io/start-requested-at` that was last acted upon; another value asks for the next run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub handled_start_request: Option<String>,
    /// How often the agent's container of the current attempt was started again, after it had run out of memory or crashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub agent_restarts: Option<u32>,
    /// Number of the last drain Job, which delivers records that an ended run left on the volume; from 1, counted through all runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub drains: Option<u32>,
    /// Drain Job at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_job_name: Option<String>,
    /// When the next drain Job is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_drain_time: Option<Time>,
    /// Id of the CLI's conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sdk_session_id: Option<String>,
    /// Model responses in the main conversation, over the whole session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub turns: Option<u64>,
    /// Tokens, over the whole session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// Cost in US dollars, over the whole session, by the product's price table; absent for a model that it does not have.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "costUSD")]
    pub cost_usd: Option<String>,
    /// The agent's last answer, cut to what the termination report carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Id of the session's trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Number of the last record in the session's event log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub last_seq: Option<u64>,
    /// Number of the last record that the gateway acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub acked_seq: Option<u64>,
    /// What became of the repositories, in the order of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub repos: Vec<RepoStatus>,
}

/// What became of a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RepoStatus {
    /// Its folder in the workspace.
    pub name: String,
    /// Where it was cloned from; where it was pushed to, once it was.
    pub url: String,
    /// Branch that was cloned, or pushed, once it was; absent for the repository's own default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Commit of the workspace: as it was cloned, or as it was pushed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Whether `commit` was pushed.
    #[serde(default)]
    pub pushed: bool,
}

/// Tokens by the API's four buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenUsage {
    /// Tokens read anew.
    #[schemars(with = "i64")]
    pub input_tokens: u64,
    /// Tokens written.
    #[schemars(with = "i64")]
    pub output_tokens: u64,
    /// Tokens read from the prompt cache.
    #[schemars(with = "i64")]
    pub cache_read_input_tokens: u64,
    /// Tokens written to the prompt cache.
    #[schemars(with = "i64")]
    pub cache_creation_input_tokens: u64,
}

impl From<protocol::Usage> for TokenUsage {
    fn from(usage: protocol::Usage) -> Self {
        let protocol::Usage {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = usage;
        // The API server refuses the whole status for a greater number.
        let most = |count: u64| count.min(i64::MAX as u64);
        Self {
            input_tokens: most(input_tokens),
            output_tokens: most(output_tokens),
            cache_read_input_tokens: most(cache_read_input_tokens),
            cache_creation_input_tokens: most(cache_creation_input_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_count_is_greater_than_the_api_server_takes() {
        let usage = protocol::Usage {
            output_tokens: u64::MAX,
            ..protocol::Usage::default()
        };
        let shown = serde_json::to_value(TokenUsage::from(usage)).unwrap();
        assert_eq!(shown["outputTokens"].as_i64(), Some(i64::MAX));
    }
}
