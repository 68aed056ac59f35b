//! How long and how much the log keeps: what is too old or too much is removed in the background, oldest first.
//!
//! What stays in any case while its session exists: `end` records, and what is not acknowledged. Readers are told the numbers
//! of what is missing.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use http::{Request, header::DATE};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822::DateTimeParser};
use kube::{api::ListParams, client::Body};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{
    Gateway,
    sessions::{self, bounded},
    store::{Kept, SessionKept, StoreError},
};

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(15);
/// How long the API server may take to say what time it is.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// How often it is asked which sessions are still there.
const PRESENCE_EVERY: u32 = 40;
/// How far this clock and the API server's may be apart for records to be removed because of their age.
const CLOCKS_WITHIN: SignedDuration = SignedDuration::from_mins(10);
/// Sessions asked for at once.
const PAGE: u32 = 500;

/// What is kept. `None`: no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Seconds that a session's records are kept after its last one.
    pub age: Option<u64>,
    /// Seconds that a deleted session's records are kept.
    pub deleted: Option<u64>,
    /// Bytes of one session.
    pub session: Option<u64>,
    /// Bytes of the sessions of one namespace.
    pub namespace: Option<u64>,
    /// Bytes of all.
    pub total: Option<u64>,
}

impl Limits {
    fn need_a_clock(&self) -> bool {
        self.age.is_some() || self.deleted.is_some()
    }

    /// Those that no clock can change.
    fn of_size(self) -> Self {
        Self {
            age: None,
            deleted: None,
            ..self
        }
    }
}

/// What is to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// All of a session.
    Forget(String),
    /// So many bytes of a session, the oldest.
    Trim(String, u64),
}

/// What is beyond the limits at `now` (seconds since 1970).
pub fn excess(kept: &Kept, limits: &Limits, now: i64) -> Vec<Removal> {
    let is_over = |since: i64, limit: Option<u64>| {
        limit.is_some_and(|limit| now.saturating_sub(since) as u64 > limit && now > since)
    };
    let mut removals = Vec::new();
    // By namespace; those that were written last come last.
    let mut rest: BTreeMap<&str, Vec<(&SessionKept, u64)>> = BTreeMap::new();
    let mut sessions: Vec<_> = kept.sessions.iter().collect();
    sessions.sort_by_key(|session| (session.gone.is_none(), session.touched));
    let mut freed = 0;
    for session in sessions {
        let mut left = session.bytes;
        if session.gone.is_some_and(|gone| is_over(gone, limits.deleted)) {
            removals.push(Removal::Forget(session.uid.clone()));
            left = 0;
        } else if is_over(session.touched, limits.age) {
            removals.push(Removal::Trim(session.uid.clone(), u64::MAX));
            left = 0;
        } else if let Some(most) = limits.session.filter(|most| left > *most) {
            removals.push(Removal::Trim(session.uid.clone(), left - most));
            left = most;
        }
        freed += session.bytes - left;
        rest.entry(&session.namespace).or_default().push((session, left));
    }
    let mut take = |sessions: &mut Vec<(&SessionKept, u64)>, mut wanted: u64| {
        let mut taken = 0;
        for (session, left) in sessions.iter_mut() {
            let bytes = wanted.min(*left);
            if bytes > 0 {
                removals.push(Removal::Trim(session.uid.clone(), bytes));
                *left -= bytes;
                wanted -= bytes;
                taken += bytes;
            }
        }
        taken
    };
    let sum = |sessions: &[(&SessionKept, u64)]| sessions.iter().map(|(_, left)| left).sum::<u64>();
    if let Some(most) = limits.namespace {
        for sessions in rest.values_mut() {
            let excess = sum(sessions).saturating_sub(most);
            freed += take(sessions, excess);
        }
    }
    // What takes most goes first, so that no namespace can push out the others.
    let mut excess = limits
        .total
        .map_or(0, |most| kept.disk.saturating_sub(freed).saturating_sub(most));
    while excess > 0 {
        let mut by_size: Vec<_> = rest.values_mut().map(|sessions| (sum(sessions), sessions)).collect();
        by_size.sort_by_key(|(size, _)| *size);
        let Some((largest, sessions)) = by_size.pop().filter(|(size, _)| *size > 0) else {
            break;
        };
        let second = by_size.last().map_or(0, |(size, _)| *size);
        let share = (largest - second).max(largest.min(1 << 20)).min(excess);
        let taken = take(sessions, share);
        excess -= taken;
    }
    removals
}

