//! What is forwarded: these paths exactly, and nothing else.

use http::Method;

/// Something that the agent may ask of the model API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A model call: metered.
    Messages,
    /// Counts tokens, free of charge.
    CountTokens,
    /// Names of models.
    Models,
}

/// The route of a request; `None`: not forwarded.
///
/// The path is compared as it was sent, without decoding: no second spelling of a path can lead elsewhere.
pub fn route(method: &Method, path: &str) -> Option<Route> {
    match (method, path) {
        (&Method::POST, "/v1/messages") => Some(Route::Messages),
        (&Method::POST, "/v1/messages/count_tokens") => Some(Route::CountTokens),
        (&Method::GET, "/v1/models") => Some(Route::Models),
        (&Method::GET, path) => path
            .strip_prefix("/v1/models/")
            .is_some_and(is_model_id)
            .then_some(Route::Models),
        _ => None,
    }
}

fn is_model_id(id: &str) -> bool {
    !id.is_empty()
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':' | b'@'))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("POST", "/v1/messages", Some(Route::Messages))]
    #[case("POST", "/v1/messages/count_tokens", Some(Route::CountTokens))]
    #[case("GET", "/v1/models", Some(Route::Models))]
    #[case("GET", "/v1/models/claude-sonnet-4-5@20250929", Some(Route::Models))]
    #[case("GET", "/v1/messages", None)]
    #[case("POST", "/v1/models", None)]
    #[case("POST", "/v1/messages/", None)]
    #[case("POST", "/v1/messages/batches", None)]
    #[case("POST", "//v1/messages", None)]
    #[case("POST", "/v1/./messages", None)]
    #[case("POST", "/v1/%6dessages", None)]
    #[case("GET", "/v1/models/../organizations", None)]
    #[case("GET", "/v1/models/..", None)]
    #[case("GET", "/v1/models/a%2fb", None)]
    #[case("GET", "/v1/models/", None)]
    #[case("GET", "/v1/files", None)]
    #[case("DELETE", "/v1/models/x", None)]
    #[case("GET", "/", None)]
    fn only_the_listed_paths_are_forwarded(#[case] method: &str, #[case] path: &str, #[case] expected: Option<Route>) {
        assert_eq!(route(&method.parse().unwrap(), path), expected);
    }
}
