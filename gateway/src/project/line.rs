//! A line of the CLI, read only as far as the APIs of tasks show it. An agent can write any line: what is made of one takes no
//! more memory than a part of the line itself, however many values it has.

use std::fmt;

use protocol::Record;
use serde::{
    Deserialize,
    de::{Deserializer, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Bytes of a line that are shown, at most.
pub(super) const MAX_SHOWN: usize = 1 << 20;
/// Parts of a message that are read, at most.
const MAX_PARTS: usize = 1000;
/// Longest id of a response or a tool's use, and longest name of a tool.
const MAX_NAME: usize = 256;

/// A value that is not looked into.
type Raw<'a> = Option<&'a RawValue>;

/// A line of the CLI.
#[derive(Debug)]
pub(super) enum Line<'a> {
    /// The model said something.
    Assistant(Response<'a>),
    /// Tools answered.
    User {
        /// In the main conversation.
        is_main: bool,
        /// What they answered.
        parts: Vec<Part<'a>>,
    },
    /// A turn's result.
    Result {
        /// What the agent answered.
        result: Option<String>,
        /// What went wrong.
        errors: Option<String>,
    },
    /// The agent asks whether it may use a tool; the id of the question.
    Question(String),
    /// It asks no more.
    Withdrawn(String),
    /// What the CLI says of itself.
    System,
    /// Anything else.
    Other,
}

/// A part of what the model said; those of one response have its id.
#[derive(Debug)]
pub(super) struct Response<'a> {
    /// The response's id.
    pub(super) id: String,
    /// It is of the model, and in the main conversation. What the CLI says in the model's place, such as an error of the API,
    /// is no response.
    pub(super) counts: bool,
    /// What it says.
    pub(super) parts: Vec<Part<'a>>,
}

/// A part of a message.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// A text.
    Text(String),
    /// A tool is used.
    ToolUse {
        /// Id of this use.
        id: String,
        /// The tool.
        tool: String,
        /// Its input; `None` when it is too long to be shown.
        input: Raw<'a>,
    },
    /// A tool answered.
    ToolResult {
        /// Id of its use.
        id: String,
        /// The text of its answer.
        text: String,
        /// It did not work.
        is_error: bool,
    },
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Members<'a> {
    #[serde(borrow, rename = "type")]
    kind: Raw<'a>,
    #[serde(borrow)]
    message: Raw<'a>,
    #[serde(borrow)]
    parent_tool_use_id: Raw<'a>,
    #[serde(borrow)]
    result: Raw<'a>,
    #[serde(borrow)]
    errors: Raw<'a>,
    #[serde(borrow)]
    request: Raw<'a>,
    #[serde(borrow)]
    request_id: Raw<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Message<'a> {
    #[serde(borrow)]
    id: Raw<'a>,
    #[serde(borrow)]
    model: Raw<'a>,
    #[serde(borrow)]
    content: Raw<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Request<'a> {
    #[serde(borrow)]
    subtype: Raw<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PartMembers<'a> {
    #[serde(borrow, rename = "type")]
    kind: Raw<'a>,
    #[serde(borrow)]
    text: Raw<'a>,
    #[serde(borrow)]
    id: Raw<'a>,
    #[serde(borrow)]
    name: Raw<'a>,
    #[serde(borrow)]
    input: Raw<'a>,
    #[serde(borrow)]
    tool_use_id: Raw<'a>,
    #[serde(borrow)]
    content: Raw<'a>,
    #[serde(borrow)]
    is_error: Raw<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Written<'a> {
    #[serde(borrow)]
    file_path: Raw<'a>,
    #[serde(borrow)]
    notebook_path: Raw<'a>,
}

/// The first values of an array.
#[derive(Default)]
struct First<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for First<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values;

        impl<'de> Visitor<'de> for Values {
            type Value = Vec<&'de RawValue>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Self::Value, A::Error> {
                let mut first = Vec::new();
                while first.len() < MAX_PARTS {
                    match values.next_element()? {
                        Some(value) => first.push(value),
                        None => return Ok(first),
                    }
                }
                while values.next_element::<IgnoredAny>()?.is_some() {}
                Ok(first)
            }
        }

        deserializer.deserialize_seq(Values).map(Self)
    }
}

fn read<'a, T: Deserialize<'a> + Default>(raw: Raw<'a>) -> T {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or_default()
}

