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

/// Where a path leads on Vertex AI: below this project and region, and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vertex {
    /// Google Cloud project.
    pub project: String,
    /// Region, such as `europe-west1` or `global`.
    pub region: String,
}

impl Vertex {
    /// The route of a request, and the model that its path names.
    pub fn route<'a>(&self, method: &Method, path: &'a str) -> Option<(Route, &'a str)> {
        let prefix = format!(
            "/v1/projects/{}/locations/{}/publishers/anthropic/models/",
            self.project, self.region
        );
        let (model, verb) = path.strip_prefix(&prefix)?.rsplit_once(':')?;
        if method != Method::POST || !is_model_id(model) || model.contains(':') {
            return None;
        }
        match (model, verb) {
            ("count-tokens", "rawPredict") => Some((Route::CountTokens, model)),
            (_, "rawPredict" | "streamRawPredict") => Some((Route::Messages, model)),
            _ => None,
        }
    }

    /// Google's address of the region.
    pub fn base_url(&self) -> String {
        match self.region.as_str() {
            "global" => "https://aiplatform.googleapis.com/v1".to_owned(),
            "us" | "eu" => format!("https://aiplatform.{}.rep.googleapis.com/v1", self.region),
            region => format!("https://{region}-aiplatform.googleapis.com/v1"),
        }
    }

    /// Whether both can stand in a path and a host name.
    pub fn is_plain(&self) -> bool {
        let plain = |text: &str| {
            !text.is_empty()
                && text
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        plain(&self.region) && self.project.split(':').all(|part| plain(&part.replace('.', "-")))
    }
}

/// The MCP server that a path names.
pub fn mcp(path: &str) -> Option<&str> {
    path.strip_prefix("/mcp/")
        .filter(|name| !name.is_empty() && !name.contains('/'))
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
    #[case("p/locations/europe-west1/publishers/anthropic/models/claude-x@20260101:streamRawPredict", Some((Route::Messages, "claude-x@20260101")))]
    #[case("p/locations/europe-west1/publishers/anthropic/models/claude-x:rawPredict", Some((Route::Messages, "claude-x")))]
    #[case("p/locations/europe-west1/publishers/anthropic/models/count-tokens:rawPredict", Some((Route::CountTokens, "count-tokens")))]
    #[case("p/locations/europe-west1/publishers/google/models/gemini:rawPredict", None)]
    #[case("other/locations/europe-west1/publishers/anthropic/models/claude-x:rawPredict", None)]
    #[case("p/locations/us-east5/publishers/anthropic/models/claude-x:rawPredict", None)]
    #[case("p/locations/europe-west1/publishers/anthropic/models/claude-x:predict", None)]
    #[case("p/locations/europe-west1/publishers/anthropic/models/../x:rawPredict", None)]
    #[case("p/locations/europe-west1/publishers/anthropic/models/a:b:rawPredict", None)]
    fn on_vertex_only_models_of_the_project_are_forwarded(#[case] path: &str, #[case] expected: Option<(Route, &str)>) {
        let vertex = Vertex {
            project: "p".into(),
            region: "europe-west1".into(),
        };
        assert_eq!(vertex.route(&Method::POST, &format!("/v1/projects/{path}")), expected);
        assert_eq!(vertex.route(&Method::GET, &format!("/v1/projects/{path}")), None);
    }

    #[rstest]
    #[case("example.com:team-1", "us-east5", true)]
    #[case("p/../q", "us-east5", false)]
    #[case("p", "evil.example/", false)]
    #[case("", "us", false)]
    fn project_and_region_are_names(#[case] project: &str, #[case] region: &str, #[case] plain: bool) {
        let vertex = Vertex {
            project: project.into(),
            region: region.into(),
        };
        assert_eq!(vertex.is_plain(), plain);
    }

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
