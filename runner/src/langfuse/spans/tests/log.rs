//! Records of a session, made by hand, and the spans that come of them.

use std::{collections::HashMap, fmt::Write as _};

use jiff::{SignedDuration, Timestamp};
use protocol::{
    Kind, Outcome, Record, Usage,
    record::{EndBody, SessionBody, UsageBody, UserBody},
};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

use crate::langfuse::{
    span::{Level, Span, SpanId},
    spans::Tracer,
};

pub(super) const UID: &str = "6fa459ea-ee8a-3ca4-894e-db77e160355e";

pub(super) fn second(n: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + n).unwrap()
}

/// Records, a second apart.
pub(super) struct Log {
    pub(super) records: Vec<Record>,
    pub(super) attempt: u32,
    pub(super) turn: u32,
}

impl Log {
    pub(super) fn new() -> Self {
        let mut log = Self {
            records: Vec::new(),
            attempt: 1,
            turn: 0,
        };
        log.attempt(1, 1);
        log
    }

    pub(super) fn now(&self) -> i64 {
        self.records.len() as i64
    }

    pub(super) fn put(&mut self, kind: Kind, body: &impl Serialize) -> &mut Self {
        let seq = self.records.len() as u64 + 1;
        self.records.push(Record {
            seq,
            attempt: self.attempt,
            turn: self.turn,
            ts: second(self.now()),
            kind,
            was: None,
            body: RawValue::from_string(serde_json::to_string(body).unwrap()).unwrap(),
        });
        self
    }

    pub(super) fn attempt(&mut self, run: u32, attempt: u32) -> &mut Self {
        self.attempt = attempt;
        self.put(
            Kind::Session,
            &SessionBody::AttemptStarted {
                run,
                pod_uid: String::new(),
                runner_version: "1".into(),
            },
        )
    }

    pub(super) fn user(&mut self, text: &str) -> &mut Self {
        self.turn += 1;
        self.more(text)
    }

    /// A message into the turn that is open.
    pub(super) fn more(&mut self, text: &str) -> &mut Self {
        self.put(
            Kind::User,
            &UserBody {
                command: "c".into(),
                uuid: Uuid::nil(),
                text: text.into(),
            },
        )
    }

    pub(super) fn usage(&mut self, id: &str, output_tokens: u64, open: bool) -> &mut Self {
        let start = self.now();
        self.put(
            Kind::Usage,
            &UsageBody {
                message_id: id.into(),
                model: "claude-opus-5-5".into(),
                usage: Usage {
                    input_tokens: 25,
                    output_tokens,
                    cache_read_input_tokens: 12_000,
                    cache_creation_input_tokens: 300,
                },
                cost_usd: None,
                open,
                estimated: false,
                started_at: second(start - 1) + SignedDuration::from_millis(100),
                first_token_at: (!open).then(|| second(start - 1) + SignedDuration::from_millis(400)),
                ended_at: (!open).then(|| second(start)),
            },
        )
    }

    pub(super) fn cli(&mut self, line: &Value) -> &mut Self {
        self.put(Kind::Cli, line)
    }

    pub(super) fn says(&mut self, id: &str, agent: Option<&str>, block: &Value) -> &mut Self {
        self.cli(&json!({"type": "assistant", "parent_tool_use_id": agent, "message":
            {"id": id, "model": "claude-opus-5-5[1m]", "role": "assistant", "content": [block]}}))
    }

    pub(super) fn tool(&mut self, id: &str, agent: Option<&str>, tool: &str, name: &str, input: &Value) -> &mut Self {
        self.says(
            id,
            agent,
            &json!({"type": "tool_use", "id": tool, "name": name, "input": input}),
        )
    }

    pub(super) fn tool_result(
        &mut self,
        agent: Option<&str>,
        tool: &str,
        content: &Value,
        is_error: bool,
    ) -> &mut Self {
        self.cli(
            &json!({"type": "user", "parent_tool_use_id": agent, "message": {"role": "user", "content":
            [{"type": "tool_result", "tool_use_id": tool, "content": content, "is_error": is_error}]}}),
        )
    }

