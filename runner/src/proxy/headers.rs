//! Which headers pass, in either direction.

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Headers that speak of one connection (RFC 9110, section 7.6.1), and those that every hop writes anew.
const HOP: [&str; 10] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
];

/// What an agent must not say to the API in our name: credentials, and an encoding that the meter could not read.
const NOT_FROM_THE_AGENT: [&str; 6] = [
    "host",
    "x-api-key",
    "authorization",
    "cookie",
    "accept-encoding",
    "expect",
];

/// The agent's headers as they go to the API, without the credential.
pub fn to_upstream(from: &HeaderMap) -> HeaderMap {
    let mut headers = passing(from);
    for name in NOT_FROM_THE_AGENT {
        headers.remove(name);
    }
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

/// The API's headers as they go to the agent; none that carries the credential.
pub fn to_agent(from: &HeaderMap, credential: &str) -> HeaderMap {
    let mut headers = passing(from);
    headers.remove(header::SET_COOKIE);
    let leaks = |value: &HeaderValue| {
        !credential.is_empty()
            && value
                .as_bytes()
                .windows(credential.len())
                .any(|part| part == credential.as_bytes())
    };
    let leaking: Vec<HeaderName> = headers
        .iter()
        .filter(|(_, value)| leaks(value))
        .map(|(name, _)| name.clone())
        .collect();
    for name in leaking {
        headers.remove(name);
    }
    headers
}

fn passing(from: &HeaderMap) -> HeaderMap {
    let named: Vec<String> = from
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    from.iter()
        .filter(|(name, _)| !HOP.contains(&name.as_str()) && !named.iter().any(|n| n == name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn the_agents_credentials_and_connection_stay_behind() {
        let agent = map(&[
            ("host", "127.0.0.1:1"),
            ("x-api-key", "token"),
            ("authorization", "Bearer token"),
            ("cookie", "a=b"),
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("accept-encoding", "gzip, br"),
            ("anthropic-beta", "a"),
            ("content-type", "application/json"),
        ]);
        let passed = to_upstream(&agent);
        let expected = map(&[
            ("anthropic-beta", "a"),
            ("content-type", "application/json"),
            ("accept-encoding", "identity"),
        ]);
        assert_eq!(passed, expected);
    }

    #[test]
    fn a_header_of_the_api_that_repeats_the_credential_is_dropped() {
        let api = map(&[
            ("request-id", "req_1"),
            ("x-debug", "key=sk-ant-fake-1"),
            ("set-cookie", "a=b"),
            ("content-length", "5"),
        ]);
        assert_eq!(to_agent(&api, "sk-ant-fake-1"), map(&[("request-id", "req_1")]));
    }
}
