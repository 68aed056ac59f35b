//! Reading what others write: a value of another kind than usual hides nothing but itself.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Reads null, and what is of another kind, as what is absent; a number with a fraction, where there should be none, as the
/// next whole one. Needs JSON that is read as it stands: nothing within an untagged enum or a flattened field.
pub fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    let value = Box::<RawValue>::deserialize(deserializer)?;
    Ok(read(value.get()).unwrap_or_default())
}

fn read<T: DeserializeOwned>(value: &str) -> Option<T> {
    let rounded = || {
        let number: f64 = serde_json::from_str(value).ok()?;
        serde_json::from_str(&format!("{:.0}", number.round())).ok()
    };
    serde_json::from_str(value).ok().or_else(rounded)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("7", 7)]
    #[case("7.0", 7)]
    #[case("12.5", 13)]
    #[case("1.2e1", 12)]
    #[case("-1", 0)]
    #[case("-0.2", 0)]
    #[case("1e300", 0)]
    #[case("1e400", 0)]
    #[case("null", 0)]
    #[case("\"7\"", 0)]
    #[case("true", 0)]
    #[case("[7]", 0)]
    fn a_count_is_read_as_far_as_it_is_one(#[case] value: &str, #[case] expected: u16) {
        #[derive(Deserialize)]
        struct Line {
            #[serde(deserialize_with = "lenient")]
            count: u16,
            #[serde(deserialize_with = "lenient")]
            perhaps: Option<u16>,
            #[serde(deserialize_with = "lenient")]
            text: String,
        }
        let text = format!(r#"{{"count":{value},"perhaps":{value},"text":["x"]}}"#);
        let of_text: Line = serde_json::from_str(&text).unwrap();
        let of_reader: Line = serde_json::from_reader(text.as_bytes()).unwrap();
        for line in [of_text, of_reader] {
            assert_eq!(
                (line.count, line.perhaps.unwrap_or(0), line.text.as_str()),
                (expected, expected, "")
            );
        }
    }
}
