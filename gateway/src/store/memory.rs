//! The event log in memory.

mod commands;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use protocol::Kind;

use super::{
    Admission, Admitted, Appended, Batch, Content, EventLog, Kept, Missing, NewRecord, PageSize, Receipt, Removed,
    STEP, SessionKept, State, StoreError, StoredRecord,
};

/// Keeps records until the process ends.
#[derive(Clone, Debug, Default)]
pub struct MemoryLog {
    sessions: Arc<Mutex<HashMap<String, Session>>>,
    commands: Arc<Mutex<commands::Commands>>,
}

#[derive(Debug, Default)]
struct Session {
    namespace: String,
    touched: i64,
    gone: Option<i64>,
    state: State,
    records: BTreeMap<u64, NewRecord>,
    conflicts: Vec<NewRecord>,
    /// By the first seq, the last.
    missing: BTreeMap<u64, u64>,
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
        let uid = admission.session.clone();
        self.with(&uid, |session| {
            if session.state.epoch != admission.seen {
                return Admitted::Outdated;
            }
            session.state.epoch = admission.epoch();
            session.namespace = admission.namespace;
            Admitted::Writer(session.state.clone())
        })
    }

    fn append(&self, batch: Batch) -> BoxFuture<'static, Result<Appended, StoreError>> {
        let Batch {
            session,
            epoch,
            spool,
            records,
            answers,
        } = batch;
        let commands = self.commands.clone();
        let uid = session.clone();
        self.with(&session, move |session| {
            if session.state.epoch != epoch || epoch == 0 {
                return Appended::Superseded;
            }
            let mut commands = commands.lock().unwrap_or_else(PoisonError::into_inner);
            for (id, answer) in answers {
                commands.answer(&uid, &id, answer);
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

    fn kept(&self) -> BoxFuture<'static, Result<Kept, StoreError>> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: Vec<_> = sessions
            .iter()
            .filter(|(_, session)| session.state.epoch > 0)
            .map(|(uid, session)| SessionKept {
                uid: uid.clone(),
                namespace: session.namespace.clone(),
                bytes: session.bytes(),
                touched: session.touched,
                gone: session.gone,
            })
            .collect();
        let disk = kept.iter().map(|session| session.bytes).sum();
        async move { Ok(Kept { sessions: kept, disk }) }.boxed()
    }

    fn note_present(&self, present: HashSet<String>, now: i64) -> BoxFuture<'static, Result<(), StoreError>> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        for (uid, session) in sessions.iter_mut() {
            session.gone = (!present.contains(uid)).then(|| session.gone.unwrap_or(now));
        }
        async { Ok(()) }.boxed()
    }

    fn trim(&self, session: &str, bytes: u64) -> BoxFuture<'static, Result<Removed, StoreError>> {
        self.with(session, |session| session.trim(bytes))
    }

    fn forget(&self, session: &str) -> BoxFuture<'static, Result<Removed, StoreError>> {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .forget(session);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = sessions
            .remove(session)
            .map_or_else(Removed::default, |session| Removed {
                records: session.records.len() as u64,
                bytes: session.bytes(),
                more: false,
            });
        async move { Ok(removed) }.boxed()
    }
}

impl Session {
    fn bytes(&self) -> u64 {
        let all = self.records.values().chain(&self.conflicts);
        all.map(|record| record.bytes.len() as u64).sum()
    }

    fn trim(&mut self, bytes: u64) -> Removed {
        let mut removed = Removed::default();
        let progress = self.state.progress;
        let behind = self.records.range(progress.removed + 1..).map(|(seq, _)| *seq);
        let old: Vec<u64> = behind.take_while(|seq| *seq <= progress.acked).collect();
        for (number, seq) in old.iter().enumerate() {
            if removed.bytes >= bytes {
                break;
            }
            if number == STEP.records || removed.bytes as usize >= STEP.bytes {
                removed.more = true;
                break;
            }
            self.state.progress.removed = *seq;
            if self.records[seq].head.kind != Kind::End
                && let Some(record) = self.records.remove(seq)
            {
                removed.records += 1;
                removed.bytes += record.bytes.len() as u64;
            }
        }
        let last = self.state.progress.removed;
        self.conflicts.retain(|record| record.head.seq > last);
        removed
    }

    fn append(&mut self, spool: String, records: Vec<NewRecord>) -> Receipt {
        let mut receipt = Receipt::default();
        let progress = &mut self.state.progress;
        for record in records {
            let head = record.head;
            match self.records.get(&head.seq) {
                // It was there, and was removed.
                None if head.seq <= progress.removed => receipt.equal += 1,
                None => {
                    if let Some(Missing { first, last }) = record.missing {
                        let known = self.missing.entry(first).or_default();
                        *known = last.max(*known);
                    }
                    self.records.insert(head.seq, record);
                    receipt.new += 1;
                    progress.add(&head);
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
        let stored = self.records.range(progress.acked + 1..).map(|(seq, _)| Ok(*seq));
        let missing = self.missing.iter().map(|(&first, &last)| Ok(Missing { first, last }));
        let Ok(more) = progress.pass::<Infallible>(stored, missing);
        receipt.more = more;
        let acked = progress.acked;
        self.missing.retain(|_, last| *last > acked);
        if receipt.new > 0 {
            self.state.spool = Some(spool);
            self.touched = Timestamp::now().as_second();
        }
        receipt.progress = self.state.progress;
        receipt
    }
}
