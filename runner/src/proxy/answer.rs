//! What the proxy says itself, in the shape of the model API's errors.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::client::SILENCE;

/// Bytes of an answer that are held whole whatever others are.
const SMALL: usize = 1 << 20;
/// How many longer ones are held at a time, until the agent has read them.
const LARGE: usize = 2;

/// A response body on its way to the agent.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Answers that are held whole, because they do not stream.
pub struct Answers(Arc<Semaphore>);

impl Default for Answers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LARGE)))
    }
}

/// An answer, and its place among the large ones.
struct Held(Vec<u8>, Option<OwnedSemaphorePermit>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Answers {
    /// Reads an answer, at most `limit` bytes of it.
    pub async fn held(&self, mut response: reqwest::Response, limit: usize) -> reqwest::Result<Bytes> {
        let mut held = Held(Vec::new(), None);
        while let Some(chunk) = response.chunk().await? {
            let chunk = &chunk[..chunk.len().min(limit - held.0.len())];
            if held.0.len() + chunk.len() > SMALL && held.1.is_none() {
                // Nobody closes it.
                held.1 = Arc::clone(&self.0).acquire_owned().await.ok();
            }
            held.0.extend_from_slice(chunk);
            if held.0.len() == limit {
                break;
            }
        }
        Ok(Bytes::from_owner(held))
    }
}

/// An error as the model API words it, so that the CLI understands it.
pub fn error(status: StatusCode, message: &str) -> Response<Body> {
    whole(status, "application/json", text(status, message))
}

/// The body of an error.
pub fn text(status: StatusCode, message: &str) -> Bytes {
    let body = serde_json::json!({
        "type": "error",
        "error": { "type": kind(status), "message": message },
    });
    Bytes::from(body.to_string())
}

/// A response that is complete.
pub fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// A body that is complete.
pub fn full(body: Bytes) -> Body {
    Full::new(body).map_err(|never| match never {}).boxed_unsync()
}

/// A response with the API's own headers.
pub fn with_headers(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// The answer for a request that the model API did not answer.
pub fn unreachable(failure: &reqwest::Error) -> Response<Body> {
    if is_silent(failure) {
        return error(
            StatusCode::GATEWAY_TIMEOUT,
            &format!("the model API said nothing for {} s", SILENCE.as_secs()),
        );
    }
    let what = if failure.is_connect() { "be reached" } else { "answer" };
    // The error's own text would name the upstream's address; the last of its causes says enough.
    let mut last = std::error::Error::source(failure);
    while let Some(next) = last.and_then(std::error::Error::source) {
        last = Some(next);
    }
    let cause = last.map(ToString::to_string).unwrap_or_default();
    error(
        StatusCode::BAD_GATEWAY,
        &format!("the model API failed to {what}: {cause}"),
    )
}

/// The model API took the request, and it may have worked on it, but did not answer in time.
pub fn is_silent(failure: &reqwest::Error) -> bool {
    failure.is_timeout() && !failure.is_connect() && !is_given_up_by_the_kernel(failure)
}

/// The connection is lost: nobody at its other end says that a packet has arrived, which is found within seconds.
fn is_given_up_by_the_kernel(failure: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(failure), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| error.raw_os_error().is_some())
}

/// The API's name for the error of a status.
fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// The status that stands behind an error that the API sends inside a stream it began with 200.
pub fn status_of(kind: &str) -> u16 {
    match kind {
        "authentication_error" => 401,
        "permission_error" => 403,
        "not_found_error" => 404,
        "request_too_large" => 413,
        "rate_limit_error" => 429,
        "overloaded_error" => 529,
        "invalid_request_error" => 400,
        "timeout_error" => 504,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_has_the_shape_that_the_cli_reads() {
        let response = error(StatusCode::NOT_FOUND, "no \"such\" path");
        assert_eq!(response.status(), 404);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&body).unwrap(),
            serde_json::json!({"type": "error", "error": {"type": "not_found_error", "message": "no \"such\" path"}})
        );
    }

    #[tokio::test]
    async fn so_many_large_answers_are_held_at_a_time_and_any_number_of_small_ones() {
        let answers = Answers::default();
        let of = |length: usize| answers.held(http::Response::new(vec![b'x'; length]).into(), 4 << 20);
        let mut large = Vec::new();
        for _ in 0..LARGE {
            large.push(of(SMALL + 1).await.unwrap());
        }
        let next = of(5 << 20);
        tokio::pin!(next);
        assert!(futures::poll!(&mut next).is_pending());
        assert_eq!(of(SMALL).await.unwrap().len(), SMALL);
        assert!(futures::poll!(&mut next).is_pending());
        large.pop();
        assert_eq!(next.await.unwrap().len(), 4 << 20, "and no more of it than may be");
    }

    #[tokio::test]
    async fn a_connection_that_is_lost_is_no_silence_of_the_api() {
        let lost = rustix::io::Errno::TIMEDOUT.raw_os_error();
        let body = move || futures::stream::iter([Err::<Bytes, _>(std::io::Error::from_raw_os_error(lost))]);
        let answer = http::Response::new(reqwest::Body::wrap_stream(body()));
        let failure = reqwest::Response::from(answer).bytes().await.unwrap_err();
        assert!(failure.is_timeout(), "{failure:?}");
        assert!(!is_silent(&failure));
        assert_eq!(unreachable(&failure).status(), StatusCode::BAD_GATEWAY);
    }

    #[test]
    fn an_error_in_a_stream_stands_for_the_status_of_its_kind() {
        for status in [401, 403, 404, 413, 429, 504, 529] {
            assert_eq!(status_of(kind(StatusCode::from_u16(status).unwrap())), status);
        }
        assert_eq!(status_of("api_error"), 500);
    }
}