/// Keeps the log within its limits until the gateway stops.
pub async fn run(gateway: &Gateway, limits: Limits) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for round in 0_u32.. {
        tokio::select! {
            _ = ticks.tick() => {}
            () = gateway.shutdown.cancelled() => return,
        }
        if !gateway.log.removes() {
            continue;
        }
        let now = Timestamp::now();
        let mut limits = limits;
        if limits.need_a_clock()
            && let Err(why) = clock_is_right(gateway, now).await
        {
            tracing::warn!(
                why,
                "no records are removed because of their age: this clock may be wrong"
            );
            limits = limits.of_size();
        }
        let ask = limits.deleted.is_some() && round.is_multiple_of(PRESENCE_EVERY);
        if ask && let Err(error) = note_present(gateway).await {
            tracing::warn!(%error, "retention cannot tell which sessions are deleted");
        }
        if let Err(error) = once(gateway, &limits, now.as_second()).await {
            tracing::error!(%error, "retention failed");
        }
    }
}

/// Whether the API server's clock says the same. What a clock that jumped makes old would be gone for good.
pub(crate) async fn clock_is_right(gateway: &Gateway, now: Timestamp) -> Result<(), String> {
    let request = Request::get("/version")
        .body(Body::empty())
        .map_err(|error| error.to_string())?;
    let answer = timeout(ANSWERS_WITHIN, gateway.client.send(request)).await;
    let answer = answer
        .map_err(|_| "the API server does not answer".to_owned())?
        .map_err(|error| format!("the API server cannot be asked: {error}"))?;
    let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok());
    agrees(date.unwrap_or_default(), now)
}

