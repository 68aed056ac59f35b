//! What the CLI's lines say. Only what decisions need is looked at.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::lenient::lenient;

/// What the CLI says it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A turn runs.
    Running,
    /// It waits for a message.
    Idle,
    /// It waits for an answer to a question.
    RequiresAction,
    /// Something newer.
    #[serde(other)]
    Unknown,
}

/// What a line says, as far as somebody must decide on it.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A turn begins: the conversation's id and the CLI's version.
    Init {
        /// Id of the conversation.
        session_id: Option<Uuid>,
        /// Version of the CLI.
        version: Option<String>,
    },
    /// See [`State`].
    StateChanged(State),
    /// A user message that we sent was taken up.
    Started(Uuid),
    /// A block of a response.
    Assistant {
        /// Id of the response.
        message_id: Option<String>,
        /// Of the main loop, and of a model: neither a subagent's nor made up by the CLI.
        main: bool,
        /// Tool calls among its blocks.
        calls: usize,
        /// Messages of ours that the model has been given with it, or since the last one.
        answers: Vec<Uuid>,
    },
    /// Results of tool calls of the main loop.
    ToolResults(usize),
    /// The end of a turn.
    Result(Box<ResultLine>),
    /// The CLI tries a model call again; the status that it got, absent for a broken connection.
    ApiRetry(Option<u16>),
    /// Tasks that run in the background.
    BackgroundTasks(usize),
    /// A new conversation begins.
    ConversationReset(Option<Uuid>),
    /// The CLI asks us something.
    ControlRequest {
        /// To be named in the answer.
        request_id: String,
        /// What it asks.
        subtype: String,
        /// The tool that a permission question is about; empty otherwise.
        tool: String,
    },
    /// A question of this id needs no answer any more.
    Withdrawn(String),
    /// An answer to us, or the echo of one of ours.
    ControlResponse,
    /// A piece of something that comes whole later: shown live, not kept.
    Live,
    /// Everything else.
    Other,
}

/// What matters of a `result`. `subtype` alone says nothing: an API failure ends as `success` with `is_error`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ResultLine {
    /// `success`, `error_max_turns`, …
    #[serde(deserialize_with = "or_default")]
    pub subtype: String,
    /// It is not what was asked for.
    #[serde(deserialize_with = "or_default")]
    pub is_error: bool,
    /// `completed`, `api_error`, `aborted_tools`, …
    pub terminal_reason: Option<String>,
    /// Status of the API's last answer, as the CLI tells it.
    #[serde(deserialize_with = "lenient")]
    pub api_error_status: Option<u16>,
    /// The last text.
    #[serde(deserialize_with = "lenient")]
    pub result: Option<String>,
    /// In place of `result` for the error subtypes.
    #[serde(deserialize_with = "lenient")]
    pub errors: Vec<String>,
    /// Messages that wait to be taken up.
    #[serde(deserialize_with = "lenient")]
    pub queued_turn_count: u64,
    /// Rounds of the turn.
    #[serde(deserialize_with = "lenient")]
    pub num_turns: u64,
    /// Messages that the turn answered.
    #[serde(deserialize_with = "lenient")]
    pub user_message_uuids: Vec<Uuid>,
    /// Set when the CLI could not start.
    pub startup_failure_reason: Option<String>,
    /// The CLI's own figure, US dollars of the conversation.
    #[serde(deserialize_with = "lenient")]
    pub total_cost_usd: f64,
    /// Milliseconds of the turn.
    #[serde(deserialize_with = "lenient")]
    pub duration_ms: u64,
}

impl ResultLine {
    /// A `result` that does not say how the turn ended. The turn is over all the same, and nothing else would end it.
    fn unreadable(line: &str, error: &serde_json::Error) -> Self {
        let mut beginning = &line[..line.floor_char_boundary(SHOWN)];
        if beginning.len() < line.len() {
            // Up to the last whole word: of a credential that is cut nobody would know that it is one.
            beginning = &beginning[..beginning.rfind(['"', ' ']).unwrap_or_default()];
        }
        Self {
            is_error: true,
            errors: vec![format!("the CLI's result cannot be read ({error}): {beginning}")],
            ..Self::default()
        }
    }
}

