//! From a request to a socket (RFC 6455, section 4.2). By hand, because what reads the socket must know its memory.

use axum::{body::Body, extract::Request, response::Response};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{
        CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
        UPGRADE,
    },
};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{api::ApiError, auth};

/// The answer to an upgrade, and the socket that it becomes. `protocol` is what is spoken on it, said when the client asks
/// for it by that name.
pub(crate) fn accept(request: Request, protocol: &'static str) -> Result<(Response, OnUpgrade), ApiError> {
    let (mut parts, _) = request.into_parts();
    let headers = &parts.headers;
    let asked = has_word(headers, &CONNECTION, "upgrade") && has_word(headers, &UPGRADE, "websocket");
    let version = headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_some_and(|version| version == "13");
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|_| asked && version);
    let key = key.map(|key| derive_accept_key(key.as_bytes()));
    let (Some(key), Some(upgrade)) = (key, parts.extensions.remove::<OnUpgrade>()) else {
        return Err(ApiError::bad_request(
            "this path is a WebSocket: ask for an upgrade to it, version 13",
        ));
    };
    let offers = auth::protocols(headers).any(|offered| offered == protocol);
    if !offers && auth::protocols(headers).next().is_some() {
        // Pages close a connection whose answer takes up none of their offers. The one with the token must not be repeated.
        return Err(ApiError::bad_request(format!(
            "none of the offered subprotocols is spoken here: offer {protocol:?}"
        )));
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if offers {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    if let Ok(key) = HeaderValue::from_str(&key) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, key);
    }
    Ok((response, upgrade))
}

fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|found| found.trim().eq_ignore_ascii_case(word))
}
