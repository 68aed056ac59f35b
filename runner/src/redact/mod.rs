//! Takes secrets out of what leaves the pod, at one place: before the spool.

mod delta;
mod known;
mod needles;
mod vault;

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, Input, MatchKind};
use secrecy::SecretString;

pub use self::delta::Deltas;
pub use self::vault::Vault;
use self::{
    known::{KNOWN, Known, Run},
    needles::Needle,
};

/// A value that the runner holds.
#[derive(Clone)]
pub struct Held {
    /// Name of the variable or file that it came in: says whether it is a credential, and stands in its place.
    pub name: String,
    /// The value.
    pub value: SecretString,
}

/// Knows what must not be seen: held values, and keys of the well-known shapes.
pub struct Redactor {
    json: Finder,
    text: Finder,
}

impl Default for Redactor {
    fn default() -> Self {
        Self::new([])
    }
}

impl Redactor {
    /// A redactor of these values and of keys of the well-known shapes.
    ///
    /// A value of a credential's name counts from 8 bytes, any other from 16: a Secret that holds `value` or `true` must
    /// not destroy every text. Of a URL only the password counts.
    pub fn new(held: impl IntoIterator<Item = Held>) -> Self {
        let needles: Vec<Needle> = held.into_iter().flat_map(|held| needles::of(&held)).collect();
        Self {
            json: Finder::new(needles.iter().flat_map(Needle::in_json)),
            text: Finder::new(needles.iter().flat_map(Needle::in_text)),
        }
    }

    /// A JSON text with the secrets inside its strings (keys too) replaced, also where a secret is written with escapes;
    /// every other byte is kept. Called for each record's body before it is spooled.
    pub fn json<'a>(&self, text: &'a str) -> Cow<'a, str> {
        utf8(text, self.json.replaced(text.as_bytes(), Some(Walker::default())))
    }

    /// Plain text with the secrets replaced: for stdout, the report and stderr lines.
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        utf8(text, self.text.replaced(text.as_bytes(), None))
    }

    /// Bytes with the secrets replaced: for a line of the CLI that is no JSON, before it is wrapped.
    pub fn bytes<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        self.text.replaced(bytes, None).map_or(Cow::Borrowed(bytes), Cow::Owned)
    }
}

/// What was UTF-8 stays so: only whole characters are replaced, by ASCII.
fn utf8(text: &str, replaced: Option<Vec<u8>>) -> Cow<'_, str> {
    replaced.map_or(Cow::Borrowed(text), |bytes| {
        Cow::Owned(String::from_utf8(bytes).unwrap_or_else(|broken| {
            let bytes = broken.into_bytes();
            String::from_utf8_lossy(&bytes).into_owned()
        }))
    })
}

/// What one pattern of the automaton stands for.
enum Target {
    Held {
        label: String,
    },
    /// Which of them, and its shape.
    Known(usize, &'static Known),
}

/// Where the runs end that each shape was looked for in; for one text, from its beginning to its end.
type Runs = [Run; KNOWN.len()];

/// Finds all secrets in one pass.
struct Finder {
    automaton: Option<AhoCorasick>,
    targets: Vec<Target>,
    /// The held values as they may look.
    forms: Vec<String>,
}

impl Finder {
    fn new(forms: impl Iterator<Item = (String, String)>) -> Self {
        let (mut patterns, mut targets) = (Vec::new(), Vec::new());
        for (form, label) in forms {
            patterns.push(form);
            targets.push(Target::Held { label });
        }
        let forms = patterns.clone();
        for (at, known) in KNOWN.iter().enumerate() {
            patterns.push(known.prefix.to_owned());
            targets.push(Target::Known(at, known));
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&patterns)
            .inspect_err(|error| tracing::error!(%error, "failed to prepare redaction"))
            .ok();
        Self {
            automaton,
            targets,
            forms,
        }
    }

    /// The next secret at or behind `at`: where it begins, where it ends, what takes its place.
    fn next(&self, bytes: &[u8], mut at: usize, runs: &mut Runs) -> Option<(usize, usize, &str)> {
        let automaton = self.automaton.as_ref()?;
        while let Some(found) = automaton.find(Input::new(bytes).range(at..)) {
            match &self.targets[found.pattern().as_usize()] {
                Target::Held { label } => return Some((found.start(), found.end(), label)),
                Target::Known(which, known) => {
                    if let Some(end) = known.end(bytes, found.end(), &mut runs[*which]) {
                        return Some((found.start(), end, "[redacted]"));
                    }
                }
            }
            at = found.start() + 1;
        }
        None
    }

