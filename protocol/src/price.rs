//! What a model's tokens cost.

use crate::{NanoUsd, Usage};

/// Prices of one model, billionths of a US dollar per token (so 1,000 is one US dollar per million tokens).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Price {
    /// Tokens read anew.
    pub input: u64,
    /// Tokens written.
    pub output: u64,
    /// Tokens read from the prompt cache.
    pub cache_read: u64,
    /// Tokens written to the prompt cache (five minutes).
    pub cache_write: u64,
}

impl Price {
    /// What `usage` costs.
    pub fn of(&self, usage: &Usage) -> NanoUsd {
        let Self {
            input,
            output,
            cache_read,
            cache_write,
        } = *self;
        [
            (usage.input_tokens, input),
            (usage.output_tokens, output),
            (usage.cache_read_input_tokens, cache_read),
            (usage.cache_creation_input_tokens, cache_write),
        ]
        .iter()
        .map(|(tokens, price)| NanoUsd(tokens.saturating_mul(*price)))
        .sum()
    }
}

/// The price of a model, by its API name with or without a date; `None` for a model that the table does not have.
pub fn price(model: &str) -> Option<Price> {
    let _ = model;
    None
}
