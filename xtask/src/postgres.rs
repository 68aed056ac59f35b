//! A PostgreSQL server for tests: Debian's, on a Unix socket in a folder of its own, as a user without rights.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, TcpListener},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{command, packages, progress};

const ROOT_OF_ALL: &str = "/usr/lib/postgresql";
const PREFIX: &str = "agentic-postgres-";
/// `nobody` and `nogroup`: the server refuses to run as root.
const NOBODY: u32 = 65_534;
/// Of the socket's name, where nobody listens on a network.
const PORT: u16 = 5432;
/// Of the one user, where the server listens on a network.
pub const PASSWORD: &str = "fake-password-of-tests";
/// How long it may take to start or to end.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running server; dropping it ends it and deletes its data. It dies with the process that started it, however that ends.
#[derive(Debug)]
pub struct Postgres {
    folder: PathBuf,
    requests: Option<mpsc::Sender<Request>>,
    keeper: Option<thread::JoinHandle<()>>,
    databases: AtomicU32,
    port: u16,
    _lock: File,
}

/// Where a server listens.
#[derive(Clone, Debug)]
struct Place {
    port: u16,
    /// File of the network namespace, when it is not this process's.
    network: Option<PathBuf>,
}

enum Request {
    Kill(mpsc::Sender<Result<()>>),
    Start(mpsc::Sender<Result<()>>),
}

impl Postgres {
    /// Starts one; takes about two seconds. Installs Debian's when it is missing and we are root.
    pub fn start() -> Result<Self> {
        Self::start_with(None, None)
    }

    /// One in another network namespace, that listens there at this address, with [`PASSWORD`].
    pub fn start_in(network: &Path, address: IpAddr) -> Result<Self> {
        let server = Self::start_with(None, Some((network, address)))?;
        server.say("postgres", &format!("ALTER ROLE agentic PASSWORD '{PASSWORD}'"))?;
        Ok(server)
    }

    /// One that also listens on the loopback interface, and there speaks nothing but TLS with this certificate and key, both PEM.
    pub fn start_with_tls(certificate: &str, key: &str) -> Result<Self> {
        Self::start_with(Some((certificate, key)), None)
    }

    fn start_with(tls: Option<(&str, &str)>, elsewhere: Option<(&Path, IpAddr)>) -> Result<Self> {
        packages::ensure_postgres()?;
        sweep();
        let (folder, lock) = claim()?;
        initialise(&folder)?;
        let port = match tls {
            Some((certificate, key)) => allow_tls(&folder.join("data"), certificate, key)?,
            None => PORT,
        };
        if let Some((_, address)) = elsewhere {
            allow_network(&folder.join("data"), address)?;
        }
        let place = Place {
            port,
            network: elsewhere.map(|(network, _)| network.to_owned()),
        };
        let (sender, requests) = mpsc::channel();
        let keeper = thread::Builder::new().name("postgres".into()).spawn({
            let folder = folder.clone();
            // The server is killed by the kernel when the thread that started it ends, so one thread keeps it.
            move || keep(&folder, &place, &requests)
        })?;
        let server = Self {
            folder,
            requests: Some(sender),
            keeper: Some(keeper),
            databases: AtomicU32::new(0),
            port,
            _lock: lock,
        };
        server.resume()?;
        Ok(server)
    }

    /// A new, empty database, as a URL.
    pub fn database(&self) -> Result<String> {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.say("postgres", &format!("CREATE DATABASE {name}"))?;
        Ok(self.url(&name))
    }

    /// A new, empty database as the words by which it is reached over the network, under this name of its host.
    pub fn database_at(&self, host: &str) -> Result<String> {
        Ok(self.url_at(&self.database()?, host))
    }

    /// A database of [`Self::database`] by the words by which it is reached over the network, under this name of its host.
    pub fn url_at(&self, database: &str, host: &str) -> String {
        format!("postgresql://agentic@{host}:{}/{}", self.port, name(database))
    }

