//! Secrets across the borders of the pieces in which a message is written.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Redactor, Runs, known::KNOWN};

/// Most bytes that are held back: whatever begins a text of this length and more is told as it is known so far.
const MAX_HELD: usize = 64 << 10;

/// Most blocks of which something is held back at the same time; a model writes one at a time in each conversation.
const MAX_BLOCKS: usize = 256;
/// Longest line of a piece; the CLI's are some hundred bytes long.
const MAX_LINE: usize = 64 << 10;
/// Most bytes of all that is held back, with the pieces it came in.
const MAX_BYTES: usize = 4 << 20;

/// What is held back, by conversation and content block.
///
/// The agent can write lines of any number of conversations that never end. Once there is no room to hold what may be the
/// beginning of a secret, no piece is shown any more, because the rest of that secret may be in any of them; the messages
/// come whole, as records.
#[derive(Default)]
pub struct Deltas {
    held: HashMap<Key, Held>,
    bytes: usize,
    overflowed: bool,
}

/// Conversation and content block.
type Key = (Option<String>, u64);

impl Deltas {
    fn take(&mut self, key: &Key) -> Option<Held> {
        let held = self.held.remove(key)?;
        self.bytes -= held.size;
        Some(held)
    }

    fn hold(&mut self, key: Key, held: Held) {
        if self.held.len() < MAX_BLOCKS && self.bytes + held.size <= MAX_BYTES {
            self.bytes += held.size;
            self.held.insert(key, held);
            return;
        }
        self.overflow();
    }

    fn overflow(&mut self) {
        tracing::warn!("pieces of messages are not shown live any more: too many, or too long ones, are written");
        *self = Self {
            overflowed: true,
            ..Self::default()
        };
    }

    fn forget(&mut self, conversation: Option<&String>) {
        let Self { held, bytes, .. } = self;
        held.retain(|(of, _), held| {
            let stays = of.as_ref() != conversation;
            if !stays {
                *bytes -= held.size;
            }
            stays
        });
    }
}

struct Held {
    text: String,
    /// The piece it came in, to be sent with it.
    line: String,
    field: &'static str,
    /// Bytes that it takes, about.
    size: usize,
}

#[derive(Deserialize)]
struct Line {
    event: Option<Event>,
    parent_tool_use_id: Option<String>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    index: u64,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    text: Option<String>,
    thinking: Option<String>,
    partial_json: Option<String>,
}

impl Delta {
    fn text(self) -> Option<(&'static str, String)> {
        let fields = [
            ("text", self.text),
            ("thinking", self.thinking),
            ("partial_json", self.partial_json),
        ];
        fields
            .into_iter()
            .find_map(|(field, text)| text.map(|text| (field, text)))
    }
}

impl Redactor {
    /// A `stream_event` line of the CLI without secrets, also those that come in pieces: what may be the beginning of one
    /// is held back until more is known. So a line can become none, or two.
    pub fn delta(&self, deltas: &mut Deltas, line: &str) -> Vec<String> {
        let Ok(Line {
            event: Some(event),
            parent_tool_use_id,
        }) = serde_json::from_str(line)
        else {
            return vec![self.json(line).into_owned()];
        };
        if deltas.overflowed {
            return Vec::new();
        }
        if line.len() > MAX_LINE {
            // What it holds of a secret is not known then.
            deltas.overflow();
            return Vec::new();
        }
        let key = (parent_tool_use_id, event.index);
        match (event.kind.as_str(), event.delta.and_then(Delta::text)) {
            ("content_block_delta", Some((field, text))) => self.piece(deltas, key, field, &text, line),
            ("content_block_stop", _) => {
                let rest = deltas
                    .take(&key)
                    .map(|held| self.with_text(&held.line, held.field, &held.text));
                rest.into_iter().chain([self.json(line).into_owned()]).collect()
            }
            ("message_start", _) => {
                // A message that was cut has no end: what was held of it is not sent at all.
                deltas.forget(key.0.as_ref());
                vec![self.json(line).into_owned()]
            }
            _ => vec![self.json(line).into_owned()],
        }
    }

    fn piece(&self, deltas: &mut Deltas, key: Key, field: &'static str, piece: &str, line: &str) -> Vec<String> {
        let before = deltas.take(&key);
        let fresh = before.is_none();
        let text = before.map_or(String::new(), |held| held.text) + piece;
        let from = if text.len() > MAX_HELD {
            text.len()
        } else {
            self.doubtful(&text)
        };
        if fresh && from == text.len() {
            return vec![self.json(line).into_owned()];
        }
        if from < text.len() {
            let text = text[from..].to_owned();
            // Some of it is in the key, too.
            let size = text.len() + 2 * line.len();
            let line = line.to_owned();
            deltas.hold(
                key,
                Held {
                    text,
                    line,
                    field,
                    size,
                },
            );
        }
        if from == 0 {
            return Vec::new();
        }
        vec![self.with_text(line, field, &text[..from])]
    }

    fn with_text(&self, line: &str, field: &str, text: &str) -> String {
        let mut line: Value = serde_json::from_str(line).unwrap_or_default();
        line["event"]["delta"][field] = self.text(text).into();
        self.json(&line.to_string()).into_owned()
    }

    /// Where in a text that goes on a secret may begin that is not complete; its length when none may.
    fn doubtful(&self, text: &str) -> usize {
        let mut runs = Runs::default();
        let mut whole = self.text.next(text.as_bytes(), 0, &mut runs);
        for (at, _) in text.char_indices() {
            while let Some((_, end, _)) = whole
                && end <= at
            {
                whole = self.text.next(text.as_bytes(), end, &mut runs);
            }
            // What stands inside of a secret is replaced with it.
            let inside = whole.is_some_and(|(start, _, _)| start < at);
            if !inside && self.may_begin(&text[at..]) {
                return at;
            }
        }
        text.len()
    }

