//! From the gateway that was asked to the one that has the session's runner.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    response::Response,
};
use http::{
    HeaderName, HeaderValue,
    header::{CONNECTION, HOST, UPGRADE},
};
use http_body_util::{BodyExt as _, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::ApiError;
use crate::{Gateway, live::Channel, store::Peer};

/// Says that a request was passed on, and is not to be again.
const FORWARDED: HeaderName = HeaderName::from_static("x-agentic-forwarded");
/// Longest answer of a gateway that proves to be one.
const MAX_ANSWER: usize = 256;
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
    let (Some(address), Some(peer)) = (gateway.log.elsewhere(session).await?, gateway.log.peer()) else {
        return Ok(Place::Here(Box::new(request)));
    };
    match open(&address, peer).await {
        Ok(sender) => pass_on(&address, sender, request).await.map(Place::Elsewhere),
        Err(cause) => {
            // It is gone, and its runner will come to another.
            tracing::info!(address, cause, "the gateway of a session's runner cannot be reached");
            Ok(Place::Here(Box::new(request)))
        }
    }
}

/// `GET /peer/{question}`: for other gateways on the same log.
pub(crate) async fn answer(
    State(gateway): State<Arc<Gateway>>,
    Path(question): Path<String>,
) -> Result<String, ApiError> {
    let answer = gateway.log.peer().and_then(|peer| peer.answer(&question));
    answer.ok_or_else(|| ApiError::not_found("this gateway has no others"))
}

type Sender = http1::SendRequest<Body>;

/// A connection to the gateway at an address, which has proved that it is one: by now a pod of anybody may have its address,
/// and what is passed on has the caller's token.
async fn open(address: &str, peer: &dyn Peer) -> Result<Sender, String> {
    let connected = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNREAD_MILLIS);
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let question = uuid::Uuid::new_v4().to_string();
        let request = http::Request::get(format!("/peer/{question}")).header(HOST, address);
        let request = request.body(Body::empty()).map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let answer = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let answer = answer.map_err(|error| error.to_string())?.to_bytes();
        if !peer.is_answer(address, &question, &String::from_utf8_lossy(&answer)) {
            return Err("it is no gateway of ours".to_owned());
        }
        sender.ready().await.map_err(|error| error.to_string())?;
        Ok(sender)
    };
    let connected = timeout(CONNECT_WITHIN, connected).await;
    connected.unwrap_or_else(|_| Err("no answer".to_owned()))
}

async fn pass_on(address: &str, mut sender: Sender, mut request: Request) -> Result<Response, ApiError> {
    for name in [CONNECTION, UPGRADE] {
        request.headers_mut().remove(name);
    }
    request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
    match sender.send_request(request).await {
        Ok(answer) => Ok(answer.map(Body::new)),
        Err(error) => {
            tracing::warn!(address, %error, "the gateway of a session's runner broke off");
            Err(ApiError::bad_gateway(
                "the gateway that the session's runner is connected to broke off: try again",
            ))
        }
    }
}
