//! The witness of what the model API answered.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use jiff::{Timestamp, fmt::rfc2822};

/// What the model API answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// Status of the last answer to a model call; `None`: none was answered yet. A broken or impossible connection is
    /// [`Witness::UNREACHABLE`]; an error inside a stream has the status that the API uses for it elsewhere.
    pub last_status: Option<u16>,
    /// `retry-after` of the last answer, seconds.
    pub retry_after: Option<u64>,
    /// The API refused the credential (401; 403 as long as it has answered no call well); nothing more is forwarded.
    pub credential_refused: bool,
}

impl Witness {
    /// Stands in [`Witness::last_status`] for a connection that could not be made or broke before the answer was complete.
    pub const UNREACHABLE: u16 = 0;
}

/// The API's answer that refused the credential: given to every later request.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// 401 or 403.
    pub status: StatusCode,
    /// The API's own words.
    pub body: Bytes,
}

/// What was seen so far, shared by all requests.
#[derive(Debug, Default)]
pub struct Seen(Mutex<Sight>);

#[derive(Debug, Default)]
struct Sight {
    witness: Witness,
    refusal: Option<Refusal>,
    /// A model call was answered well.
    accepted: bool,
}

impl Seen {
    /// What was seen so far.
    pub fn witness(&self) -> Witness {
        self.lock().witness
    }

    /// The refusal, when there was one.
    pub fn refusal(&self) -> Option<Refusal> {
        self.lock().refusal.clone()
    }

    /// A model call was answered.
    pub fn answered(&self, status: u16, retry_after: Option<u64>) {
        let mut seen = self.lock();
        seen.witness.last_status = Some(status);
        seen.witness.retry_after = retry_after;
        seen.accepted |= (200..300).contains(&status);
    }

    /// Whether the credential was good for a model call.
    pub fn accepted(&self) -> bool {
        self.lock().accepted
    }

    /// The API could not be reached, or the connection broke.
    pub fn unreachable(&self) {
        self.answered(Witness::UNREACHABLE, None);
    }

    /// The API refused the credential.
    pub fn refused(&self, refusal: Refusal) {
        let mut seen = self.lock();
        seen.witness.credential_refused = true;
        seen.witness.last_status = Some(refusal.status.as_u16());
        seen.refusal.get_or_insert(refusal);
    }

    fn lock(&self) -> MutexGuard<'_, Sight> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds that an answer asks to wait: a number, or a date (RFC 9110, section 10.2.3). At most a day. The date is one of the
/// API's clock, which `now` stands for where the answer does not tell the time.
pub fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<u64> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = if let Ok(seconds) = value.parse::<f64>() {
        seconds.max(0.0).ceil() as u64
    } else {
        let date = |value| Some(rfc2822::parse(value).ok()?.timestamp());
        let told = headers.get(header::DATE).and_then(|value| date(value.to_str().ok()?));
        u64::try_from(date(value)?.as_second() - told.unwrap_or(now).as_second()).unwrap_or(0)
    };
    Some(Duration::from_secs(seconds).min(Duration::from_hours(24)).as_secs())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("7", Some(7))]
    #[case("0.4", Some(1))]
    #[case("-1", Some(0))]
    #[case("1e30", Some(86_400))]
    #[case("Fri, 02 Jan 2026 03:04:35 GMT", Some(30))]
    #[case("Fri, 02 Jan 2026 03:00:00 GMT", Some(0))]
    #[case("soon", None)]
    fn a_wait_is_read_from_seconds_or_a_date(#[case] value: &str, #[case] seconds: Option<u64>) {
        let headers = HeaderMap::from_iter([(header::RETRY_AFTER, value.parse().unwrap())]);
        assert_eq!(retry_after(&headers, "2026-01-02T03:04:05Z".parse().unwrap()), seconds);
    }

    #[test]
    fn a_clock_that_is_wrong_makes_no_wait_of_a_date_longer() {
        let headers = HeaderMap::from_iter([
            (header::RETRY_AFTER, "Fri, 02 Jan 2026 03:04:35 GMT".parse().unwrap()),
            (header::DATE, "Fri, 02 Jan 2026 03:04:05 GMT".parse().unwrap()),
        ]);
        assert_eq!(retry_after(&headers, "2026-01-01T00:00:00Z".parse().unwrap()), Some(30));
    }

    #[test]
    fn the_first_refusal_is_kept() {
        let seen = Seen::default();
        for (status, body) in [(StatusCode::UNAUTHORIZED, "first"), (StatusCode::FORBIDDEN, "second")] {
            seen.refused(Refusal {
                status,
                body: Bytes::from(body),
            });
        }
        assert_eq!(seen.refusal().unwrap().body, "first");
        assert!(seen.witness().credential_refused);
    }
}