    /// The bytes with secrets replaced; `None`: there are none. `walker` is given for JSON.
    fn replaced(&self, bytes: &[u8], mut walker: Option<Walker>) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let (mut at, mut copied) = (0, 0);
        let mut runs = Runs::default();
        while let Some((start, end, label)) = self.next(bytes, at, &mut runs) {
            let place = walker.as_mut().map_or(Place::Text, |walker| walker.place(bytes, start));
            if place == Place::Escape {
                at = start + 1;
                continue;
            }
            out.extend_from_slice(&bytes[copied..start]);
            if place == Place::Literal {
                // A number that reads like a secret: it stays one.
                out.extend(
                    bytes[start..end]
                        .iter()
                        .map(|b| if b.is_ascii_digit() { b'1' } else { *b }),
                );
            } else {
                out.extend_from_slice(label.as_bytes());
            }
            (at, copied) = (end, end);
        }
        (copied > 0).then(|| {
            out.extend_from_slice(&bytes[copied..]);
            out
        })
    }
}

/// Where in a JSON text a byte stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a string, at the start of a character.
    Text,
    /// In a string, inside an escape: what begins here is not what it looks like (`\n` is no `n`).
    Escape,
    /// Outside of strings.
    Literal,
}

/// Walks a valid JSON text, only as far as there are matches.
#[derive(Default)]
struct Walker {
    at: usize,
    inside: bool,
}

