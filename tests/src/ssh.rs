//! A git server over ssh: the real sshd on loopback, with a host key and a user's key of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::git::repository;

/// How long the server may take to listen.
const STARTS: Duration = Duration::from_mins(1);

/// The running server; ends when it is dropped.
pub struct SshServer {
    /// Where it listens.
    pub address: SocketAddr,
    dir: tempfile::TempDir,
    user: String,
    server: Child,
}

impl Drop for SshServer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl SshServer {
    /// Starts one that takes one key, which nobody else knows.
    pub fn start() -> Result<Self> {
        let sshd = xtask::packages::ensure_sshd()?;
        let dir = tempfile::tempdir()?;
        new_key(&dir.path().join("user-key"))?;
        new_key(&dir.path().join("host-key"))?;
        std::fs::copy(dir.path().join("user-key.pub"), dir.path().join("authorized_keys"))?;
        // Started by root it wants a folder to lock itself into.
        if xtask::packages::is_root() {
            std::fs::create_dir_all("/run/sshd")?;
        }
        let user = Command::new("id")
            .arg("-un")
            .output()
            .context("failed to run id")?
            .stdout;
        let user = String::from_utf8(user)?.trim().to_owned();
        let deadline = Instant::now() + STARTS;
        loop {
            // Somebody else may take the port before sshd does.
            let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
            let mut server = spawn(&sshd, dir.path(), address, &user)?;
            if listens(&mut server, address, deadline)? {
                return Ok(Self {
                    address,
                    dir,
                    user,
                    server,
                });
            }
        }
    }

    /// Has it show another host key from now on.
    pub fn change_host_key(&mut self) -> Result<()> {
        self.server.kill()?;
        self.server.wait()?;
        std::fs::remove_file(self.path("host-key"))?;
        new_key(&self.path("host-key"))?;
        let sshd = xtask::packages::ensure_sshd()?;
        let deadline = Instant::now() + STARTS;
        loop {
            self.server = spawn(&sshd, self.dir.path(), self.address, &self.user)?;
            if listens(&mut self.server, self.address, deadline)? {
                return Ok(());
            }
        }
    }

    /// Address of a repository.
    pub fn url(&self, name: &str) -> String {
        format!("ssh://{}@{}{}", self.user, self.address, self.path(name).display())
    }

    /// Makes a repository with these files on `main`.
    pub fn repository(&self, name: &str, files: &[(&str, &str)]) -> Result<()> {
        repository(&self.path(name), files)
    }

    /// What `git` says of a repository.
    pub fn git(&self, name: &str, arguments: &[&str]) -> Result<String> {
        crate::git::git(&self.path(name), arguments)
    }

    /// The key that it takes.
    pub fn key(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.path("user-key"))?)
    }

    /// What a file of known hosts says of it.
    pub fn known_host(&self) -> Result<String> {
        let key = std::fs::read_to_string(self.path("host-key.pub"))?;
        Ok(format!("[{}]:{} {key}", self.address.ip(), self.address.port()))
    }

    /// A key that it does not take.
    pub fn other_key(&self) -> Result<String> {
        let path = self.path("other-key");
        new_key(&path)?;
        Ok(std::fs::read_to_string(path)?)
    }

    /// What it said so far.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.path("log"))?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn new_key(path: &Path) -> Result<()> {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()?;
    ensure!(made.success(), "ssh-keygen: {made}");
    Ok(())
}

fn spawn(sshd: &Path, dir: &Path, address: SocketAddr, user: &str) -> Result<Child> {
    let file = |name: &str| dir.join(name).display().to_string();
    let config = format!(
        "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nAllowUsers {user}\nPidFile none\nUsePAM no\n\
         StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
         PermitUserRC no\nPrintMotd no\n",
        file("host-key"),
        file("authorized_keys"),
    );
    std::fs::write(dir.join("sshd_config"), config)?;
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))?;
    Command::new(sshd)
        .args(["-D", "-e", "-f"])
        .arg(dir.join("sshd_config"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("failed to start sshd")
}

/// Waits until it answers as ssh does; false: it ended.
fn listens(server: &mut Child, address: SocketAddr, deadline: Instant) -> Result<bool> {
    use std::io::Read as _;
    while Instant::now() < deadline {
        if server.try_wait()?.is_some() {
            return Ok(false);
        }
        let mut greeting = [0; 4];
        if let Ok(mut stream) = std::net::TcpStream::connect(address)
            && stream.set_read_timeout(Some(STARTS)).is_ok()
            && stream.read_exact(&mut greeting).is_ok()
            && &greeting == b"SSH-"
        {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("sshd does not answer on {address}")
}
