//! TLS with a certificate that may be renewed while it is served.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What is wrong with the files.
#[derive(Debug, thiserror::Error)]
#[error("failed to use the TLS certificate {certificate} with the key {key}: {why}")]
pub struct Error {
    certificate: PathBuf,
    key: PathBuf,
    why: String,
}

/// A certificate and its key, as the files have them now.
#[derive(Debug)]
pub struct Certificate {
    files: (PathBuf, PathBuf),
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Of two PEM files: the chain, and the key.
    pub fn load(certificate: &Path, key: &Path) -> Result<Arc<Self>, Error> {
        let current = RwLock::new(Arc::new(read(certificate, key)?));
        let files = (certificate.to_owned(), key.to_owned());
        Ok(Arc::new(Self { files, current }))
    }

    /// Takes connections with it.
    pub fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// Reads the files again. On an error the certificate stays as it was.
    pub fn reload(&self) -> Result<(), Error> {
        let new = Arc::new(read(&self.files.0, &self.files.1)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Follows the files until the gateway stops.
    pub async fn follow(&self, shutdown: &CancellationToken) {
        let mut last = None;
        while shutdown
            .run_until_cancelled(tokio::time::sleep(LOOK_EVERY))
            .await
            .is_some()
        {
            let now = (
                tokio::fs::read(&self.files.0).await.ok(),
                tokio::fs::read(&self.files.1).await.ok(),
            );
            if Some(&now) == last.as_ref() {
                continue;
            }
            match self.reload() {
                Ok(()) => {
                    last = Some(now);
                    tracing::info!(certificate = %self.files.0.display(), "TLS certificate read");
                }
                // Half of the pair may be old still: it is looked at again.
                Err(error) => tracing::error!(%error, "TLS certificate stays as it was"),
            }
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let failed = |why: String| Error {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        why,
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.map_err(|error| failed(error.to_string()))?;
    if chain.is_empty() {
        return Err(failed("there is no certificate in it".to_owned()));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(error.to_string()))?;
    let provider = CryptoProvider::get_default().ok_or_else(|| failed("no crypto provider is installed".to_owned()))?;
    // Fails when the two do not belong together.
    CertifiedKey::from_der(chain, secret, provider).map_err(|error| failed(error.to_string()))
}
