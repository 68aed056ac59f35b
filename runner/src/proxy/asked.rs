//! What the meter must know of a request before it is forwarded: what it may cost at most.

use std::fmt;

use protocol::{NanoUsd, Usage, price::Prices};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::limits::{Amount, Limits};

/// Bytes of a request that stand for a token of its prompt.
const BYTES_PER_TOKEN: u64 = 3;
/// Tokens that no answer has more of, whatever was asked for.
const LONGEST_ANSWER: u64 = 1_000_000;

/// A model call's request, as far as it costs something. A field that is there twice is refused: the API might read the
/// other one.
#[derive(Debug, Default, Deserialize)]
pub struct Asked {
    /// The model; on Vertex it is in the path.
    #[serde(default)]
    pub model: String,
    #[serde(default, deserialize_with = "whole")]
    max_tokens: Option<u64>,
    #[serde(default)]
    tools: Vec<Tool>,
    /// Fast answers are dearer by a factor that the price table does not have; so are the next ones.
    speed: Option<Word>,
    service_tier: Option<Word>,
    inference_geo: Option<Word>,
    container: Option<Any>,
    mcp_servers: Option<Any>,
    stream: Option<serde_json::Value>,
    #[serde(default)]
    messages: Reaching,
    #[serde(default)]
    system: Reaching,
    /// Bytes of the request.
    #[serde(skip)]
    size: u64,
}

/// Why a request is not forwarded while a limit holds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It cannot be metered.
    #[error("the request is no JSON object that the meter can read: {0}")]
    Unreadable(String),
    /// There is no price for the model.
    #[error(
        "the session has a maxCostUSD, and there is no price for the model {0:?}: take another model, or have the \
         administrator add its price to ProjectSettings"
    )]
    NoPrice(String),
    /// There is no price for something that was asked for.
    #[error("the session has a maxCostUSD, and there is no price for {0}: ask without it")]
    NoPriceFor(&'static str),
}

impl Asked {
    /// Reads a request's body.
    pub fn read(body: &[u8]) -> Result<Self, Refused> {
        let asked: Self = serde_json::from_slice(body).map_err(|error| Refused::Unreadable(error.to_string()))?;
        Ok(Self {
            size: body.len() as u64,
            ..asked
        })
    }

    /// Whether the price of the tokens is the price of the whole.
    pub fn unpriced_feature(&self) -> Option<&'static str> {
        let is =
            |word: &Option<Word>, usual: &[&str]| word.as_ref().is_none_or(|word| usual.contains(&word.0.as_str()));
        if !is(&self.speed, &["", "standard"]) {
            return Some("fast answers (`speed`)");
        }
        if !is(&self.service_tier, &["", "auto", "standard", "standard_only"]) {
            return Some("this `service_tier`");
        }
        if !is(&self.inference_geo, &["", "global"]) {
            return Some("a region of inference (`inference_geo`)");
        }
        if self.container.is_some() || self.tools.iter().any(Tool::runs_code) {
            return Some("code execution on the API's side");
        }
        self.mcp_servers.is_some().then_some("MCP servers on the API's side")
    }

    /// Whether the request may be forwarded under these limits.
    pub fn allowed(&self, limits: &Limits, prices: &Prices) -> Result<(), Refused> {
        if limits.cost.is_none() {
            return Ok(());
        }
        if prices.of(&self.model).is_none() {
            return Err(Refused::NoPrice(self.model.clone()));
        }
        self.unpriced_feature()
            .map_or(Ok(()), |feature| Err(Refused::NoPriceFor(feature)))
    }

    /// What the request may cost at most: its body as input, `max_tokens` as output. A request whose prompt the API fetches
    /// from elsewhere, or that does not bound its answer, may cost anything.
    pub fn reservation(&self, prices: &Prices) -> Amount {
        let fetches = self.messages.0 || self.system.0 || self.tools.iter().any(Tool::fetches);
        match self.max_tokens {
            Some(output) if !fetches => self.amount(output, prices),
            _ => Amount::UNBOUNDED,
        }
    }

    /// Whether the answer comes as it is made.
    pub fn streams(&self) -> bool {
        self.stream.as_ref().is_some_and(|value| *value == true)
    }

    /// What an API may have done for a request whose answer nobody waits for: the prompt was read, and an answer that does not
    /// stream is made before its first byte comes.
    pub fn given_up(&self) -> Usage {
        Usage {
            input_tokens: self.size / BYTES_PER_TOKEN,
            output_tokens: self
                .max_tokens
                .filter(|_| !self.streams())
                .map_or(0, |most| most.min(LONGEST_ANSWER)),
            ..Usage::default()
        }
    }

    /// What the request costs at least, as far as can be told from it.
    pub fn prompt(&self, prices: &Prices) -> Amount {
        self.amount(0, prices)
    }

    fn amount(&self, output: u64, prices: &Prices) -> Amount {
        let usage = Usage {
            input_tokens: self.size / BYTES_PER_TOKEN,
            output_tokens: output,
            ..Usage::default()
        };
        let cost = prices.of(&self.model).map_or(NanoUsd(0), |price| price.of(&usage));
        Amount {
            cost,
            tokens: usage.input_tokens.saturating_add(output),
        }
    }
}

/// A count, which some clients write as `100.0`.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(deserializer)?;
    Ok(number.and_then(|n| n.as_u64().or_else(|| n.as_f64().map(|f| f.max(0.0).ceil() as u64))))
}

