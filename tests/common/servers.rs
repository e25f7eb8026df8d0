//! Servers of a test's own, for faults that are the whole server's: killed,
//! frozen, restarted, reconfigured.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redis::{Client, Value};
use tempfile::TempDir;
use url::Url;

use super::{Authority, Database, Leaf, eventually};

/// A Redis. Dropping it ends it.
pub struct RedisServer {
    process: Option<Child>,
    folder: TempDir,
    port: u16,
    password: String,
}

impl RedisServer {
    /// Starts one, with nothing in it.
    pub fn start() -> Self {
        let mut server = Self::absent();
        server.start_again(&[]);
        server
    }

    /// Starts one that speaks TLS alone, and lets nobody in without a
    /// certificate of `clients`, if they are given.
    pub fn start_tls(leaf: &Leaf, clients: Option<&Authority>) -> Self {
        let mut server = Self::absent();
        server.start_again_tls(leaf, clients);
        server
    }

    /// As [`Self::start_again`], with TLS as [`Self::start_tls`] has it.
    pub fn start_again_tls(&mut self, leaf: &Leaf, clients: Option<&Authority>) {
        let authority = clients.map_or_else(|| leaf.cert(), Authority::file);
        let files = [leaf.cert(), leaf.key(), authority];
        let [cert, key, authority] = files.map(|path| path.display().to_string());
        let port = self.port.to_string();
        self.start_again(&[
            "--port",
            "0",
            "--tls-port",
            &port,
            "--tls-cert-file",
            &cert,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &authority,
            "--tls-auth-clients",
            if clients.is_some() { "yes" } else { "no" },
        ]);
    }

    /// Its URL, where it speaks TLS.
    pub fn tls_url(&self, host: &str) -> String {
        format!("rediss://{host}:{}/0", self.port)
    }

    /// One that does not run yet.
    pub fn absent() -> Self {
        Self {
            process: None,
            folder: TempDir::new().expect("a folder"),
            port: free_port(),
            password: String::new(),
        }
    }

