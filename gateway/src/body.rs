//! Bodies of requests, read into a budget: see [`crate::room`].

use std::{ops::Deref, sync::Arc, time::Duration};

use axum::{
    body::{Bytes, HttpBody as _},
    extract::{FromRequest, Request},
};
use http::header::CONTENT_LENGTH;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use crate::{Gateway, api::ApiError, room::Taken};

/// Longest body of a request: the longest spec, escaped.
pub const MAX_BODY: usize = 4 << 20;
/// Most values of a body: what is made of them takes many times as much as the shortest of them.
const MAX_VALUES: usize = 10_000;
/// How long a body may take to arrive.
const ARRIVES_WITHIN: Duration = Duration::from_secs(20);

/// A body of at most [`MAX_BODY`] bytes. An extractor that says whether the caller may send it must stand before it.
pub struct Held {
    bytes: Bytes,
    _room: Taken,
}

/// Who sends a request's body, once that is known: whose share of the budget it takes.
#[derive(Clone, Debug)]
pub struct Sender(pub String);

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl FromRequest<Arc<Gateway>> for Held {
    type Rejection = ApiError;

    async fn from_request(request: Request, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let said = request
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        // Who does not say how long it is may send the longest.
        let length = match said {
            Some(length) => length,
            None if request.body().is_end_stream() => 0,
            None => MAX_BODY,
        };
        if length > MAX_BODY {
            return Err(too_large());
        }
        let sender = request.extensions().get::<Sender>();
        let share = gateway.bodies.of(sender.map_or("", |Sender(name)| name));
        let room = share.take(length).await;
        let body = Limited::new(request.into_body(), length).collect();
        match tokio::time::timeout(ARRIVES_WITHIN, body).await {
            Ok(Ok(body)) => {
                let bytes = body.to_bytes();
                if has_too_many(&bytes) {
                    return Err(ApiError::too_large(format!("a body has at most {MAX_VALUES} values")));
                }
                Ok(Self { bytes, _room: room })
            }
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
            Err(_) => Err(ApiError::request_timeout(format!(
                "the body did not arrive within {} s",
                ARRIVES_WITHIN.as_secs()
            ))),
        }
    }
}

/// Whether JSON has more values than [`MAX_VALUES`]. Each stands behind one of `{[,` outside of a text; of what is no JSON a
/// parser reads no further than to where it is none, and until there this counts the same.
fn has_too_many(json: &[u8]) -> bool {
    let (mut values, mut is_text, mut is_escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b'{' | b'[' | b',' if !is_text => values += 1,
            _ => {}
        }
    }
    values > MAX_VALUES
}

fn too_large() -> ApiError {
    ApiError::too_large(format!("a body has at most {MAX_BODY} bytes"))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(format!("[{}]", vec!["{}"; MAX_VALUES / 2 - 1].join(",")), false)]
    #[case(format!("[{}]", vec!["{}"; MAX_VALUES / 2 + 1].join(",")), true)]
    #[case(format!("[{}]", vec!["0"; MAX_VALUES + 1].join(",")), true)]
    #[case(format!("[\"\\\\\",{}]", vec!["0"; MAX_VALUES + 1].join(",")), true)]
    #[case(format!("{{\"prompt\":\"\\\"{}\"}}", "{,[".repeat(MAX_VALUES)), false)]
    fn values_are_counted_and_texts_are_not(#[case] json: String, #[case] too_many: bool) {
        serde_json::from_str::<serde_json::Value>(&json).unwrap();
        assert_eq!(has_too_many(json.as_bytes()), too_many);
    }
}
