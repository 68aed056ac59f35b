//! What was written, compared with what was stored.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use gateway::store::{EventLog, PageSize};
use protocol::record::{EndBody, SessionBody};
use protocol::{Kind, Outcome, Record};
use runner::spool::Spool;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// A line of the scripted agent.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: String,
    p: Option<u64>,
    n: Option<u64>,
}

/// What the records say.
#[derive(Default)]
pub struct Truth {
    pub records: u64,
    /// Lines of each of the agent's processes.
    lines: BTreeMap<u64, u64>,
    /// How each attempt ended.
    ends: BTreeMap<u32, Outcome>,
    begun: u32,
    sum: (u32, Sha256, u64),
}

/// Compares the log with the spool, byte by byte, and reads both.
pub async fn compare(spool: &Path, log: Arc<dyn EventLog>, uid: &str, last: u64) -> Truth {
    let mut reader = Spool::open(spool, |_| ()).unwrap().reader(1);
    let mut truth = Truth::default();
    let page = PageSize {
        records: 1_000,
        bytes: 4 << 20,
    };
    let mut after = 0;
    while after < last {
        let stored = log.read(uid, after, page).await.unwrap();
        assert!(!stored.is_empty(), "the log ends at {after}, the spool at {last}");
        for record in stored {
            let spooled = reader.read(last, 1).unwrap();
            let spooled = spooled
                .first()
                .unwrap_or_else(|| panic!("the spool ends before {}", record.seq));
            assert_eq!(record.seq, after + 1, "the log has no hole");
            assert_eq!(spooled.seq, record.seq, "and neither has the spool");
            let bytes = record.whole().expect("no record here is long");
            assert!(bytes == spooled.bytes.get().as_bytes(), "record {} differs", record.seq);
            truth.take(bytes);
            after = record.seq;
        }
    }
    let beyond = log.read(uid, last, page).await.unwrap();
    assert!(beyond.is_empty(), "the log goes on behind the spool's end");
    truth
}

impl Truth {
    fn take(&mut self, bytes: &[u8]) {
        let record: Record = serde_json::from_slice(bytes).unwrap();
        self.records += 1;
        assert!(record.was.is_none(), "nothing was appended again");
        if self.sum.0 != record.attempt {
            assert!(record.attempt > self.sum.0, "attempts are in order");
            self.sum = (record.attempt, Sha256::new(), 0);
        }
        match record.kind {
            Kind::Cli => self.line(record.body.get()),
            Kind::End => self.end(&record),
            Kind::Gap => panic!("a gap: {}", record.body.get()),
            Kind::Session => {
                let body: SessionBody = serde_json::from_str(record.body.get()).unwrap();
                self.begun += u32::from(matches!(body, SessionBody::AttemptStarted { .. }));
            }
            _ => {}
        }
        self.sum.1.update(bytes);
        self.sum.2 += bytes.len() as u64;
    }

    /// The lines of a process come in order, without a hole.
    fn line(&mut self, body: &str) {
        let line: Line = serde_json::from_str(body).unwrap();
        if line.kind != "scripted" {
            return;
        }
        let next = self.lines.entry(line.p.unwrap()).or_default();
        assert_eq!(line.n, Some(*next), "line of process {:?}", line.p);
        *next += 1;
    }

    fn end(&mut self, record: &Record) {
        let end: EndBody = serde_json::from_str(record.body.get()).unwrap();
        assert_eq!(end.last_seq, record.seq - 1);
        assert_eq!(end.bytes, self.sum.2, "bytes of attempt {}", record.attempt);
        assert_eq!(
            end.sha256,
            hex::encode(self.sum.1.clone().finalize()),
            "attempt {}",
            record.attempt
        );
        let before = self.ends.insert(record.attempt, end.outcome);
        assert_eq!(before, None, "attempt {} ends twice", record.attempt);
    }

    pub fn attempts(&self) -> usize {
        self.ends.len()
    }

    /// Each attempt ends once, and what the last process wrote is all there.
    pub fn check(&self, last: &Path) {
        // A runner that is killed before its first record leaves no attempt.
        assert_eq!(
            self.ends.len(),
            self.begun as usize,
            "one end for each attempt that began"
        );
        let (&final_attempt, &outcome) = self.ends.last_key_value().unwrap();
        assert_eq!(outcome, Outcome::Succeeded);
        let mut killed = self.ends.iter().filter(|(attempt, _)| **attempt != final_attempt);
        assert!(killed.all(|(_, outcome)| *outcome == Outcome::Lost));
        let said = std::fs::read_to_string(last).unwrap();
        let (process, lines) = said.trim().split_once(' ').unwrap();
        // A process that was started when there was enough already writes none.
        let written = self.lines.get(&process.parse().unwrap()).copied().unwrap_or(0);
        assert_eq!(written.to_string(), lines, "all of it");
    }
}