/// Bytes of a line that are shown to people.
const SHOWN: usize = 300;

/// Reads null as what is absent: a `result` that could not be read for it would never end its turn.
pub fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Most values in a line that is made a tree of: each takes a hundred bytes and more, where the line may have two for it.
const MAX_VALUES: usize = 50_000;

/// Whether a tree of what a line says has a size that does not matter. The agent can write lines of nothing but brackets.
pub fn is_light(line: &str) -> bool {
    let opens = |byte: &u8| matches!(byte, b',' | b'{' | b'[' | b':');
    line.bytes().filter(opens).nth(MAX_VALUES).is_none()
}

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default)]
    subtype: Option<&'a RawValue>,
}

fn word(raw: Option<&RawValue>) -> Cow<'_, str> {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or_default()
}

/// Looks at a line; `None`: it is not a JSON object.
pub fn event(line: &str) -> Option<Event> {
    if !line.trim_ascii_start().starts_with('{') {
        return None;
    }
    let head: Head<'_> = serde_json::from_str(line).ok()?;
    let subtype = word(head.subtype);
    let event = match (word(head.kind).as_ref(), subtype.as_ref()) {
        ("stream_event" | "keep_alive", _) | ("system", "thinking_tokens") => Some(Event::Live),
        ("system", "init") => init(line),
        ("system", "session_state_changed") => state(line),
        ("system", "api_retry") => retry(line),
        ("system", "background_tasks_changed") => tasks(line),
        ("command_lifecycle", _) => lifecycle(line),
        ("assistant", _) if is_light(line) => assistant(line),
        ("user", _) if is_light(line) => tool_results(line),
        ("result", _) => Some(Event::Result(Box::new(
            serde_json::from_str(line).unwrap_or_else(|error| ResultLine::unreadable(line, &error)),
        ))),
        ("conversation_reset", _) => reset(line),
        ("control_request", _) => control_request(line),
        ("control_cancel_request", _) => withdrawn(line),
        ("control_response", _) => Some(Event::ControlResponse),
        _ => None,
    };
    Some(event.unwrap_or(Event::Other))
}

fn init(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Init {
        session_id: Option<Uuid>,
        #[serde(default, deserialize_with = "lenient")]
        claude_code_version: Option<String>,
    }
    let Init {
        session_id,
        claude_code_version: version,
    } = serde_json::from_str(line).ok()?;
    Some(Event::Init { session_id, version })
}

fn state(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Changed {
        state: State,
    }
    serde_json::from_str(line)
        .ok()
        .map(|Changed { state }| Event::StateChanged(state))
}

fn retry(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Retry {
        #[serde(default, deserialize_with = "lenient")]
        error_status: Option<u16>,
    }
    serde_json::from_str(line)
        .ok()
        .map(|Retry { error_status }| Event::ApiRetry(error_status))
}

fn tasks(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Tasks {
        tasks: Vec<serde::de::IgnoredAny>,
    }
    serde_json::from_str(line)
        .ok()
        .map(|Tasks { tasks }| Event::BackgroundTasks(tasks.len()))
}

fn lifecycle(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Lifecycle {
        command_uuid: Uuid,
        state: String,
    }
    let Lifecycle { command_uuid, state } = serde_json::from_str(line).ok()?;
    (state == "started").then_some(Event::Started(command_uuid))
}

/// The content of a message: text, or blocks.
#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Blocks(Vec<Block>),
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Block {
    #[serde(rename = "type", default, deserialize_with = "or_default")]
    kind: String,
}

impl Content {
    fn count(&self, kind: &str) -> usize {
        match self {
            Self::Blocks(blocks) => blocks.iter().filter(|block| block.kind == kind).count(),
            Self::Other(_) => 0,
        }
    }
}

fn assistant(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Assistant {
        message: Message,
        parent_tool_use_id: Option<serde::de::IgnoredAny>,
        #[serde(default, deserialize_with = "lenient")]
        user_message_uuids: Vec<Uuid>,
    }
    #[derive(Deserialize)]
    struct Message {
        #[serde(default, deserialize_with = "lenient")]
        id: Option<String>,
        #[serde(default, deserialize_with = "lenient")]
        model: Option<String>,
        content: Option<Content>,
    }
    let Assistant {
        message,
        parent_tool_use_id,
        user_message_uuids: answers,
    } = serde_json::from_str(line).ok()?;
    let main = parent_tool_use_id.is_none() && message.model.as_deref() != Some("<synthetic>");
    Some(Event::Assistant {
        message_id: message.id,
        main,
        calls: message.content.map_or(0, |content| content.count("tool_use")),
        answers,
    })
}

