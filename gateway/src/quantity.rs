//! Sizes and times as people write them in flags.

/// Bytes; `None` for `0`, which means no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub Option<u64>);

/// Seconds; `None` for `0`, which means no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds(pub Option<u64>);

/// `5Gi`, `500M`, `1000`: as Kubernetes writes quantities.
pub fn bytes(text: &str) -> Result<Bytes, String> {
    let units = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("", 1),
    ];
    let number = parse(text, &units).ok_or_else(|| format!("{text:?} is no size: write it as 500Mi, 4Gi or 0"))?;
    Ok(Bytes((number > 0).then_some(number)))
}

/// `90d`, `12h`, `30m`, `45s`.
pub fn seconds(text: &str) -> Result<Seconds, String> {
    let units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1), ("", 1)];
    let number = parse(text, &units).ok_or_else(|| format!("{text:?} is no time: write it as 90d, 12h, 30m or 0"))?;
    Ok(Seconds((number > 0).then_some(number)))
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = units
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))?;
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(*unit)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("4Gi", Some(4 << 30))]
    #[case("500M", Some(500_000_000))]
    #[case("17", Some(17))]
    #[case("0", None)]
    fn sizes_are_written_as_in_kubernetes(#[case] text: &str, #[case] expected: Option<u64>) {
        assert_eq!(bytes(text), Ok(Bytes(expected)));
    }

    #[rstest]
    #[case("90d", Some(7_776_000))]
    #[case("12h", Some(43_200))]
    #[case("0", None)]
    fn times_have_a_unit(#[case] text: &str, #[case] expected: Option<u64>) {
        assert_eq!(seconds(text), Ok(Seconds(expected)));
    }

    #[rstest]
    #[case("")]
    #[case("Gi")]
    #[case("-1Gi")]
    #[case("+1")]
    #[case("1.5Gi")]
    #[case("4GiB")]
    #[case("99999999999Ti")]
    fn what_is_no_quantity_is_refused(#[case] text: &str) {
        assert!(bytes(text).is_err() && seconds(text).is_err());
    }
}
