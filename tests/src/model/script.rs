//! The script of a conversation, carried in its prompt: `@mock {"steps":[…]}`.
//!
//! The newest user text with a directive rules, and the step is the number of assistant messages after it. So no state
//! is needed: a resume in another process, a fork and a subagent all go on where the conversation stands.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// What introduces a script in a user message.
pub const DIRECTIVE: &str = "@mock ";

/// What the CLI puts into the conversation in the model's name when it goes on after an interrupted turn.
const NOT_OURS: &str = "No response requested.";

/// A conversation's answers, in order. After the last one the model says [`Step::after_the_end`].
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// One entry for each answer.
    pub steps: Vec<Step>,
}

/// One answer of the model.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// Thinking that comes before the text.
    pub thinking: Option<String>,
    /// Text of the answer.
    pub text: Option<String>,
    /// Tool calls, after the text.
    pub tools: Vec<ToolCall>,
    /// Usage numbers; invented from the lengths of the texts where absent.
    pub usage: Usage,
    /// Pause before each delta, milliseconds.
    pub chunk_ms: u64,
    /// Characters in a delta [24].
    pub chunk_chars: Option<usize>,
    /// Wait until this name is released.
    pub hold: Option<String>,
    /// Where a hold or a hang takes place.
    pub at: Place,
    /// Never answer.
    pub hang: bool,
    /// Answer with an HTTP error instead.
    pub error: Option<HttpError>,
    /// Send an `error` event in the middle of the stream.
    pub sse_error: Option<SseError>,
    /// Close the connection in the middle of the answer.
    pub cut: Option<Cut>,
    /// Extra headers of the answer.
    pub headers: BTreeMap<String, String>,
    /// Instead of `end_turn` or `tool_use`.
    pub stop_reason: Option<String>,
}

impl Step {
    /// What is said when the script has no further step.
    pub fn after_the_end() -> Self {
        Self {
            text: Some("The script has no further step.".to_owned()),
            ..Self::default()
        }
    }

    /// What is said to a conversation without a directive.
    pub fn without_script() -> Self {
        Self {
            text: Some("This is an answer of the mock model.".to_owned()),
            ..Self::default()
        }
    }
}

/// A tool call.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    /// Name of the tool.
    pub name: String,
    /// Its arguments.
    #[serde(default)]
    pub input: Map<String, Value>,
}

/// Usage numbers of an answer.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Usage {
    /// Uncached input.
    pub input_tokens: Option<u64>,
    /// Output, thinking included.
    pub output_tokens: Option<u64>,
    /// Input read from the cache.
    pub cache_read_input_tokens: u64,
    /// Input written to the cache for five minutes.
    pub cache_5m_input_tokens: u64,
    /// Input written to the cache for an hour.
    pub cache_1h_input_tokens: u64,
}

/// Where in an answer something happens.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Before the first byte, headers included.
    #[default]
    Start,
    /// In the stream, after the first delta (in an answer that is not streamed: at the start).
    Middle,
}

/// An HTTP error in the API's form.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct HttpError {
    /// Status code.
    pub status: u16,
    /// Message; one is invented where absent.
    pub message: Option<String>,
    /// Only for the first so many requests of this step; for all of them where absent.
    pub times: Option<u32>,
}

/// An `error` event in the stream.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SseError {
    /// Such as `overloaded_error`.
    pub r#type: String,
    /// Only for the first so many requests of this step; for all of them where absent.
    pub times: Option<u32>,
}

/// A connection that is closed too early.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Only for the first so many requests of this step; for all of them where absent.
    pub times: Option<u32>,
}

/// A script found in a conversation, and where the conversation stands in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Position {
    /// The script.
    pub script: Script,
    /// Number of the answer that is asked for, from 0.
    pub step: usize,
}

impl Position {
    /// The answer that is asked for.
    pub fn answer(&self) -> Step {
        self.script
            .steps
            .get(self.step)
            .cloned()
            .unwrap_or_else(Step::after_the_end)
    }
}

