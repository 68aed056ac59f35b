//! The HTTP client for the model API and for Langfuse.

use std::time::Duration;

use reqwest::{Certificate, Client, ClientBuilder, Url, redirect};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the model API may say nothing, before its answer or within it: as long as the CLI waits itself.
pub const SILENCE: Duration = Duration::from_mins(10);

/// A client for requests to this base URL: no redirects, bodies untouched, no time limit but for connecting.
///
/// `HTTPS_PROXY` and its kin hold, except towards loopback.
pub fn http_client(base: &Url) -> reqwest::Result<Client> {
    towards(base, None)?.build()
}

/// The same for the model API, which may have a certificate of one of these authorities (PEM) and is not waited for without end.
pub fn model_client(base: &Url, authorities: Option<&[u8]>) -> reqwest::Result<Client> {
    towards(base, authorities)?.read_timeout(SILENCE).build()
}

fn towards(base: &Url, authorities: Option<&[u8]>) -> reqwest::Result<ClientBuilder> {
    let mut client = plain();
    if let Some(pem) = authorities {
        client = client.tls_certs_merge(Certificate::from_pem_bundle(pem)?);
    }
    if base.scheme() == "http" {
        // Without redirects TLS is never needed: reading the system's certificates is saved.
        client = client.tls_certs_only([]);
    }
    if is_loopback(base) {
        client = client.no_proxy();
    }
    Ok(client)
}

/// What all our clients have in common.
pub fn plain() -> ClientBuilder {
    // One crypto provider in the process; an error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .no_gzip()
        .referer(false)
        .user_agent(concat!("agentic-runner/", env!("CARGO_PKG_VERSION")))
}

/// A base URL that can be extended by a path: http or https, with a host, without query.
pub fn base_url(text: &str) -> Option<Url> {
    let mut url = Url::parse(text.trim()).ok()?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() || url.query().is_some() {
        return None;
    }
    url.set_fragment(None);
    Some(url)
}

pub fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(|host| {
        host == "localhost"
            || host
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback())
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("https://api.anthropic.com", true)]
    #[case(" http://10.0.0.1:4000/anthropic/ ", true)]
    #[case("api.anthropic.com", false)]
    #[case("ftp://x", false)]
    #[case("https://x/?key=1", false)]
    #[case("", false)]
    fn a_base_url_is_http_with_a_host(#[case] text: &str, #[case] usable: bool) {
        assert_eq!(base_url(text).is_some(), usable);
    }

    #[rstest]
    #[case("http://127.0.0.1:1", true)]
    #[case("http://[::1]:1", true)]
    #[case("http://localhost", true)]
    #[case("http://10.0.0.1", false)]
    fn loopback_is_told_from_elsewhere(#[case] url: &str, #[case] loopback: bool) {
        assert_eq!(is_loopback(&Url::parse(url).unwrap()), loopback);
    }
}
