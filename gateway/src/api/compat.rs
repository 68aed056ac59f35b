//! What the APIs of other systems share: who calls, in which namespace, and the form of their errors.

use std::{marker::PhantomData, net::IpAddr, sync::Arc};

use axum::{
    extract::{FromRequest, FromRequestParts, Request},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONTENT_TYPE, HOST, ORIGIN, UPGRADE},
    request::Parts,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::{ApiError, Right, openapi::ErrorForm};
use crate::{
    Gateway,
    auth::{
        Credential,
        kubernetes::{Caller, Refusal, Verb},
    },
    body::Held,
};

/// The header by which a request is found in logs.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id of a request.
const MAX_REQUEST_ID: usize = 64;

/// An error of the task API.
#[derive(Clone, Debug)]
pub struct TaskError(ApiError);

/// The form of an error of the task API.
#[derive(Serialize, JsonSchema)]
pub struct Detail {
    /// Why, for people, and what to do.
    detail: String,
}

/// An error of the claude-code API.
#[derive(Clone, Debug)]
pub struct QueryError(ApiError);

/// The form of an error of the claude-code API.
#[derive(Serialize, JsonSchema)]
pub struct Failure {
    /// Always `error`.
    r#type: &'static str,
    /// Which sort of error, one word.
    error: String,
    /// Why, for people, and what to do.
    message: String,
    /// The HTTP status.
    details: String,
}

impl From<&ApiError> for Detail {
    fn from(error: &ApiError) -> Self {
        Self {
            detail: error.message().to_owned(),
        }
    }
}

impl From<&ApiError> for Failure {
    fn from(error: &ApiError) -> Self {
        Self {
            r#type: "error",
            error: error.reason().to_owned(),
            message: error.message().to_owned(),
            details: format!("HTTP status {}", error.code()),
        }
    }
}

macro_rules! errors {
    ($($error:ident as $form:ident),*) => {
        $(
            impl<E: Into<ApiError>> From<E> for $error {
                fn from(error: E) -> Self {
                    Self(error.into())
                }
            }

            impl IntoResponse for $error {
                fn into_response(self) -> Response {
                    self.0.with_body($form::from(&self.0))
                }
            }

            impl ErrorForm for $form {
                fn example(code: u16) -> Value {
                    serde_json::to_value(Self::from(&ApiError::example(code))).unwrap_or_default()
                }
            }
        )*
    };
}

errors!(TaskError as Detail, QueryError as Failure);

/// Who calls one of these APIs.
#[derive(Clone, Debug)]
pub struct Who {
    /// The caller.
    pub caller: Caller,
    /// Where its sessions are.
    pub namespace: String,
    /// Whose tasks it sees: its own, when it has a key among several; else those of all without one.
    pub owner: String,
    /// What it showed, to ask again later; `None`: nothing needed to be shown.
    pub credential: Option<Credential>,
}

/// A caller of one of these APIs who has the right `R` in its namespace, with errors of the form `E`.
pub struct Ours<R, E> {
    /// Who.
    pub who: Who,
    _right: PhantomData<(R, E)>,
}

impl<R: Right, E: From<ApiError> + IntoResponse + Send> FromRequestParts<Arc<Gateway>> for Ours<R, E> {
    type Rejection = E;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, E> {
        let who = who(gateway, &parts.headers).await?;
        if who.credential.is_none() && !is_own_name(gateway, &parts.headers) {
            return Err(E::from(ApiError::forbidden(
                "this host name is not known here, and a page could have made its visitor's browser take it for us: use an address, or whoever runs the gateway allows the name with --allow-host",
            )));
        }
        if who.credential.is_none() && is_forged(&parts.headers) {
            return Err(E::from(ApiError::forbidden(
                "web pages may send this with the header `Content-Type: application/json` only, which their browser asks leave for",
            )));
        }
        gateway.count(&who.caller).map_err(|refusal| E::from(refusal.into()))?;
        may(gateway, &who, R::VERB).await?;
        Ok(Self {
            who,
            _right: PhantomData,
        })
    }
}

/// Whether the `Host` of a request is one that only we can have: a page can have its own name lead here (DNS rebinding), and
/// then it is of our origin for its visitor's browser. Names of one word, of the cluster and of this machine cannot be bought.
fn is_own_name(gateway: &Gateway, headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let ours = [".localhost", ".svc", ".svc.cluster.local"];
    name.parse::<IpAddr>().is_ok()
        || !name.contains('.')
        || ours.iter().any(|ours| name.ends_with(ours))
        || gateway.compat.settings.hosts.contains(&name)
}

