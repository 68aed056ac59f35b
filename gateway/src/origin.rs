//! Browsers: which web pages may speak with the gateway. Other clients send no `Origin`, or need no leave.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN, RETRY_AFTER, UPGRADE},
};
use std::{sync::Arc, time::Duration};
use tower_http::cors::CorsLayer;

use crate::{api::ApiError, auth};

/// How long a browser may remember what it was allowed.
const REMEMBER: Duration = Duration::from_mins(10);

/// The pages that may, by origin, such as `https://console.example.com`.
#[derive(Clone, Debug, Default)]
pub struct Origins(Arc<[HeaderValue]>);

impl Origins {
    /// These and no others.
    pub fn new(origins: impl IntoIterator<Item = HeaderValue>) -> Self {
        Self(origins.into_iter().collect())
    }

    /// Lets their scripts read what the gateway answers.
    pub fn cors(&self) -> CorsLayer {
        CorsLayer::new()
            .allow_origin(self.0.to_vec())
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
            .allow_headers([
                AUTHORIZATION,
                CONTENT_TYPE,
                HeaderName::from_static("last-event-id"),
                HeaderName::from_static(auth::API_KEY),
            ])
            .expose_headers([RETRY_AFTER])
            .max_age(REMEMBER)
    }

    fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(ORIGIN) else { return true };
        self.0.contains(origin) || is_own(origin, headers.get(HOST))
    }
}

/// Whether a page that the gateway itself served asks.
fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let authority = origin
        .to_str()
        .ok()
        .and_then(|origin| Some(origin.split_once("://")?.1));
    authority.is_some() && authority == host.and_then(|host| host.to_str().ok())
}

/// Refuses upgrades asked for by other pages: browsers ask no leave for them.
pub async fn check(State(origins): State<Origins>, request: Request, next: Next) -> Response {
    if request.headers().contains_key(UPGRADE) && !origins.allows(request.headers()) {
        return ApiError::forbidden(
            "pages of this origin may not open WebSockets here: whoever runs the gateway can allow it with --allow-origin",
        )
        .into_response();
    }
    next.run(request).await
}