/// A short text, or the beginning of a longer one.
fn name(raw: Raw<'_>) -> String {
    cut(read(raw), MAX_NAME)
}

fn cut(mut text: String, length: usize) -> String {
    if text.len() > length {
        text.truncate(text.floor_char_boundary(length));
        text.shrink_to_fit();
    }
    text
}

/// How much of a line may still be shown.
struct Room(usize);

impl Room {
    fn text(&mut self, raw: Raw<'_>) -> Option<String> {
        let text: Option<String> = read(raw);
        let text = cut(text?, self.0);
        self.0 -= text.len();
        Some(text)
    }

    fn texts<'a>(&mut self, parts: impl Iterator<Item = Raw<'a>>, between: &str) -> String {
        let mut all = String::new();
        for (at, text) in parts.filter_map(|part| self.text(part)).enumerate() {
            if at > 0 {
                all.push_str(between);
            }
            all.push_str(&text);
        }
        all
    }

    fn value<'a>(&mut self, raw: Raw<'a>) -> Raw<'a> {
        let raw = raw.filter(|raw| raw.get().len() <= self.0)?;
        self.0 -= raw.get().len();
        Some(raw)
    }

    /// The parts of a message's content; a plain text is one part.
    fn parts<'a>(&mut self, content: Raw<'a>) -> Vec<Part<'a>> {
        if content.is_some_and(|content| content.get().starts_with('"')) {
            return self.text(content).map(Part::Text).into_iter().collect();
        }
        let First(parts) = read(content);
        parts
            .into_iter()
            .filter_map(|part| self.part(&read(Some(part))))
            .collect()
    }

    fn part<'a>(&mut self, part: &PartMembers<'a>) -> Option<Part<'a>> {
        match name(part.kind).as_str() {
            "text" => self.text(part.text).map(Part::Text),
            "tool_use" => Some(Part::ToolUse {
                id: name(part.id),
                tool: name(part.name),
                input: self.value(part.input),
            }),
            "tool_result" => Some(Part::ToolResult {
                id: name(part.tool_use_id),
                text: self.answer(part.content),
                is_error: read(part.is_error),
            }),
            _ => None,
        }
    }

    /// The text of a tool's answer.
    fn answer(&mut self, content: Raw<'_>) -> String {
        if content.is_some_and(|content| content.get().starts_with('"')) {
            return self.text(content).unwrap_or_default();
        }
        let First(parts) = read(content);
        let parts = parts.into_iter().map(|part| read::<PartMembers<'_>>(Some(part)).text);
        self.texts(parts, "\n")
    }
}

impl<'a> Line<'a> {
    /// What a record of the CLI says.
    pub(super) fn of(record: &'a Record) -> Self {
        let line: Members<'a> = read(Some(&record.body));
        let mut room = Room(MAX_SHOWN);
        let is_main = line.parent_tool_use_id.is_none();
        match name(line.kind).as_str() {
            "assistant" => {
                let message: Message<'a> = read(line.message);
                Self::Assistant(Response {
                    id: name(message.id),
                    counts: is_main && name(message.model) != "<synthetic>",
                    parts: room.parts(message.content),
                })
            }
            "user" => Self::User {
                is_main,
                parts: room.parts(read::<Message<'a>>(line.message).content),
            },
            "result" => {
                let First(errors) = read(line.errors);
                let errors = room.texts(errors.into_iter().map(Some), "; ");
                Self::Result {
                    result: room.text(line.result),
                    errors: Some(errors).filter(|errors| !errors.is_empty()),
                }
            }
            "control_request" if name(read::<Request<'a>>(line.request).subtype) == "can_use_tool" => {
                // Cut, it would be the id of another question.
                let id: String = read(line.request_id);
                if id.len() <= MAX_NAME {
                    Self::Question(id)
                } else {
                    Self::Other
                }
            }
            "control_cancel_request" => Self::Withdrawn(name(line.request_id)),
            "system" => Self::System,
            _ => Self::Other,
        }
    }
}

/// The file that a tool's input names.
pub(super) fn file(input: Raw<'_>, is_notebook: bool) -> Option<String> {
    let written: Written<'_> = read(input);
    read(if is_notebook {
        written.notebook_path
    } else {
        written.file_path
    })
}
