//! The meter: what one response says of its tokens, while it streams by or as a whole.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use jiff::Timestamp;
use protocol::{
    NanoUsd, Usage,
    price::{Extras, Prices},
    record::UsageBody,
};
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use super::{answer, asked::Asked, sse::Event, stream::Encoding};
use crate::lenient::lenient;

/// Bytes of a `content_block_delta` event around its text.
const DELTA_ENVELOPE: usize = 72;
/// Bytes that stand for a token in an estimate.
const BYTES_PER_TOKEN: u64 = 3;
/// Most tokens of a kind that an answer is believed to have: sums of more would be no numbers to the cluster any more.
const MAX_COUNT: u64 = 1_000_000_000;

/// What an event means for the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Nothing,
    /// The response has begun: its opening record is due.
    Opened,
    /// The response is complete: its closing record is due.
    Ended,
    /// The API reports an error in the stream; the status that it stands for.
    Failed(u16),
}

/// Reads one response.
#[derive(Debug)]
pub struct Meter {
    id: Option<String>,
    asked: Asked,
    prices: Arc<Prices>,
    /// The model that answers, by its own words.
    model: String,
    usage: Usage,
    extras: Extras,
    started_at: Timestamp,
    first_token_at: Option<Timestamp>,
    /// Output tokens estimated from the bytes seen.
    estimate: u64,
    /// The API has told the final numbers.
    is_final: bool,
}

impl Meter {
    /// A response to a request that was forwarded at `started_at`.
    pub fn new(asked: Asked, prices: Arc<Prices>, started_at: Timestamp) -> Self {
        Self {
            id: None,
            model: asked.model.clone(),
            asked,
            prices,
            usage: Usage::default(),
            extras: Extras::default(),
            started_at,
            first_token_at: None,
            estimate: 0,
            is_final: false,
        }
    }

    /// Reads an event of a streamed response.
    pub fn event(&mut self, event: &Event, now: Timestamp) -> Step {
        let name = if event.name.is_empty() {
            serde_json::from_slice::<Typed>(&event.data).map_or(String::new(), |typed| typed.kind)
        } else {
            event.name.clone()
        };
        match name.as_str() {
            // One a response: each has a record of its own on disk.
            "message_start" if self.is_open() => Step::Nothing,
            "message_start" => {
                if let Ok(start) = serde_json::from_slice::<Start>(&event.data) {
                    self.begin(start.message);
                }
                // A start that cannot be read is one all the same: the response is metered by its bytes.
                self.id.get_or_insert_with(synthetic_id);
                Step::Opened
            }
            "content_block_start" | "content_block_delta" => {
                self.first_token(now);
                self.seen(event.length.saturating_sub(DELTA_ENVELOPE));
                Step::Nothing
            }
            "message_delta" => {
                if let Ok(delta) = serde_json::from_slice::<Delta>(&event.data)
                    && let Some(usage) = delta.usage
                {
                    self.take(&usage);
                    self.is_final |= usage.is_final();
                }
                Step::Nothing
            }
            "message_stop" => Step::Ended,
            "error" => Step::Failed(
                serde_json::from_slice::<Failure>(&event.data)
                    .map_or(500, |failure| answer::status_of(&failure.error.kind)),
            ),
            _ => Step::Nothing,
        }
    }

    /// Reads a response that is not streamed.
    pub fn whole(&mut self, body: &[u8], encoding: Encoding, now: Timestamp) {
        self.first_token(now);
        if let Ok(message) = serde_json::from_reader::<_, Message>(encoding.text(body)) {
            self.is_final = message.usage.as_ref().is_some_and(Told::is_final);
            self.begin(message);
        }
        if !self.is_final {
            // What is not what it is said to be counts as it came.
            let text = std::io::copy(&mut encoding.text(body), &mut std::io::sink());
            self.seen(text.map_or(body.len(), |length| length as usize));
        }
        self.id.get_or_insert_with(synthetic_id);
    }

    /// No answer comes any more: what the API may have done all the same is taken for done.
    pub fn given_up(&mut self) {
        self.id.get_or_insert_with(synthetic_id);
        let Usage {
            input_tokens,
            output_tokens,
            ..
        } = self.asked.given_up();
        self.usage.input_tokens = self.usage.input_tokens.max(input_tokens);
        self.estimate = self.estimate.max(output_tokens);
    }

    /// The clock may have been set back since the request: no time is told that is before it.
    fn first_token(&mut self, now: Timestamp) {
        self.first_token_at.get_or_insert(now.max(self.started_at));
    }

    /// Counts bytes of an answer, for the estimate.
    pub fn seen(&mut self, bytes: usize) {
        self.estimate += (bytes as u64).div_ceil(BYTES_PER_TOKEN).max(1);
    }

