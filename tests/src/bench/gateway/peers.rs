//! The gateway's process, and those who speak with it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{GatewayFrame, Hello, Role, VERSION};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use super::cluster;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(3);

pub(super) struct Process {
    pub(super) child: Child,
    pub(super) address: SocketAddr,
}

impl Process {
    /// On one core when one is given; its log in `folder`.
    pub(super) async fn start(binary: &Path, folder: &Path, cluster: SocketAddr, core: Option<usize>) -> Result<Self> {
        Self::start_with(binary, folder, cluster, core, &[]).await
    }

    /// The same with arguments of its own.
    pub(super) async fn start_with(
        binary: &Path,
        folder: &Path,
        cluster: SocketAddr,
        core: Option<usize>,
        arguments: &[String],
    ) -> Result<Self> {
        let kubeconfig = folder.join("kubeconfig");
        std::fs::write(&kubeconfig, cluster::kubeconfig(cluster))?;
        let mut command = on_core(binary, core);
        command
            .args([
                "--listen=127.0.0.1:0",
                "--metrics-address=127.0.0.1:0",
                "--log-format=json",
                "--max-connections=20000",
                "--rate-per-minute=0",
            ])
            .arg(format!("--data={}", folder.join("events.db").display()))
            .args(arguments)
            .env("KUBECONFIG", &kubeconfig)
            .env("RUST_LOG", "warn,agentic_gateway=info")
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .with_context(|| format!("failed to start {}", binary.display()))?;
        let mut lines = BufReader::new(child.stderr.take().context("no stderr")?).lines();
        let address = loop {
            let line = timeout(PATIENCE, lines.next_line())
                .await??
                .context("the gateway ended")?;
            let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if line["fields"]["message"] == "listening" {
                break line["fields"]["address"].as_str().context("no address")?.parse()?;
            }
        };
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("gateway: {line}");
            }
        });
        Ok(Self { child, address })
    }

    pub(super) fn pid(&self) -> Result<u32> {
        self.child.id().context("the gateway ended")
    }
}

/// A command that runs on one core only.
pub(super) fn on_core(binary: &Path, core: Option<usize>) -> Command {
    let Some(core) = core else {
        return Command::new(binary);
    };
    let mut command = Command::new("taskset");
    command.arg("--cpu-list").arg(core.to_string()).arg(binary);
    command
}

pub(super) fn itself() -> Result<PathBuf> {
    std::env::current_exe().context("failed to find this program")
}

/// A record of about 500 bytes, as long as a short message of the CLI.
pub(super) fn record(seq: u64, text: &str) -> String {
    format!(
        r#"{{"seq":{seq},"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05.678Z","kind":"cli","body":{{"type":"assistant","message":{{"id":"msg_{seq}","role":"assistant","content":[{{"type":"text","text":"{text}"}}]}}}}}}"#
    )
}

pub(super) struct Runner {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub(super) acked: u64,
}

impl Runner {
    pub(super) async fn connect(address: SocketAddr, number: usize) -> Result<Self> {
        let mut request = format!("ws://{address}/api/projects/bench/sessions/s{number}/ws").into_client_request()?;
        request
            .headers_mut()
            .insert("authorization", format!("Bearer t{number}").parse()?);
        let (socket, _) = timeout(
            PATIENCE,
            tokio_tungstenite::connect_async_with_config(request, None, true),
        )
        .await??;
        let mut runner = Self { socket, acked: 0 };
        let hello = Hello {
            protocol: VERSION,
            role: Role::Run,
            uid: format!("u{number}"),
            name: format!("s{number}"),
            attempt: 1,
            pod_uid: format!("p{number}"),
            spool: "bench".to_owned(),
            next_seq: 1,
            cli_version: None,
        };
        runner
            .text(format!(r#"{{"hello":{}}}"#, serde_json::to_string(&hello)?))
            .await?;
        match runner.frame().await? {
            GatewayFrame::Welcome(welcome) => runner.acked = welcome.acked_seq,
            other => bail!("not welcome: {other:?}"),
        }
        Ok(runner)
    }

    pub(super) async fn text(&mut self, text: String) -> Result<()> {
        self.socket.send(Message::text(text)).await.context("the gateway left")
    }

    pub(super) async fn frame(&mut self) -> Result<GatewayFrame> {
        loop {
            match timeout(PATIENCE, self.socket.next())
                .await?
                .context("the gateway left")??
            {
                Message::Text(text) => return Ok(serde_json::from_str(&text)?),
                Message::Close(close) => bail!("closed: {close:?}"),
                _ => {}
            }
        }
    }

    pub(super) async fn acked(&mut self, seq: u64) -> Result<()> {
        while self.acked < seq {
            match self.frame().await? {
                GatewayFrame::Ack(ack) => self.acked = ack.seq,
                other => bail!("no ack: {other:?}"),
            }
        }
        Ok(())
    }

    /// Sends frames of `batch` records up to `last`, at most `window` of them not acknowledged.
    pub(super) async fn deliver(&mut self, last: u64, batch: u64, window: u64, text: &str) -> Result<()> {
        let mut next = self.acked + 1;
        while next <= last {
            let to = last.min(next + batch - 1);
            let records: Vec<_> = (next..=to).map(|seq| record(seq, text)).collect();
            self.text(format!(r#"{{"records":[{}]}}"#, records.join(","))).await?;
            next = to + 1;
            self.acked(next.saturating_sub(1 + batch * window)).await?;
        }
        self.acked(last).await
    }
}

/// A client that follows a session, on a bare socket: what it costs must not be what is measured.
pub(super) struct Watcher {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// End of the last read, kept for marks that are cut.
    tail: Vec<u8>,
}

impl Watcher {
    pub(super) async fn connect(address: SocketAddr, number: usize) -> Result<Self> {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "GET /api/projects/bench/agentic-sessions/s{number}/events HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer reader\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut watcher = Self {
            stream,
            buffer: vec![0; 4 << 10],
            tail: Vec::new(),
        };
        // The first event: it is attached.
        watcher.until(b"event: phase").await?;
        Ok(watcher)
    }

    pub(super) fn with_buffer(mut self, bytes: usize) -> Self {
        self.buffer.resize(bytes, 0);
        self
    }

    /// Reads until `mark` came.
    pub(super) async fn until(&mut self, mark: &[u8]) -> Result<usize> {
        let mut read = 0;
        loop {
            if let Some(at) = self.tail.windows(mark.len()).position(|part| part == mark) {
                self.tail.drain(..at + mark.len());
                return Ok(read);
            }
            let keep = self.tail.len().min(mark.len() - 1);
            self.tail.drain(..self.tail.len() - keep);
            let count = timeout(PATIENCE, self.stream.read(&mut self.buffer)).await??;
            ensure!(count > 0, "the gateway ended the stream");
            read += count;
            self.tail.extend_from_slice(&self.buffer[..count]);
        }
    }
}
