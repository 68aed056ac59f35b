//! Quantities of Kubernetes (`500m`, `4Gi`, `1e3`) as numbers, to be compared.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

const NANO: i128 = 1_000_000_000;

/// Billionths of the unit; `None` for what is no quantity.
pub fn nanos(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (factor, divisor) = scale(suffix)?;
    let (sign, number) = match number.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && part.is_empty()) || !(whole.bytes().chain(part.bytes())).all(|b| b.is_ascii_digit()) {
        return None;
    }
    // More than nine digits behind the point are less than a billionth.
    let part: String = format!("{part:0<9}").chars().take(9).collect();
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let value = whole.checked_mul(NANO)?.checked_add(part.parse().ok()?)?;
    Some(sign * value.checked_mul(factor)? / divisor)
}

fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| (1_i128 << (10 * power), 1);
    let decimal = |power: u32| (10_i128.pow(power), 1);
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, NANO),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    })
}

/// Whether an amount is 0 or less, or none at all.
pub fn is_nothing(amount: &Quantity) -> bool {
    nanos(amount).is_none_or(|nanos| nanos <= 0)
}

/// Whether `one` is more than `other`. What cannot be read is more than anything: the API server would refuse it.
pub fn exceeds(one: &Quantity, other: &Quantity) -> bool {
    match (nanos(one), nanos(other)) {
        (Some(one), Some(other)) => one > other,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1", 1_000_000_000)]
    #[case("500m", 500_000_000)]
    #[case("0.5", 500_000_000)]
    #[case(".5", 500_000_000)]
    #[case("-1", -1_000_000_000)]
    #[case("1e3", 1_000_000_000_000)]
    #[case("1E-3", 1_000_000)]
    #[case("4Gi", 4_294_967_296_000_000_000)]
    #[case("1.5Ki", 1_536_000_000_000)]
    #[case("2E", 2_000_000_000_000_000_000_000_000_000)]
    #[case("7n", 7)]
    fn quantities_are_numbers(#[case] text: &str, #[case] expected: i128) {
        assert_eq!(nanos(&Quantity(text.into())), Some(expected));
    }

    #[rstest]
    #[case("")]
    #[case("Gi")]
    #[case("1Xi")]
    #[case("1e99999")]
    #[case("1.2.3")]
    #[case("99999999999999999999999999999999999999Ei")]
    fn what_is_none_is_none(#[case] text: &str) {
        assert_eq!(nanos(&Quantity(text.into())), None);
        assert!(exceeds(&Quantity(text.into()), &Quantity("1Ei".into())));
    }
}
