//! Whether the gateway works.

use std::sync::Arc;

use axum::{Json, extract::State};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use super::{
    ApiError,
    openapi::{self, Api},
};
use crate::Gateway;

/// That the gateway works.
#[derive(Serialize, JsonSchema)]
pub struct Health {
    /// Always `healthy`.
    status: &'static str,
    /// Version of the gateway.
    version: &'static str,
}

/// `/health`.
pub fn routes(api: Api) -> Api {
    let health = openapi::get("getHealth", "Whether the gateway works", health)
        .open()
        .answers::<Health>(
            200,
            "The event log answers",
            json!({"status": "healthy", "version": "0.1.0"}),
        )
        .refuses(&[503]);
    api.route("/health", [health])
}

async fn health(State(gateway): State<Arc<Gateway>>) -> Result<Json<Health>, ApiError> {
    gateway.log.state("").await?;
    Ok(Json(Health {
        status: "healthy",
        version: env!("CARGO_PKG_VERSION"),
    }))
}
