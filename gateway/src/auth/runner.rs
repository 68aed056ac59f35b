//! Runners: a projected token with our audience, bound to the pod that the session's status names.

use base64::Engine as _;
use kube::Client;
use protocol::{frame::close, names::GATEWAY_AUDIENCE};
use serde::Deserialize;

use super::{
    BASE64URL,
    kubernetes::{Queue, review},
};
use crate::sessions::{self, Sessions, Target, View};

/// Where the API server puts the UID of the pod that a token is bound to.
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// RFC 6455: try again later.
const TRY_AGAIN_LATER: u16 = 1013;

/// Why a runner is turned away.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There is no token, or it is not a good one.
    #[error("the token is refused: {0}")]
    Forbidden(&'static str),
    /// The session's status names another pod, or none yet.
    #[error("this is not, or not yet, the session's pod")]
    NotThisPod,
    /// There is no such session, or it is another one of that name.
    #[error("the session is gone")]
    Gone,
    /// The API server could not be asked.
    #[error(transparent)]
    Unavailable(#[from] sessions::Error),
}

impl Refusal {
    /// The WebSocket's close code.
    pub fn code(&self) -> u16 {
        match self {
            Self::Forbidden(_) => close::FORBIDDEN,
            Self::NotThisPod => close::NOT_THIS_POD,
            Self::Gone => close::GONE,
            Self::Unavailable(_) => TRY_AGAIN_LATER,
        }
    }
}

/// UID of the pod that a token is bound to. Strangers wait elsewhere than a token that says it is of the pod which the
/// session is known to `name`.
pub async fn pod(client: &Client, token: Option<&str>, named: Option<&str>) -> Result<String, Refusal> {
    let token = token.ok_or(Refusal::Forbidden("there is none"))?;
    let queue = match (said(token), named) {
        (Some(said), Some(named)) if said == named => Queue::Runners,
        _ => Queue::Callers,
    };
    let identity = review(client, token, Some(GATEWAY_AUDIENCE), queue).await?;
    let mut identity = identity.ok_or(Refusal::Forbidden("the cluster does not accept it for this audience"))?;
    match identity.extra.remove(POD_UID).unwrap_or_default().pop() {
        Some(uid) if !uid.is_empty() => Ok(uid),
        _ => Err(Refusal::Forbidden("it is not bound to a pod")),
    }
}

/// The pod that a token says it is of, which only a review can confirm: nobody outside the cluster knows these UIDs.
fn said(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        #[serde(rename = "kubernetes.io")]
        kubernetes: Bound,
    }
    #[derive(Deserialize)]
    struct Bound {
        pod: Pod,
    }
    #[derive(Deserialize)]
    struct Pod {
        uid: String,
    }
    let claims = token.split('.').nth(1)?;
    let claims: Claims = serde_json::from_slice(&BASE64URL.decode(claims).ok()?).ok()?;
    Some(claims.kubernetes.pod.uid)
}

/// The session, read live, if its status names this pod.
pub async fn session(sessions: &Sessions, target: &Target, pod: &str) -> Result<View, Refusal> {
    let session = sessions.get(target).await?.ok_or(Refusal::Gone)?;
    let view = View::from(&session);
    if view.pod.as_deref() == Some(pod) {
        Ok(view)
    } else {
        Err(Refusal::NotThisPod)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_of_which_pod_it_is_and_others_say_nothing() {
        let token = |claims: &str| format!("e30.{}.c2ln", BASE64URL.encode(claims));
        let projected =
            r#"{"aud":["agentic-gateway"],"kubernetes.io":{"namespace":"a","pod":{"name":"p","uid":"u-1"}}}"#;
        assert_eq!(said(&token(projected)).as_deref(), Some("u-1"));
        for other in [r#"{"kubernetes.io":{"serviceaccount":{"uid":"u-1"}}}"#, "{}", "u-1"] {
            assert_eq!(said(&token(other)), None, "{other}");
        }
        assert_eq!(said("junk"), None);
    }
}
