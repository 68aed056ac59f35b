//! The meter: what one response says of its tokens, while it streams by or as a whole.

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
                self.first_token_at.get_or_insert(now);
                self.seen(event.length.saturating_sub(DELTA_ENVELOPE));
                Step::Nothing
            }
            "message_delta" => {
                if let Ok(delta) = serde_json::from_slice::<Delta>(&event.data)
                    && let Some(usage) = delta.usage
                {
                    self.take(&usage);
                    self.is_final |= usage.output_tokens.is_some();
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
        self.first_token_at.get_or_insert(now);
        if let Ok(message) = serde_json::from_reader::<_, Message>(encoding.text(body)) {
            self.is_final = message.usage.is_some();
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
        self.body(usage, Some(now))
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

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    id: String,
    #[serde(default)]
    model: String,
    usage: Option<Told>,
}

#[derive(Deserialize)]
struct Delta {
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
    cache_creation: Option<CacheCreation>,
    server_tool_use: Option<ServerToolUse>,
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
    let number = Option::<serde_json::Number>::deserialize(deserializer)?;
    let count = number.and_then(|n| n.as_u64().or_else(|| n.as_f64().map(|f| f.max(0.0).ceil() as u64)));
    Ok(count.map(|count| count.min(MAX_COUNT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> Meter {
        let asked = Asked::read(br#"{"model":"asked","max_tokens":100}"#).unwrap();
        Meter::new(asked, Arc::default(), at(1))
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn event(name: &str, data: &str) -> Event {
        Event {
            name: name.into(),
            data: data.into(),
            length: data.len(),
        }
    }

    const START: &str = r#"{"type":"message_start","message":{"id":"msg_1","model":"some-model","usage":
        {"input_tokens":25,"cache_read_input_tokens":12000,"cache_creation_input_tokens":300,"output_tokens":1}}}"#;

    #[test]
    fn a_stream_tells_its_start_its_first_token_and_its_numbers() {
        let mut meter = meter();
        assert_eq!(meter.event(&event("message_start", START), at(2)), Step::Opened);
        let opening = meter.opening();
        assert!(opening.open && !opening.estimated && opening.ended_at.is_none());
        assert_eq!(
            (opening.message_id.as_str(), opening.model.as_str()),
            ("msg_1", "some-model")
        );
        assert_eq!(meter.event(&event("content_block_start", "{}"), at(3)), Step::Nothing);
        assert_eq!(meter.event(&event("content_block_delta", "{}"), at(4)), Step::Nothing);
        let delta = r#"{"usage":{"input_tokens":0,"cache_read_input_tokens":null,"output_tokens":90.0}}"#;
        assert_eq!(meter.event(&event("message_delta", delta), at(5)), Step::Nothing);
        assert_eq!(meter.event(&event("message_stop", "{}"), at(5)), Step::Ended);
        let closing = meter.closing(at(6));
        assert_eq!(
            closing.usage,
            Usage {
                input_tokens: 25,
                output_tokens: 90,
                cache_read_input_tokens: 12000,
                cache_creation_input_tokens: 300
            }
        );
        assert!(!closing.open && !closing.estimated);
        assert_eq!(
            (closing.started_at, closing.first_token_at, closing.ended_at),
            (at(1), Some(at(3)), Some(at(6)))
        );
    }

    #[test]
    fn a_cut_stream_is_closed_with_an_estimate_from_the_bytes_seen() {
        let mut meter = meter();
        meter.event(&event("message_start", START), at(2));
        let delta = Event {
            length: DELTA_ENVELOPE + 300,
            ..event("content_block_delta", "")
        };
        meter.event(&delta, at(3));
        let closing = meter.closing(at(4));
        assert!(closing.estimated);
        assert_eq!((closing.usage.input_tokens, closing.usage.output_tokens), (25, 100));
    }

    #[test]
    fn events_without_a_name_are_told_by_their_type() {
        let mut meter = meter();
        assert_eq!(meter.event(&event("", START), at(2)), Step::Opened);
        assert_eq!(
            meter.event(&event("", r#"{"type":"message_stop"}"#), at(2)),
            Step::Ended
        );
    }

    #[test]
    fn an_error_in_the_stream_stands_for_its_status() {
        let mut meter = meter();
        let overloaded = r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#;
        assert_eq!(meter.event(&event("error", overloaded), at(2)), Step::Failed(529));
    }

    #[test]
    fn a_start_that_cannot_be_read_is_metered_by_its_bytes() {
        let mut meter = meter();
        assert_eq!(meter.event(&event("message_start", "oops"), at(2)), Step::Opened);
        meter.seen(30);
        let closing = meter.closing(at(3));
        assert!(closing.message_id.starts_with("cut-") && closing.estimated);
        assert_eq!((closing.model.as_str(), closing.usage.output_tokens), ("asked", 10));
        assert_eq!(
            closing.message_id,
            meter.opening().message_id,
            "one id for both records"
        );
    }

    #[test]
    fn a_response_in_an_unknown_name_costs_what_was_asked_for() {
        let asked = Asked::read(br#"{"model":"claude-opus-5-5","max_tokens":100}"#).unwrap();
        let mut meter = Meter::new(asked, Arc::default(), at(1));
        meter.whole(
            br#"{"id":"m","model":"our-alias","usage":{"output_tokens":7}}"#,
            Encoding::Plain,
            at(2),
        );
        let closing = meter.closing(at(2));
        assert_eq!(
            (closing.model.as_str(), closing.cost_usd),
            ("our-alias", Some(NanoUsd(140_000)))
        );
    }

    #[test]
    fn counts_that_nothing_can_have_are_cut() {
        let mut meter = meter();
        meter.whole(
            br#"{"id":"m","usage":{"output_tokens":18446744073709551615,"input_tokens":-5,"cache_read_input_tokens":1e300}}"#,
            Encoding::Plain,
            at(2),
        );
        let Usage {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            ..
        } = meter.closing(at(2)).usage;
        assert_eq!(
            (input_tokens, output_tokens, cache_read_input_tokens),
            (0, MAX_COUNT, MAX_COUNT)
        );
    }

    #[test]
    fn an_answer_that_nobody_waited_for_is_no_longer_than_an_answer_can_be() {
        let asked = Asked::read(br#"{"model":"m","max_tokens":18446744073709551615}"#).unwrap();
        let mut meter = Meter::new(asked, Arc::default(), at(1));
        meter.given_up();
        assert_eq!(meter.closing(at(2)).usage.output_tokens, 1_000_000);
    }

    #[test]
    fn a_whole_response_is_read_at_once() {
        let mut meter = meter();
        meter.whole(
            br#"{"usage":{"output_tokens":7,"input_tokens":3},"id":"msg_2","model":"m","content":[]}"#,
            Encoding::Plain,
            at(2),
        );
        let closing = meter.closing(at(2));
        assert!(!closing.estimated);
        assert_eq!((closing.message_id.as_str(), closing.usage.output_tokens), ("msg_2", 7));
    }

    fn packed(text: &[u8]) -> Vec<u8> {
        use std::io::Write as _;

        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(text).unwrap();
        gzip.finish().unwrap()
    }

    #[test]
    fn a_packed_response_is_read_as_one_that_is_not() {
        let mut meter = meter();
        let text = br#"{"usage":{"output_tokens":7,"input_tokens":3},"id":"msg_2","model":"m","content":[]}"#;
        meter.whole(&packed(text), Encoding::Gzip, at(2));
        let closing = meter.closing(at(2));
        assert!(!closing.estimated);
        assert_eq!((closing.message_id.as_str(), closing.usage.output_tokens), ("msg_2", 7));
    }

    #[test]
    fn a_response_is_unpacked_so_far_and_metered_by_that() {
        let mut meter = meter();
        meter.whole(&packed(&vec![b'x'; 65 << 20]), Encoding::Gzip, at(2));
        assert_eq!(meter.closing(at(2)).usage.output_tokens, (64_u64 << 20).div_ceil(3));
    }

    #[test]
    fn what_is_not_packed_as_it_is_said_to_be_is_metered_by_its_bytes() {
        let mut meter = meter();
        meter.whole(&[b'x'; 300], Encoding::Gzip, at(2));
        assert_eq!(meter.closing(at(2)).usage.output_tokens, 100);
    }

    #[test]
    fn a_second_start_in_a_response_is_none() {
        let mut meter = meter();
        meter.event(&event("message_start", START), at(2));
        let again = START.replace("msg_1", "msg_2");
        assert_eq!(meter.event(&event("message_start", &again), at(2)), Step::Nothing);
        assert_eq!(meter.closing(at(3)).message_id, "msg_1");
    }
}
