//! What to look for, given a value that is held.

use secrecy::ExposeSecret as _;
use serde_json::Value;

use super::Held;

/// Fewest bytes of a value whose name says that it is a credential.
const MIN_CREDENTIAL: usize = 8;
/// Fewest bytes of any other value.
const MIN_ORDINARY: usize = 16;
/// Fewest bytes of a line of a key of many lines.
const MIN_LINE: usize = 24;

/// Parts of names of credentials.
const CREDENTIAL: [&str; 8] = [
    "TOKEN",
    "KEY",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "CREDENTIAL",
    "PRIVATE",
    "AUTH",
];

/// Ends of names of values that are no secrets, however long, and that a user needs to see.
const PUBLIC: [&str; 9] = [
    "_URL",
    "_HOST",
    "_ENDPOINT",
    "_REGION",
    "_MODEL",
    "_ENABLED",
    "_PROJECT",
    "_PROJECT_ID",
    "_LOCATION",
];

/// A text to look for.
pub struct Needle {
    text: String,
    label: String,
}

impl Needle {
    /// What it looks like inside a JSON string, and inside one in a JSON string, with what takes its place.
    pub fn in_json(&self) -> impl Iterator<Item = (String, String)> {
        let once = escaped(&self.text);
        let twice = escaped(&once);
        let forms = if once == twice { vec![once] } else { vec![once, twice] };
        forms.into_iter().map(|form| (form, self.label.clone()))
    }

    /// What it looks like in a plain text, and in a JSON string in one.
    pub fn in_text(&self) -> impl Iterator<Item = (String, String)> {
        let once = escaped(&self.text);
        let forms = if once == self.text {
            vec![once]
        } else {
            vec![self.text.clone(), once]
        };
        forms.into_iter().map(|form| (form, self.label.clone()))
    }
}

/// A text as it stands between the quotes of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// What to look for of a held value.
pub fn of(held: &Held) -> Vec<Needle> {
    let name: String = held
        .name
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
        .collect();
    let label = format!("[redacted {name}]");
    let mut texts = Vec::new();
    collect(&name, held.value.expose_secret(), &mut texts);
    texts.sort();
    texts.dedup();
    texts
        .into_iter()
        .map(|text| Needle {
            text,
            label: label.clone(),
        })
        .collect()
}

fn collect(name: &str, value: &str, texts: &mut Vec<String>) {
    // Secrets made from files often end in a line break.
    let value = value.trim();
    let upper = name.to_ascii_uppercase();
    if let Ok(url) = reqwest::Url::parse(value)
        && url.has_host()
    {
        texts.extend(url.password().filter(|p| p.len() >= MIN_CREDENTIAL).map(str::to_owned));
        return;
    }
    if let Ok(Value::Object(fields)) = serde_json::from_str(value) {
        // A service account and its kin: what counts in it has a name of its own.
        for (field, value) in &fields {
            if let Value::String(text) = value
                && is_credential(&field.to_ascii_uppercase())
            {
                collect(field, text, texts);
            }
        }
    }
    let min = if is_credential(&upper) {
        MIN_CREDENTIAL
    } else {
        MIN_ORDINARY
    };
    if value.len() < min || (!is_credential(&upper) && PUBLIC.iter().any(|end| upper.ends_with(end))) {
        return;
    }
    if value.contains('\n') {
        // Tools print files line by line: a line of a private key is as good as the whole.
        let lines = value.lines().map(str::trim);
        texts.extend(
            lines
                .filter(|line| line.len() >= MIN_LINE && !line.contains([' ', '"']) && !line.starts_with("-----"))
                .map(str::to_owned),
        );
    }
    texts.push(value.to_owned());
}

fn is_credential(upper: &str) -> bool {
    CREDENTIAL.iter().any(|part| upper.contains(part))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::trimmed("A_TOKEN", "fake-token-1\n", &["fake-token-1"])]
    #[case::password_of_a_url("A_URL", "https://me:fakefake@host/x", &["fakefake"])]
    #[case::no_password("A_TOKEN_URL", "https://host/a/long/path", &[])]
    #[case::lines_of_a_key(
        "SSH_PRIVATE_KEY",
        "-----BEGIN FAKE-----\nFAKEfakeFAKEfakeFAKEfake\nshort\n-----END FAKE-----",
        &["-----BEGIN FAKE-----\nFAKEfakeFAKEfakeFAKEfake\nshort\n-----END FAKE-----", "FAKEfakeFAKEfakeFAKEfake"],
    )]
    #[case::service_account(
        "GCP_JSON",
        r#"{"type":"service_account","private_key":"FAKE-private-key","n":1}"#,
        &["FAKE-private-key", r#"{"type":"service_account","private_key":"FAKE-private-key","n":1}"#],
    )]
    fn a_value_is_looked_for_in_every_form_it_may_take(
        #[case] name: &str,
        #[case] value: &str,
        #[case] expected: &[&str],
    ) {
        let held = Held {
            name: name.into(),
            value: value.into(),
        };
        let texts: Vec<String> = of(&held).into_iter().map(|needle| needle.text).collect();
        assert_eq!(texts, expected);
    }
}