    pub(super) fn result(&mut self, text: &str) -> &mut Self {
        self.cli(
            &json!({"type": "result", "subtype": "success", "is_error": false, "result": text,
            "num_turns": 2, "total_cost_usd": 0.25, "stop_reason": "end_turn", "terminal_reason": "completed"}),
        )
    }

    pub(super) fn turn_ended(&mut self, outcome: Outcome) -> &mut Self {
        let turn = self.turn;
        self.put(Kind::Session, &SessionBody::TurnEnded { turn, outcome })
    }

    pub(super) fn end(&mut self, outcome: Outcome) -> &mut Self {
        self.put(
            Kind::End,
            &EndBody {
                outcome,
                last_seq: 0,
                bytes: 0,
                sha256: String::new(),
            },
        )
    }

    pub(super) fn spans(&self) -> Vec<Span> {
        spans(&self.records, false)
    }
}

pub(super) fn spans(records: &[Record], mask: bool) -> Vec<Span> {
    let mut tracer = Tracer::new(UID, 1, mask);
    for record in records {
        tracer.record(record);
    }
    tracer.take_ready()
}

pub(super) fn text(block: &str) -> Value {
    json!({"type": "text", "text": block})
}

/// The tree, one line a span, in the order in which they began.
pub(super) fn tree(spans: &[Span]) -> String {
    let ids: HashMap<SpanId, usize> = spans.iter().enumerate().map(|(n, span)| (span.id, n)).collect();
    assert_eq!(ids.len(), spans.len(), "two spans have one id");
    let mut children: HashMap<Option<usize>, Vec<&Span>> = HashMap::new();
    for span in spans {
        let parent = span.parent.and_then(|id| ids.get(&id).copied());
        children.entry(parent).or_default().push(span);
    }
    let mut out = String::new();
    walk(&mut out, &children, &ids, None, 0);
    out
}

fn walk(
    out: &mut String,
    children: &HashMap<Option<usize>, Vec<&Span>>,
    ids: &HashMap<SpanId, usize>,
    parent: Option<usize>,
    depth: usize,
) {
    let mut here = children.get(&parent).cloned().unwrap_or_default();
    here.sort_by_key(|span| (span.start, span.end));
    for span in here {
        let since = |at: Timestamp| at.duration_since(second(0)).as_secs_f64();
        let mut line = format!(
            "{}{} ({:?}) {:.1}-{:.1}",
            "  ".repeat(depth),
            span.name,
            span.kind,
            since(span.start),
            since(span.end)
        );
        if span.level != Level::Default {
            write!(line, " {:?}:{}", span.level, span.status.as_deref().unwrap_or("")).unwrap();
        }
        if let (Some(model), Some(usage)) = (&span.model, &span.usage) {
            write!(line, " {model} {}+{}", usage.input_tokens, usage.output_tokens).unwrap();
        }
        for (arrow, value) in [("<", &span.input), (">", &span.output)] {
            if let Some(value) = value {
                write!(line, " {arrow} {value}").unwrap();
            }
        }
        out.push_str(&line);
        out.push('\n');
        walk(out, children, ids, Some(ids[&span.id]), depth + 1);
    }
}

pub(super) fn with_a_tool() -> Log {
    let mut log = Log::new();
    log.cli(&json!({"type": "system", "subtype": "init", "claude_code_version": "2.1.329"}))
        .user("please list MARKER-1")
        .usage("msg_a", 1, true)
        .says("msg_a", None, &text("I look"))
        .tool("msg_a", None, "tool_1", "Bash", &json!({"command": "ls"}))
        .usage("msg_a", 40, false)
        .tool_result(None, "tool_1", &json!("ls: no such file"), true)
        .usage("msg_b", 9, false)
        .says("msg_b", None, &text("all done"))
        .result("all done")
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    log
}
