//! Who may do what: callers by their Kubernetes rights, runners by the pod that their token is bound to.

pub mod kubernetes;
pub mod runner;

use http::{HeaderMap, header::AUTHORIZATION};

/// The bearer token of a request.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token.trim())
}
