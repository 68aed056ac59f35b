//! The model, what it may use up, and what follows failures.
#![expect(
    clippy::struct_field_names,
    reason = "maxTurns, maxCostUSD and maxTokens are the words of the API"
)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which model works, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LlmSettings {
    /// Name of the model as the model API knows it; the CLI's default when absent. Example: `claude-sonnet-5-5`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = "^[^\\x00-\\x20-][^\\x00-\\x20]*$"))]
    pub model: Option<String>,
    /// Model that works when the first is overloaded; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = "^[^\\x00-\\x20-][^\\x00-\\x20]*$"))]
    pub fallback_model: Option<String>,
    /// Most tokens of one response of the model, 1 to 1,000,000; the CLI's own value for the model when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 1_000_000))]
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 1; the API's default when absent. The API takes it only from a model that does not think; else the
    /// session is `Failed` with reason `ConfigError`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub temperature: Option<f64>,
}

/// What a session may use up over all its runs. On reaching one the agent is stopped, its work is kept, and the session is `Failed`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Responses of the model in the main conversation; reason `MaxTurns`. No limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 1_000_000))]
    pub max_turns: Option<u32>,
    /// US dollars, as a decimal string, by the product's price table; reason `BudgetExceeded`. Passed by at most one response of the
    /// model. Needs a model with a price. No limit when absent. Example: `"2.50"`
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "maxCostUSD")]
    #[schemars(length(min = 1, max = 19))]
    #[x_kube(
        validation = Rule::new("self.matches('^[0-9]{1,9}([.][0-9]{1,9})?$') && self.matches('[1-9]')")
            .message("limits.maxCostUSD must be an amount in US dollars above 0, written as a string with a point, such as \"2.50\"")
    )]
    pub max_cost_usd: Option<String>,
    /// Tokens of all kinds together, those of the cache included; reason `BudgetExceeded`. No limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 1, max = 1_000_000_000_000_i64))]
    pub max_tokens: Option<u64>,
}

/// What follows failures that are not the agent's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retry {
    /// Attempts of a run, 1 to 10; 3 when absent. Those that the cluster ends (eviction, preemption, a lost node) do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1, max = 10))]
    pub max_attempts: Option<u32>,
}
