//! Errors as Kubernetes writes them, with the message once more where clients of the platform look for it.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header::WWW_AUTHENTICATE};
use serde_json::json;

use crate::{auth::kubernetes::Refusal, sessions, store::StoreError};

/// An answer that is not the one asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    code: StatusCode,
    reason: String,
    message: String,
}

impl ApiError {
    fn new(code: StatusCode, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.to_owned(),
            message: message.into(),
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

    fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { code, reason, message } = self;
        let body = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": code.as_u16(),
            "error": message,
        });
        let mut response = (code, axum::Json(body)).into_response();
        if code == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unauthenticated => Self::unauthorized(refusal.to_string()),
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
