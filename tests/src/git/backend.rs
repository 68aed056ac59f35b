//! One request to `git http-backend`, which is a CGI program.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::request::Parts;
use http::{Response, header};
use http_body_util::Full;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

pub(super) async fn run(root: &Path, head: &Parts, body: Bytes) -> Result<Response<Full<Bytes>>> {
    let text = |name: header::HeaderName| {
        head.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("")
    };
    let mut backend = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("REMOTE_USER", "pusher")
        .env("REQUEST_METHOD", head.method.as_str())
        .env("PATH_INFO", head.uri.path())
        .env("QUERY_STRING", head.uri.query().unwrap_or(""))
        .env("CONTENT_TYPE", text(header::CONTENT_TYPE))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", text(header::CONTENT_ENCODING))
        .env("GIT_PROTOCOL", text(header::HeaderName::from_static("git-protocol")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = backend.stdin.take().context("it has a stdin")?;
    let feeding = tokio::spawn(async move {
        // It reads no more than it needs.
        let _ = stdin.write_all(&body).await;
    });
    let output = backend.wait_with_output().await?;
    feeding.await?;
    response(output.stdout)
}

fn response(output: Vec<u8>) -> Result<Response<Full<Bytes>>> {
    let end = output
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .context("it answers with headers")?;
    let mut builder = Response::builder();
    for line in std::str::from_utf8(&output[..end])?.split("\r\n") {
        let (name, value) = line.split_once(": ").context("a header has a value")?;
        builder = if name.eq_ignore_ascii_case("status") {
            builder.status(value.split(' ').next().unwrap_or(value).parse::<u16>()?)
        } else {
            builder.header(name, value)
        };
    }
    Ok(builder.body(Full::new(Bytes::from(output).slice(end + 4..)))?)
}
