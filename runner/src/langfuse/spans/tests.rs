//! Spans of records made by hand, in the shape in which the CLI writes its lines.

mod log;

use insta::assert_snapshot;
use protocol::{Kind, Outcome, Record};
use serde_json::{Value, json};

use super::{
    super::{span::Span, text::CAP},
    Tracer,
};
use log::{Log, UID, spans, text, tree, with_a_tool};

#[test]
fn a_turn_has_its_calls_and_tools_beside_each_other() {
    assert_snapshot!(tree(&with_a_tool().spans()), @r##"
    agent-session (Agent) 0.0-12.0 < please list MARKER-1 > all done
      agent-turn (Agent) 2.0-11.0 < please list MARKER-1 > all done
        Bash (Tool) 5.0-7.0 Error:ls: no such file < {"command":"ls"} > ls: no such file
        llm-call (Generation) 5.1-6.0 claude-opus-5-5 25+40 < [{"content":"please list MARKER-1","role":"user"}] > {"content":"I look","role":"assistant","tool_calls":[{"function":{"arguments":"{\"command\":\"ls\"}","name":"Bash"},"id":"tool_1","type":"function"}]}
        llm-call (Generation) 7.1-8.0 claude-opus-5-5 25+9 < [{"content":"ls: no such file","role":"tool","tool_call_id":"tool_1"}] > {"content":"all done","role":"assistant","tool_calls":[]}
    "##);
}

#[test]
fn a_subagent_has_its_calls_and_tools_below_it() {
    let mut log = Log::new();
    log.user("delegate")
        .tool("msg_a", None, "tool_1", "Agent", &json!({"prompt": "sub task"}))
        .usage("msg_a", 5, false)
        .cli(
            &json!({"type": "system", "subtype": "task_started", "tool_use_id": "tool_1", "task_type": "local_agent",
            "subagent_type": "reviewer", "is_backgrounded": false}),
        )
        .cli(&json!({"type": "user", "parent_tool_use_id": "tool_1", "message":
            {"role": "user", "content": [{"type": "text", "text": "sub task"}]}}))
        .usage("msg_s", 6, false)
        .tool("msg_s", Some("tool_1"), "tool_2", "Read", &json!({"path": "x"}))
        .tool_result(
            Some("tool_1"),
            "tool_2",
            &json!([{"type": "text", "text": "content"}]),
            false,
        )
        .usage("msg_t", 7, false)
        .says("msg_t", Some("tool_1"), &text("sub says hi"))
        .tool_result(None, "tool_1", &json!("sub says hi"), false)
        .usage("msg_b", 8, false)
        .says("msg_b", None, &text("main done"))
        .result("main done")
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    assert_snapshot!(tree(&log.spans()), @r##"
    agent-session (Agent) 0.0-16.0 < delegate > main done
      agent-turn (Agent) 1.0-15.0 < delegate > main done
        subagent (Agent) 2.0-11.0 < {"prompt":"sub task"} > sub says hi
          llm-call (Generation) 5.1-6.0 claude-opus-5-5 25+6 < [{"content":"sub task","role":"user"}] > {"content":"","role":"assistant","tool_calls":[{"function":{"arguments":"{\"path\":\"x\"}","name":"Read"},"id":"tool_2","type":"function"}]}
          Read (Tool) 7.0-8.0 < {"path":"x"} > content
          llm-call (Generation) 8.1-9.0 claude-opus-5-5 25+7 < [{"content":"content","role":"tool","tool_call_id":"tool_2"}] > {"content":"sub says hi","role":"assistant","tool_calls":[]}
        llm-call (Generation) 2.1-3.0 claude-opus-5-5 25+5 < [{"content":"delegate","role":"user"}] > {"content":"","role":"assistant","tool_calls":[{"function":{"arguments":"{\"prompt\":\"sub task\"}","name":"Agent"},"id":"tool_1","type":"function"}]}
        llm-call (Generation) 11.1-12.0 claude-opus-5-5 25+8 < [{"content":"sub says hi","role":"tool","tool_call_id":"tool_1"}] > {"content":"main done","role":"assistant","tool_calls":[]}
    "##);
}

#[test]
fn a_subagent_in_the_background_outlives_its_turn() {
    let mut log = Log::new();
    log.user("delegate")
        .usage("msg_a", 5, false)
        .tool("msg_a", None, "tool_1", "Agent", &json!({"prompt": "sub task"}))
        .cli(
            &json!({"type": "system", "subtype": "task_started", "tool_use_id": "tool_1", "task_type": "local_agent",
            "is_backgrounded": true}),
        )
        .tool_result(None, "tool_1", &json!("Async agent launched"), false)
        .result("waiting")
        .turn_ended(Outcome::Succeeded)
        .usage("msg_s", 6, false)
        .says("msg_s", Some("tool_1"), &text("sub says hi"))
        .cli(
            &json!({"type": "system", "subtype": "task_notification", "tool_use_id": "tool_1", "status": "completed",
            "summary": "sub says hi"}),
        )
        .end(Outcome::Succeeded);
    assert_snapshot!(tree(&log.spans()), @r##"
    agent-session (Agent) 0.0-11.0 < delegate > waiting
      agent-turn (Agent) 1.0-7.0 < delegate > waiting
        llm-call (Generation) 1.1-2.0 claude-opus-5-5 25+5 < [{"content":"delegate","role":"user"}] > {"content":"","role":"assistant","tool_calls":[{"function":{"arguments":"{\"prompt\":\"sub task\"}","name":"Agent"},"id":"tool_1","type":"function"}]}
        subagent (Agent) 3.0-10.0 < {"prompt":"sub task"} > sub says hi
          llm-call (Generation) 7.1-8.0 claude-opus-5-5 25+6 < [] > {"content":"sub says hi","role":"assistant","tool_calls":[]}
    "##);
}

#[test]
fn a_metered_response_that_the_cli_never_shows_is_a_generation_all_the_same() {
    let mut log = Log::new();
    log.user("/compact")
        .usage("msg_x", 700, false)
        .cli(&json!({"type": "system", "subtype": "compact_boundary"}))
        .result("")
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    let spans = log.spans();
    let tokens: u64 = spans
        .iter()
        .filter_map(|span| span.usage)
        .map(|usage| usage.output_tokens)
        .sum();
    assert_eq!(tokens, 700);
    assert!(spans.iter().any(|span| span.name == "compact"));
}

#[test]
fn every_metered_response_is_in_exactly_one_generation() {
    let spans = with_a_tool().spans();
    let usage: Vec<u64> = spans
        .iter()
        .filter_map(|span| span.usage)
        .map(|usage| usage.output_tokens)
        .collect();
    assert_eq!(usage, [40, 9]);
}

#[test]
fn numbers_that_come_when_their_generation_is_out_make_no_second_one() {
    let mut log = Log::new();
    log.user("hello")
        .usage("msg_a", 1, true)
        .says("msg_a", None, &text("one"))
        .turn_ended(Outcome::Succeeded)
        .usage("msg_a", 40, false)
        .end(Outcome::Succeeded);
    let spans = log.spans();
    assert_eq!(spans.iter().filter(|span| span.name == "llm-call").count(), 1);
}

#[test]
fn an_api_error_is_an_error_of_the_turn_and_of_the_session() {
    let mut log = Log::new();
    log.user("hello")
        .cli(&json!({"type": "system", "subtype": "api_retry", "attempt": 1, "error_status": 401}))
        .cli(&json!({"type": "assistant", "is_api_error_message": true, "message":
            {"id": "u", "model": "<synthetic>", "content": [{"type": "text", "text": "Invalid API key"}]}}))
        .cli(&json!({"type": "result", "subtype": "success", "is_error": true, "result": "Invalid API key"}))
        .turn_ended(Outcome::InvalidCredentials)
        .end(Outcome::InvalidCredentials);
    assert_snapshot!(tree(&log.spans()), @r##"
    agent-session (Agent) 0.0-6.0 Error:invalidCredentials < hello > Invalid API key
      agent-turn (Agent) 1.0-5.0 Error:Invalid API key < hello > Invalid API key
        api-retry (Event) 2.0-2.0 Warning:attempt 1: 401
        api-error (Event) 3.0-3.0 Error:Invalid API key
    "##);
}

#[test]
fn what_is_open_at_the_end_was_interrupted() {
    let mut log = Log::new();
    log.user("hello")
        .tool("msg_a", None, "tool_1", "Bash", &json!({"command": "sleep"}))
        .usage("msg_a", 5, true)
        .end(Outcome::Stopped);
    assert_snapshot!(tree(&log.spans()), @r##"
    agent-session (Agent) 0.0-4.0 Warning:interrupted < hello
      agent-turn (Agent) 1.0-4.0 Warning:interrupted < hello
        Bash (Tool) 2.0-4.0 Warning:interrupted < {"command":"sleep"}
        llm-call (Generation) 2.1-2.1 Warning:the response was cut claude-opus-5-5 25+5 < [{"content":"hello","role":"user"}] > {"content":"","role":"assistant","tool_calls":[{"function":{"arguments":"{\"command\":\"sleep\"}","name":"Bash"},"id":"tool_1","type":"function"}]}
    "##);
}

#[test]
fn a_message_into_a_running_turn_is_in_the_next_calls_input() {
    let mut log = Log::new();
    log.user("first")
        .says("msg_a", None, &text("one"))
        .more("second MARKER-2")
        .says("msg_b", None, &text("two"))
        .result("two")
        .turn_ended(Outcome::Succeeded);
    let spans = log.spans();
    let turns: Vec<&Span> = spans.iter().filter(|span| span.name == "agent-turn").collect();
    assert_eq!(turns.len(), 1);
    assert_eq!(turns[0].input.as_deref(), Some("first"));
    let inputs: Vec<bool> = spans
        .iter()
        .filter(|span| span.name == "llm-call")
        .map(|span| span.input.as_ref().unwrap().contains("MARKER-2"))
        .collect();
    assert_eq!(inputs, [false, true]);
}

#[test]
fn a_replayed_message_is_not_read_twice() {
    let mut log = Log::new();
    log.user("MARKER-1")
        .cli(&json!({"type": "user", "isReplay": true, "message": {"role": "user", "content": "MARKER-1"}}))
        .says("msg_a", None, &text("one"))
        .turn_ended(Outcome::Succeeded);
    let spans = log.spans();
    let call = spans.iter().find(|span| span.name == "llm-call").unwrap();
    assert_eq!(call.input.as_ref().unwrap().matches("MARKER-1").count(), 1);
}

#[test]
fn masked_spans_keep_numbers_and_names_and_no_text() {
    let records = with_a_tool().records;
    let spans = spans(&records, true);
    let all = format!("{spans:?}");
    for text in ["MARKER-1", "I look", "no such file", "all done", "\"ls\""] {
        assert!(!all.contains(text), "{text} in {all}");
    }
    assert!(all.contains("Bash") && all.contains("claude-opus-5-5") && all.contains("[REDACTED]"));
    assert_eq!(spans.len(), crate::langfuse::spans::tests::spans(&records, false).len());
}

#[test]
fn long_texts_are_cut_and_their_length_is_told() {
    let much = "x".repeat(50_000);
    let mut log = Log::new();
    log.user(&format!("MARKER-3 {much}"))
        .tool("msg_a", None, "tool_1", "Write", &json!({"path": "p", "content": much}))
        .tool_result(None, "tool_1", &json!(much), false)
        .says("msg_b", None, &text(&much))
        .result(&much)
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    let spans = log.spans();
    for span in &spans {
        for field in [&span.input, &span.output].into_iter().flatten() {
            assert!(field.chars().count() <= CAP, "{}: {}", span.name, field.len());
        }
    }
    let turn = spans.iter().find(|span| span.name == "agent-turn").unwrap();
    assert!(turn.metadata.contains(&("input_length", json!(50_009))));
    assert!(turn.metadata.contains(&("output_length", json!(50_000))));
    let call = spans.iter().find(|span| span.name == "llm-call").unwrap();
    assert!(
        serde_json::from_str::<Value>(call.input.as_ref().unwrap()).unwrap()[0]["content"]
            .as_str()
            .unwrap()
            .contains("MARKER-3")
    );
}

/// Spans that a process sends: it replays what an earlier one has spooled.
fn sent(before: &[Record], after: &[Record]) -> Vec<Span> {
    let mut tracer = Tracer::new(UID, 1, false);
    for record in before {
        tracer.record(record);
    }
    drop(tracer.take_ready());
    for record in after {
        tracer.record(record);
    }
    tracer.take_ready()
}

#[test]
fn after_a_kill_at_any_record_no_span_is_sent_twice_and_only_what_was_ready_is_missing() {
    let mut log = with_a_tool();
    log.records.pop();
    log.user("again")
        .says("msg_c", None, &text("third"))
        .usage("msg_c", 4, false)
        .result("third")
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    let whole = log.spans();
    for kill in 0..log.records.len() {
        let (before, after) = log.records.split_at(kill);
        let mut both = spans(before, false);
        both.extend(sent(before, after));
        both.sort_by_key(|span| span.id);
        let mut expected = whole.clone();
        expected.sort_by_key(|span| span.id);
        assert_eq!(both, expected, "killed before record {kill}");
    }
}

#[test]
fn a_lost_attempt_leaves_its_turn_open_and_a_stopped_one_does_not() {
    let turn = |first: Outcome| {
        let mut log = Log::new();
        log.user("hello").says("msg_a", None, &text("one")).end(first);
        let before = log.records.len();
        log.attempt(1, 2)
            .says("msg_b", None, &text("two"))
            .result("two")
            .turn_ended(Outcome::Succeeded)
            .end(Outcome::Succeeded);
        let (before, after) = log.records.split_at(before);
        let spans = sent(before, after);
        let all = [crate::langfuse::spans::tests::spans(before, false), spans.clone()].concat();
        (all.len(), tree(&all), spans)
    };
    let (_, lost, spans) = turn(Outcome::Lost);
    assert_eq!(spans.iter().filter(|span| span.name == "llm-call").count(), 2, "{lost}");
    assert_eq!(spans.iter().filter(|span| span.name == "agent-session").count(), 1);
    let (_, stopped, spans) = turn(Outcome::Stopped);
    assert_eq!(spans.iter().filter(|span| span.name == "llm-call").count(), 1);
    assert_snapshot!(stopped, @r##"
    agent-session (Agent) 0.0-3.0 Warning:interrupted < hello
      agent-turn (Agent) 1.0-3.0 Warning:interrupted < hello
        llm-call (Generation) 1.0-2.0 < [{"content":"hello","role":"user"}] > {"content":"one","role":"assistant","tool_calls":[]}
    agent-session (Agent) 4.0-8.0 < hello > two
      agent-turn (Agent) 5.0-7.0 > two
        llm-call (Generation) 5.0-5.0 < [] > {"content":"two","role":"assistant","tool_calls":[]}
    "##);
}

#[test]
fn a_new_run_has_a_root_of_its_own() {
    let mut log = with_a_tool();
    log.attempt(2, 2)
        .user("more")
        .result("ok")
        .turn_ended(Outcome::Succeeded)
        .end(Outcome::Succeeded);
    let spans = log.spans();
    let roots: Vec<&Span> = spans.iter().filter(|span| span.parent.is_none()).collect();
    assert_eq!(roots.len(), 2);
    assert_eq!(
        (roots[1].input.as_deref(), roots[1].output.as_deref()),
        (Some("more"), Some("ok"))
    );
    assert!(roots[1].metadata.contains(&("run", json!(2))));
}

#[test]
fn bodies_that_cannot_be_read_are_passed_over() {
    let mut log = Log::new();
    for kind in [Kind::Cli, Kind::User, Kind::Usage, Kind::Session, Kind::End] {
        log.put(kind, &json!({"type": ["odd"], "text": 1}));
        log.put(kind, &json!("odd"));
    }
    log.cli(&json!({"type": "assistant", "message": "odd"}))
        .cli(&json!({"type": "assistant", "message": {"id": "m", "content": {"a": 1}}}))
        .cli(&json!({"type": "user", "message": {"content": [1, {"type": "tool_result"}]}}))
        .cli(&json!({"type": "system", "subtype": "task_notification", "tool_use_id": "nobody"}))
        .cli(&json!({"type": "of the future"}))
        .end(Outcome::Succeeded);
    assert!(log.spans().iter().any(|span| span.name == "agent-session"));
}

/// The agent can write lines of its own to the CLI's stdout.
#[test]
fn what_is_kept_of_lines_without_end_is_bounded_and_the_next_call_is_told_with_its_first_and_last() {
    let mut log = Log::new();
    log.user("MARKER-4");
    let much = "x".repeat(20_000);
    for n in 0..600 {
        let (id, tool) = (format!("msg_{n}"), format!("tool_{n}"));
        log.tool_result(None, &tool, &json!(format!("{n} {much}")), false)
            .tool_result(Some(&id), &tool, &json!(much), false)
            .says("msg_a", Some("tool_a"), &text(&much))
            .says(&id, Some("tool_b"), &text(&much))
            .tool("msg_a", Some("tool_a"), &tool, "Bash", &json!({"command": much}));
    }
    let mut tracer = Tracer::new(UID, 1, false);
    for record in &log.records {
        tracer.record(record);
    }
    let said: usize = tracer.lanes.values().map(|lane| lane.size).sum();
    let called = tracer.lanes.values().filter_map(|lane| lane.call.as_ref());
    let texts = called.flat_map(|call| &call.texts).map(String::len);
    assert!(said + texts.sum::<usize>() < 32 << 20, "{} MiB", said >> 20);
    assert!(tracer.lanes.len() <= 256 && tracer.tools.len() <= 512 && tracer.closed.len() <= 256);
    log.records.clear();
    log.says("msg_z", None, &text("done")).turn_ended(Outcome::Succeeded);
    for record in &log.records {
        tracer.record(record);
    }
    let spans = tracer.take_ready();
    let call = spans
        .iter()
        .find(|span| span.metadata.contains(&("message_id", json!("msg_z"))));
    let input = call.unwrap().input.as_ref().unwrap();
    assert!(input.contains("MARKER-4") && input.contains("599 x"), "{input}");
}
