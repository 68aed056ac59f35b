//! Long answers hold their room until their client has taken them: see [`crate::room`].

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, HttpBody as _},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, Method, header::AUTHORIZATION};
use sha2::{Digest as _, Sha256};

use crate::{Gateway, api::ApiError, auth};

/// Answers up to this length need no room: as much as a connection costs anyway.
const FREE: u64 = 4 << 10;
/// How long an answer may wait for room.
const ROOM_WITHIN: Duration = Duration::from_secs(10);

/// Lets an answer go when there is room for it in its caller's share. What is written in pieces sees to its room itself.
pub async fn hold(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let caller = shown(request.headers());
    let response = next.run(request).await;
    // The API's document is the same bytes for all.
    let Some(length) = response.body().size_hint().exact().filter(|length| *length > FREE) else {
        return response;
    };
    let share = gateway.answers.of(&hex::encode(caller));
    let Ok(room) = tokio::time::timeout(ROOM_WITHIN, share.take(length as usize)).await else {
        // What was done must be said.
        return if reads { too_many() } else { response };
    };
    let (parts, body) = response.into_parts();
    match axum::body::to_bytes(body, usize::MAX).await {
        Ok(bytes) => Response::from_parts(parts, Body::from(Arc::new(room).hold(bytes))),
        Err(error) => ApiError::unavailable(error.to_string()).into_response(),
    }
}

fn too_many() -> Response {
    ApiError::too_many("your other answers are not read yet: read them, or try again later", 1).into_response()
}

/// What a caller shows, hashed.
fn shown(headers: &HeaderMap) -> [u8; 32] {
    let shown = headers.get(auth::API_KEY).or_else(|| headers.get(AUTHORIZATION));
    Sha256::digest(shown.map_or(&[][..], |shown| shown.as_bytes())).into()
}
