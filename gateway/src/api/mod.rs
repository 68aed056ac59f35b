//! The HTTP APIs.

mod allowed;
mod create;
mod error;
mod events;
pub mod health;
mod lifecycle;
mod list;
mod messages;
pub mod openapi;
pub mod projects;
mod socket;
mod speak;
mod workspace;

use std::sync::{Arc, LazyLock};

use axum::{Router, http::header::CONTENT_TYPE, response::IntoResponse};
use serde_json::Value;

pub use allowed::{Create, Delete, Get, List, OfProject, OfSession, Right, Update};
pub use error::ApiError;
pub use workspace::is_upload;

use crate::Gateway;
use openapi::Api;

static DOCUMENT: LazyLock<String> = LazyLock::new(|| serde_json::to_string_pretty(&openapi()).unwrap_or_default());

fn described() -> Api {
    let document = openapi::get("getOpenapi", "This document", document)
        .open()
        .answers_with(200, "An OpenAPI 3.1 document", &["application/json"]);
    let api = projects::routes(health::routes(Api::default()));
    let api = lifecycle::routes(messages::routes(speak::routes(api)));
    socket::routes(workspace::routes(api)).route("/openapi.json", [document])
}

/// The routes that the OpenAPI document describes.
pub fn router() -> Router<Arc<Gateway>> {
    described().finish().0
}

/// The OpenAPI 3.1 document of [`router`].
pub fn openapi() -> Value {
    described().finish().1
}

async fn document() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}
