//! What time it is, by this machine and by the API server.
//!
//! A clock may step by hours: a virtual machine goes on, a time server is found. What cannot be taken back is not done for the sake of
//! a time that this machine alone has come to.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use http::{HeaderMap, header::DATE};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822::DateTimeParser};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// How far the clocks may be apart. It is what a runner is left to end by itself when its time is over: a step of less ends nobody
/// who works.
const WITHIN: SignedDuration = SignedDuration::from_mins(2);
/// How often the API server's word is taken, at most.
const LISTEN: Duration = Duration::from_secs(1);
/// How often the clocks are compared for people.
const TELL: Duration = Duration::from_secs(5);

/// This machine's clock.
type Own = dyn Fn() -> Timestamp + Send + Sync;

/// This machine's clock, and the API server's as its answers tell of it.
#[derive(Clone)]
pub struct Clock {
    own: Arc<Own>,
    heard: Arc<Mutex<Option<Heard>>>,
}

/// The API server's word, and when it came by a clock that does not step.
#[derive(Clone, Copy)]
struct Heard {
    there: Timestamp,
    at: Instant,
}

/// A time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// To the second, as it is stored: a time that is read back equals the one that was written.
    pub time: Timestamp,
    /// Both clocks say so. Else it is the API server's, by which all objects are dated.
    pub is_sure: bool,
}

impl Default for Clock {
    fn default() -> Self {
        Self::by(Timestamp::now)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("ahead", &self.ahead()).finish()
    }
}

impl Clock {
    /// With another clock in the place of this machine's.
    pub fn by(own: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self {
            own: Arc::new(own),
            heard: Arc::default(),
        }
    }

    /// What time it is. While the API server has not said anything, this machine is believed.
    pub fn now(&self) -> Now {
        let own = (self.own)();
        let there = self.there();
        let is_sure = there.is_none_or(|there| own.duration_since(there).abs() <= WITHIN);
        let time = there.filter(|_| !is_sure).unwrap_or(own);
        Now {
            time: Timestamp::from_second(time.as_second()).unwrap_or_default(),
            is_sure,
        }
    }

    /// How far this machine is ahead of the API server, if that is known.
    fn ahead(&self) -> Option<SignedDuration> {
        Some((self.own)().duration_since(self.there()?))
    }

    fn there(&self) -> Option<Timestamp> {
        let heard = (*self.held())?;
        heard
            .there
            .saturating_add(SignedDuration::try_from(heard.at.elapsed()).ok()?)
            .ok()
    }

    /// Takes the time from an answer of the API server.
    pub fn hear(&self, headers: &HeaderMap) {
        let mut heard = self.held();
        if heard.is_some_and(|heard| heard.at.elapsed() < LISTEN) {
            return;
        }
        let date = headers.get(DATE).and_then(|date| date.to_str().ok());
        if let Some(there) = date.and_then(|date| DateTimeParser::new().parse_timestamp(date).ok()) {
            *heard = Some(Heard {
                there,
                at: Instant::now(),
            });
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Heard>> {
        // A word is taken as a whole.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells people when the clocks disagree, and when they agree again; until `stop`.
pub async fn watch(clock: &Clock, metrics: &Metrics, stop: CancellationToken) {
    let mut told = true;
    loop {
        let ahead = clock.ahead().unwrap_or_default();
        metrics.clock_ahead.set(ahead.as_secs());
        let agrees = ahead.abs() <= WITHIN;
        if told && !agrees {
            tracing::error!(
                ahead_seconds = ahead.as_secs(),
                "this machine's clock and the API server's disagree: no session is stopped, given up or deleted because of its time"
            );
        } else if agrees && !told {
            tracing::info!("this machine's clock and the API server's agree again");
        }
        told = agrees;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(TELL) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use http::HeaderValue;
    use rstest::rstest;

    use super::*;

    const HERE: i64 = 1_800_000_000;

    fn says(date: &'static str) -> HeaderMap {
        [(DATE, HeaderValue::from_static(date))].into_iter().collect()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A clock that goes by hand, and the hand.
    fn clock() -> (Clock, Arc<AtomicI64>) {
        let hand = Arc::new(AtomicI64::new(HERE));
        let own = hand.clone();
        (Clock::by(move || at(own.load(Ordering::SeqCst))), hand)
    }

    #[rstest]
    #[case::as_it_is(0, true)]
    #[case::a_little_ahead(110, true)]
    #[case::a_little_behind(-110, true)]
    #[case::a_step_ahead(7_200, false)]
    #[case::a_step_back(-7_200, false)]
    fn a_time_that_this_machine_alone_has_come_to_is_not_believed(#[case] step: i64, #[case] sure: bool) {
        let (clock, hand) = clock();
        clock.hear(&says("Fri, 15 Jan 2027 08:00:00 GMT"));
        hand.fetch_add(step, Ordering::SeqCst);
        let now = clock.now();
        assert_eq!(now.is_sure, sure);
        if sure {
            assert_eq!(now.time, at(HERE + step));
        } else {
            assert!((at(HERE)..at(HERE + 60)).contains(&now.time), "{now:?}");
        }
    }

    #[test]
    fn who_has_not_heard_of_another_clock_believes_its_own() {
        let (clock, _) = clock();
        for nothing in [HeaderMap::new(), says("yesterday")] {
            clock.hear(&nothing);
            assert_eq!(
                clock.now(),
                Now {
                    time: at(HERE),
                    is_sure: true
                }
            );
        }
    }

    #[test]
    fn a_machine_whose_clock_is_put_right_is_believed_again() {
        let (clock, hand) = clock();
        clock.hear(&says("Fri, 15 Jan 2027 08:00:00 GMT"));
        hand.fetch_add(-90_000, Ordering::SeqCst);
        assert!(!clock.now().is_sure);
        hand.fetch_add(90_000, Ordering::SeqCst);
        assert!(clock.now().is_sure);
    }
}