fn tool_results(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct User {
        message: Message,
        parent_tool_use_id: Option<serde::de::IgnoredAny>,
    }
    #[derive(Deserialize)]
    struct Message {
        content: Content,
    }
    let User {
        message,
        parent_tool_use_id,
    } = serde_json::from_str(line).ok()?;
    let results = message.content.count("tool_result");
    (parent_tool_use_id.is_none() && results > 0).then_some(Event::ToolResults(results))
}

fn withdrawn(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Withdrawn {
        request_id: String,
    }
    serde_json::from_str(line)
        .ok()
        .map(|Withdrawn { request_id }| Event::Withdrawn(request_id))
}

fn reset(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Reset {
        new_conversation_id: Option<Uuid>,
    }
    serde_json::from_str(line)
        .ok()
        .map(|Reset { new_conversation_id }| Event::ConversationReset(new_conversation_id))
}

fn control_request(line: &str) -> Option<Event> {
    #[derive(Deserialize)]
    struct Envelope {
        request_id: String,
        request: Request,
    }
    #[derive(Deserialize)]
    struct Request {
        subtype: String,
        #[serde(default, deserialize_with = "lenient")]
        tool_name: String,
    }
    let Envelope { request_id, request } = serde_json::from_str(line).ok()?;
    Some(Event::ControlRequest {
        request_id,
        subtype: request.subtype,
        tool: request.tool_name,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::cli::outcome;
    use crate::proxy::Witness;

    #[rstest]
    #[case(
        r#"{"type":"system","subtype":"session_state_changed","state":"idle"}"#,
        Event::StateChanged(State::Idle)
    )]
    #[case(
        r#"{"type":"system","subtype":"api_retry","error_status":null}"#,
        Event::ApiRetry(None)
    )]
    #[case(
        r#"{"subtype":"background_tasks_changed","tasks":[{},{}],"type":"system"}"#,
        Event::BackgroundTasks(2)
    )]
    #[case(r#"{"type":"assistant","message":{"id":"m","model":"<synthetic>"},"parent_tool_use_id":null}"#, Event::Assistant { message_id: Some("m".into()), main: false, calls: 0, answers: vec![] })]
    #[case(r#"{"type":"assistant","message":{"id":"m","model":"x"},"parent_tool_use_id":"t"}"#, Event::Assistant { message_id: Some("m".into()), main: false, calls: 0, answers: vec![] })]
    #[case(r#"{"type":"assistant","message":{"id":"m","model":"x","content":[{"type":"text"},{"type":"tool_use"}]},"parent_tool_use_id":null}"#, Event::Assistant { message_id: Some("m".into()), main: true, calls: 1, answers: vec![] })]
    #[case(r#"{"type":"assistant","message":{"id":"m","model":"x","content":"text"},"user_message_uuids":["00000000-0000-0000-0000-000000000000"]}"#, Event::Assistant { message_id: Some("m".into()), main: true, calls: 0, answers: vec![Uuid::nil()] })]
    #[case(r#"{"type":"user","message":{"content":[{"type":"tool_result"},{"type":"tool_result","content":[]}]},"parent_tool_use_id":null}"#, Event::ToolResults(2))]
    #[case(
        r#"{"type":"user","message":{"content":[{"type":"tool_result"}]},"parent_tool_use_id":"t"}"#,
        Event::Other
    )]
    #[case(r#"{"type":"user","message":{"content":"hello"}}"#, Event::Other)]
    #[case(r#"{"type":"control_cancel_request","request_id":"r"}"#, Event::Withdrawn("r".into()))]
    #[case(r#"{"type":"control_request","request_id":"r","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{}}}"#, Event::ControlRequest { request_id: "r".into(), subtype: "can_use_tool".into(), tool: "Bash".into() })]
    #[case::null_is_absent(r#"{"type":"result","subtype":"success","is_error":null,"terminal_reason":null,"api_error_status":null,"result":null,"errors":null,"queued_turn_count":null,"num_turns":null,"user_message_uuids":null,"startup_failure_reason":null,"total_cost_usd":null,"duration_ms":null}"#, Event::Result(Box::new(ResultLine { subtype: "success".into(), ..ResultLine::default() })))]
    #[case::null_is_absent(r#"{"type":"result","subtype":null}"#, Event::Result(Box::default()))]
    #[case::null_is_absent(r#"{"type":"assistant","message":{"id":null,"model":null,"content":[{"type":null},{"type":"tool_use"}],"usage":null},"parent_tool_use_id":null,"user_message_uuids":null}"#, Event::Assistant { message_id: None, main: true, calls: 1, answers: vec![] })]
    #[case::null_is_absent(r#"{"type":"control_request","request_id":"r","request":{"subtype":"initialize","tool_name":null}}"#, Event::ControlRequest { request_id: "r".into(), subtype: "initialize".into(), tool: String::new() })]
    #[case::of_another_kind(r#"{"type":"result","subtype":"success","is_error":false,"terminal_reason":"completed","api_error_status":"429","result":["x"],"errors":{},"queued_turn_count":"1","num_turns":2.0,"user_message_uuids":[7],"total_cost_usd":"0.1","duration_ms":12.5}"#, Event::Result(Box::new(ResultLine { subtype: "success".into(), terminal_reason: Some("completed".into()), num_turns: 2, duration_ms: 13, ..ResultLine::default() })))]
    #[case::of_another_kind(r#"{"type":"assistant","message":{"id":7,"model":{},"content":7},"user_message_uuids":{}}"#, Event::Assistant { message_id: None, main: true, calls: 0, answers: vec![] })]
    #[case::of_another_kind(
        r#"{"type":"system","subtype":"api_retry","error_status":529.0}"#,
        Event::ApiRetry(Some(529))
    )]
    #[case::of_another_kind(
        r#"{"type":"system","subtype":"api_retry","error_status":"529"}"#,
        Event::ApiRetry(None)
    )]
    #[case(r#"{"type":"stream_event","event":{}}"#, Event::Live)]
    #[case(r#"{"type":"news","state":{"of":"tomorrow"}}"#, Event::Other)]
    #[case(r#"{"type":{"not":"text"}}"#, Event::Other)]
    fn a_line_is_peeked_at(#[case] line: &str, #[case] expected: Event) {
        assert_eq!(event(line), Some(expected));
    }

    #[rstest]
    #[case(r#"{"type":"result","subtype":"success","is_error":"no","result":"Done."}"#)]
    #[case(r#"{"type":"result","subtype":{},"is_error":false,"result":"Done."}"#)]
    #[case(r#"{"type":"result","subtype":"success","terminal_reason":["completed"],"result":"Done."}"#)]
    #[case(r#"{"type":"result","subtype":"success","result":"Done.","result":"Done."}"#)]
    fn a_result_that_does_not_say_how_the_turn_ended_ends_it_as_failed(#[case] line: &str) {
        let Some(Event::Result(result)) = event(line) else {
            panic!("{line}");
        };
        assert!(result.is_error && !result.nothing_done());
        assert!(result.errors[0].contains("Done."), "{:?}", result.errors);
        assert_eq!(outcome(&result, &Witness::default()), protocol::Outcome::AgentError);
    }

    /// A credential is found when the message is told; a part of one would not be.
    #[test]
    fn what_is_shown_of_a_result_ends_behind_a_whole_word() {
        for length in 200..320 {
            let filler = "x".repeat(length);
            let line =
                format!(r#"{{"type":"result","is_error":"no","result":"{filler} fake-credential-of-40-characters"}}"#);
            let Some(Event::Result(result)) = event(&line) else {
                panic!("{line}");
            };
            let said = &result.errors[0];
            assert!(
                !said.contains("fake-") || said.contains("fake-credential-of-40-characters"),
                "{said}"
            );
        }
    }

    #[rstest]
    #[case("oops")]
    #[case("[1]")]
    #[case("{\"type\":")]
    fn what_is_no_object_is_said_to_be_none(#[case] line: &str) {
        assert_eq!(event(line), None);
    }
}
