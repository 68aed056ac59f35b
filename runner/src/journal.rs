//! The one place where a record is made: redacted, spooled, and shown to everything that follows the records.

use protocol::record::{GapBody, LogBody, LogLevel, MAX_RECORD, NotJson, SessionBody, UserBody};
use protocol::{Kind, Outcome, Record, Usage};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::history::History;
use crate::langfuse::Exporter;
use crate::redact::{Deltas, Vault};
use crate::spool::{Spool, SpoolError, raw};
use crate::transcript::Transcript;
use crate::uplink::Request;

/// Longest body: a record has at most [`MAX_RECORD`] bytes, its envelope included.
const MAX_BODY: usize = MAX_RECORD - 1_024;
/// Bytes that are read at once to be appended again.
const AGAIN_BYTES: usize = 1 << 20;

/// See the module.
pub struct Journal {
    spool: Spool,
    history: History,
    vault: Vault,
    deltas: Deltas,
    exporter: Option<Exporter>,
    transcript: Transcript,
    attempt: u32,
    /// Tokens by the meter and by the CLI, when they were last compared.
    audited: (Usage, Usage),
}

impl Journal {
    /// A journal of `attempt` on a spool whose records made `history`.
    pub fn new(
        spool: Spool,
        history: History,
        vault: Vault,
        exporter: Option<Exporter>,
        mut transcript: Transcript,
        attempt: u32,
    ) -> Self {
        transcript.begin_behind(history.rounds);
        Self {
            spool,
            history,
            vault,
            deltas: Deltas::default(),
            exporter,
            transcript,
            attempt,
            audited: Default::default(),
        }
    }

    /// What the records say.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// See [`History::goes_on`].
    pub fn goes_on(&mut self, arrived: &[uuid::Uuid]) {
        self.history.goes_on(arrived);
    }

    /// Where they are.
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Attempt that writes.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Writes a record; returns its seq.
    pub fn record(&mut self, kind: Kind, body: &impl Serialize) -> Result<u64, SpoolError> {
        let turn = self.history.turn;
        self.put(kind, turn, raw(kind, body)?)
    }

    /// Writes what the CLI said, untouched but for redaction.
    pub fn cli(&mut self, line: &[u8]) -> Result<u64, SpoolError> {
        let turn = self.history.turn;
        if let Some(body) = std::str::from_utf8(line).ok().and_then(object) {
            return self.put(Kind::Cli, turn, body);
        }
        let redacted = self.vault.redactor().bytes(line);
        let body = NotJson::new(&redacted);
        self.record(Kind::Cli, &body)
    }

    /// Writes that a line was too long to be kept.
    pub fn too_long(&mut self, length: u64) -> Result<u64, SpoolError> {
        self.record(
            Kind::Gap,
            &GapBody {
                from: None,
                to: None,
                length: Some(length),
            },
        )
    }

    /// Writes that a message is sent. It opens a turn unless one is open.
    pub fn user(&mut self, body: &UserBody) -> Result<u64, SpoolError> {
        let opens = !self.history.open_turn() || self.history.stopped().is_some();
        let turn = self.history.turn + u32::from(opens);
        self.put(Kind::User, turn, raw(Kind::User, body)?)
    }

    /// The text of a message as its record holds it.
    pub fn recorded(&self, body: &UserBody) -> Option<String> {
        let raw = raw(Kind::User, body).ok()?;
        let redacted: UserBody = serde_json::from_str(&self.vault.redactor().json(raw.get())).ok()?;
        Some(redacted.text)
    }

    /// Writes what happened to the session.
    pub fn session(&mut self, body: &SessionBody) -> Result<u64, SpoolError> {
        self.record(Kind::Session, body)
    }

    /// Writes something for people.
    pub fn log(&mut self, level: LogLevel, message: impl Into<String>) -> Result<u64, SpoolError> {
        self.record(
            Kind::Log,
            &LogBody {
                level,
                message: message.into(),
            },
        )
    }

    /// Compares the meter with what the CLI counts, and says so when the difference is a new one.
    pub fn audit(&mut self) -> Result<(), SpoolError> {
        let (metered, told) = (self.history.usage(), self.history.told());
        let difference = (metered, told);
        if std::mem::replace(&mut self.audited, difference) == difference || told == Usage::default() {
            return Ok(());
        }
        let pairs = [
            (metered.input_tokens, told.input_tokens),
            (metered.output_tokens, told.output_tokens),
            (metered.cache_read_input_tokens, told.cache_read_input_tokens),
            (metered.cache_creation_input_tokens, told.cache_creation_input_tokens),
        ];
        let (metered, told) = (metered.total(), told.total());
        if pairs.iter().any(|(metered, told)| metered < told) {
            self.log(
                LogLevel::Warning,
                format!(
                    "The CLI counts {told} tokens and the proxy metered {metered}: limits and cost may be too low."
                ),
            )?;
        } else if metered > told {
            self.log(
                LogLevel::Info,
                format!(
                    "The proxy metered {metered} tokens and the CLI counts {told}: the rest are responses that were cut, and requests of the agent's own tools."
                ),
            )?;
        }
        Ok(())
    }