impl Walker {
    fn place(&mut self, bytes: &[u8], to: usize) -> Place {
        while self.at < to {
            let width = match (bytes[self.at], self.inside) {
                (b'"', inside) => {
                    self.inside = !inside;
                    1
                }
                (b'\\', true) if bytes.get(self.at + 1) == Some(&b'u') => 6,
                (b'\\', true) => 2,
                _ => 1,
            };
            self.at += width;
        }
        match (self.at == to, self.inside) {
            (false, _) => Place::Escape,
            (true, true) => Place::Text,
            (true, false) => Place::Literal,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn redactor(held: &[(&str, &str)]) -> Redactor {
        Redactor::new(held.iter().map(|(name, value)| Held {
            name: (*name).into(),
            value: (*value).into(),
        }))
    }

    #[test]
    fn a_text_without_secrets_is_not_copied() {
        let redactor = redactor(&[("API_TOKEN", "fake-token-1")]);
        assert!(matches!(redactor.json(r#"{"a":"b"}"#), Cow::Borrowed(_)));
        assert!(matches!(redactor.text("nothing here"), Cow::Borrowed(_)));
        assert!(matches!(redactor.bytes(b"\xff"), Cow::Borrowed(_)));
    }

    #[rstest]
    #[case::short("GREETING", "value", false)]
    #[case::short_credential("API_KEY", "value", false)]
    #[case::credential("API_KEY", "12345678", true)]
    #[case::ordinary_below_sixteen("GREETING", "fifteen bytes!!", false)]
    #[case::ordinary("GREETING", "sixteen bytes!!!", true)]
    #[case::address("ANTHROPIC_BASE_URL", "https://gateway.example.com/x", false)]
    #[case::region("VERTEX_REGION", "europe-west1-and-more", false)]
    fn a_value_counts_by_its_name_and_length(#[case] name: &str, #[case] value: &str, #[case] redacted: bool) {
        let text = format!("before {value} after");
        let expected = format!("before [redacted {name}] after");
        assert_eq!(
            redactor(&[(name, value)]).text(&text),
            if redacted { expected } else { text.clone() }
        );
    }

    #[test]
    fn a_value_with_escapes_is_found_in_json_also_in_json_within_json() {
        let secret = "line one \"quoted\"\\\nand a tab\t.";
        let redactor = redactor(&[("MY_SECRET", secret)]);
        let inner = json!({ "inner": secret }).to_string();
        let outer = json!({ "a": secret, "b": inner, secret: 1 }).to_string();
        let out = redactor.json(&outer).into_owned();
        let read: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(read["a"], "[redacted MY_SECRET]");
        assert_eq!(read["b"], r#"{"inner":"[redacted MY_SECRET]"}"#);
        assert_eq!(read["[redacted MY_SECRET]"], 1);
    }

    #[test]
    fn what_only_looks_like_a_secret_behind_an_escape_stays() {
        let redactor = redactor(&[("API_TOKEN", "nabcdefgh"), ("OTHER_TOKEN", "0041xyzxyz")]);
        let text = r#"{"a":"\nabcdefgh","b":"\u0041xyzxyz","c":"nabcdefgh"}"#;
        let expected = r#"{"a":"\nabcdefgh","b":"\u0041xyzxyz","c":"[redacted API_TOKEN]"}"#;
        assert_eq!(redactor.json(text), expected);
    }

    #[test]
    fn a_number_that_reads_like_a_secret_stays_a_number() {
        let redactor = redactor(&[("PIN_TOKEN", "1234567890.123456")]);
        let out = redactor
            .json(r#"{"n":1234567890.123456,"s":"1234567890.123456"}"#)
            .into_owned();
        assert_eq!(out, r#"{"n":1111111111.111111,"s":"[redacted PIN_TOKEN]"}"#);
    }

    #[rstest]
    #[case("sk-ant-api03-fakeFAKEfake_FAKE-00", true)]
    #[case("sk-ant-short", false)]
    #[case("ghp_000000000000000000000000000000000fake", true)]
    #[case("github_pat_00000000000000000fake_FAKE", true)]
    #[case("glpat-0000000000000000fake", true)]
    #[case("AKIAFAKEFAKEFAKE0000", true)]
    #[case("AKIAFAKEFAKEFAKE0000AndSoOnInABlob", false)]
    #[case("AKIAFAKEFAKEfakeFAKE", false)]
    #[case("Authorization: Bearer abcdefghijklmnopqrst0", true)]
    #[case("Bearer authentication-documentation", false)]
    #[case("eyJmYWtlIjoiZmFrZSJ9.eyJmYWtlIjoiZmFrZSJ9.ZmFrZQ", true)]
    #[case("eyJmYWtlIjoiZmFrZSJ9eyJmYWtlIjoiZmFrZSJ9ZmFrZQ", false)]
    fn keys_of_known_shapes_are_found_though_nobody_holds_them(#[case] text: &str, #[case] redacted: bool) {
        let quoted = json!({ "text": format!("\n{text}\n") }).to_string();
        let out = Redactor::default().json(&quoted).into_owned();
        assert_eq!(out != quoted, redacted, "{out}");
        assert!(serde_json::from_str::<Value>(&out).is_ok());
    }

    #[test]
    fn a_held_key_is_named_rather_than_guessed() {
        let key = "sk-ant-fake-0123456789abcdef";
        assert_eq!(
            redactor(&[("ANTHROPIC_API_KEY", key)]).text(&format!("{key}, {key}0")),
            "[redacted ANTHROPIC_API_KEY], [redacted ANTHROPIC_API_KEY]0"
        );
    }

    #[test]
    fn bytes_that_are_no_text_are_searched_all_the_same() {
        let redactor = redactor(&[("API_TOKEN", "fake-token-1")]);
        assert_eq!(
            &*redactor.bytes(b"\xfffake-token-1\xfe"),
            b"\xff[redacted API_TOKEN]\xfe"
        );
    }

    fn value() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            "[a-f\\\\\"\n\u{e9}0-9]{0,12}",
            Just("ab\"c\\d\ne".to_owned()),
            Just("say ab\"c\\d\ne twice ab\"c\\d\ne".to_owned()),
        ];
        let leaf = prop_oneof![
            text.prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            Just(Value::Null)
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec(("[a-f]{0,9}", inner), 0..6).prop_map(|pairs| pairs.into_iter().collect()),
            ]
        })
    }

    fn replaced(value: &Value, secret: &str) -> Value {
        match value {
            Value::String(text) => text.replace(secret, "[redacted A_TOKEN]").into(),
            Value::Array(values) => values.iter().map(|value| replaced(value, secret)).collect(),
            Value::Object(fields) => fields
                .iter()
                .map(|(key, value)| (key.replace(secret, "[redacted A_TOKEN]"), replaced(value, secret)))
                .collect(),
            other => other.clone(),
        }
    }

    /// A thread of its own would not help: the runner cannot go on before a line is redacted.
    #[rstest]
    #[case("eyJ")]
    #[case("eyJ.")]
    #[case("sk-ant-")]
    #[case("AKIA")]
    #[case("Bearer ")]
    fn a_long_run_of_beginnings_takes_no_longer_than_any_line(#[case] beginning: &str) {
        let text = beginning.repeat(1_000_000 / beginning.len());
        let begun = std::time::Instant::now();
        Redactor::default().text(&text);
        assert!(begun.elapsed().as_secs() < 30, "{:?}", begun.elapsed());
    }

    proptest! {
        #[test]
        fn redacted_json_is_the_json_of_the_redacted_strings(value in value()) {
            let secret = "ab\"c\\d\ne";
            let text = value.to_string();
            let out = redactor(&[("A_TOKEN", secret)]).json(&text).into_owned();
            let read: Value = serde_json::from_str(&out).unwrap();
            prop_assert_eq!(read, replaced(&value, secret));
        }
    }
}
