//! Runners: a projected token with our audience, bound to the pod that the session's status names.

use kube::Client;
use protocol::{frame::close, names::GATEWAY_AUDIENCE};

use super::kubernetes::review;
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

/// UID of the pod that a token is bound to.
pub async fn pod(client: &Client, token: Option<&str>) -> Result<String, Refusal> {
    let token = token.ok_or(Refusal::Forbidden("there is none"))?;
    let identity = review(client, token, Some(GATEWAY_AUDIENCE)).await?;
    let mut identity = identity.ok_or(Refusal::Forbidden("the cluster does not accept it for this audience"))?;
    match identity.extra.remove(POD_UID).unwrap_or_default().pop() {
        Some(uid) if !uid.is_empty() => Ok(uid),
        _ => Err(Refusal::Forbidden("it is not bound to a pod")),
    }
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