    /// Closes the last attempt that wrote here.
    pub fn end(&mut self, outcome: Outcome) -> Result<u64, SpoolError> {
        let record = self.spool.append_end(self.history.turn, outcome)?;
        Ok(self.follow(&record))
    }

    /// Gives records new seqs, because the old ones are taken in the gateway's log.
    pub async fn append_again(&mut self, request: Request) -> Result<(), SpoolError> {
        match request {
            Request::AppendAgain(record) => {
                self.spool.append_again(*record)?;
            }
            Request::AppendAllAgain { after, done } => {
                let gap = self.append_all_again(after).await?;
                // An uplink that is gone asks again after its next welcome.
                let _ = done.send(gap);
            }
            // Nobody is there to take them any more; the gateway asks the next attempt.
            Request::Command(_) | Request::CheckLease => {}
        }
        Ok(())
    }

    /// Appends a gap behind `after` and all own records behind that; returns the gap's seq.
    async fn append_all_again(&mut self, after: u64) -> Result<u64, SpoolError> {
        let own = self.spool.next_seq() - 1;
        // A reader sees only what is on disk.
        self.spool.durable(own).await?;
        self.spool.skip_to(after + 1);
        let gap = self.spool.next_seq();
        let hole = gap > after + 1;
        let body = GapBody {
            from: hole.then_some(after + 1),
            to: hole.then_some(gap - 1),
            length: None,
        };
        self.record(Kind::Gap, &body)?;
        let mut reader = self.spool.reader(1);
        loop {
            let batch = reader.read(own, AGAIN_BYTES)?;
            if batch.is_empty() {
                return Ok(gap);
            }
            for stored in batch {
                if let Ok(record) = serde_json::from_str::<Record>(stored.bytes.get())
                    && record.was.is_none()
                {
                    self.spool.append_again(record)?;
                }
            }
            // Reading is faster than the disk may be, and there may be more of it than memory.
            self.spool.room().await?;
            tokio::task::yield_now().await;
        }
    }

    /// A line that is shown live and not kept: none, or two, where a secret may be cut into pieces.
    pub fn redacted_delta(&mut self, line: &str) -> Vec<String> {
        self.vault.redactor().delta(&mut self.deltas, line)
    }

    /// Nothing that was begun live goes on: its process is gone.
    pub fn forget_deltas(&mut self) {
        self.deltas = Deltas::default();
    }

    /// Id of the trace, when there is one.
    pub fn trace_id(&self) -> Option<String> {
        self.exporter.as_ref().map(Exporter::trace_id)
    }

    /// What is to be said of `text` to people.
    pub fn redacted(&self, text: &str) -> String {
        self.vault.redactor().text(text).into_owned()
    }

    /// The exporter, to be finished; nothing is shown to it any more.
    pub fn take_exporter(&mut self) -> Option<Exporter> {
        self.exporter.take()
    }

    /// Has the exporter send what is complete.
    pub fn turn_end(&mut self) {
        if let Some(exporter) = &mut self.exporter {
            exporter.turn_end();
        }
    }

    fn put(&mut self, kind: Kind, turn: u32, body: Box<RawValue>) -> Result<u64, SpoolError> {
        let body = match self.vault.redactor().json(body.get()) {
            std::borrow::Cow::Borrowed(_) => body,
            std::borrow::Cow::Owned(redacted) => {
                RawValue::from_string(redacted).map_err(|error| SpoolError::Encode {
                    kind: kind.as_str(),
                    reason: format!("redaction broke it: {error}"),
                })?
            }
        };
        if body.get().len() > MAX_BODY {
            let body = GapBody {
                from: None,
                to: None,
                length: Some(body.get().len() as u64),
            };
            let record = self
                .spool
                .append(self.attempt, turn, Kind::Gap, raw(Kind::Gap, &body)?)?;
            return Ok(self.follow(&record));
        }
        let record = self.spool.append(self.attempt, turn, kind, body)?;
        Ok(self.follow(&record))
    }

    fn follow(&mut self, record: &Record) -> u64 {
        self.history.observe(record);
        self.transcript.show(record, self.history.rounds);
        if let Some(exporter) = &mut self.exporter {
            exporter.observe(record);
        }
        record.seq
    }
}

/// The line as the body of a record, when it is a JSON object.
fn object(line: &str) -> Option<Box<RawValue>> {
    let line = line.trim_ascii();
    line.starts_with('{')
        .then(|| RawValue::from_string(line.to_owned()).ok())
        .flatten()
}
