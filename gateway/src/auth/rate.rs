//! How often a caller may ask.

use std::{
    collections::HashMap,
    sync::{Mutex, OnceLock, PoisonError},
};

use tokio::time::Instant;

/// Callers remembered at once. One who is forgotten begins anew.
const CAPACITY: usize = 10_000;

/// Requests that somebody may still make now.
#[derive(Debug)]
pub(super) struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    /// Full, for so many requests a minute.
    pub(super) fn new(rate: u32) -> Self {
        Self {
            left: f64::from(rate),
            at: Instant::now(),
        }
    }

    /// Counts a request, or says how many seconds to wait before the next.
    pub(super) fn take(&mut self, rate: u32) -> Result<(), u64> {
        let rate = f64::from(rate);
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * rate / 60.0;
        self.left = (self.left + earned).min(rate);
        self.at = now;
        // A second less than one millionth is none.
        let seconds = ((1.0 - self.left) * 60.0 / rate - 1e-6).ceil();
        if seconds > 0.0 {
            return Err(seconds as u64);
        }
        self.left -= 1.0;
        Ok(())
    }

    /// Whether it is as good as new.
    fn is_idle(&self) -> bool {
        self.at.elapsed().as_secs() >= 60
    }
}

/// What callers with a Kubernetes identity may still ask.
#[derive(Debug, Default)]
pub struct Rates {
    rate: OnceLock<u32>,
    callers: Mutex<HashMap<String, Bucket>>,
}

impl Rates {
    /// Lets each caller ask so often a minute; nobody is counted before.
    pub fn limit(&self, rate: u32) {
        // A second one changes nothing.
        let _ = self.rate.set(rate);
    }

    /// Counts a request, or says how many seconds to wait before the next.
    pub fn count(&self, caller: &str) -> Result<(), u64> {
        let Some(&rate) = self.rate.get() else { return Ok(()) };
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = callers.get_mut(caller) {
            return bucket.take(rate);
        }
        if callers.len() >= CAPACITY {
            callers.retain(|_, bucket| !bucket.is_idle());
            if callers.len() >= CAPACITY {
                callers.clear();
            }
        }
        let bucket = callers.entry(caller.to_owned()).or_insert_with(|| Bucket::new(rate));
        bucket.take(rate)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_caller_has_a_rate_of_its_own_and_none_before_there_is_one() {
        let rates = Rates::default();
        assert!((0..100).all(|_| rates.count("ann") == Ok(())));
        rates.limit(2);
        assert_eq!([(); 3].map(|()| rates.count("ann")), [Ok(()), Ok(()), Err(30)]);
        assert_eq!(rates.count("bob"), Ok(()));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!([(); 2].map(|()| rates.count("ann")), [Ok(()), Err(30)]);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_without_number_are_not_all_remembered() {
        let rates = Rates::default();
        rates.limit(1);
        for caller in 0..3 * CAPACITY {
            assert_eq!(rates.count(&caller.to_string()), Ok(()));
        }
        assert!(rates.callers.lock().unwrap().len() <= CAPACITY);
    }
}