/// Whether a web page of another origin may have made a browser send it: such requests carry `Origin`, and browsers ask no
/// leave for those that are not JSON.
fn is_forged(headers: &HeaderMap) -> bool {
    let json = headers.get(CONTENT_TYPE).and_then(|media| media.to_str().ok());
    let json = json.is_some_and(|media| media.trim_start().starts_with("application/json"));
    headers.contains_key(ORIGIN) && !headers.contains_key(UPGRADE) && !json
}

/// Who a request is of.
async fn who(gateway: &Gateway, headers: &HeaderMap) -> Result<Who, ApiError> {
    let shown = Credential::of(headers);
    // Clients of these APIs show their key either way.
    let key = match &shown {
        Some(Credential::Key(key) | Credential::Token(key)) => gateway.keys.find(key),
        None => None,
    };
    let compat = &gateway.compat;
    if let Some(key) = key {
        return Ok(Who {
            namespace: key.namespace().to_owned(),
            owner: key.own_name().unwrap_or_default().to_owned(),
            caller: Caller::from(key),
            credential: shown,
        });
    }
    let (caller, credential) = match (&compat.anonymous, shown) {
        (Some(anonymous), _) => (Caller::from(anonymous.clone()), None),
        (None, Some(credential)) => (gateway.authenticate(&credential).await?, Some(credential)),
        (None, None) => {
            return Err(ApiError::unauthorized(
                "no key: send it in the header `X-API-Key: <key>` or `Authorization: Bearer <key>`",
            ));
        }
    };
    Ok(Who {
        caller,
        namespace: compat.settings.namespace.clone(),
        owner: String::new(),
        credential,
    })
}

async fn may(gateway: &Gateway, who: &Who, verb: Verb) -> Result<(), ApiError> {
    Ok(gateway.authorize(&who.caller, verb, &who.namespace, None).await?)
}

/// Whether a caller has lost the right to read. A cluster that cannot be asked takes no rights away.
pub async fn is_forbidden(gateway: &Gateway, who: &Who) -> bool {
    let Some(credential) = &who.credential else {
        return false;
    };
    let answer = async {
        let caller = match credential {
            Credential::Key(key) | Credential::Token(key) => gateway.keys.find(key).map(Caller::from),
        };
        let caller = match caller {
            Some(caller) => caller,
            None => gateway.authenticate(credential).await?,
        };
        gateway.authorize(&caller, Verb::Get, &who.namespace, None).await
    };
    matches!(
        answer.await,
        Err(Refusal::Unauthenticated | Refusal::UnknownKey | Refusal::Forbidden { .. })
    )
}

/// A body, with errors of the form `E`. An extractor that says whether the caller may send it must stand before it.
pub struct Body<E> {
    /// Its bytes.
    pub bytes: Held,
    _error: PhantomData<E>,
}

impl<E: From<ApiError> + IntoResponse + Send> FromRequest<Arc<Gateway>> for Body<E> {
    type Rejection = E;

    async fn from_request(request: Request, gateway: &Arc<Gateway>) -> Result<Self, E> {
        let bytes = Held::from_request(request, gateway).await?;
        Ok(Self {
            bytes,
            _error: PhantomData,
        })
    }
}

/// A refusal of what no route has answered, in the form that clients of this path know.
pub fn refusal(path: &str, error: ApiError) -> Response {
    let is_in = |folder: &str| {
        path.strip_prefix(folder)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if is_in("/api/v1") || is_in("/ws") {
        TaskError(error).into_response()
    } else if is_in("/claude-code") || is_in("/debug") || path == "/" {
        QueryError(error).into_response()
    } else {
        error.into_response()
    }
}

/// Refuses requests that name two hosts: who stands before us may have looked at the other one.
pub async fn with_one_host(request: Request, next: Next) -> Response {
    if request.headers().get_all(HOST).iter().nth(1).is_some() {
        let error = ApiError::bad_request("a request has one header `Host`");
        return refusal(request.uri().path(), error);
    }
    next.run(request).await
}

/// The id of a request: the client's, or one of ours.
pub async fn with_request_id(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let given = given.filter(|id| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(fits)
    });
    let id = given.map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned);
    let Ok(value) = HeaderValue::from_str(&id) else {
        return next.run(request).await;
    };
    request.headers_mut().insert(REQUEST_ID, value.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

/// The id of a request, which [`with_request_id`] has seen to.
pub fn request_id(headers: &HeaderMap) -> String {
    let id = headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    id.unwrap_or_default().to_owned()
}