fn agrees(date: &str, now: Timestamp) -> Result<(), String> {
    let there = DateTimeParser::new()
        .parse_timestamp(date)
        .map_err(|_| "the API server does not say what time it is".to_owned())?;
    if now.duration_since(there).abs() > CLOCKS_WITHIN {
        return Err(format!("it is {there} at the API server, and {now} here"));
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Cluster(#[from] sessions::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Removes what is beyond the limits.
pub async fn once(gateway: &Gateway, limits: &Limits, now: i64) -> Result<(), StoreError> {
    let kept = gateway.log.kept().await?;
    gateway.metrics.kept(kept.disk, kept.sessions.len());
    gateway.metrics.log_is_full(gateway.log.is_full());
    for removal in excess(&kept, limits, now) {
        let (mut records, mut bytes) = (0, 0);
        loop {
            let step = match &removal {
                Removal::Forget(session) => gateway.log.forget(session).await?,
                Removal::Trim(session, wanted) => gateway.log.trim(session, wanted.saturating_sub(bytes)).await?,
            };
            records += step.records;
            bytes += step.bytes;
            if !step.more || gateway.shutdown.is_cancelled() {
                break;
            }
        }
        if records > 0 {
            let (session_uid, all) = match &removal {
                Removal::Forget(session) => (session, true),
                Removal::Trim(session, _) => (session, false),
            };
            tracing::info!(session_uid, all, records, bytes, "records removed to make room");
            gateway.metrics.removed(records, bytes);
        }
    }
    Ok(())
}

async fn note_present(gateway: &Gateway) -> Result<(), Error> {
    let api = gateway.sessions.everywhere();
    let (mut present, mut token) = (HashSet::new(), None);
    loop {
        let mut page = ListParams::default().limit(PAGE);
        page.continue_token = token;
        let what = || "AgenticSessions of all namespaces".to_owned();
        let list = bounded("list", what, api.list_metadata(&page)).await?;
        present.extend(list.items.into_iter().filter_map(|session| session.metadata.uid));
        token = list.metadata.continue_.filter(|token| !token.is_empty());
        if token.is_none() {
            break;
        }
    }
    Ok(gateway.log.note_present(present, Timestamp::now().as_second()).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(uid: &str, namespace: &str, bytes: u64, touched: i64, gone: Option<i64>) -> SessionKept {
        SessionKept {
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            bytes,
            touched,
            gone,
        }
    }

    fn kept(sessions: Vec<SessionKept>) -> Kept {
        let disk = sessions.iter().map(|session| session.bytes).sum();
        Kept { sessions, disk }
    }

    fn trim(uid: &str, bytes: u64) -> Removal {
        Removal::Trim(uid.to_owned(), bytes)
    }

    #[test]
    fn a_clock_that_the_api_server_does_not_share_is_not_believed() {
        let date = "Fri, 02 Jan 2026 03:04:05 GMT";
        let at = |text: &str| text.parse().unwrap();
        assert_eq!(agrees(date, at("2026-01-02T03:13:00Z")), Ok(()));
        assert_eq!(agrees(date, at("2026-01-02T02:55:00Z")), Ok(()));
        let why = agrees(date, at("2036-01-02T03:04:05Z")).unwrap_err();
        assert_eq!(
            why,
            "it is 2026-01-02T03:04:05Z at the API server, and 2036-01-02T03:04:05Z here"
        );
        assert!(agrees(date, at("2025-12-31T03:04:05Z")).is_err());
        assert!(agrees("", at("2026-01-02T03:04:05Z")).is_err(), "nobody knows");
    }

    #[test]
    fn nothing_is_removed_without_limits_or_within_them() {
        let kept = kept(vec![session("u1", "a", 1 << 40, 0, Some(0))]);
        assert_eq!(excess(&kept, &Limits::default(), i64::MAX), []);
        let limits = Limits {
            age: Some(100),
            deleted: Some(50),
            session: Some(1 << 40),
            namespace: Some(1 << 40),
            total: Some(1 << 40),
        };
        assert_eq!(excess(&kept, &limits, 50), []);
        assert_eq!(excess(&kept, &limits, -7), [], "a clock that went back");
    }

    #[test]
    fn what_is_too_old_goes_and_of_deleted_sessions_all() {
        let kept = kept(vec![
            session("old", "a", 7, 10, None),
            session("deleted", "a", 7, 99, Some(60)),
            session("new", "a", 7, 50, None),
        ]);
        let limits = Limits {
            age: Some(60),
            deleted: Some(30),
            ..Limits::default()
        };
        assert_eq!(
            excess(&kept, &limits, 100),
            [Removal::Forget("deleted".to_owned()), trim("old", u64::MAX)]
        );
    }

    #[test]
    fn a_session_that_takes_too_much_loses_its_own_oldest_records_and_no_others() {
        let kept = kept(vec![
            session("loud", "a", 900, 2, None),
            session("quiet", "a", 90, 1, None),
        ]);
        let limits = Limits {
            session: Some(100),
            ..Limits::default()
        };
        assert_eq!(excess(&kept, &limits, 100), [trim("loud", 800)]);
    }

    #[test]
    fn a_namespace_that_takes_too_much_loses_what_was_written_longest_ago() {
        let kept = kept(vec![
            session("a-new", "a", 60, 9, None),
            session("a-old", "a", 60, 3, None),
            session("a-deleted", "a", 10, 8, Some(8)),
            session("b", "b", 90, 1, None),
        ]);
        let limits = Limits {
            namespace: Some(100),
            ..Limits::default()
        };
        assert_eq!(excess(&kept, &limits, 100), [trim("a-deleted", 10), trim("a-old", 20)]);
    }

    #[test]
    fn of_all_namespaces_the_largest_gives_way() {
        let gib = 1 << 30;
        let kept = kept(vec![
            session("small", "small", gib, 1, None),
            session("big", "big", 5 * gib, 9, None),
        ]);
        let limits = Limits {
            total: Some(3 * gib),
            ..Limits::default()
        };
        let removals = excess(&kept, &limits, 100);
        assert_eq!(removals, [trim("big", 3 * gib)]);
        let limits = Limits {
            total: Some(0),
            ..Limits::default()
        };
        let removed: u64 = excess(&kept, &limits, 100)
            .iter()
            .map(|removal| match removal {
                Removal::Trim(_, bytes) => *bytes,
                Removal::Forget(_) => 0,
            })
            .sum();
        assert_eq!(removed, 6 * gib);
    }
}
