//! TLS to the database, when its URL asks for it: the server's certificate and its name are then always checked.

use std::{
    future::Future,
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_rustls::{TlsConnector, client};

use super::Database;
use crate::store::StoreError;

/// Makes connections safe.
#[derive(Clone)]
pub(super) struct Tls(TlsConnector);

/// What a URL says of TLS. The words are `libpq`'s; what this gateway does not tell apart is the stricter of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    required: bool,
    authorities: Option<String>,
    /// The URL without what the driver does not know.
    rest: String,
}

/// The driver's configuration, and whom to trust.
pub(super) fn configuration(database: &Database) -> Result<(tokio_postgres::Config, Tls), StoreError> {
    let asked = asked(&database.url)?;
    let mut config: tokio_postgres::Config = asked.rest.parse().map_err(|error| StoreError::Url(Arc::new(error)))?;
    let given = database.authorities.as_deref();
    let authorities = given.or(asked.authorities.as_deref().map(Path::new));
    // A file of authorities without the wish for TLS would be no protection at all.
    let required = asked.required || authorities.is_some();
    config.ssl_mode(if required {
        tokio_postgres::config::SslMode::Require
    } else {
        tokio_postgres::config::SslMode::Disable
    });
    let roots = if required {
        roots(authorities)?
    } else {
        RootCertStore::empty()
    };
    Tls::new(roots).map(|tls| (config, tls))
}

/// Takes `sslmode` and `sslrootcert` out of both forms of a URL.
fn asked(url: &str) -> Result<Asked, StoreError> {
    let mut asked = Asked::default();
    if let Some((head, query)) = url.split_once('?').filter(|_| url.contains("://")) {
        let rest: Vec<_> = take(&mut asked, query.split('&'), percent_decoded)?;
        asked.rest = if rest.is_empty() {
            head.to_owned()
        } else {
            format!("{head}?{}", rest.join("&"))
        };
    } else if url.contains("://") {
        url.clone_into(&mut asked.rest);
    } else {
        let unquoted = |value: &str| Some(value.trim_matches('\'').to_owned());
        let rest = take(&mut asked, url.split(' '), unquoted)?;
        asked.rest = rest.join(" ");
    }
    Ok(asked)
}

fn take<'a>(
    asked: &mut Asked,
    words: impl Iterator<Item = &'a str>,
    decoded: impl Fn(&str) -> Option<String>,
) -> Result<Vec<&'a str>, StoreError> {
    let mut rest = Vec::new();
    for word in words {
        match word.split_once('=') {
            Some(("sslmode", mode)) => {
                asked.required = match mode {
                    "disable" | "allow" | "prefer" => false,
                    "require" | "verify-ca" | "verify-full" => true,
                    _ => return Err(StoreError::TlsMode),
                }
            }
            Some(("sslrootcert", file)) => {
                asked.authorities = Some(decoded(file).ok_or(StoreError::TlsMode)?).filter(|file| file != "system");
            }
            _ => rest.push(word),
        }
    }
    Ok(rest)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Those of the file alone, or those that the system trusts.
fn roots(authorities: Option<&Path>) -> Result<RootCertStore, StoreError> {
    let mut roots = RootCertStore::empty();
    let Some(file) = authorities else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return if roots.is_empty() {
            Err(StoreError::NoAuthorities)
        } else {
            Ok(roots)
        };
    };
    let failed = |why: String| StoreError::Authorities {
        path: file.to_owned(),
        why,
    };
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| failed(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots.add(certificate).map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(failed("it has no certificate".to_owned()));
    }
    Ok(roots)
}

impl Tls {
    fn new(roots: RootCertStore) -> Result<Self, StoreError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| StoreError::TlsMode)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

/// For one server.
pub(super) struct Connector(TlsConnector, ServerName<'static>);

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> MakeTlsConnect<S> for Tls {
    type Stream = Stream<S>;
    type TlsConnect = Connector;
    type Error = io::Error;

    fn make_tls_connect(&mut self, name: &str) -> io::Result<Connector> {
        // A socket of this machine has no name, and no TLS either.
        let name = if name.is_empty() { "localhost" } else { name };
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        Ok(Connector(self.0.clone(), name))
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> TlsConnect<S> for Connector {
    type Stream = Stream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            self.0
                .connect(self.1, stream)
                .await
                .map(|stream| Stream(Box::new(stream)))
        })
    }
}

/// A connection that is safe.
pub(super) struct Stream<S>(Box<client::TlsStream<S>>);

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Stream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("postgresql://u:p@h/d", false, None, "postgresql://u:p@h/d")]
    #[case("postgresql://u:p@h/d?sslmode=require", true, None, "postgresql://u:p@h/d")]
    #[case(
        "postgres://u@h/d?connect_timeout=5&sslmode=verify-full&sslrootcert=%2Fetc%2Fca.pem",
        true,
        Some("/etc/ca.pem"),
        "postgres://u@h/d?connect_timeout=5"
    )]
    #[case(
        "host=h user=u sslmode=verify-ca sslrootcert='/ca.pem' dbname=d",
        true,
        Some("/ca.pem"),
        "host=h user=u dbname=d"
    )]
    #[case("host=h sslmode=verify-full sslrootcert=system", true, None, "host=h")]
    #[case("host=h sslmode=prefer", false, None, "host=h")]
    fn the_words_of_libpq_are_understood(
        #[case] url: &str,
        #[case] required: bool,
        #[case] authorities: Option<&str>,
        #[case] rest: &str,
    ) {
        let expected = Asked {
            required,
            authorities: authorities.map(str::to_owned),
            rest: rest.to_owned(),
        };
        assert_eq!(asked(url).unwrap(), expected);
    }

    #[test]
    fn an_unknown_mode_is_refused() {
        assert!(matches!(asked("host=h sslmode=verify_full"), Err(StoreError::TlsMode)));
        assert!(matches!(asked("postgres://h/d?sslmode="), Err(StoreError::TlsMode)));
    }
}
