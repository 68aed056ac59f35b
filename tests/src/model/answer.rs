//! From a step of a script to the API's answer: one message, or its events.

use serde_json::{Value, json};

use super::script::Step;

/// A message of the model, complete.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Unique id of the message.
    pub id: String,
    /// Name of the model, as asked for.
    pub model: String,
    /// What it says.
    pub step: Step,
}

impl Answer {
    /// The message, as it is answered without streaming.
    pub fn message(&self) -> Value {
        let mut message = self.envelope();
        message["content"] = self.blocks().into();
        message["stop_reason"] = self.stop_reason().into();
        message["usage"] = self.usage();
        message
    }

    /// The events of the stream, in order, pings apart.
    pub fn events(&self) -> Vec<Value> {
        let mut start = self.envelope();
        start["usage"] = self.usage();
        // The API says 1 here; the whole number comes with `message_delta`.
        start["usage"]["output_tokens"] = 1.into();
        let mut events = vec![json!({ "type": "message_start", "message": start })];
        for (index, block) in self.blocks().iter().enumerate() {
            events.extend(block_events(index, block, self.step.chunk_chars.unwrap_or(24).max(1)));
        }
        events.push(json!({
            "type": "message_delta",
            "delta": { "stop_reason": self.stop_reason(), "stop_sequence": null },
            "usage": self.usage(),
        }));
        events.push(json!({ "type": "message_stop" }));
        events
    }

    fn envelope(&self) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": [], "stop_reason": null, "stop_sequence": null,
        })
    }

    fn blocks(&self) -> Vec<Value> {
        let thinking = self.step.thinking.as_ref().map(
            |text| json!({ "type": "thinking", "thinking": text, "signature": format!("mock-signature-{}", self.id) }),
        );
        let text = self
            .step
            .text
            .as_ref()
            .map(|text| json!({ "type": "text", "text": text }));
        let tools = self.step.tools.iter().enumerate().map(|(index, call)| {
            let id = format!("toolu_{}_{index}", self.id.trim_start_matches("msg_"));
            json!({ "type": "tool_use", "id": id, "name": call.name, "input": call.input })
        });
        thinking.into_iter().chain(text).chain(tools).collect()
    }

    fn stop_reason(&self) -> &str {
        let usual = if self.step.tools.is_empty() {
            "end_turn"
        } else {
            "tool_use"
        };
        self.step.stop_reason.as_deref().unwrap_or(usual)
    }

    fn usage(&self) -> Value {
        let usage = &self.step.usage;
        let said = self.step.text.as_deref().unwrap_or_default().len()
            + self.step.thinking.as_deref().unwrap_or_default().len()
            + self.step.tools.iter().map(|call| call.name.len() + 20).sum::<usize>();
        json!({
            "input_tokens": usage.input_tokens.unwrap_or(25),
            "output_tokens": usage.output_tokens.unwrap_or(said as u64 / 4 + 1),
            "cache_read_input_tokens": usage.cache_read_input_tokens,
            "cache_creation_input_tokens": usage.cache_5m_input_tokens + usage.cache_1h_input_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.cache_5m_input_tokens,
                "ephemeral_1h_input_tokens": usage.cache_1h_input_tokens,
            },
            "service_tier": "standard",
        })
    }
}

fn block_events(index: usize, block: &Value, chunk_chars: usize) -> Vec<Value> {
    let delta = |delta: Value| json!({ "type": "content_block_delta", "index": index, "delta": delta });
    let mut opening = block.clone();
    let mut deltas = Vec::new();
    match block["type"].as_str() {
        Some("thinking") => {
            opening["thinking"] = "".into();
            opening["signature"] = "".into();
            for part in chunks(block["thinking"].as_str().unwrap_or_default(), chunk_chars) {
                deltas.push(delta(json!({ "type": "thinking_delta", "thinking": part })));
            }
            deltas.push(delta(
                json!({ "type": "signature_delta", "signature": block["signature"] }),
            ));
        }
        Some("tool_use") => {
            opening["input"] = json!({});
            for part in chunks(&block["input"].to_string(), chunk_chars) {
                deltas.push(delta(json!({ "type": "input_json_delta", "partial_json": part })));
            }
        }
        _ => {
            opening["text"] = "".into();
            for part in chunks(block["text"].as_str().unwrap_or_default(), chunk_chars) {
                deltas.push(delta(json!({ "type": "text_delta", "text": part })));
            }
        }
    }
    let mut events = vec![json!({ "type": "content_block_start", "index": index, "content_block": opening })];
    events.append(&mut deltas);
    events.push(json!({ "type": "content_block_stop", "index": index }));
    events
}

fn chunks(text: &str, chars: usize) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    letters.chunks(chars).map(|part| part.iter().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        let step = serde_json::from_value(json!({
            "thinking": "Hm, wörter.",
            "text": "I shall write a file and then say so.",
            "tools": [{ "name": "Bash", "input": { "command": "echo hi > out.txt" } }],
            "chunk_chars": 7,
            "usage": { "input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 7,
                       "cache_5m_input_tokens": 11, "cache_1h_input_tokens": 13 },
        }))
        .unwrap();
        Answer {
            id: "msg_mock_1".to_owned(),
            model: "claude-opus-5-5".to_owned(),
            step,
        }
    }

    /// Puts the deltas of block `index` together, as a client does.
    fn joined(events: &[Value], index: usize, field: &str) -> String {
        let deltas = events
            .iter()
            .filter(|event| event["type"] == "content_block_delta" && event["index"] == index);
        deltas.filter_map(|event| event["delta"][field].as_str()).collect()
    }

    #[test]
    fn the_stream_says_what_the_message_says() {
        let (events, message) = (answer().events(), answer().message());
        let content = &message["content"];
        assert_eq!(joined(&events, 0, "thinking"), content[0]["thinking"].as_str().unwrap());
        assert_eq!(
            joined(&events, 0, "signature"),
            content[0]["signature"].as_str().unwrap()
        );
        assert_eq!(joined(&events, 1, "text"), content[1]["text"].as_str().unwrap());
        let input: Value = serde_json::from_str(&joined(&events, 2, "partial_json")).unwrap();
        assert_eq!(input, content[2]["input"]);
        assert_eq!(message["stop_reason"], "tool_use");
    }

    #[test]
    fn usage_is_whole_only_at_the_end_of_the_stream() {
        let events = answer().events();
        let end = events.iter().find(|event| event["type"] == "message_delta").unwrap();
        assert_eq!(events[0]["message"]["usage"]["output_tokens"], 1);
        assert_eq!(end["usage"], answer().message()["usage"]);
        assert_eq!(end["usage"]["cache_creation_input_tokens"], 24);
    }
}
