//! One connection to Redis, whose replies are waited for within a bound.

use std::time::{Duration, Instant};

use std::sync::Arc;

use redis::{
    Client, ClientTlsConfig, Connection, ConnectionAddr, ConnectionInfo, ErrorKind,
    IntoConnectionInfo, Pipeline, RedisError, TlsCertificates, Value,
};

use super::RELEASE;
use super::switches::{Permit, Switches};
use crate::config::checked::{self, Tls};
use crate::random;
use crate::trust;

/// How long the key of a probe may stay, should nobody remove it.
const PROBE_TTL_MS: u64 = 1_000;

/// A connection that comes back by itself, and is not used while Redis is away.
pub(super) struct Link {
    way: Way,
    timeout: Duration,
    connection: Option<(Permit, Connection)>,
    pub(super) switches: Arc<Switches>,
}

impl Link {
    pub(super) fn new(redis: &checked::Redis, switches: &Arc<Switches>) -> anyhow::Result<Self> {
        Ok(Self {
            way: Way::new(redis)?,
            timeout: redis.timeout,
            connection: None,
            switches: Arc::clone(switches),
        })
    }

    /// One reply for each command of `pipeline`, or `None` when Redis is to be
    /// gone without. Takes at most `connect_timeout` for each step of a new
    /// connection and twice `timeout` for all replies together.
    ///
    /// A command that is refused has an error for its reply. Unless that is
    /// about the key alone, Redis is not asked again for a while.
    pub(super) fn query(&mut self, pipeline: &Pipeline) -> Option<Vec<Value>> {
        let permit = self.switches.permit()?;
        match self.ask(permit, pipeline) {
            Ok(replies) => {
                if let Some(refusal) = refusal(&replies) {
                    self.give_up(permit, &refusal);
                }
                Some(replies)
            }
            Err(error) => {
                self.give_up(permit, &describe(&error, self.timeout));
                None
            }
        }
    }

    /// Redis is of no use: the connection may lead to what was Redis once.
    pub(super) fn give_up(&mut self, permit: Permit, cause: &str) {
        self.connection = None;
        self.switches.leave(permit, cause);
    }

    /// As [`Self::give_up`], for an answer to a query that has just succeeded.
    pub(super) fn give_up_now(&mut self, cause: &str) {
        if let Some(permit) = self.switches.permit() {
            self.give_up(permit, cause);
        }
    }

    fn ask(&mut self, permit: Permit, pipeline: &Pipeline) -> Result<Vec<Value>, RedisError> {
        // A connection from before Redis was away may lead elsewhere.
        if let Some((made, connection)) = &mut self.connection
            && *made == permit
        {
            match replies(connection, pipeline, self.timeout) {
                // A server that was restarted, or a connection that was idle
                // for too long: what is asked for can be asked for twice.
                Err(error) if error.is_connection_dropped() => {}
                result => return result,
            }
        }
        self.connection = None;
        let connection = self.way.connect(self.timeout)?;
        let (_, connection) = self.connection.insert((permit, connection));
        replies(connection, pipeline, self.timeout)
    }

    /// Does what a claim and its release do, on a connection of its own. Half
    /// the time must be enough: a Redis that is barely in time would be left
    /// again at once.
    pub(super) fn probe(&self, key_prefix: &str) -> Result<(), String> {
        let within = (self.timeout / 2).max(Duration::from_millis(1));
        let mut pipeline = Pipeline::with_capacity(2);
        let key = probe_key(key_prefix);
        let set = pipeline.cmd("SET").arg(&key).arg("c:probe");
        set.arg("NX").arg("GET").arg("PX").arg(PROBE_TTL_MS);
        let eval = pipeline.cmd("EVAL").arg(RELEASE).arg(1);
        eval.arg(&key).arg("c:probe");
        let asked = self
            .way
            .connect(within)
            .and_then(|mut connection| replies(&mut connection, &pipeline, within))
            .map_err(|error| describe(&error, within))?;
        match refusal(&asked) {
            Some(refusal) => Err(refusal),
            None if matches!(asked.as_slice(), [Value::Nil, Value::Int(_)]) => Ok(()),
            None => Err(NO_ANSWER.to_owned()),
        }
    }
}

