//! The HTTP client of the tests.

use std::sync::Once;

/// A client without proxies; TLS by ring, which is all that this workspace links.
pub fn client() -> reqwest::Client {
    install_crypto();
    // Only a broken TLS setup fails here, and then nothing can be tested.
    reqwest::Client::builder().no_proxy().build().unwrap_or_default()
}

/// Makes ring the process's crypto provider, once.
pub fn install_crypto() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // It fails only when a provider is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
