//! Whether the gateway works.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::ApiError;
use crate::Gateway;

/// `GET /health`: 200 while the event log answers.
pub async fn health(State(gateway): State<Arc<Gateway>>) -> Result<Json<Value>, ApiError> {
    gateway.log.state("").await?;
    Ok(Json(json!({"status": "healthy", "version": env!("CARGO_PKG_VERSION")})))
}