    /// Runs a statement in a database of [`Self::database`] or in `postgres`; what it says, without headings.
    pub fn say(&self, database: &str, statement: &str) -> Result<String> {
        let name = name(database);
        let mut psql = Command::new(programs()?.join("psql"));
        psql.args([
            "--no-psqlrc",
            "--quiet",
            "--tuples-only",
            "--no-align",
            "--username=agentic",
        ])
        .arg(format!("--host={}", self.folder.display()))
        .arg(format!("--port={}", self.port))
        .args(["--command", statement, name])
        .env("LC_ALL", "C");
        command::output(&mut psql)
    }

    /// A copy of a database of [`Self::database`] as it is now, for [`Self::put_back`]. Its connections are cut.
    pub fn copy(&self, database: &str) -> Result<String> {
        let copy = format!("copy{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let name = name(database);
        self.cut(name)?;
        self.say("postgres", &format!("CREATE DATABASE {copy} TEMPLATE {name}"))?;
        self.say("postgres", &format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"))?;
        Ok(copy)
    }

    /// Makes the database what it was when it was copied, under whoever uses it.
    pub fn put_back(&self, copy: &str, database: &str) -> Result<()> {
        let name = name(database);
        self.cut(name)?;
        self.say("postgres", &format!("ALTER DATABASE {name} RENAME TO {copy}newer"))?;
        self.say("postgres", &format!("ALTER DATABASE {copy} RENAME TO {name}"))?;
        Ok(())
    }

    fn cut(&self, name: &str) -> Result<()> {
        self.say("postgres", &format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false"))?;
        let cut =
            format!("SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = '{name}'");
        self.say("postgres", &cut)?;
        Ok(())
    }

    /// Kills it at once, as a crash of its machine would.
    pub fn kill(&self) -> Result<()> {
        self.ask(Request::Kill)
    }

    /// Starts it after [`Self::kill`] and waits until it answers.
    pub fn resume(&self) -> Result<()> {
        self.ask(Request::Start)
    }

    fn url(&self, name: &str) -> String {
        format!(
            "host={} port={} user=agentic dbname={name}",
            self.folder.display(),
            self.port
        )
    }

    fn ask(&self, request: impl FnOnce(mpsc::Sender<Result<()>>) -> Request) -> Result<()> {
        let ended = || anyhow!("the thread of the server has ended");
        let (reply, answer) = mpsc::channel();
        let requests = self.requests.as_ref().with_context(ended)?;
        requests.send(request(reply)).map_err(|_| ended())?;
        answer.recv().with_context(ended)?
    }
}

/// Of a database by its words.
fn name(database: &str) -> &str {
    database.rsplit_once("dbname=").map_or(database, |(_, name)| name)
}

impl Drop for Postgres {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn keep(folder: &Path, place: &Place, requests: &mpsc::Receiver<Request>) {
    let mut running: Option<Child> = None;
    while let Ok(request) = requests.recv() {
        let (reply, result) = match request {
            Request::Kill(reply) => (reply, running.take().map_or(Ok(()), kill)),
            Request::Start(reply) => (reply, serve(folder, place).map(|child| running = Some(child))),
        };
        let _ = reply.send(result);
    }
    if let Some(child) = running {
        let _ = kill(child);
    }
}

fn kill(mut child: Child) -> Result<()> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("no pid")?;
    kill_process(pid, Signal::KILL)?;
    child.wait()?;
    Ok(())
}

/// Where Debian has the newest version's programs.
fn programs() -> Result<PathBuf> {
    let versions = fs::read_dir(ROOT_OF_ALL).with_context(|| format!("failed to read {ROOT_OF_ALL}"))?;
    let newest = versions
        .flatten()
        .filter(|version| version.path().join("bin/postgres").exists())
        .max_by_key(|version| version.file_name().to_string_lossy().parse::<u32>().unwrap_or_default());
    Ok(newest.context("there is no PostgreSQL server")?.path().join("bin"))
}

/// A program of the server, as nobody when we are root.
fn as_nobody(program: &Path, network: Option<&Path>) -> Command {
    let mut command = Command::new(if network.is_some() { "nsenter" } else { "setpriv" });
    if let Some(network) = network {
        command
            .arg(format!("--net={}", network.display()))
            .args(["--", "setpriv"]);
    }
    if packages::is_root() {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .env("LC_ALL", "C");
    command
}

fn initialise(folder: &Path) -> Result<()> {
    let mut initdb = as_nobody(&programs()?.join("initdb"), None);
    initdb
        .current_dir("/")
        .args([
            "--username=agentic",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
            "-D",
        ])
        .arg(folder.join("data"));
    command::output(&mut initdb).context("failed to make a PostgreSQL database")?;
    // Nobody listens on a network, unless what is appended later says so.
    append(
        &folder.join("data/postgresql.conf"),
        "listen_addresses = ''\nmax_connections = 200\n",
    )
}

fn append(file: &Path, text: &str) -> Result<()> {
    let mut opened = File::options().append(true).open(file)?;
    opened
        .write_all(text.as_bytes())
        .with_context(|| format!("failed to write {}", file.display()))
}

/// Has the server of this folder listen at an address, for whoever knows the password.
fn allow_network(data: &Path, address: IpAddr) -> Result<()> {
    let conf = format!("listen_addresses = '{address}'\n");
    append(&data.join("postgresql.conf"), &conf)?;
    let rules = "local all all trust\nhost all all all scram-sha-256\n";
    fs::write(data.join("pg_hba.conf"), rules).context("failed to write who may connect")
}

/// Has the server of this folder listen on the loopback interface, with TLS alone; the port.
fn allow_tls(data: &Path, certificate: &str, key: &str) -> Result<u16> {
    for (name, text) in [("server.crt", certificate), ("server.key", key)] {
        let file = data.join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        if packages::is_root() {
            chown(&file, Some(NOBODY), Some(NOBODY))?;
        }
    }
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let conf = format!("listen_addresses = '127.0.0.1'\nport = {port}\nssl = on\n");
    append(&data.join("postgresql.conf"), &conf)?;
    fs::write(
        data.join("pg_hba.conf"),
        "local all all trust\nhostssl all all 127.0.0.1/32 trust\n",
    )?;
    Ok(port)
}

fn serve(folder: &Path, place: &Place) -> Result<Child> {
    let log = folder.join("log");
    let file = File::options().create(true).append(true).open(&log)?;
    let mut server = as_nobody(&programs()?.join("postgres"), place.network.as_deref());
    server
        .current_dir("/")
        .arg("-D")
        .arg(folder.join("data"))
        .arg("-c")
        .arg(format!("unix_socket_directories={}", folder.display()))
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let begun = Instant::now();
    let ready = programs()?.join("pg_isready");
    loop {
        let mut child = server.spawn().context("failed to start PostgreSQL")?;
        while child.try_wait()?.is_none() {
            if command::output(
                Command::new(&ready)
                    .arg("--host")
                    .arg(folder)
                    .arg(format!("--port={}", place.port)),
            )
            .is_ok()
            {
                return Ok(child);
            }
            if begun.elapsed() > PATIENCE {
                let _ = child.kill();
            }
            thread::sleep(Duration::from_millis(20));
        }
        // What is left of one that was killed may take a moment to go.
        if begun.elapsed() > PATIENCE {
            bail!("PostgreSQL does not start:\n{}", command::tail(&log, 20));
        }
    }
}

/// A fresh folder that nobody can write to, and the lock that says that its owner lives.
fn claim() -> Result<(PathBuf, File)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("{PREFIX}{}-{count}", std::process::id()));
    // Locked under another name first, or it could be swept before its lock is taken.
    let staging = folder.with_extension("new");
    let _ = fs::remove_dir_all(&staging);
    fs::create_dir_all(&staging).with_context(|| format!("failed to create {}", staging.display()))?;
    let lock = File::create(staging.join("lock"))?;
    lock.lock()?;
    fs::set_permissions(&staging, fs::Permissions::from_mode(0o755))?;
    if packages::is_root() {
        chown(&staging, Some(NOBODY), Some(NOBODY))?;
    }
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&staging, &folder)?;
    Ok((folder, lock))
}

/// Deletes what processes left behind that have ended.
pub fn sweep() {
    for folder in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = folder.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with(PREFIX) && !name.ends_with(".new");
        if ours && File::open(folder.path().join("lock")).is_ok_and(|lock| lock.try_lock().is_ok()) {
            progress::say("deleting the data of a PostgreSQL server that was left behind");
            let _ = fs::remove_dir_all(folder.path());
        }
    }
}
