//! How long to wait after a failure: per object, doubling, with jitter.

use std::{collections::HashMap, sync::Mutex, time::Duration};

const FIRST: Duration = Duration::from_secs(1);
const FIRST_RACE: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_mins(5);

/// Failures in a row, by object.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: Mutex<HashMap<(String, String), u32>>,
}

impl Backoff {
    /// Counts a failure; answers how long to wait.
    pub fn next(&self, namespace: &str, name: &str) -> Duration {
        self.after(FIRST, namespace, name)
    }

    /// The same when somebody was faster, which one more look settles, as a rule.
    pub fn next_race(&self, namespace: &str, name: &str) -> Duration {
        self.after(FIRST_RACE, namespace, name)
    }

    fn after(&self, first: Duration, namespace: &str, name: &str) -> Duration {
        let mut failures = self.locked();
        let count = failures.entry((namespace.to_owned(), name.to_owned())).or_default();
        let wait = first
            .saturating_mul(1_u32.checked_shl(*count).unwrap_or(u32::MAX))
            .min(LONGEST);
        *count = count.saturating_add(1).min(16);
        jittered(wait)
    }

    /// A success, or the object is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.locked().remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// Forgets objects that are gone.
    pub fn keep(&self, exists: impl Fn(&str, &str) -> bool) {
        self.locked().retain(|(namespace, name), _| exists(namespace, name));
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), u32>> {
        // Counters are whole after every operation: one that panicked elsewhere did no harm here.
        self.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Between 80 % and 120 %, so that what failed together does not come back together.
pub fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.8 + 0.4 * rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_always_comes_too_late_waits_longer_and_longer_too() {
        let backoff = Backoff::default();
        let waits: Vec<_> = (0..9)
            .map(|_| backoff.next_race("poets", "poem").as_secs_f64())
            .collect();
        assert!(waits[0] < 0.13 && (20.0..31.0).contains(&waits[8]), "{waits:?}");
    }

    #[test]
    fn waits_double_to_five_minutes_and_start_anew_after_a_success() {
        let backoff = Backoff::default();
        let waits: Vec<_> = (0..20).map(|_| backoff.next("poets", "poem").as_secs_f64()).collect();
        assert!(
            (0.8..=1.2).contains(&waits[0]) && (6.4..=9.6).contains(&waits[3]),
            "{waits:?}"
        );
        assert!((240.0..=360.0).contains(&waits[19]), "{waits:?}");
        assert!(backoff.next("poets", "ode").as_secs_f64() <= 1.2);
        backoff.forget("poets", "poem");
        assert!(backoff.next("poets", "poem").as_secs_f64() <= 1.2);
        backoff.keep(|_, name| name == "poem");
        assert_eq!(backoff.locked().len(), 1, "an ode that is gone");
    }
}
