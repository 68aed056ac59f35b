//! Tokens.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// Tokens by the API's four buckets, which exclude each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Tokens read anew.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
    /// Tokens read from the prompt cache.
    pub cache_read_input_tokens: u64,
    /// Tokens written to the prompt cache, of either lifetime.
    pub cache_creation_input_tokens: u64,
}

impl Usage {
    /// All tokens together.
    pub fn total(&self) -> u64 {
        let Self {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = *self;
        [
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        ]
        .iter()
        .fold(0, |a, b| a.saturating_add(*b))
    }
}

impl Usage {
    /// What is left of it without `other`.
    #[must_use]
    pub fn less(self, other: Self) -> Self {
        let Self {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = other;
        Self {
            input_tokens: self.input_tokens.saturating_sub(input_tokens),
            output_tokens: self.output_tokens.saturating_sub(output_tokens),
            cache_read_input_tokens: self.cache_read_input_tokens.saturating_sub(cache_read_input_tokens),
            cache_creation_input_tokens: self
                .cache_creation_input_tokens
                .saturating_sub(cache_creation_input_tokens),
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        let Self {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        } = other;
        self.input_tokens = self.input_tokens.saturating_add(input_tokens);
        self.output_tokens = self.output_tokens.saturating_add(output_tokens);
        self.cache_read_input_tokens = self.cache_read_input_tokens.saturating_add(cache_read_input_tokens);
        self.cache_creation_input_tokens = self
            .cache_creation_input_tokens
            .saturating_add(cache_creation_input_tokens);
    }
}
