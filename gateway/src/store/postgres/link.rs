//! The line between gateways: `NOTIFY` and `LISTEN`, on a connection of its own, made again whenever it breaks.
//!
//! A commit that notifies waits for every other one that does, so news is told in transactions of their own that wait for no
//! disk, and what has gathered meanwhile in one of them. Who is told nothing looks at the log every [`LOOK_EVERY`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, time::interval};
use tokio_postgres::AsyncMessage;
use uuid::Uuid;

use super::pool::Pool;
use crate::store::{StoreError, news::News};

/// How long news that was lost stays unknown.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long until a broken line is tried again.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// News that may wait; what is more is found by looking.
const BACKLOG: usize = 4096;
/// News told at once.
const AT_ONCE: usize = 512;
/// Longest text that PostgreSQL takes, bytes.
const LONGEST: usize = 7999;
/// Which of several gateways makes room: the one that holds this lock, with the life of its line. Any number that nobody else uses.
const ROOM_LOCK: &str = "SELECT pg_try_advisory_lock(7020317654021)";

/// Where news goes.
#[derive(Clone, Debug)]
pub(super) struct Teller(mpsc::Sender<News>);

impl Teller {
    pub(super) fn tell(&self, news: News) {
        // Full: the others will look.
        let _ = self.0.try_send(news);
    }
}

/// Our end of the line.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) teller: Teller,
    pub(super) heard: mpsc::Receiver<News>,
    /// Whether this gateway makes room.
    pub(super) removes: Arc<AtomicBool>,
}

#[derive(Serialize, Deserialize)]
struct Note {
    from: Uuid,
    news: News,
}

/// Opens the line; it ends when nobody can tell anything any more.
pub(super) fn open(pool: Arc<Pool>) -> Link {
    let (sender, mut to_tell) = mpsc::channel(BACKLOG);
    let (told, heard) = mpsc::channel(BACKLOG);
    let removes = Arc::new(AtomicBool::new(false));
    let held = removes.clone();
    tokio::spawn(async move {
        let from = Uuid::new_v4();
        while let Err(error) = run(&pool, from, &mut to_tell, &told, &held).await {
            held.store(false, Ordering::Relaxed);
            tracing::warn!(%error, "the line to other gateways broke");
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    });
    Link {
        teller: Teller(sender),
        heard,
        removes,
    }
}

async fn run(
    pool: &Pool,
    from: Uuid,
    to_tell: &mut mpsc::Receiver<News>,
    told: &mpsc::Sender<News>,
    removes: &AtomicBool,
) -> Result<(), StoreError> {
    let (client, mut connection) = pool.connect().await?;
    let (sender, mut notes) = mpsc::channel(BACKLOG);
    let _driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut messages = futures::stream::poll_fn(move |cx| connection.poll_message(cx));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(note) = message {
                let _ = sender.try_send(note.payload().to_owned());
            }
        }
    }));
    client
        .batch_execute("SET synchronous_commit = off; LISTEN agentic_gateway")
        .await?;
    let notify = "SELECT pg_notify('agentic_gateway', note) FROM unnest($1::text[]) AS note";
    let notify = client.prepare(notify).await?;
    let mut look = interval(LOOK_EVERY);
    let mut gathered = Vec::new();
    loop {
        tokio::select! {
            note = notes.recv() => {
                let note = note.ok_or(StoreError::Silent)?;
                match serde_json::from_str(&note) {
                    Ok(Note { from: sender, news }) if sender != from => hear(told, news),
                    Ok(_) => {}
                    // Of another version of the gateway.
                    Err(_) => hear(told, News::Missed),
                }
            }
            count = to_tell.recv_many(&mut gathered, AT_ONCE) => {
                if count == 0 {
                    return Ok(());
                }
                let notes = notes_of(from, &mut gathered);
                client.query(&notify, &[&notes]).await?;
            }
            _ = look.tick() => {
                let row = client.query_one(ROOM_LOCK, &[]).await?;
                removes.store(row.get(0), Ordering::Relaxed);
                hear(told, News::Missed);
            }
        }
    }
}

fn hear(told: &mpsc::Sender<News>, news: News) {
    // Full: the next look at the log says it all.
    let _ = told.try_send(news);
}

/// What is told: of a session's progress only the newest, and nothing that is too long.
fn notes_of(from: Uuid, gathered: &mut Vec<News>) -> Vec<String> {
    let mut kept: Vec<News> = Vec::with_capacity(gathered.len());
    for news in gathered.drain(..) {
        if let News::Stored { session, .. } = &news {
            let older = |known: &News| matches!(known, News::Stored { session: of, .. } if of == session);
            if let Some(known) = kept.iter_mut().find(|known| older(known)) {
                *known = news;
                continue;
            }
        }
        kept.push(news);
    }
    let notes = kept
        .into_iter()
        .filter_map(|news| serde_json::to_string(&Note { from, news }).ok());
    notes.filter(|note| note.len() <= LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Progress;

    #[test]
    fn only_the_newest_progress_of_a_session_is_told_and_nothing_too_long() {
        let stored = |session: &str, acked| News::Stored {
            session: session.to_owned(),
            progress: Progress {
                acked,
                ..Progress::default()
            },
        };
        let delta = |length| News::Delta {
            session: "a".to_owned(),
            delta: "x".repeat(length).into(),
        };
        let mut gathered = vec![stored("a", 1), delta(10), stored("b", 1), stored("a", 2), delta(8000)];
        let notes = notes_of(Uuid::nil(), &mut gathered);
        let told: Vec<News> = notes
            .iter()
            .map(|note| serde_json::from_str::<Note>(note).unwrap().news)
            .collect();
        assert_eq!(told, [stored("a", 2), delta(10), stored("b", 1)]);
    }
}
