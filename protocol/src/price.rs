//! What a model's tokens cost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{NanoUsd, Usage};

/// Prices of one model, billionths of a US dollar per token (so 1,000 is one US dollar per million tokens).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Price {
    /// Tokens read anew.
    pub input: u64,
    /// Tokens written.
    pub output: u64,
    /// Tokens read from the prompt cache.
    pub cache_read: u64,
    /// Tokens written to the prompt cache (five minutes).
    pub cache_write: u64,
    /// Long prompts cost more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
}

/// A dearer price of long prompts: of everything in a response to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tier {
    /// Prompts of more tokens than this, cached ones included.
    pub above: u64,
    /// By which every price is multiplied.
    pub factor: u64,
}

/// What a response may cost beside its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Of the tokens written to the prompt cache, those kept for an hour: twice the price of input.
    pub hour_cache_writes: u64,
    /// Web searches that the API made.
    pub web_searches: u64,
}

/// A web search of the API: ten US dollars for a thousand.
const WEB_SEARCH: u64 = 10_000_000;

impl Price {
    /// What `usage` costs.
    pub fn of(&self, usage: &Usage) -> NanoUsd {
        self.with(usage, &Extras::default())
    }

    /// What `usage` costs together with `extras`.
    pub fn with(&self, usage: &Usage, extras: &Extras) -> NanoUsd {
        let Self {
            input,
            output,
            cache_read,
            cache_write,
            tier,
        } = *self;
        let prompt = usage.total().saturating_sub(usage.output_tokens);
        let factor = tier.map_or(1, |tier| if prompt > tier.above { tier.factor } else { 1 });
        let hour = extras.hour_cache_writes.min(usage.cache_creation_input_tokens);
        let times = |price: u64| price.saturating_mul(factor);
        [
            (usage.input_tokens, times(input)),
            (usage.output_tokens, times(output)),
            (usage.cache_read_input_tokens, times(cache_read)),
            (usage.cache_creation_input_tokens - hour, times(cache_write)),
            (hour, times(input).saturating_mul(2)),
            (extras.web_searches, WEB_SEARCH),
        ]
        .iter()
        .map(|(count, price)| NanoUsd(count.saturating_mul(*price)))
        .sum()
    }
}

const fn flat(input: u64, output: u64, cache_read: u64, cache_write: u64) -> Price {
    Price {
        input,
        output,
        cache_read,
        cache_write,
        tier: None,
    }
}

const OPUS_4: Price = flat(15_000, 75_000, 1_500, 18_750);
const OPUS_4_5: Price = flat(5_000, 25_000, 500, 6_250);
const SONNET_4: Price = flat(3_000, 15_000, 300, 3_750);
const FABLE_5: Price = flat(10_000, 50_000, 1_000, 12_500);
const FABLE_5_1: Price = flat(10_000, 50_000, 250, 12_500);
const FABLE_5_2: Price = flat(8_000, 40_000, 200, 10_000);

/// The models, by what is left of their names when provider and date are taken off.
const TABLE: &[(&str, Price)] = &[
    ("claude-opus-5-5", flat(4_000, 20_000, 200, 5_000)),
    ("claude-opus-5", OPUS_4_5),
    ("claude-opus-4-8", OPUS_4_5),
    ("claude-opus-4-7", OPUS_4_5),
    ("claude-opus-4-6", OPUS_4_5),
    ("claude-opus-4-5", OPUS_4_5),
    ("claude-opus-4-1", OPUS_4),
    ("claude-opus-4-0", OPUS_4),
    ("claude-opus-4", OPUS_4),
    ("claude-sonnet-5-5", flat(2_000, 10_000, 100, 2_500)),
    ("claude-sonnet-5", flat(2_000, 10_000, 200, 2_500)),
    ("claude-sonnet-4-6", SONNET_4),
    ("claude-sonnet-4-5", SONNET_4),
    ("claude-sonnet-4-0", SONNET_4),
    ("claude-sonnet-4", SONNET_4),
    ("claude-3-7-sonnet", SONNET_4),
    ("claude-3-5-sonnet", SONNET_4),
    (
        "claude-haiku-5-5",
        Price {
            tier: Some(Tier {
                above: 100_000,
                factor: 5,
            }),
            ..flat(100, 500, 10, 125)
        },
    ),
    ("claude-haiku-4-5", flat(1_000, 5_000, 100, 1_250)),
    ("claude-3-5-haiku", flat(800, 4_000, 80, 1_000)),
    ("claude-fable-5-2", FABLE_5_2),
    ("claude-fable-5-1", FABLE_5_1),
    ("claude-fable-5", FABLE_5),
    ("claude-mythos-5-2", FABLE_5_2),
    ("claude-mythos-5-1", FABLE_5_1),
    ("claude-mythos-5", FABLE_5),
];

/// The price of a model, by its API name with or without a date, a provider's prefix or Vertex' `@date`; `None` for a
/// model that the table does not have.
pub fn price(model: &str) -> Option<Price> {
    let name = plain(model);
    TABLE
        .iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known))
        .map(|(_, price)| *price)
}

/// The prices that hold for a session: the admin's before the table's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prices(BTreeMap<String, Price>);

/// Names that the CLI knows models by, and what they stand for.
const ALIASES: [(&str, &str); 6] = [
    ("default", "claude-opus-5-5"),
    ("opus", "claude-opus-5-5"),
    ("opusplan", "claude-opus-5-5"),
    ("sonnet", "claude-sonnet-5-5"),
    ("haiku", "claude-haiku-5-5"),
    ("fable", "claude-fable-5-2"),
];

