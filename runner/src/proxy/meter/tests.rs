//! What an answer is found to have used.

use super::*;

fn meter() -> Meter {
    let asked = Asked::read(br#"{"model":"asked","max_tokens":100}"#).unwrap();
    Meter::new(asked, Arc::default(), at(1))
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn event(name: &str, data: &str) -> Event {
    Event {
        name: name.into(),
        data: data.into(),
        length: data.len(),
    }
}

const START: &str = r#"{"type":"message_start","message":{"id":"msg_1","model":"some-model","usage":
    {"input_tokens":25,"cache_read_input_tokens":12000,"cache_creation_input_tokens":300,"output_tokens":1}}}"#;

#[test]
fn a_stream_tells_its_start_its_first_token_and_its_numbers() {
    let mut meter = meter();
    assert_eq!(meter.event(&event("message_start", START), at(2)), Step::Opened);
    let opening = meter.opening();
    assert!(opening.open && !opening.estimated && opening.ended_at.is_none());
    assert_eq!(
        (opening.message_id.as_str(), opening.model.as_str()),
        ("msg_1", "some-model")
    );
    assert_eq!(meter.event(&event("content_block_start", "{}"), at(3)), Step::Nothing);
    assert_eq!(meter.event(&event("content_block_delta", "{}"), at(4)), Step::Nothing);
    let delta = r#"{"usage":{"input_tokens":0,"cache_read_input_tokens":null,"output_tokens":90.0}}"#;
    assert_eq!(meter.event(&event("message_delta", delta), at(5)), Step::Nothing);
    assert_eq!(meter.event(&event("message_stop", "{}"), at(5)), Step::Ended);
    let closing = meter.closing(at(6));
    assert_eq!(
        closing.usage,
        Usage {
            input_tokens: 25,
            output_tokens: 90,
            cache_read_input_tokens: 12000,
            cache_creation_input_tokens: 300
        }
    );
    assert!(!closing.open && !closing.estimated);
    assert_eq!(
        (closing.started_at, closing.first_token_at, closing.ended_at),
        (at(1), Some(at(3)), Some(at(6)))
    );
}

#[test]
fn a_cut_stream_is_closed_with_an_estimate_from_the_bytes_seen() {
    let mut meter = meter();
    meter.event(&event("message_start", START), at(2));
    let delta = Event {
        length: DELTA_ENVELOPE + 300,
        ..event("content_block_delta", "")
    };
    meter.event(&delta, at(3));
    let closing = meter.closing(at(4));
    assert!(closing.estimated);
    assert_eq!((closing.usage.input_tokens, closing.usage.output_tokens), (25, 100));
}

