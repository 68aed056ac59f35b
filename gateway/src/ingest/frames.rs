//! Frames of a runner as they are read: each byte of a record is looked at once, and stays where it is in the frame.

use bytes::Bytes;
use protocol::{
    Kind, Record, RecordHead,
    frame::RunnerFrame,
    record::{GapBody, MAX_RECORD, checksum},
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::End;
use crate::store::{MAX_SEQ, Missing, NewRecord};

/// Longest frame that has no records, such as a listing of a folder: some wait for readers that may be slow.
const MAX_OTHER: usize = 4 << 20;

/// A frame.
#[derive(Debug)]
pub(super) enum Frame {
    /// Records, parts of the frame's memory.
    Records(Vec<NewRecord>),
    /// Anything else.
    Other(RunnerFrame),
}

/// Reads a frame. The one key of a frame says what it is; records are nearly all frames.
pub(super) fn parse(text: &Utf8Bytes) -> Result<Frame, End> {
    let wrong = |error: serde_json::Error| End::Protocol(format!("frame not understood: {error}"));
    if !text.starts_with(r#"{"records""#) {
        if text.len() > MAX_OTHER {
            return Err(End::Protocol(format!(
                "a frame without records has at most {MAX_OTHER} bytes"
            )));
        }
        return serde_json::from_str(text).map(Frame::Other).map_err(wrong);
    }
    let records = match in_one_pass(text) {
        Some(records) => records,
        None => in_two(text)?,
    };
    let frame: &Bytes = text.as_ref();
    let mut last = 0;
    let records = records.into_iter().map(|(head, record)| {
        let record = new(head, frame.slice_ref(record.as_bytes()), last).map_err(|what| after(last, &what))?;
        last = head.seq;
        Ok(record)
    });
    records.collect::<Result<_, _>>().map(Frame::Records)
}

fn after(last: u64, what: &str) -> End {
    End::Protocol(format!("record after seq {last}: {what}"))
}

/// The records of a frame as our runners write it, without spaces between them; `None` for any other.
fn in_one_pass(text: &str) -> Option<Vec<(RecordHead, &str)>> {
    let mut rest = text.strip_prefix(r#"{"records":["#)?;
    let mut found = Vec::new();
    while rest.starts_with('{') {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<RecordHead>();
        let head = values.next()?.ok()?;
        let (record, behind) = rest.split_at(values.byte_offset());
        found.push((head, record));
        rest = match behind.as_bytes() {
            [b',', ..] => &behind[1..],
            b"]}" => return Some(found),
            _ => return None,
        };
    }
    None
}

/// The records of any frame of records, and what is wrong with one.
fn in_two(text: &str) -> Result<Vec<(RecordHead, &str)>, End> {
    #[derive(Deserialize)]
    struct Records<'a> {
        #[serde(borrow)]
        records: Vec<&'a RawValue>,
    }
    let Records { records } =
        serde_json::from_str(text).map_err(|error| End::Protocol(format!("frame not understood: {error}")))?;
    let mut last = 0;
    let heads = records.into_iter().map(|record| {
        let head: RecordHead = serde_json::from_str(record.get()).map_err(|error| after(last, &error.to_string()))?;
        last = head.seq;
        Ok((head, record.get()))
    });
    heads.collect()
}

fn new(head: RecordHead, bytes: Bytes, last: u64) -> Result<NewRecord, String> {
    if head.seq <= last || head.seq > MAX_SEQ {
        return Err(format!("seq {} is not between it and {MAX_SEQ}", head.seq));
    }
    if bytes.len() > MAX_RECORD {
        return Err(format!("longer than {MAX_RECORD} bytes"));
    }
    Ok(NewRecord {
        missing: missing(&head, &bytes)?,
        checksum: checksum(&bytes),
        head,
        bytes,
    })
}

/// What a `gap` says is missing before it. One that says nothing stands where a spool goes on behind the records of
/// another: whatever is not there before it will not come.
fn missing(head: &RecordHead, bytes: &[u8]) -> Result<Option<Missing>, String> {
    if head.kind != Kind::Gap {
        return Ok(None);
    }
    let record: Record = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let GapBody { from, to, length } = serde_json::from_str(record.body.get()).map_err(|error| error.to_string())?;
    let (first, last) = match (from, to, length) {
        (Some(from), Some(to), _) => (from, to),
        (None, None, None) => (1, head.seq - 1),
        _ => return Ok(None),
    };
    if first == 0 || last >= head.seq {
        return Err(format!("a gap at seq {} cannot miss {first} to {last}", head.seq));
    }
    Ok((first <= last).then_some(Missing { first, last }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(seq: u64, body: &str) -> String {
        format!(r#"{{"seq":{seq},"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"cli","body":{body}}}"#)
    }

    #[test]
    fn a_frame_with_spaces_has_the_same_records_as_one_without() {
        let records = [
            record(1, r#"{"a" : "]},{"}"#),
            record(2, r#"[[{"\"":1.50}]]"#),
            record(9, "null"),
        ];
        let tight = format!(r#"{{"records":[{}]}}"#, records.join(","));
        let loose = format!("{{\"records\" : [ {} ] }} ", records.join(" ,\n"));
        assert!(in_one_pass(&tight).is_some() && in_one_pass(&loose).is_none());
        for frame in [tight, loose] {
            let Frame::Records(found) = parse(&frame.into()).unwrap() else {
                panic!()
            };
            assert!(
                found
                    .iter()
                    .map(|record| &record.bytes[..])
                    .eq(records.iter().map(String::as_bytes))
            );
        }
    }

    #[test]
    fn what_is_wrong_with_a_record_is_said() {
        let frame = |records: &str| parse(&format!(r#"{{"records":[{records}]}}"#).into());
        let said = |records: &str| frame(records).unwrap_err().to_string();
        let (one, two) = (record(1, "1"), record(2, "2"));
        assert!(said(&format!("{two},{one}")).contains("record after seq 2: seq 1 is not between"));
        assert!(said(&format!("{one},{{}}")).contains("record after seq 1: missing field"));
        assert!(said(&format!("{one},")).contains("frame not understood"));
        assert!(said(&format!("{one}]}}{{[{one}")).contains("frame not understood"));
        assert!(matches!(frame("").unwrap(), Frame::Records(records) if records.is_empty()));
    }

    proptest! {
        #[test]
        fn one_pass_finds_what_two_find_or_nothing(
            bodies in prop::collection::vec(r#"[\[\]{},:" a1\\]{0,12}"#, 0..4),
            tail in r"[\]},\[{ ]{0,3}",
        ) {
            let records: Vec<_> = (1..).zip(bodies).map(|(seq, body)| record(seq, &body)).collect();
            let frame = format!(r#"{{"records":[{}{tail}"#, records.join(","));
            if let Some(found) = in_one_pass(&frame) {
                prop_assert_eq!(Some(found), in_two(&frame).ok());
            }
        }
    }
}