/// Finds the ruling script in the messages of a request. `Ok(None)`: there is no directive.
///
/// # Errors
/// The parser's complaint when the newest directive is not a script.
pub fn position(messages: &[Value]) -> Result<Option<Position>, serde_json::Error> {
    let mut answers_after = 0;
    for message in messages.iter().rev() {
        match message["role"].as_str() {
            // A message that the CLI made up is no answer of ours.
            Some("assistant") if texts(message) != [NOT_OURS] => answers_after += 1,
            Some("user") => {
                if let Some(directive) = texts(message).into_iter().rev().find_map(directive) {
                    let mut parser = serde_json::Deserializer::from_str(directive);
                    let script = Script::deserialize(&mut parser)?;
                    return Ok(Some(Position {
                        script,
                        step: answers_after,
                    }));
                }
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The texts of a message. Tool results are not texts: what a tool printed cannot script the model.
pub fn texts(message: &Value) -> Vec<&str> {
    match &message["content"] {
        Value::String(text) => vec![text],
        Value::Array(blocks) => blocks
            .iter()
            .filter(|block| block["type"] == "text")
            .filter_map(|block| block["text"].as_str())
            .collect(),
        _ => Vec::new(),
    }
}

fn directive(text: &str) -> Option<&str> {
    // One inside a script, for a sub-agent, has its quotes escaped.
    let rules = |after: &&str| after.starts_with('{') && !after.starts_with("{\\");
    text.rmatch_indices(DIRECTIVE)
        .map(|(at, _)| &text[at + DIRECTIVE.len()..])
        .find(rules)
}

/// A prompt that says `text` to a reader and `steps` to the mock.
pub fn prompt(text: &str, steps: &Value) -> String {
    format!("{text}\n{DIRECTIVE}{}", serde_json::json!({ "steps": steps }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn user(text: &str) -> Value {
        json!({ "role": "user", "content": [{ "type": "text", "text": text }] })
    }

    #[test]
    fn a_script_for_a_sub_agent_stands_within_its_callers() {
        let inner = prompt("Part.", &json!([{ "text": "inner" }]));
        let outer = prompt(
            "All.",
            &json!([{ "text": "outer", "tools": [{ "name": "Agent", "input": { "prompt": inner } }] }]),
        );
        assert_eq!(step_text(&[user(&outer)]).unwrap(), "outer");
        assert_eq!(step_text(&[user(&inner)]).unwrap(), "inner");
    }

    fn assistant() -> Value {
        json!({ "role": "assistant", "content": [{ "type": "text", "text": "x" }] })
    }

    fn step_text(messages: &[Value]) -> Option<String> {
        position(messages)
            .unwrap()
            .map(|position| position.answer().text.unwrap())
    }

    #[test]
    fn the_step_is_the_number_of_answers_after_the_directive() {
        let prompt = user(&prompt("Do it.", &json!([{ "text": "first" }, { "text": "second" }])));
        assert_eq!(step_text(&[assistant(), prompt.clone()]).unwrap(), "first");
        assert_eq!(
            step_text(&[prompt.clone(), assistant(), user("go on")]).unwrap(),
            "second"
        );
        assert_eq!(
            step_text(&[prompt, assistant(), assistant()]).unwrap(),
            Step::after_the_end().text.unwrap(),
            "a script that is over says so"
        );
    }

    #[test]
    fn a_message_that_the_cli_made_up_is_no_step() {
        let prompt = user(&prompt("Do it.", &json!([{ "text": "first" }, { "text": "second" }])));
        let made_up = json!({ "role": "assistant", "content": [{ "type": "text", "text": NOT_OURS }] });
        assert_eq!(
            step_text(&[prompt, assistant(), user("cut"), made_up, user("go on")]).unwrap(),
            "second"
        );
    }

    #[test]
    fn the_newest_directive_rules() {
        let old = user(&prompt("old", &json!([{ "text": "old" }])));
        let new = user(&prompt("new", &json!([{ "text": "new" }])));
        assert_eq!(step_text(&[old, assistant(), new]).unwrap(), "new");
    }

    #[test]
    fn what_a_tool_printed_is_no_directive() {
        let result = json!({ "role": "user", "content": [
            { "type": "tool_result", "tool_use_id": "a", "content": "@mock {\"steps\":[{\"text\":\"no\"}]}" }
        ]});
        assert_eq!(position(&[result]).unwrap(), None);
    }

    #[test]
    fn a_script_with_a_misspelt_field_is_an_error() {
        let wrong = user(&prompt("Do it.", &json!([{ "txt": "typo" }])));
        assert!(
            position(&[wrong])
                .unwrap_err()
                .to_string()
                .contains("unknown field `txt`")
        );
    }

    #[test]
    fn text_may_follow_the_directive() {
        let prompt = user(&format!(
            "{} and more {{}}",
            prompt("Do it.", &json!([{ "text": "read" }]))
        ));
        assert_eq!(step_text(&[prompt]).unwrap(), "read");
    }
}