    fn may_begin(&self, tail: &str) -> bool {
        self.text
            .forms
            .iter()
            .any(|form| form.len() > tail.len() && form.starts_with(tail))
            || KNOWN.iter().any(|known| known.may_begin(tail))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::redact::Held as Secret;

    const KEY: &str = "fake\"secret\nof two lines";

    fn redactor() -> Redactor {
        Redactor::new([Secret {
            name: "MY_SECRET".into(),
            value: KEY.into(),
        }])
    }

    fn event(event: &Value) -> String {
        json!({"type": "stream_event", "event": event, "parent_tool_use_id": null, "uuid": "u"}).to_string()
    }

    fn piece(index: u64, text: &str) -> String {
        event(&json!({"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}))
    }

    fn stop(index: u64) -> String {
        event(&json!({"type": "content_block_stop", "index": index}))
    }

    /// The text of each block as a client puts it together.
    fn seen(lines: &[String]) -> Vec<String> {
        let redactor = redactor();
        let mut deltas = Deltas::default();
        let out: Vec<String> = lines
            .iter()
            .flat_map(|line| redactor.delta(&mut deltas, line))
            .collect();
        assert!(
            deltas.held.is_empty() && deltas.bytes == 0,
            "something is held after the end"
        );
        let mut texts = vec![String::new(); 2];
        for line in out {
            let event = serde_json::from_str::<Value>(&line).unwrap()["event"].clone();
            let text = event["delta"]["text"].as_str().unwrap_or_default();
            texts[event["index"].as_u64().unwrap() as usize] += text;
        }
        texts
    }

    #[test]
    fn a_piece_without_a_doubt_passes_as_it_is() {
        let line = piece(0, "nothing to hide.");
        assert_eq!(redactor().delta(&mut Deltas::default(), &line), [line]);
    }

    #[test]
    fn what_begins_as_a_key_and_goes_on_as_none_is_not_held() {
        let line = piece(0, "sk-ant-and then a word.");
        assert_eq!(redactor().delta(&mut Deltas::default(), &line), [line]);
    }

    #[test]
    fn a_line_longer_than_any_of_the_clis_is_not_shown_and_none_is_from_then_on() {
        let (redactor, mut deltas) = (redactor(), Deltas::default());
        for text in ["nothing. ".repeat(MAX_LINE / 9), "nothing.".to_owned()] {
            assert!(redactor.delta(&mut deltas, &piece(0, &text)).is_empty());
        }
    }

    #[test]
    fn a_key_of_a_known_shape_is_held_until_it_ends() {
        let texts = seen(&[
            piece(0, "it is sk-an"),
            piece(0, "t-fake0123456789"),
            piece(0, "abcdef"),
            piece(0, ", ok"),
            stop(0),
        ]);
        assert_eq!(texts[0], "it is [redacted], ok");
    }

    #[test]
    fn blocks_that_are_written_at_the_same_time_are_kept_apart() {
        let (a, b) = KEY.split_at(9);
        let texts = seen(&[piece(0, a), piece(1, b), piece(0, "!"), piece(1, "?"), stop(0), stop(1)]);
        assert_eq!(texts, [format!("{a}!"), format!("{b}?")]);
    }

    fn of_conversation(n: usize, text: &str, more: usize) -> String {
        json!({"type": "stream_event", "parent_tool_use_id": format!("t{n}"), "uuid": "x".repeat(more), "event":
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}})
        .to_string()
    }

    #[rstest::rstest]
    #[case::many(10_000, 0)]
    #[case::long(100, 60_000)]
    fn what_is_held_is_bounded_and_what_does_not_fit_is_not_shown(#[case] blocks: usize, #[case] more: usize) {
        let redactor = redactor();
        let mut deltas = Deltas::default();
        let most = (0..blocks)
            .map(|n| {
                let shown = redactor.delta(&mut deltas, &of_conversation(n, "sk-ant-", more));
                assert!(shown.is_empty());
                assert!(deltas.held.len() <= MAX_BLOCKS && deltas.bytes <= MAX_BYTES);
                deltas.held.len()
            })
            .max();
        assert!(most > Some(5), "{most:?}");
        // The rest of the key, of which only the beginning was told from.
        for n in 0..blocks {
            let rest = of_conversation(n, "fake0123456789abcdef and more. ", 0);
            let shown = redactor.delta(&mut deltas, &rest).concat();
            assert!(!shown.contains("0123456789"), "{shown}");
        }
    }

    #[test]
    fn a_message_that_was_cut_leaves_nothing_behind() {
        let redactor = redactor();
        let mut deltas = Deltas::default();
        assert!(redactor.delta(&mut deltas, &piece(0, "fake\"sec")).is_empty());
        redactor.delta(&mut deltas, &event(&json!({"type": "message_start", "message": {}})));
        assert!(deltas.held.is_empty() && deltas.bytes == 0);
    }

    proptest! {
        #[test]
        fn a_text_in_any_pieces_is_the_redacted_text(
            parts in prop::collection::vec(prop_oneof![Just(KEY), Just("fake\""), Just("s"), Just("plain é "), Just("glpat-0000000000000000fake. ")], 1..8),
            size in 1..40_usize,
        ) {
            let text = parts.concat();
            let chars: Vec<char> = text.chars().collect();
            let mut lines: Vec<String> = chars.chunks(size).map(|part| piece(0, &part.iter().collect::<String>())).collect();
            lines.push(stop(0));
            prop_assert_eq!(&*seen(&lines)[0], &*redactor().text(&text));
        }
    }
}