    /// Starts it on its old port, with further `arguments`, and waits until it
    /// listens.
    pub fn start_again(&mut self, arguments: &[&str]) {
        let program = ["redis-server", "valkey-server"]
            .into_iter()
            .find(|name| Command::new(name).arg("--version").output().is_ok())
            .expect("Redis is installed: run script/services install");
        let process = Command::new(program)
            .args(["--bind", "127.0.0.1", "--save", "", "--daemonize", "no"])
            .args(["--port", &self.port.to_string()])
            .args(["--enable-debug-command", "yes"])
            .args(["--dir", &self.folder.path().to_string_lossy()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("Redis starts");
        self.process = Some(process);
        eventually("Redis listens", || {
            std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
    }

    /// Its URL, with its password if it has one.
    pub fn url(&self) -> String {
        let user = match self.password.as_str() {
            "" => String::new(),
            password => format!(":{password}@"),
        };
        format!("redis://{user}127.0.0.1:{}/0", self.port)
    }

    /// Asks for `password` from now on, for none if it is empty, and closes
    /// every connection.
    pub fn change_password(&mut self, password: &str) {
        self.run(&["CONFIG", "SET", "requirepass", password]);
        password.clone_into(&mut self.password);
        // The connection that asks for it goes with the others.
        let kill = ["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no"];
        drop(self.command(&kill));
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        kill(pid_of(process), signal).expect("Redis takes a signal");
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.kill().expect("Redis is killed");
        process.wait().expect("wait");
    }

    /// Runs a command, on a connection of its own.
    pub fn command(&self, words: &[&str]) -> Result<Value, redis::RedisError> {
        let mut connection = Client::open(self.url())?.get_connection()?;
        let mut command = redis::cmd(words[0]);
        for word in &words[1..] {
            command.arg(word);
        }
        command.query(&mut connection)
    }

    /// Runs a command that must succeed.
    pub fn run(&self, words: &[&str]) -> Value {
        self.command(words)
            .unwrap_or_else(|e| panic!("failed to run {words:?}: {e}"))
    }

    /// How many of its keys fit `pattern`.
    pub fn count_keys(&self, pattern: &str) -> usize {
        match self.run(&["KEYS", pattern]) {
            Value::Array(keys) => keys.len(),
            other => panic!("KEYS said {other:?}"),
        }
    }

    /// How many of its keys that fit `pattern` say that an id is done.
    pub fn count_marks(&self, pattern: &str) -> usize {
        const COUNT: &str = "local marks = 0 \
             for _, key in ipairs(redis.call('keys', ARGV[1])) do \
             if redis.call('getrange', key, 0, 1) == 'd:' then marks = marks + 1 end end \
             return marks";
        match self.run(&["EVAL", COUNT, "0", pattern]) {
            Value::Int(marks) => usize::try_from(marks).expect("a count"),
            other => panic!("EVAL said {other:?}"),
        }
    }

    /// A number of `INFO`.
    pub fn info(&self, field: &str) -> i64 {
        let mut connection = Client::open(self.url())
            .and_then(|client| client.get_connection())
            .expect("a connection");
        let info: redis::InfoDict = redis::cmd("INFO").query(&mut connection).expect("INFO");
        info.get(field).expect("a number")
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // One that is stopped is killed all the same.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// A PostgreSQL. Dropping it ends it.
pub struct PostgresServer {
    process: Option<Child>,
    folder: TempDir,
    port: u16,
}

impl PostgresServer {
    /// Makes a database cluster and starts it with further `settings`.
    pub fn start(settings: &[&str]) -> Self {
        let mut server = Self::initialised();
        server.start_again(settings);
        server
    }

    /// Starts one that speaks TLS to whoever asks for it, and then wants a
    /// certificate of `clients`, if they are given.
    pub fn start_tls(leaf: &Leaf, clients: Option<&Authority>) -> Self {
        let mut server = Self::initialised();
        let settings = server.tls_settings(leaf, clients);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        server.start_again(&settings);
        server
    }

    /// The settings of [`Self::start_tls`], and the files that they name.
    fn tls_settings(&self, leaf: &Leaf, clients: Option<&Authority>) -> Vec<String> {
        let cert = self.place(&leaf.cert(), "server.pem");
        let key = self.place(&leaf.key(), "server.key");
        let mut settings = vec![
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", cert.display()),
            format!("ssl_key_file={}", key.display()),
        ];
        if let Some(clients) = clients {
            let authority = self.place(&clients.file(), "clients.pem");
            let who = "all all 127.0.0.1/32 trust";
            settings.push(format!("ssl_ca_file={}", authority.display()));
            settings.push(self.rules(&format!(
                "hostnossl {who}\nhostssl {who} clientcert=verify-ca\n"
            )));
        }
        settings
    }

    /// Replaces the certificates of one that [`Self::start_tls`] started; those
    /// who connect from now on meet the new ones.
    pub fn renew_tls(&self, leaf: &Leaf, clients: &Authority) {
        self.tls_settings(leaf, Some(clients));
        let url = format!("{}?sslmode=disable", self.url());
        let loaded = || -> i64 {
            let loaded = "select (extract(epoch from pg_conf_load_time()) * 1000000)::int8";
            Database::connect(&url).count(loaded)
        };
        let before = loaded();
        let process = self.process.as_ref().expect("it runs");
        kill(pid_of(process), Signal::SIGHUP).expect("PostgreSQL takes a signal");
        eventually("PostgreSQL has loaded its files", || loaded() > before);
    }

    /// Starts one that asks everybody but the superuser `ackonce` for a password.
    pub fn start_with_passwords() -> Self {
        let mut server = Self::initialised();
        let rules = server.rules(
            "host all ackonce 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
        );
        server.start_again(&[&rules]);
        server
    }

    /// The setting that names a `pg_hba.conf` with this text.
    fn rules(&self, text: &str) -> String {
        let rules = self.folder.path().join("rules");
        std::fs::write(&rules, text).expect("pg_hba.conf");
        let rules = self.place(&rules, "pg_hba.conf");
        format!("hba_file={}", rules.display())
    }

    /// A copy of `path` that is the server's alone.
    fn place(&self, path: &Path, name: &str) -> PathBuf {
        let copy = self.folder.path().join(name);
        let mut install = Command::new("install");
        if is_root() {
            install.args(["-o", "postgres", "-g", "postgres"]);
        }
        let status = install.args(["-m", "600"]).arg(path).arg(&copy).status();
        assert!(status.expect("install").success());
        copy
    }

    fn initialised() -> Self {
        let server = Self::prepare();
        server.tool("initdb", |initdb| {
            initdb
                .args(["--no-sync", "--username=ackonce", "--auth=trust"])
                .args(["--encoding=UTF8", "--locale=C", "--pgdata"])
        });
        server
    }

    /// Makes a streaming standby of `primary` and starts it.
    pub fn standby_of(primary: &Self) -> Self {
        let mut server = Self::prepare();
        let port = primary.port.to_string();
        server.tool("pg_basebackup", |backup| {
            backup
                .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync"])
                .args(["--host=127.0.0.1", "--username=ackonce", "--port", &port])
                .arg("--pgdata")
        });
        server.start_again(&[]);
        server
    }

    /// Keeps what its files hold, as a snapshot of its disk does; it must have
    /// ended.
    pub fn snapshot(&self) -> PathBuf {
        let copy = self.folder.path().join("snapshot");
        copy_folder(&self.data(), &copy);
        copy
    }

    /// Puts a snapshot in the place of its files; it must have ended.
    pub fn restore(&self, snapshot: &Path) {
        std::fs::remove_dir_all(self.data()).expect("its files go");
        copy_folder(snapshot, &self.data());
    }

    fn prepare() -> Self {
        let folder = TempDir::new().expect("a folder");
        if is_root() {
            let chown = Command::new("chown")
                .arg("postgres:postgres")
                .arg(folder.path())
                .status();
            assert!(chown.expect("chown").success());
        }
        Self {
            process: None,
            folder,
            port: free_port(),
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn tool(&self, name: &str, arguments: impl for<'a> FnOnce(&'a mut Command) -> &'a mut Command) {
        let mut command = as_postgres(name);
        arguments(&mut command).arg(self.data());
        let output = command.current_dir(self.folder.path()).output();
        let output = output.unwrap_or_else(|e| panic!("failed to run {name}: {e}"));
        assert!(output.status.success(), "{name}: {output:?}");
    }

    /// Starts it on its old port and waits until it answers.
    pub fn start_again(&mut self, settings: &[&str]) {
        let url = format!("{}?sslmode=disable", self.url());
        // Children of one that was killed may still hold its memory: then it
        // ends again.
        eventually("PostgreSQL answers", || {
            let ended = match &mut self.process {
                None => true,
                Some(process) => process.try_wait().expect("wait").is_some(),
            };
            if ended {
                self.process = Some(self.launch(settings));
            }
            Database::try_connect(&url).is_ok()
        });
    }

    fn launch(&self, settings: &[&str]) -> Child {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .expect("a log");
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(self.data());
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "shared_buffers=32MB",
            "max_connections=60",
            "timezone=UTC",
            &format!("port={}", self.port),
        ]
        .iter()
        .chain(settings)
        {
            command.arg("-c").arg(setting);
        }
        command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("PostgreSQL starts")
    }

    /// URL of its first database.
    pub fn url(&self) -> String {
        format!("postgres://ackonce@127.0.0.1:{}/postgres", self.port)
    }

    /// `url`, on this server.
    pub fn same_database(&self, url: &str) -> String {
        let mut url = Url::parse(url).expect("a URL");
        url.set_port(Some(self.port)).expect("a port");
        url.into()
    }

    /// Ends it with `signal`: SIGINT is a fast shutdown, SIGQUIT an immediate
    /// one, SIGKILL a crash.
    pub fn end(&mut self, signal: Signal) {
        let mut process = self.process.take().expect("it runs");
        kill(pid_of(&process), signal).expect("PostgreSQL takes a signal");
        process.wait().expect("wait");
    }

    /// What it wrote into its log.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            kill(pid_of(process), Signal::SIGQUIT).ok();
            drop(process.wait());
        }
        if std::thread::panicking() {
            let log = self.log();
            let end: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("--- end of PostgreSQL's log ---");
            end.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// A program of PostgreSQL's, which does not run as root.
fn as_postgres(program: &str) -> Command {
    let program = postgres_bin().join(program);
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            "--",
        ])
        .arg(program);
    command
}

fn copy_folder(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg("--archive")
        .arg(from)
        .arg(to)
        .status();
    assert!(status.expect("cp").success());
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").expect("/proc").uid() == 0
}

/// The folder of the newest server that is installed.
fn postgres_bin() -> PathBuf {
    let installed = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let version = |path: &Path| -> Option<u32> { path.file_name()?.to_str()?.parse().ok() };
    installed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("bin/initdb").exists())
        .max_by_key(|path| version(path))
        .map_or_else(PathBuf::new, |path| path.join("bin"))
}

fn pid_of(process: &Child) -> Pid {
    Pid::from_raw(i32::try_from(process.id()).expect("a pid"))
}

pub(super) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}
