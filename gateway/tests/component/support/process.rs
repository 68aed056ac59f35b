//! The gateway as a process.

use std::{
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use super::{cluster::Cluster, soon};

pub struct Process {
    pub child: Child,
    pub address: SocketAddr,
    pub metrics: SocketAddr,
    /// All that it logs.
    pub log: Arc<Mutex<String>>,
}

impl Process {
    /// On ports of its own choice, which it says when it listens.
    pub async fn start(cluster: &Cluster, folder: &Path) -> Self {
        Self::start_under(&[], cluster, folder).await
    }

    /// Under a program such as `strace`, which gets the gateway as its last arguments.
    pub async fn start_under(program: &[&str], cluster: &Cluster, folder: &Path) -> Self {
        Self::start_with(program, cluster, folder, &[]).await
    }

    /// One of several on a database.
    pub async fn start_on(cluster: &Cluster, folder: &Path, database: &str) -> Self {
        Self::start_with(&[], cluster, folder, &[format!("--database-url={database}")]).await
    }

    /// With arguments of its own.
    pub async fn start_with(program: &[&str], cluster: &Cluster, folder: &Path, arguments: &[String]) -> Self {
        let kubeconfig = folder.join("kubeconfig");
        std::fs::write(&kubeconfig, cluster.kubeconfig()).unwrap();
        let words: Vec<&str> = program
            .iter()
            .copied()
            .chain([env!("CARGO_BIN_EXE_agentic-gateway")])
            .collect();
        let anywhere = !arguments.iter().any(|argument| argument.starts_with("--listen="));
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args(["--metrics-address=127.0.0.1:0", "--log-format=json"])
            .args(anywhere.then_some("--listen=127.0.0.1:0"))
            .arg(format!("--data={}", folder.join("events.db").display()))
            .args(arguments)
            .env("KUBECONFIG", &kubeconfig)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut first = String::new();
        let (address, metrics) = soon("the gateway listening", async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the gateway ended");
                first.push_str(&line);
                first.push('\n');
                let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else {
                    continue;
                };
                if line["fields"]["message"] == "listening" {
                    let parse = |name: &str| line["fields"][name].as_str().unwrap().parse().unwrap();
                    return (parse("address"), parse("metrics"));
                }
            }
        })
        .await;
        let log = Arc::new(Mutex::new(first));
        // What is not read would block it.
        tokio::spawn({
            let log: Arc<Mutex<String>> = log.clone();
            async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    let mut log = log.lock().unwrap();
                    log.push_str(&line);
                    log.push('\n');
                }
            }
        });
        Self {
            child,
            address,
            metrics,
            log,
        }
    }

    /// Asks it to end, as Kubernetes does.
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}