/// What is said of a peer that talks like Redis and is none.
pub(super) const NO_ANSWER: &str = "the server's answer is none to SET with NX and GET";

/// A key that nobody else uses, among those the daemon may use.
pub(super) fn probe_key(key_prefix: &str) -> String {
    format!("{key_prefix}:probe:{:016x}", random::draw())
}

/// How Redis is reached: its URL, understood, and the files for TLS.
pub(super) struct Way {
    info: ConnectionInfo,
    tls: Tls,
    connect_timeout: Duration,
}

impl Way {
    pub(super) fn new(redis: &checked::Redis) -> anyhow::Result<Self> {
        // redis's own error may quote the URL, and with it the password.
        let info: ConnectionInfo =
            redis.url.expose().into_connection_info().map_err(|_| {
                anyhow::anyhow!("failed to read the Redis URL: see `ackonce check`")
            })?;
        // Each command sent while connecting may take as long as all the rest.
        let settings = info.redis_settings().clone().set_skip_set_lib_name();
        let info = info.set_redis_settings(settings);
        let info = match info.addr() {
            ConnectionAddr::Unix(_) => info,
            _ => {
                let tcp = info.tcp_settings().clone().set_nodelay(true);
                info.set_tcp_settings(tcp)
            }
        };
        Ok(Self {
            info,
            tls: redis.tls.clone(),
            connect_timeout: redis.connect_timeout,
        })
    }

    /// A connection whose replies are waited for so long.
    pub(super) fn connect(&self, timeout: Duration) -> Result<Connection, RedisError> {
        let client = match self.info.addr() {
            ConnectionAddr::TcpTls { .. } => {
                Client::build_with_tls(self.info.clone(), self.certificates()?)?
            }
            _ => Client::open(self.info.clone())?,
        };
        let connection = client.get_connection_with_timeout(self.connect_timeout)?;
        connection.set_read_timeout(Some(timeout))?;
        connection.set_write_timeout(Some(timeout))?;
        Ok(connection)
    }

    fn certificates(&self) -> Result<TlsCertificates, RedisError> {
        let pem = trust::pem(&self.tls).map_err(std::io::Error::other)?;
        let client = |(client_cert, client_key)| ClientTlsConfig {
            client_cert,
            client_key,
        };
        Ok(TlsCertificates {
            client_tls: pem.client.map(client),
            root_cert: pem.authorities,
        })
    }
}

/// Reply by reply: `Pipeline::query` would go on reading after the first that
/// did not come, and wait `timeout` for each of the others.
fn replies(
    connection: &mut Connection,
    pipeline: &Pipeline,
    timeout: Duration,
) -> Result<Vec<Value>, RedisError> {
    let count = pipeline.len();
    let mut replies = Vec::with_capacity(count);
    if count == 0 {
        return Ok(replies);
    }
    let asked = Instant::now();
    connection.send_packed_command(&pipeline.get_packed_pipeline())?;
    while replies.len() < count {
        match connection.recv_response()? {
            Value::Push { .. } => {}
            reply => replies.push(reply),
        }
        if replies.len() < count && asked.elapsed() > timeout {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        }
    }
    Ok(replies)
}

/// The first error that is about more than the key it was given.
fn refusal(replies: &[Value]) -> Option<String> {
    replies.iter().find_map(|reply| match reply {
        Value::ServerError(error) if error.code() != "WRONGTYPE" => Some(in_its_own_words(
            error.code(),
            error.details().unwrap_or_default(),
        )),
        _ => None,
    })
}

/// What the server said: its code is what one looks for.
fn in_its_own_words(code: &str, detail: &str) -> String {
    [code, detail].join(" ")
}

pub(super) fn describe(error: &RedisError, within: Duration) -> String {
    if error.is_timeout() {
        return format!("no answer within {within:?}");
    }
    if let Some(tls) = trust::tls_error(error) {
        return format!("TLS failed: {}", trust::explained(tls));
    }
    if let (Some(code), Some(detail)) = (error.code(), error.detail()) {
        return in_its_own_words(code, detail);
    }
    match error.kind() {
        ErrorKind::Parse => format!("the server does not speak Redis's protocol: {error}"),
        _ => error.to_string(),
    }
}
