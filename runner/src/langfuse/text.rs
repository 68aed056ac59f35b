//! Texts as they stand in a span: bounded, and masked when asked.

use serde_json::Value;

/// Most characters of an input or output.
pub const CAP: usize = 20_000;
/// Most characters of a status message.
pub const STATUS_CAP: usize = 500;
/// What a masked text reads.
pub const MASK: &str = "[REDACTED]";

/// A text of at most `cap` characters: its beginning, and a quarter of its end, because both tell what it was.
pub fn cut(text: &str, cap: usize) -> String {
    let length = text.chars().count();
    if length <= cap {
        return text.to_owned();
    }
    let note = format!("\n[… {length} characters in all …]\n");
    let room = cap.saturating_sub(note.chars().count());
    let tail = room / 4;
    let head: String = text.chars().take(room - tail).collect();
    let end: String = text.chars().skip(length - tail).collect();
    head + &note + &end
}

/// A structure as JSON of at most [`CAP`] characters: its strings are cut until it fits.
pub fn json(value: &Value) -> String {
    let mut text = value.to_string();
    let mut limit = CAP / 2;
    while text.chars().count() > CAP && limit >= 64 {
        text = shortened(value, limit).to_string();
        limit /= 2;
    }
    cut(&text, CAP)
}

fn shortened(value: &Value, limit: usize) -> Value {
    match value {
        Value::String(text) => cut(text, limit).into(),
        Value::Array(values) => values.iter().map(|value| shortened(value, limit)).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.clone(), shortened(value, limit)))
            .collect(),
        other => other.clone(),
    }
}

/// A structure with every text masked; its shape stays.
pub fn masked(value: &Value) -> Value {
    match value {
        Value::String(_) => MASK.into(),
        Value::Array(values) => values.iter().map(masked).collect(),
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), masked(value))).collect(),
        other => other.clone(),
    }
}

/// The text of a message's content: a string, or blocks of which those with text count.
pub fn of_content(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks.iter().map(of_block).collect::<Vec<_>>().join("\n"),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn of_block(block: &Value) -> String {
    match block["text"].as_str() {
        Some(text) => text.to_owned(),
        // An image as base64 helps nobody in a trace.
        None => format!("[{}]", block["type"].as_str().unwrap_or("content")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end() {
        let text = format!("begin{}end", "é".repeat(30_000));
        let cut = cut(&text, CAP);
        assert_eq!(cut.chars().count(), CAP);
        assert!(cut.starts_with("begin") && cut.ends_with("end") && cut.contains("30008 characters"));
    }

    #[test]
    fn a_large_structure_stays_json_within_the_cap() {
        let value: Value = (0..20).map(|n| json!({"n": n, "text": "\"".repeat(9_000)})).collect();
        let text = json(&value);
        assert!(text.chars().count() <= CAP);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()[19]["n"], 19);
    }

    #[test]
    fn content_is_the_text_of_its_blocks() {
        let blocks =
            json!([{"type": "text", "text": "a"}, {"type": "image", "source": {}}, {"type": "text", "text": "b"}]);
        assert_eq!(of_content(&blocks), "a\n[image]\nb");
        assert_eq!(of_content(&json!("plain")), "plain");
    }
}