impl Prices {
    /// The table, with these instead of or beside its own. A name holds as it is written, and for the spellings of
    /// [`price`].
    pub fn new(own: BTreeMap<String, Price>) -> Self {
        Self(own)
    }

    /// The price of a model, as the API or a gateway names it.
    pub fn of(&self, model: &str) -> Option<Price> {
        let own = |name: &str| {
            let mut known = self.0.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
            known.next().map(|(_, price)| *price)
        };
        own(model).or_else(|| own(plain(model))).or_else(|| price(model))
    }

    /// The price of a model as a session names it: the CLI's short names (`sonnet`, `opus[1m]`) are known too.
    pub fn of_setting(&self, model: &str) -> Option<Price> {
        let short = model.split('[').next().unwrap_or(model);
        let alias = ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(short));
        self.of(model).or_else(|| self.of(alias?.1))
    }
}

/// `eu.anthropic.claude-x-20250101-v1:0`, `anthropic/claude-x`, `claude-x@20250101`, `claude-x[1m]` → `claude-x`.
fn plain(model: &str) -> &str {
    let name = model.rsplit('/').next().unwrap_or(model);
    let name = name
        .rfind("anthropic.")
        .map_or(name, |at| &name[at + "anthropic.".len()..]);
    let name = name.split(['@', '[', ':']).next().unwrap_or(name);
    let name = ["-v1", "-v2", "-latest"]
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .unwrap_or(name);
    match name.rsplit_once('-') {
        Some((rest, date)) if date.len() == 8 && date.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("claude-sonnet-4-5", Some(3_000))]
    #[case("claude-sonnet-4-5-20250929", Some(3_000))]
    #[case("claude-sonnet-4-5@20250929", Some(3_000))]
    #[case("anthropic/claude-sonnet-4-5-20250929", Some(3_000))]
    #[case("vertex_ai/claude-sonnet-4-5@20250929", Some(3_000))]
    #[case("eu.anthropic.claude-sonnet-4-5-20250929-v1:0", Some(3_000))]
    #[case("claude-3-7-sonnet-latest", Some(3_000))]
    #[case("Claude-Opus-5-5[1m]", Some(4_000))]
    #[case("claude-opus-4-20250514", Some(15_000))]
    #[case("claude-opus-4-9", None)]
    #[case("claude-opus-5-5-fast", None)]
    #[case("claude-mythos-preview", None)]
    #[case("gpt-oss", None)]
    #[case("", None)]
    fn a_model_is_found_by_any_of_its_names_and_no_other(#[case] model: &str, #[case] input: Option<u64>) {
        assert_eq!(price(model).map(|price| price.input), input);
    }

    /// The first as the CLI itself priced it; the others on either side of a tier.
    #[rstest]
    #[case("claude-opus-5-5", 50, 103, 24_000, 600, 10_060_000)]
    #[case("claude-haiku-5-5", 50, 0, 99_950, 0, 1_004_500)]
    #[case("claude-haiku-5-5", 51, 0, 99_950, 0, 5_023_000)]
    fn a_response_costs_what_its_buckets_cost(
        #[case] model: &str,
        #[case] input_tokens: u64,
        #[case] output_tokens: u64,
        #[case] cache_read_input_tokens: u64,
        #[case] cache_creation_input_tokens: u64,
        #[case] nanos: u64,
    ) {
        let usage = Usage {
            input_tokens,
            output_tokens,
            cache_read_input_tokens,
            cache_creation_input_tokens,
        };
        assert_eq!(price(model).unwrap().of(&usage), NanoUsd(nanos));
    }

    #[rstest]
    #[case("claude-sonnet-4-5@20250929", Some(7))]
    #[case("our-own", Some(8))]
    #[case("OUR-OWN", Some(8))]
    #[case("claude-opus-5-5", Some(4_000))]
    #[case("somebody-elses", None)]
    fn the_admins_price_comes_before_the_tables(#[case] model: &str, #[case] input: Option<u64>) {
        let own = [("claude-sonnet-4-5", flat(7, 7, 7, 7)), ("our-own", flat(8, 8, 8, 8))];
        let prices = Prices::new(own.map(|(name, price)| (name.to_owned(), price)).into());
        assert_eq!(prices.of(model).map(|price| price.input), input);
    }

    #[rstest]
    #[case("opus[1m]", Some(4_000))]
    #[case("Haiku", Some(100))]
    #[case("claude-sonnet-5", Some(2_000))]
    #[case("gpt-oss", None)]
    fn a_session_may_name_a_model_as_the_cli_does(#[case] model: &str, #[case] input: Option<u64>) {
        let prices = Prices::default();
        assert_eq!(prices.of_setting(model).map(|price| price.input), input);
        assert!(prices.of("opus").is_none(), "the API knows no such name");
    }

    #[test]
    fn a_price_beyond_all_measure_does_not_overflow() {
        let dear = Price {
            tier: Some(Tier {
                above: 1,
                factor: u64::MAX,
            }),
            ..flat(u64::MAX, u64::MAX, u64::MAX, u64::MAX)
        };
        let usage = Usage {
            input_tokens: u64::MAX,
            output_tokens: 5,
            ..Usage::default()
        };
        assert_eq!(dear.of(&usage), NanoUsd(u64::MAX));
    }

    #[test]
    fn an_hour_in_the_cache_and_a_search_cost_extra() {
        let usage = Usage {
            cache_creation_input_tokens: 300,
            ..Usage::default()
        };
        let extras = Extras {
            hour_cache_writes: 100,
            web_searches: 1,
        };
        let cost = price("claude-opus-5-5").unwrap().with(&usage, &extras);
        assert_eq!(cost, NanoUsd(200 * 5_000 + 100 * 8_000 + 10_000_000));
    }
}
