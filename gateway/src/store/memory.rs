//! The event log in memory.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};

use super::{
    Admission, Admitted, Appended, Batch, Content, EventLog, Missing, NewRecord, PageSize, Progress, Receipt, State,
    StoreError, StoredRecord,
};

/// Keeps records until the process ends.
#[derive(Clone, Debug, Default)]
pub struct MemoryLog {
    sessions: Arc<Mutex<HashMap<String, Session>>>,
}

#[derive(Debug, Default)]
struct Session {
    state: State,
    records: BTreeMap<u64, NewRecord>,
    conflicts: Vec<NewRecord>,
    missing: Vec<Missing>,
}

impl MemoryLog {
    fn with<T>(&self, session: &str, f: impl FnOnce(&mut Session) -> T) -> BoxFuture<'static, Result<T, StoreError>>
    where
        T: Send + 'static,
    {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = f(sessions.entry(session.to_owned()).or_default());
        async move { Ok(answer) }.boxed()
    }
}

impl EventLog for MemoryLog {
    fn state(&self, session: &str) -> BoxFuture<'static, Result<State, StoreError>> {
        self.with(session, |session| session.state.clone())
    }

    fn admit(&self, admission: Admission) -> BoxFuture<'static, Result<Admitted, StoreError>> {
        self.with(&admission.session, |session| {
            if session.state.epoch != admission.seen {
                return Admitted::Outdated;
            }
            session.state.epoch += 1;
            Admitted::Writer(session.state.clone())
        })
    }

    fn append(&self, batch: Batch) -> BoxFuture<'static, Result<Appended, StoreError>> {
        let Batch {
            session,
            epoch,
            spool,
            records,
        } = batch;
        self.with(&session, move |session| {
            if session.state.epoch != epoch || epoch == 0 {
                return Appended::Superseded;
            }
            Appended::Stored(session.append(spool, records))
        })
    }

    fn read(
        &self,
        session: &str,
        after: u64,
        page: PageSize,
    ) -> BoxFuture<'static, Result<Vec<StoredRecord>, StoreError>> {
        self.with(session, |session| {
            let mut bytes = 0;
            session
                .records
                .range(after + 1..)
                .take_while(|(seq, _)| **seq <= session.state.progress.acked)
                .take(page.records)
                .map(|(seq, record)| StoredRecord {
                    seq: *seq,
                    kind: record.head.kind,
                    content: if record.bytes.len() > page.bytes {
                        Content::Long(record.bytes.len())
                    } else {
                        Content::Whole(record.bytes.clone())
                    },
                })
                .take_while(|record| {
                    bytes += record.content.held();
                    bytes <= page.bytes
                })
                .collect()
        })
    }

    fn piece(
        &self,
        session: &str,
        seq: u64,
        offset: usize,
        length: usize,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        self.with(session, |session| {
            let bytes = session
                .records
                .get(&seq)
                .map(|record| record.bytes.clone())
                .unwrap_or_default();
            let from = offset.min(bytes.len());
            bytes.slice(from..from.saturating_add(length).min(bytes.len()))
        })
    }
}

impl Session {
    fn append(&mut self, spool: String, records: Vec<NewRecord>) -> Receipt {
        let mut receipt = Receipt::default();
        let progress = &mut self.state.progress;
        for record in records {
            let head = record.head;
            match self.records.get(&head.seq) {
                None => {
                    self.missing.extend(record.missing);
                    self.records.insert(head.seq, record);
                    receipt.new += 1;
                    if progress.add(&head) {
                        close_holes(progress, &self.records, &self.missing);
                    }
                }
                Some(old) if old.checksum == record.checksum && old.bytes.len() == record.bytes.len() => {
                    receipt.equal += 1;
                }
                Some(_) => {
                    receipt.conflicts.push(head.seq);
                    if !self.conflicts.iter().any(|kept| kept.bytes == record.bytes) {
                        self.conflicts.push(record);
                    }
                }
            }
        }
        if receipt.new > 0 {
            self.state.spool = Some(spool);
        }
        receipt.progress = self.state.progress;
        receipt
    }
}

fn close_holes(progress: &mut Progress, records: &BTreeMap<u64, NewRecord>, missing: &[Missing]) {
    loop {
        let behind = records.range(progress.acked + 1..);
        let Ok(moved) = progress.pass_stored(behind.map(|(seq, _)| Ok::<_, Infallible>(*seq)));
        if !progress.pass_missing(missing.iter().copied()) && !moved {
            return;
        }
    }
}
