//! The HTTP APIs.

mod allowed;
pub mod claude_code;
pub mod compat;
mod create;
mod error;
mod events;
mod forward;
pub mod health;
mod lifecycle;
mod list;
mod messages;
pub mod openapi;
pub mod projects;
mod socket;
mod speak;
pub mod tasks;
mod workspace;

use std::sync::Arc;

use axum::{Extension, Router, http::header::CONTENT_TYPE, response::IntoResponse};
use bytes::Bytes;
use serde_json::{Value, json};

pub use allowed::{Create, Delete, Get, List, OfProject, OfSession, Right, Update};
pub use claude_code::is_query;
pub use error::ApiError;
pub(crate) use forward::answer as peer;
pub use workspace::is_upload;

use crate::{Gateway, compat::Settings};
use openapi::Api;

fn described(settings: &Settings) -> Api {
    let api = projects::routes(health::routes(Api::default()));
    let mut api = socket::routes(workspace::routes(lifecycle::routes(messages::routes(speak::routes(
        api,
    )))));
    if settings.tasks {
        api = tasks::routes(api);
    }
    if settings.claude_code {
        api = claude_code::routes(api);
    }
    let document = openapi::get("getOpenapi", "This document", document)
        .open()
        .answers_with(200, "An OpenAPI 3.1 document", &["application/json"])
        .looks(
            "application/json",
            json!({"openapi": "3.1.0", "info": {"title": "Agentic gateway"}, "paths": {}}),
        );
    api.route("/openapi.json", [document])
}

/// The routes that the OpenAPI document describes.
pub fn router(settings: &Settings) -> Router<Arc<Gateway>> {
    let (router, document) = described(settings).finish();
    let document = serde_json::to_vec_pretty(&document).unwrap_or_default();
    router.layer(Extension(Document(document.into())))
}

/// The OpenAPI 3.1 document of [`router`].
pub fn openapi(settings: &Settings) -> Value {
    described(settings).finish().1
}

#[derive(Clone)]
struct Document(Bytes);

async fn document(Extension(Document(document)): Extension<Document>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], document)
}
