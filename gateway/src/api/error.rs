//! Errors as Kubernetes writes them, with the message once more where clients of the platform look for it.

use axum::response::{IntoResponse, Response};
use http::{
    HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::openapi::ErrorForm;
use crate::{auth::kubernetes::Refusal, sessions, store::StoreError};

/// Why a request was not done, in the form of the Kubernetes API.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "Kubernetes' own names")]
pub(super) struct Status {
    /// Always `Status`.
    kind: &'static str,
    /// Always `v1`.
    api_version: &'static str,
    /// Empty.
    metadata: Empty,
    /// Always `Failure`.
    status: &'static str,
    /// Why, one word.
    reason: String,
    /// Why, for people, and what to do.
    message: String,
    /// The HTTP status.
    code: u16,
    /// The message once more, where clients of the platform look for it.
    error: String,
}

#[derive(Serialize, JsonSchema)]
struct Empty {}

/// What an HTTP status means here, for the API's document.
pub(super) fn meaning(code: u16) -> &'static str {
    match code {
        400 => "The request is not understood, or asks for what there is not; the message names it.",
        401 => "No token, or one that the cluster does not accept.",
        403 => "The caller may not do this; the message names the right that is missing.",
        404 => "There is no such thing.",
        408 => "The body took too long to arrive.",
        409 => "Not in this state; the message says what to do first.",
        413 => "The body is too long.",
        416 => "The file has no such bytes.",
        422 => "The cluster's rules for sessions refuse it; the message names the field and the rule.",
        429 => "Too much at once: try again later.",
        502 => "The session's runner left before it answered.",
        503 => "The cluster or the event log cannot be reached: try again.",
        504 => "The session's runner did not answer in time.",
        _ => "It was not done.",
    }
}

impl ErrorForm for Status {
    fn example(code: u16) -> Value {
        serde_json::to_value(ApiError::example(code).status()).unwrap_or_default()
    }
}

/// An answer that is not the one asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    code: StatusCode,
    reason: String,
    message: String,
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(code: StatusCode, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.to_owned(),
            message: message.into(),
            retry_after: None,
        }
    }

    /// A refusal of this HTTP status, for the API's document.
    pub(super) fn example(code: u16) -> Self {
        let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let reason = code.canonical_reason().unwrap_or_default().replace(' ', "");
        Self::new(code, &reason, meaning(code.as_u16()))
    }

    /// The HTTP status.
    pub fn code(&self) -> StatusCode {
        self.code
    }

    /// Why, one word.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Why, for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// This error with another body, whose form an API has of its own.
    pub(super) fn with_body<T: Serialize>(&self, body: T) -> Response {
        let mut response = (self.code, axum::Json(body)).into_response();
        if self.code == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// The body is understood, and what it asks for is not possible.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message)
    }

    /// Not now: try again in so many seconds.
    pub fn busy(message: impl Into<String>, retry_after: u64) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::unavailable(message)
        }
    }

    /// Too much at once: try again in so many seconds.
    pub fn too_many(message: impl Into<String>, retry_after: u64) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
        }
    }

    /// The request cannot be understood or honoured.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// The request has no token.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
    }

    /// The caller may not.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// The path is there, but not for this method.
    pub fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "this path does not take this method: see the header Allow",
        )
    }

    /// The body is longer than allowed.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
    }

    /// The request did not arrive in time.
    pub fn request_timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "Timeout", message)
    }

    /// Not in this state.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "Conflict", message)
    }

    /// The runner left.
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "BadGateway", message)
    }

    /// The runner says nothing.
    pub fn gateway_timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "GatewayTimeout", message)
    }

    /// The file has no such bytes.
    pub fn no_such_range(message: impl Into<String>) -> Self {
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "RangeNotSatisfiable", message)
    }

    /// Not now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message)
    }

    fn status(self) -> Status {
        Status {
            kind: "Status",
            api_version: "v1",
            metadata: Empty {},
            status: "Failure",
            reason: self.reason,
            error: self.message.clone(),
            message: self.message,
            code: self.code.as_u16(),
        }
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.with_body(self.clone().status())
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unauthenticated | Refusal::UnknownKey => Self::unauthorized(refusal.to_string()),
            Refusal::TooOften(seconds) => Self::too_many(refusal.to_string(), seconds),
            Refusal::Forbidden { .. } => Self::new(StatusCode::FORBIDDEN, "Forbidden", refusal.to_string()),
            // What the gateway may not ask is no fault of the caller.
            Refusal::Unavailable(error) => Self::unavailable(error.to_string()),
        }
    }
}

impl From<sessions::Error> for ApiError {
    /// What the API server refuses comes through with its message; everything else is ours to repair.
    fn from(error: sessions::Error) -> Self {
        if let sessions::Error::Api {
            source: kube::Error::Api(status),
            ..
        } = &error
            && matches!(status.code, 400 | 403 | 404 | 409 | 413 | 422 | 429)
            && let Ok(code) = StatusCode::from_u16(status.code)
        {
            return Self::new(code, &status.reason, status.message.clone());
        }
        tracing::warn!(%error, "API server failed");
        Self::unavailable(error.to_string())
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "event log failed");
        Self::unavailable(error.to_string())
    }
}