/// A tool. Those that the API runs itself have a type with a date.
#[derive(Debug, Deserialize)]
struct Tool {
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

impl Tool {
    fn is(&self, begin: &str) -> bool {
        self.kind.as_deref().is_some_and(|kind| kind.starts_with(begin))
    }

    fn runs_code(&self) -> bool {
        self.is("code_execution")
    }

    /// What it finds becomes part of the prompt.
    fn fetches(&self) -> bool {
        self.is("web_")
    }
}

/// A setting; one that is no string is an unusual one.
#[derive(Debug)]
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Ok(Self(value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
    }
}

/// Anything but null.
#[derive(Debug)]
struct Any;

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

/// Whether something within names what the API would fetch: a `type` of `url` or `file`, at any depth.
#[derive(Clone, Copy, Debug, Default)]
struct Reaching(bool);

impl<'de> Deserialize<'de> for Reaching {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(Walk)
            .map(|found| Self(found == Found::Inside))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// This very string.
    Word,
    /// Somewhere below.
    Inside,
}

impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Walk)
    }
}

struct Walk;

impl<'de> Visitor<'de> for Walk {
    type Value = Found;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_str<E>(self, text: &str) -> Result<Found, E> {
        Ok(if matches!(text, "url" | "file") {
            Found::Word
        } else {
            Found::Nothing
        })
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
        Ok(Found::Nothing)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found, E> {
        Ok(Found::Nothing)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found, E> {
        Ok(Found::Nothing)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found, E> {
        Ok(Found::Nothing)
    }

    fn visit_unit<E>(self) -> Result<Found, E> {
        Ok(Found::Nothing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Found, A::Error> {
        let mut found = Found::Nothing;
        while let Some(next) = seq.next_element::<Found>()? {
            if next == Found::Inside {
                found = Found::Inside;
            }
        }
        Ok(found)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Found::Nothing;
        while let Some((key, value)) = map.next_entry::<std::borrow::Cow<'de, str>, Found>()? {
            if value == Found::Inside || (value == Found::Word && key == "type") {
                found = Found::Inside;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn read(body: &str) -> Asked {
        Asked::read(body.as_bytes()).unwrap()
    }

    #[test]
    fn a_request_may_cost_its_body_and_the_longest_answer() {
        let body = r#"{"model":"claude-opus-5-5","max_tokens":100,"messages":[{"role":"user","content":"hi"}]}"#;
        let want = read(body).reservation(&Prices::default());
        let input = body.len() as u64 / 3;
        assert_eq!(want.tokens, input + 100);
        assert_eq!(want.cost, NanoUsd(input * 4_000 + 100 * 20_000));
    }

    #[rstest]
    #[case::no_bound(r#"{"model":"m","messages":[]}"#)]
    #[case::a_page(r#"{"max_tokens":1,"messages":[{"content":[{"source":{"type":"url","url":"https://x"}}]}]}"#)]
    #[case::a_file(r#"{"max_tokens":1,"system":[{"source":{"file_id":"f","type":"file"}}]}"#)]
    #[case::a_search(r#"{"max_tokens":1,"tools":[{"type":"web_search_20250305","name":"web_search"}]}"#)]
    fn a_request_that_does_not_say_how_much_it_reads_may_cost_anything(#[case] body: &str) {
        assert_eq!(read(body).reservation(&Prices::default()), Amount::UNBOUNDED);
    }

    #[test]
    fn words_in_a_text_fetch_nothing() {
        let body = r#"{"max_tokens":100.0,"messages":[{"content":"url"},{"content":[{"type":"text","text":"file"}]}]}"#;
        assert_eq!(
            read(body).reservation(&Prices::default()).tokens,
            body.len() as u64 / 3 + 100
        );
    }

    #[rstest]
    #[case::twice(r#"{"max_tokens":1,"max_tokens":1000000}"#)]
    #[case::twice_by_an_escape("{\"max_tokens\":1,\"max_\\u0074okens\":1000000}")]
    #[case::twice_below(r#"{"tools":[{"type":"custom","type":"web_search_20250305"}]}"#)]
    #[case::text(r#"{"max_tokens":"1000000"}"#)]
    #[case::list("[]")]
    #[case::two("{} {}")]
    #[case::nothing("")]
    fn a_request_that_may_be_read_in_two_ways_is_refused(#[case] body: &str) {
        assert!(
            matches!(Asked::read(body.as_bytes()), Err(Refused::Unreadable(_))),
            "{body}"
        );
    }

    #[rstest]
    #[case(r#"{"model":"claude-opus-5-5"}"#, true)]
    #[case(r#"{"model":"claude-opus-5-5","speed":null,"service_tier":"auto"}"#, true)]
    #[case(r#"{"model":"claude-opus-5-5","speed":"fast"}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","speed":["fast"]}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","service_tier":"priority"}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","inference_geo":"us"}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","container":{}}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","mcp_servers":[]}"#, false)]
    #[case(r#"{"model":"claude-opus-5-5","tools":[{"type":"code_execution_20250825"}]}"#, false)]
    #[case(r#"{"model":"gpt-oss"}"#, false)]
    fn what_has_no_price_is_refused_only_while_dollars_are_limited(#[case] body: &str, #[case] priced: bool) {
        let asked = read(body);
        let limited = Limits {
            cost: Some(NanoUsd(1)),
            tokens: None,
        };
        assert_eq!(asked.allowed(&limited, &Prices::default()).is_ok(), priced);
        assert!(asked.allowed(&Limits::default(), &Prices::default()).is_ok());
    }
}