#[test]
fn events_without_a_name_are_told_by_their_type() {
    let mut meter = meter();
    assert_eq!(meter.event(&event("", START), at(2)), Step::Opened);
    assert_eq!(
        meter.event(&event("", r#"{"type":"message_stop"}"#), at(2)),
        Step::Ended
    );
}

#[test]
fn an_error_in_the_stream_stands_for_its_status() {
    let mut meter = meter();
    let overloaded = r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#;
    assert_eq!(meter.event(&event("error", overloaded), at(2)), Step::Failed(529));
}

#[test]
fn a_start_that_cannot_be_read_is_metered_by_its_bytes() {
    let mut meter = meter();
    assert_eq!(meter.event(&event("message_start", "oops"), at(2)), Step::Opened);
    meter.seen(30);
    let closing = meter.closing(at(3));
    assert!(closing.message_id.starts_with("cut-") && closing.estimated);
    assert_eq!((closing.model.as_str(), closing.usage.output_tokens), ("asked", 10));
    assert_eq!(
        closing.message_id,
        meter.opening().message_id,
        "one id for both records"
    );
}

#[test]
fn numbers_count_whatever_stands_beside_them() {
    let asked = br#"{"model":"claude-opus-5-5","max_tokens":100}"#;
    for beside in [
        r#""id":null,"model":"claude-opus-5-5""#,
        r#""id":"msg_1","model":null"#,
        r#""model":7"#,
        r#""id":{}"#,
    ] {
        let message = format!(r#"{{{beside},"usage":{{"input_tokens":25,"output_tokens":4,"cache_creation":[]}}}}"#);
        let mut streamed = Meter::new(Asked::read(asked).unwrap(), Arc::default(), at(1));
        let start = format!(r#"{{"type":"message_start","message":{message}}}"#);
        assert_eq!(streamed.event(&event("message_start", &start), at(2)), Step::Opened);
        streamed.event(
            &event("message_delta", r#"{"usage":{"output_tokens":4,"input_tokens":"x"}}"#),
            at(2),
        );
        let mut whole = Meter::new(Asked::read(asked).unwrap(), Arc::default(), at(1));
        whole.whole(message.as_bytes(), Encoding::Plain, at(2));
        for meter in [streamed, whole] {
            let closing = meter.closing(at(2));
            assert_eq!(
                (closing.usage.input_tokens, closing.usage.output_tokens),
                (25, 4),
                "{beside}"
            );
            assert_eq!(
                (closing.estimated, closing.model.as_str()),
                (false, "claude-opus-5-5"),
                "{beside}"
            );
            assert_eq!(closing.cost_usd, Some(NanoUsd(25 * 4_000 + 4 * 20_000)), "{beside}");
        }
    }
}

/// A response without a number of its output is no response without output.
#[test]
fn a_response_that_does_not_tell_its_output_is_estimated() {
    for usage in [
        r#"{"input_tokens":25}"#,
        r#"{"input_tokens":25,"output_tokens":"4"}"#,
        r#"{"input_tokens":25,"output_tokens":null}"#,
        r#"{"input_tokens":25,"output_tokens":{}}"#,
    ] {
        let message = format!(r#"{{"id":"msg_1","model":"some-model","content":"abcdefghijkl","usage":{usage}}}"#);
        let mut whole = meter();
        whole.whole(message.as_bytes(), Encoding::Plain, at(2));
        let closing = whole.closing(at(2));
        assert!(closing.estimated, "{usage}");
        assert_eq!(closing.usage.input_tokens, 25, "{usage}");
        assert_eq!(
            closing.usage.output_tokens,
            (message.len() as u64).div_ceil(3),
            "{usage}"
        );
    }
}

#[test]
fn a_response_in_an_unknown_name_costs_what_was_asked_for() {
    let asked = Asked::read(br#"{"model":"claude-opus-5-5","max_tokens":100}"#).unwrap();
    let mut meter = Meter::new(asked, Arc::default(), at(1));
    meter.whole(
        br#"{"id":"m","model":"our-alias","usage":{"output_tokens":7}}"#,
        Encoding::Plain,
        at(2),
    );
    let closing = meter.closing(at(2));
    assert_eq!(
        (closing.model.as_str(), closing.cost_usd),
        ("our-alias", Some(NanoUsd(140_000)))
    );
}

#[test]
fn counts_that_nothing_can_have_are_cut() {
    let mut meter = meter();
    meter.whole(
        br#"{"id":"m","usage":{"output_tokens":18446744073709551615,"input_tokens":-5,"cache_read_input_tokens":1e300}}"#,
        Encoding::Plain,
        at(2),
    );
    let Usage {
        input_tokens,
        output_tokens,
        cache_read_input_tokens,
        ..
    } = meter.closing(at(2)).usage;
    assert_eq!(
        (input_tokens, output_tokens, cache_read_input_tokens),
        (0, MAX_COUNT, MAX_COUNT)
    );
}

#[test]
fn an_answer_that_nobody_waited_for_is_no_longer_than_an_answer_can_be() {
    let asked = Asked::read(br#"{"model":"m","max_tokens":18446744073709551615}"#).unwrap();
    let mut meter = Meter::new(asked, Arc::default(), at(1));
    meter.given_up();
    assert_eq!(meter.closing(at(2)).usage.output_tokens, 1_000_000);
}

#[test]
fn a_whole_response_is_read_at_once() {
    let mut meter = meter();
    meter.whole(
        br#"{"usage":{"output_tokens":7,"input_tokens":3},"id":"msg_2","model":"m","content":[]}"#,
        Encoding::Plain,
        at(2),
    );
    let closing = meter.closing(at(2));
    assert!(!closing.estimated);
    assert_eq!((closing.message_id.as_str(), closing.usage.output_tokens), ("msg_2", 7));
}

fn packed(text: &[u8]) -> Vec<u8> {
    use std::io::Write as _;

    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn a_packed_response_is_read_as_one_that_is_not() {
    let mut meter = meter();
    let text = br#"{"usage":{"output_tokens":7,"input_tokens":3},"id":"msg_2","model":"m","content":[]}"#;
    meter.whole(&packed(text), Encoding::Gzip, at(2));
    let closing = meter.closing(at(2));
    assert!(!closing.estimated);
    assert_eq!((closing.message_id.as_str(), closing.usage.output_tokens), ("msg_2", 7));
}

#[test]
fn a_response_is_unpacked_so_far_and_metered_by_that() {
    let mut meter = meter();
    meter.whole(&packed(&vec![b'x'; 65 << 20]), Encoding::Gzip, at(2));
    assert_eq!(meter.closing(at(2)).usage.output_tokens, (64_u64 << 20).div_ceil(3));
}

#[test]
fn what_is_not_packed_as_it_is_said_to_be_is_metered_by_its_bytes() {
    let mut meter = meter();
    meter.whole(&[b'x'; 300], Encoding::Gzip, at(2));
    assert_eq!(meter.closing(at(2)).usage.output_tokens, 100);
}

#[test]
fn a_second_start_in_a_response_is_none() {
    let mut meter = meter();
    meter.event(&event("message_start", START), at(2));
    let again = START.replace("msg_1", "msg_2");
    assert_eq!(meter.event(&event("message_start", &again), at(2)), Step::Nothing);
    assert_eq!(meter.closing(at(3)).message_id, "msg_1");
}

#[test]
fn a_clock_that_is_set_back_gives_no_time_before_the_request() {
    let mut meter = meter();
    meter.event(&event("message_start", START), at(0));
    meter.event(&event("content_block_delta", "{}"), at(-3_600));
    let closing = meter.closing(at(-3_599));
    assert_eq!((closing.first_token_at, closing.ended_at), (Some(at(1)), Some(at(1))));
}