    /// Whether the response has begun.
    pub fn is_open(&self) -> bool {
        self.id.is_some()
    }

    /// The record of a response that has begun.
    pub fn opening(&self) -> UsageBody {
        self.body(self.usage, None)
    }

    /// The record of a response that is over: its own numbers, or an estimate when it was cut before it told them.
    pub fn closing(&self, now: Timestamp) -> UsageBody {
        let mut usage = self.usage;
        if !self.is_final {
            usage.output_tokens = usage.output_tokens.max(self.estimate);
        }
        self.body(usage, Some(now.max(self.first_token_at.unwrap_or(self.started_at))))
    }

    fn body(&self, usage: Usage, ended_at: Option<Timestamp>) -> UsageBody {
        UsageBody {
            message_id: self.id.clone().unwrap_or_else(synthetic_id),
            model: self.model.clone(),
            usage,
            cost_usd: self.cost(&usage),
            open: ended_at.is_none(),
            estimated: ended_at.is_some() && !self.is_final,
            started_at: self.started_at,
            first_token_at: self.first_token_at,
            ended_at,
        }
    }

    /// A gateway may answer in the name of a model that nobody knows; what was asked for has a price then.
    fn cost(&self, usage: &Usage) -> Option<NanoUsd> {
        if self.asked.unpriced_feature().is_some() {
            return None;
        }
        let price = self
            .prices
            .of(&self.model)
            .or_else(|| self.prices.of(&self.asked.model))?;
        Some(price.with(usage, &self.extras))
    }

    fn begin(&mut self, message: Message) {
        self.id = Some(message.id).filter(|id| !id.is_empty());
        if !message.model.is_empty() {
            self.model = message.model;
        }
        if let Some(usage) = message.usage {
            self.take(&usage);
        }
    }

    /// Counts are cumulative; some gateways repeat a count as zero at the end, so that the greater one holds.
    fn take(&mut self, told: &Told) {
        let raise = |into: &mut u64, value: Option<u64>| *into = (*into).max(value.unwrap_or(0));
        raise(&mut self.usage.input_tokens, told.input_tokens);
        raise(&mut self.usage.output_tokens, told.output_tokens);
        raise(&mut self.usage.cache_read_input_tokens, told.cache_read_input_tokens);
        raise(
            &mut self.usage.cache_creation_input_tokens,
            told.cache_creation_input_tokens,
        );
        let hour = told.cache_creation.as_ref().and_then(|c| c.ephemeral_1h_input_tokens);
        raise(&mut self.extras.hour_cache_writes, hour);
        let searches = told.server_tool_use.as_ref().and_then(|s| s.web_search_requests);
        raise(&mut self.extras.web_searches, searches);
    }
}

/// An id for a response that told none.
fn synthetic_id() -> String {
    format!("cut-{}", Uuid::new_v4())
}

#[derive(Deserialize)]
struct Typed {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Start {
    message: Message,
}

/// The numbers must not depend on what stands beside them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Message {
    #[serde(deserialize_with = "lenient")]
    id: String,
    #[serde(deserialize_with = "lenient")]
    model: String,
    #[serde(deserialize_with = "lenient")]
    usage: Option<Told>,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default, deserialize_with = "lenient")]
    usage: Option<Told>,
}

#[derive(Deserialize)]
struct Failure {
    error: Typed,
}

/// Usage as the API writes it: any count may be absent or null.
#[derive(Deserialize)]
struct Told {
    #[serde(default, deserialize_with = "count")]
    input_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    output_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    cache_read_input_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    cache_creation_input_tokens: Option<u64>,
    #[serde(default, deserialize_with = "lenient")]
    cache_creation: Option<CacheCreation>,
    #[serde(default, deserialize_with = "lenient")]
    server_tool_use: Option<ServerToolUse>,
}

impl Told {
    /// Whether it can be the last word: without a number of the output there is only an estimate.
    fn is_final(&self) -> bool {
        self.output_tokens.is_some()
    }
}

#[derive(Deserialize)]
struct CacheCreation {
    #[serde(default, deserialize_with = "count")]
    ephemeral_1h_input_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct ServerToolUse {
    #[serde(default, deserialize_with = "count")]
    web_search_requests: Option<u64>,
}

/// A count: gateways write some as `12.0`.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number: Option<serde_json::Number> = lenient(deserializer)?;
    let count = number.and_then(|n| n.as_u64().or_else(|| n.as_f64().map(|f| f.max(0.0).ceil() as u64)));
    Ok(count.map(|count| count.min(MAX_COUNT)))
}
