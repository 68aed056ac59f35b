//! From the gateway that was asked to the one that has the session's runner.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, extract::Request, response::Response};
use http::{
    HeaderName, HeaderValue,
    header::{CONNECTION, UPGRADE},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::ApiError;
use crate::{Gateway, live::Channel};

/// Says that a request was passed on, and is not to be again.
const FORWARDED: HeaderName = HeaderName::from_static("x-agentic-forwarded");
/// How long the other one may take to be reached.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Milliseconds after which one that takes nothing is given up.
const UNREAD_MILLIS: u32 = 60_000;

/// Where a request is answered.
pub(super) enum Place {
    /// Here, as it is.
    Here(Box<Request>),
    /// It was, elsewhere.
    Elsewhere(Response),
}

/// Passes a request on if the session's runner is at another gateway. The caller's rights are known here and asked for there
/// again: what is shown is passed on too.
pub(super) async fn to_the_runner(
    gateway: &Gateway,
    channel: &Arc<Channel>,
    session: &str,
    request: Request,
) -> Result<Place, ApiError> {
    if channel.files.is_open() || request.headers().contains_key(FORWARDED) {
        return Ok(Place::Here(Box::new(request)));
    }
    match gateway.log.elsewhere(session).await? {
        Some(address) => pass_on(&address, request).await.map(Place::Elsewhere),
        None => Ok(Place::Here(Box::new(request))),
    }
}

async fn pass_on(address: &str, mut request: Request) -> Result<Response, ApiError> {
    let failed = |cause: String| {
        tracing::warn!(address, cause, "the gateway of a session's runner cannot be reached");
        ApiError::bad_gateway("the gateway that the session's runner is connected to cannot be reached: try again")
    };
    let stream = match timeout(CONNECT_WITHIN, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed("no answer".to_owned())),
    };
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD_MILLIS);
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| failed(error.to_string()))?;
    tokio::spawn(connection);
    for name in [CONNECTION, UPGRADE] {
        request.headers_mut().remove(name);
    }
    request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
    let answer = sender.send_request(request).await;
    answer
        .map(|answer| answer.map(Body::new))
        .map_err(|error| failed(error.to_string()))
}
