//! Amounts of US dollars, exact to a billionth.

use std::{fmt, iter::Sum, ops::Add, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Billionths of a US dollar. Written as a decimal string (`"0.012345"`), because JSON numbers lose digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NanoUsd(pub u64);

/// A string that is not an amount: digits, at most one point, at most nine digits behind it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("failed to read {0:?} as an amount in US dollars, such as \"2.50\"")]
pub struct NotAnAmount(pub String);

const NANOS: u64 = 1_000_000_000;

impl NanoUsd {
    /// `self + other`, at most the largest amount.
    #[must_use]
    pub fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// `self - other`, at least nothing.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for NanoUsd {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.saturating_add(other)
    }
}

impl Sum for NanoUsd {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self(0), Self::saturating_add)
    }
}

impl fmt::Display for NanoUsd {
    /// Rounded up to a millionth: what is shown never understates what was spent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.div_ceil(1_000);
        let (dollars, rest) = (micros / 1_000_000, micros % 1_000_000);
        let digits = format!("{rest:06}");
        let digits = digits.trim_end_matches('0');
        write!(f, "{dollars}.{digits:0<2}")
    }
}

impl FromStr for NanoUsd {
    type Err = NotAnAmount;

    fn from_str(text: &str) -> Result<Self, NotAnAmount> {
        let refuse = || NotAnAmount(text.to_owned());
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty()
            || !digits(whole)
            || !digits(part)
            || part.len() > 9
            || (text.contains('.') && part.is_empty())
        {
            return Err(refuse());
        }
        let whole: u64 = whole.parse().map_err(|_| refuse())?;
        let part: u64 = format!("{part:0<9}").parse().map_err(|_| refuse())?;
        whole
            .checked_mul(NANOS)
            .and_then(|nanos| nanos.checked_add(part))
            .map(Self)
            .ok_or_else(refuse)
    }
}

impl Serialize for NanoUsd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (whole, part) = (self.0 / NANOS, self.0 % NANOS);
        let part = format!("{part:09}");
        let part = part.trim_end_matches('0');
        serializer.collect_str(&format_args!("{whole}.{part:0<2}"))
    }
}

impl<'de> Deserialize<'de> for NanoUsd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("0", 0)]
    #[case("2.50", 2_500_000_000)]
    #[case("0.000000001", 1)]
    fn an_amount_is_read(#[case] text: &str, #[case] nanos: u64) {
        assert_eq!(text.parse(), Ok(NanoUsd(nanos)));
    }

    #[rstest]
    #[case("")]
    #[case("-1")]
    #[case("1.")]
    #[case(".5")]
    #[case("1e3")]
    #[case("1.0000000001")]
    #[case("99999999999999999999")]
    fn what_is_not_an_amount_is_refused(#[case] text: &str) {
        assert_eq!(text.parse::<NanoUsd>(), Err(NotAnAmount(text.to_owned())));
    }

    #[rstest]
    #[case(0, "0.00")]
    #[case(1, "0.000001")]
    #[case(1_500_000_000, "1.50")]
    #[case(10_720_000, "0.01072")]
    fn an_amount_is_shown_rounded_up(#[case] nanos: u64, #[case] shown: &str) {
        assert_eq!(NanoUsd(nanos).to_string(), shown);
    }

    proptest! {
        #[test]
        fn json_keeps_every_digit(nanos: u64) {
            let json = serde_json::to_string(&NanoUsd(nanos)).unwrap();
            prop_assert_eq!(serde_json::from_str::<NanoUsd>(&json).unwrap(), NanoUsd(nanos));
        }
    }
}
