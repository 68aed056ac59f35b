//! What the Messages API refuses, and the form of its refusals.

use std::collections::HashSet;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::script;

/// Fields of a request that the API knows.
const FIELDS: &[&str] = &[
    "cache_control",
    "container",
    "context_management",
    "diagnostics",
    "inference_geo",
    "max_tokens",
    "mcp_servers",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "speed",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
];

/// An error answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: StatusCode,
    /// The API's name for the kind of error.
    pub kind: &'static str,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal with the kind that the API gives to this status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            504 => "timeout_error",
            529 => "overloaded_error",
            500..=599 => "api_error",
            _ => "invalid_request_error",
        };
        Self {
            status,
            kind,
            message: message.into(),
        }
    }

    /// A request that is wrong in itself.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The API's body for it.
    pub fn body(&self) -> Value {
        json!({ "type": "error", "error": { "type": self.kind, "message": self.message } })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}

/// A credential as it may be logged: never itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KeyPrint {
    /// Header that carried it.
    pub header: String,
    /// Length in bytes.
    pub length: usize,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

impl KeyPrint {
    /// The print of a credential.
    pub fn of(header: &str, key: &str) -> Self {
        Self {
            header: header.to_owned(),
            length: key.len(),
            sha256: hex::encode(Sha256::digest(key)),
        }
    }
}

/// The credentials of a request, as header and value.
fn credentials(headers: &HeaderMap) -> Vec<(&'static str, &str)> {
    let key = headers
        .get("x-api-key")
        .and_then(|value| value.to_str().ok())
        .map(|key| ("x-api-key", key));
    let bearer = headers
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .map(|token| ("authorization", token));
    key.into_iter().chain(bearer).collect()
}

/// Prints of every credential that a request carries.
pub fn prints(headers: &HeaderMap) -> Vec<KeyPrint> {
    credentials(headers)
        .into_iter()
        .map(|(header, key)| KeyPrint::of(header, key))
        .collect()
}

/// Lets only accepted keys in. All credentials that a request carries must be right, so that a second, wrong one shows.
pub fn check_key(headers: &HeaderMap, accepted: &[String]) -> Result<(), Refusal> {
    let found = credentials(headers);
    let refusal = |message: &str| Err(Refusal::new(StatusCode::UNAUTHORIZED, message));
    if found.is_empty() {
        return refusal("x-api-key header is required");
    }
    for (header, key) in found {
        if !accepted.iter().any(|accepted| accepted == key) {
            return refusal(if header == "x-api-key" {
                "invalid x-api-key"
            } else {
                "invalid bearer token"
            });
        }
    }
    Ok(())
}

/// Refuses a body that the API would refuse. `model` is the body's, or the path's where the path names it.
pub fn check_body(body: &Value, model: Option<&str>) -> Result<(), Refusal> {
    let Some(fields) = body.as_object() else {
        return Err(Refusal::bad_request("Input should be a valid dictionary"));
    };
    if let Some(unknown) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
        return Err(Refusal::bad_request(format!(
            "{unknown}: Extra inputs are not permitted"
        )));
    }
    let model = model.ok_or_else(|| Refusal::bad_request("model: Field required"))?;
    // Routers that stand before the API have names with a slash.
    if !model.starts_with("claude-") && !model.contains('/') {
        return Err(Refusal::new(StatusCode::NOT_FOUND, format!("model: {model}")));
    }
    check_sampling(body)?;
    let messages = body["messages"]
        .as_array()
        .ok_or_else(|| Refusal::bad_request("messages: Field required"))?;
    check_messages(messages)
}

