//! A git server: the real `git http-backend` behind TLS by an authority of its own, with a token, refusals and redirects.

mod backend;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Method, path and query.
    pub line: String,
    /// The token that came with it.
    pub token: Option<String>,
    /// What was answered.
    pub status: u16,
}

/// What a server does that may change while it runs.
#[derive(Default)]
struct Behaviour {
    /// Token that is asked for.
    token: Option<String>,
    /// Everything is redirected below this.
    redirect: Option<String>,
    /// So many requests are answered 503.
    down: u32,
    asked: Vec<Asked>,
}

/// The running server; ends when it is dropped.
pub struct GitServer {
    /// Where it listens, on loopback.
    pub address: SocketAddr,
    /// Its authority's certificate.
    pub ca: String,
    root: tempfile::TempDir,
    behaviour: Arc<Mutex<Behaviour>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for GitServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl GitServer {
    /// Starts one without repositories, that asks for `token`.
    pub async fn start(token: Option<&str>) -> Result<Self> {
        Self::listen(([127, 0, 0, 1], 0).into(), token).await
    }

    /// Starts one at an address.
    pub async fn listen(address: SocketAddr, token: Option<&str>) -> Result<Self> {
        crate::http::install_crypto();
        let (acceptor, ca) = tls(address)?;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let root = tempfile::tempdir()?;
        let behaviour = Arc::new(Mutex::new(Behaviour {
            token: token.map(str::to_owned),
            ..Behaviour::default()
        }));
        let (shared, folder) = (Arc::clone(&behaviour), root.path().to_owned());
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, shared, folder) = (acceptor.clone(), Arc::clone(&shared), folder.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let service = service_fn(move |request| answer(request, Arc::clone(&shared), folder.clone()));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self {
            address,
            ca,
            root,
            behaviour,
            serving,
        })
    }

    /// Address of a repository.
    pub fn url(&self, name: &str) -> String {
        format!("https://{}/{name}.git", self.address)
    }

    /// Folder of a repository.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(format!("{name}.git"))
    }

    /// Makes a repository with these files on `main`; empty: without a commit.
    pub fn repository(&self, name: &str, files: &[(&str, &str)]) -> Result<()> {
        repository(&self.path(name), files)
    }

    /// Refuses pushes to a repository from now on.
    pub fn refuse_pushes(&self, name: &str, message: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let hook = self.path(name).join("hooks/pre-receive");
        std::fs::create_dir_all(self.path(name).join("hooks"))?;
        std::fs::write(&hook, format!("#!/bin/sh\necho '{message}' >&2\nexit 1\n"))?;
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Answers everything with a redirect below `target` from now on.
    pub fn redirect(&self, target: &str) {
        self.with(|behaviour| behaviour.redirect = Some(target.to_owned()));
    }

    /// Answers the next requests with 503.
    pub fn down(&self, requests: u32) {
        self.with(|behaviour| behaviour.down = requests);
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.with(|behaviour| behaviour.asked.clone())
    }

    /// What `git` says of a repository.
    pub fn git(&self, name: &str, arguments: &[&str]) -> Result<String> {
        git(&self.path(name), arguments)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Behaviour) -> T) -> T {
        act(&mut self.behaviour.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes a bare repository with these files on `main`; empty: without a commit.
pub fn repository(path: &Path, files: &[(&str, &str)]) -> Result<()> {
    std::fs::create_dir_all(path)?;
    git(path, &["init", "--quiet", "--bare", "--initial-branch=main"])?;
    git(path, &["config", "http.receivepack", "true"])?;
    if files.is_empty() {
        return Ok(());
    }
    let work = tempfile::tempdir()?;
    for (name, content) in files {
        let file = work.path().join(name);
        std::fs::create_dir_all(file.parent().context("a file has a folder")?)?;
        std::fs::write(file, content)?;
    }
    let tree = format!("--work-tree={}", work.path().display());
    git(path, &["-c", "core.bare=false", &tree, "add", "--all"])?;
    git(
        path,
        &["-c", "core.bare=false", &tree, "commit", "--quiet", "--message=first"],
    )?;
    Ok(())
}

/// Runs git in a repository; gives what it says.
pub fn git(path: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new("git")
        .env("GIT_DIR", path)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .envs(["AUTHOR", "COMMITTER"].map(|who| (format!("GIT_{who}_NAME"), "upstream")))
        .envs(["AUTHOR", "COMMITTER"].map(|who| (format!("GIT_{who}_EMAIL"), "upstream@test.example")))
        .args(arguments)
        .output()
        .context("failed to run git")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "git {arguments:?}: {said}");
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// A certificate for this address and `localhost`, and what takes connections by it.
pub(crate) fn tls(address: SocketAddr) -> Result<(TlsAcceptor, String)> {
    let mut params = CertificateParams::new(vec!["localhost".to_owned(), "git".to_owned()])?;
    params.subject_alt_names.push(SanType::IpAddress(address.ip()));
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let pem = certificate.pem();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.into()], key)?;
    Ok((TlsAcceptor::from(Arc::new(config)), pem))
}

async fn answer(
    request: Request<Incoming>,
    behaviour: Arc<Mutex<Behaviour>>,
    root: PathBuf,
) -> Result<Response<Full<Bytes>>> {
    let line = format!("{} {}", request.method(), request.uri());
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(password);
    let refusal = {
        let mut behaviour = behaviour.lock().unwrap_or_else(PoisonError::into_inner);
        let refusal = refused(&mut behaviour, &request, token.as_deref());
        behaviour.asked.push(Asked {
            line,
            token,
            status: refusal.as_ref().map_or(200, |refusal| refusal.status().as_u16()),
        });
        refusal
    };
    if let Some(refusal) = refusal {
        return Ok(refusal);
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    backend::run(&root, &head, body).await
}

fn refused(
    behaviour: &mut Behaviour,
    request: &Request<Incoming>,
    token: Option<&str>,
) -> Option<Response<Full<Bytes>>> {
    let mut response = Response::new(Full::default());
    if let Some(target) = &behaviour.redirect {
        *response.status_mut() = StatusCode::FOUND;
        let location = format!("{target}{}", request.uri()).parse().ok()?;
        response.headers_mut().insert(header::LOCATION, location);
        return Some(response);
    }
    if behaviour.down > 0 {
        behaviour.down -= 1;
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        return Some(response);
    }
    if behaviour.token.as_deref().is_some_and(|wanted| token != Some(wanted)) {
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        let challenge = header::HeaderValue::from_static("Basic realm=\"git\"");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        return Some(response);
    }
    None
}

fn password(header: &str) -> Option<String> {
    let encoded = header.strip_prefix("Basic ")?;
    let pair = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok()?;
    Some(pair.split_once(':')?.1.to_owned())
}