fn check_sampling(body: &Value) -> Result<(), Refusal> {
    match &body["max_tokens"] {
        Value::Null => return Err(Refusal::bad_request("max_tokens: Field required")),
        value if value.as_u64().is_none_or(|tokens| tokens == 0) => {
            return Err(Refusal::bad_request(
                "max_tokens: Input should be greater than or equal to 1",
            ));
        }
        _ => {}
    }
    let thinks = matches!(body["thinking"]["type"].as_str(), Some("enabled" | "adaptive"));
    let edits = body["context_management"]["edits"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if !thinks
        && edits.iter().any(|edit| {
            edit["type"]
                .as_str()
                .is_some_and(|kind| kind.starts_with("clear_thinking"))
        })
    {
        return Err(Refusal::bad_request(
            "`clear_thinking` strategy requires `thinking` to be enabled or adaptive",
        ));
    }
    match &body["temperature"] {
        Value::Null => Ok(()),
        value => match value.as_f64() {
            None => Err(Refusal::bad_request("temperature: Input should be a valid number")),
            Some(temperature) if !(0.0..=1.0).contains(&temperature) => {
                Err(Refusal::bad_request("temperature: range: 0..1"))
            }
            Some(temperature) if thinks && temperature < 1.0 => Err(Refusal::bad_request(
                "`temperature` may only be set to 1 when thinking is enabled.",
            )),
            Some(_) => Ok(()),
        },
    }
}

/// Roles, empty texts, and tool calls that have no result in the next message.
fn check_messages(messages: &[Value]) -> Result<(), Refusal> {
    if messages.is_empty() {
        return Err(Refusal::bad_request("messages: at least one message is required"));
    }
    let mut open: HashSet<&str> = HashSet::new();
    for (index, message) in messages.iter().enumerate() {
        let role = message["role"].as_str().unwrap_or_default();
        if !matches!(role, "user" | "assistant" | "system") {
            return Err(Refusal::bad_request(format!(
                "messages.{index}.role: Input should be 'user' or 'assistant'"
            )));
        }
        if script::texts(message).iter().any(|text| text.is_empty()) {
            return Err(Refusal::bad_request(format!(
                "messages.{index}: text content blocks must be non-empty"
            )));
        }
        // The mid-conversation system message stands between a call and its result in some requests.
        if role == "system" {
            continue;
        }
        for id in ids(message, "tool_result", "tool_use_id") {
            if !open.remove(id) {
                return Err(Refusal::bad_request(format!(
                    "messages.{index}: unexpected `tool_use_id` found in `tool_result` blocks: {id}"
                )));
            }
        }
        if role == "user" && !open.is_empty() {
            return Err(Refusal::bad_request(format!(
                "messages.{index}: `tool_use` ids were found without `tool_result` blocks immediately after: {open:?}"
            )));
        }
        open.extend(ids(message, "tool_use", "id"));
    }
    Ok(())
}

fn ids<'a>(message: &'a Value, kind: &'a str, field: &'a str) -> impl Iterator<Item = &'a str> {
    let blocks = message["content"].as_array().map(Vec::as_slice).unwrap_or_default();
    blocks
        .iter()
        .filter(move |block| block["type"] == kind)
        .filter_map(move |block| block[field].as_str())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn good() -> Value {
        json!({ "model": "claude-opus-5-5", "max_tokens": 10, "messages": [{ "role": "user", "content": "hi" }] })
    }

    fn refused(change: &Value) -> String {
        let mut body = good();
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let refusal = check_body(&body, body["model"].as_str()).unwrap_err();
        format!("{} {}: {}", refusal.status.as_u16(), refusal.kind, refusal.message)
    }

    #[test]
    fn an_ordinary_request_is_accepted() {
        assert_eq!(check_body(&good(), Some("claude-opus-5-5")), Ok(()));
    }

    #[rstest]
    #[case(json!({ "temprature": 1 }), "400 invalid_request_error: temprature: Extra inputs are not permitted")]
    #[case(json!({ "model": "gpt-9" }), "404 not_found_error: model: gpt-9")]
    #[case(json!({ "max_tokens": null }), "400 invalid_request_error: max_tokens: Field required")]
    #[case(json!({ "max_tokens": 0 }), "max_tokens: Input should be greater than or equal to 1")]
    #[case(json!({ "messages": [] }), "messages: at least one message is required")]
    #[case(json!({ "messages": [{ "role": "user", "content": "" }] }), "text content blocks must be non-empty")]
    #[case(json!({ "temperature": 0.5, "thinking": { "type": "adaptive" } }), "`temperature` may only be set to 1")]
    #[case(json!({ "context_management": { "edits": [{ "type": "clear_thinking_20251015" }] } }), "requires `thinking`")]
    #[case(json!({ "temperature": 1.5 }), "temperature: range: 0..1")]
    #[case(json!({ "messages": [
        { "role": "user", "content": "hi" },
        { "role": "assistant", "content": [{ "type": "tool_use", "id": "t1", "name": "Bash", "input": {} }] },
        { "role": "user", "content": "no result" },
    ] }), "`tool_use` ids were found without `tool_result` blocks")]
    #[case(json!({ "messages": [
        { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t2", "content": "?" }] },
    ] }), "unexpected `tool_use_id` found in `tool_result` blocks: t2")]
    fn a_wrong_request_is_refused(#[case] change: Value, #[case] expected: &str) {
        let said = refused(&change);
        assert!(said.contains(expected), "{said}");
    }

    #[rstest]
    #[case(&[], "x-api-key header is required")]
    #[case(&[("x-api-key", "sk-ant-fake-wrong")], "invalid x-api-key")]
    #[case(&[("authorization", "Bearer sk-ant-fake-wrong")], "invalid bearer token")]
    #[case(&[("x-api-key", "sk-ant-fake-right"), ("authorization", "Bearer other")], "invalid bearer token")]
    fn only_accepted_keys_are_let_in(#[case] headers: &[(&'static str, &'static str)], #[case] expected: &str) {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        let refusal = check_key(&headers, &["sk-ant-fake-right".to_owned()]).unwrap_err();
        assert_eq!(
            (refusal.status, refusal.message.as_str()),
            (StatusCode::UNAUTHORIZED, expected)
        );
    }
}
