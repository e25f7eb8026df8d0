//! Is this plausibly the URL of that server? Complaints never repeat any part
//! of a URL: a slip of the pen can make any part of it the password.

use percent_encoding::percent_decode_str;
use url::Url;

use super::checked::Secret;
use super::defaults;
use super::error::Complaint;

/// `amqp://` and `amqps://`.
pub(super) fn check_amqp(text: &str) -> Result<(), Complaint> {
    const EXAMPLE: &str = "write it like amqp://USER:PASSWORD@HOST:5672/VHOST";
    let url = parse(text, &["amqp", "amqps"], EXAMPLE)?;
    require_host(&url, EXAMPLE)?;
    if url.path().trim_start_matches('/').contains('/') || url.path().starts_with("//") {
        return Err(Complaint::new(
            "has more than one part after its host",
            "the path is the vhost; write a slash in it as %2f, as in amqp://HOST/%2f",
        ));
    }
    if url.path().contains('@') {
        return Err(Complaint::new(
            "has an `@` after its host",
            "write / and @ in a user name, a password or a vhost as %2F and %40",
        ));
    }
    if url.port() == Some(0) {
        return Err(Complaint::new("has the port 0", EXAMPLE));
    }
    let vhost = url.path().trim_start_matches('/');
    let host = url.host_str().unwrap_or_default();
    let password = url.password().unwrap_or_default();
    for part in [vhost, host, url.username(), password] {
        check_part(part)?;
    }
    refuse_amqp_parameters(&url)
}

/// A part of an AMQP URL: the connection takes no other.
fn check_part(part: &str) -> Result<(), Complaint> {
    let Ok(text) = percent_decode_str(part).decode_utf8() else {
        return Err(Complaint::new(
            "has a %-sequence that is not UTF-8",
            "encode special characters as UTF-8, as in %C3%A9 for é",
        ));
    };
    if text.len() > defaults::AMQP_NAME_MAX || text.contains('\0') {
        return Err(Complaint::new(
            "has a part that no broker can be sent",
            "user name, password, host and vhost have at most 255 bytes each, and no NUL",
        ));
    }
    Ok(())
}

fn refuse_amqp_parameters(url: &Url) -> Result<(), Complaint> {
    if url.fragment().is_some() {
        return Err(Complaint::new(
            "has a part after `#`",
            "write a # in the password as %23",
        ));
    }
    let Some((name, _)) = url.query_pairs().next() else {
        return match url.query() {
            None => Ok(()),
            Some(_) => Err(Complaint::new("ends in a bare `?`", "leave it out")),
        };
    };
    let (name, hint) = match name.as_ref() {
        "heartbeat" => ("heartbeat", "set `heartbeat` in [broker] instead"),
        "connection_timeout" => (
            "connection_timeout",
            "set `connect_timeout` in [broker] instead",
        ),
        "cacertfile" => ("cacertfile", "set `ca_file` in [broker] instead"),
        "channel_max" => (
            "channel_max",
            "leave it out: the daemon knows what it needs",
        ),
        _ => {
            return Err(Complaint::new(
                "has an unknown parameter after `?`",
                "URLs take no parameters here; write a ? in the password as %3F",
            ));
        }
    };
    Err(Complaint::new(format!("has the parameter `{name}`"), hint))
}

/// `redis://`, `rediss://` and, for a socket, `unix://` and `redis+unix://`.
pub(super) fn check_redis(text: &str) -> Result<(), Complaint> {
    const EXAMPLE: &str =
        "write it like redis://:PASSWORD@HOST:6379/0, rediss://… for TLS, or unix:///PATH";
    let url = parse(text, &["redis", "rediss", "redis+unix", "unix"], EXAMPLE)?;
    let is_socket = matches!(url.scheme(), "redis+unix" | "unix");
    let known: &[&str] = match is_socket {
        true => &["db", "user", "pass", "protocol"],
        false => &["protocol"],
    };
    if url
        .query_pairs()
        .any(|(name, _)| !known.contains(&name.as_ref()))
    {
        return Err(Complaint::new(
            "has an unknown parameter after `?`",
            format!(
                "known here: {}; write a ? in the password as %3F",
                known.join(", ")
            ),
        ));
    }
    if is_socket {
        return match url.to_file_path() {
            Ok(path) if path.file_name().is_some() => Ok(()),
            _ => Err(Complaint::new("names no socket", EXAMPLE)),
        };
    }
    require_host(&url, EXAMPLE)?;
    if matches!(url.host_str(), Some("0.0.0.0" | "[::]")) {
        return Err(Complaint::new(
            "has a wildcard for its host",
            "name the address to connect to, such as 127.0.0.1",
        ));
    }
    let database = url.path().trim_matches('/');
    if !database.is_empty() && database.parse::<u32>().is_err() {
        return Err(Complaint::new(
            "has a path that is not a database's number",
            EXAMPLE,
        ));
    }
    if url.fragment() == Some("insecure") {
        return Err(Complaint::new(
            "asks for TLS that verifies nobody",
            "leave out #insecure; for an authority of your own set `ca_file`",
        ));
    }
    if url.fragment().is_some() {
        return Err(Complaint::new(
            "has a part after `#`",
            "write a # in the password as %23",
        ));
    }
    Ok(())
}

/// `postgres://` and `postgresql://`.
pub(super) fn check_postgres(text: &str) -> Result<(), Complaint> {
    const EXAMPLE: &str = "write it like postgres://USER:PASSWORD@HOST:5432/DATABASE, or with ?host=/FOLDER for a \
         socket";
    let url = parse(text, &["postgres", "postgresql"], EXAMPLE)?;
    let named = url
        .query_pairs()
        .any(|(name, value)| matches!(name.as_ref(), "host" | "hostaddr") && !value.is_empty());
    if !named {
        require_host(&url, EXAMPLE)?;
    }
    if url.fragment().is_some() {
        return Err(Complaint::new(
            "has a part after `#`",
            "write a # in the password as %23",
        ));
    }
    url.query_pairs()
        .try_for_each(|(name, _)| check_postgres_parameter(&name))
}

/// sqlx logs what it does not know, with its value, and goes on without it.
fn check_postgres_parameter(name: &str) -> Result<(), Complaint> {
    let (name, hint) = match name {
        "sslmode"
        | "ssl-mode"
        | "host"
        | "hostaddr"
        | "port"
        | "dbname"
        | "user"
        | "password"
        | "application_name"
        | "options"
        | "statement-cache-capacity" => return Ok(()),
        name if name.starts_with("options[") && name.ends_with(']') => return Ok(()),
        "sslrootcert" | "ssl-root-cert" | "ssl-ca" => {
            ("sslrootcert", "set `ca_file` in [postgres] instead")
        }
        "sslcert" | "ssl-cert" => ("sslcert", "set `client_cert_file` in [postgres] instead"),
        "sslkey" | "ssl-key" => ("sslkey", "set `client_key_file` in [postgres] instead"),
        "sslpassword" => (
            "sslpassword",
            "name a key without a password in `client_key_file` of [postgres]",
        ),
        "target_session_attrs" => (
            "target_session_attrs",
            "leave it out, and name the server that takes writes",
        ),
        "channel_binding" => (
            "channel_binding",
            "leave it out: sslmode=verify-full proves the server",
        ),
        "connect_timeout" => (
            "connect_timeout",
            "set `connect_timeout` in [postgres] instead",
        ),
        _ => {
            return Err(Complaint::new(
                "has an unknown parameter after `?`",
                "known: sslmode, host, hostaddr, port, dbname, user, password, application_name, \
                 options, statement-cache-capacity; write a ? in the password as %3F",
            ));
        }
    };
    Err(Complaint::new(format!("has the parameter `{name}`"), hint))
}

/// `http://` and `https://`, of a fixed receiver.
pub(super) fn check_http(text: &str) -> Result<(), Complaint> {
    const EXAMPLE: &str = "write it like https://HOST/PATH";
    let url = parse(text, &["http", "https"], EXAMPLE)?;
    require_host(&url, EXAMPLE)?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Complaint::new(
            "has a user name or a password in it",
            "put a line such as Authorization: Basic … into the file of `headers_file`",
        ));
    }
    if url.fragment().is_some() {
        return Err(Complaint::new(
            "has a part after `#`",
            "no receiver sees it: leave it out, or write a # as %23",
        ));
    }
    Ok(())
}

/// Whether an HTTP URL asks for TLS.
pub(super) fn is_https(text: &str) -> bool {
    has_scheme(text, "https:")
}

/// Several URLs that are tried in turn.
pub(super) fn check_list(urls: &[Secret]) -> Result<(), Complaint> {
    let most = defaults::BROKER_URLS_MAX;
    if urls.is_empty() {
        return Err(Complaint::new("is an empty list", "name at least one URL"));
    }
    if urls.len() > most {
        return Err(Complaint::new(
            format!("names {} servers", urls.len()),
            format!("allowed: 1 to {most}, which are tried in turn"),
        ));
    }
    let twice = (1..urls.len()).find(|at| urls[..*at].contains(&urls[*at]));
    match twice {
        None => Ok(()),
        Some(at) => Err(Complaint::new(
            format!(
                "names one server twice, the second time as number {}",
                at + 1
            ),
            "name each once: they are tried in turn, again and again",
        )),
    }
}

/// Whether an AMQP URL asks for TLS.
pub(super) fn is_tls(text: &str) -> bool {
    has_scheme(text, "amqps:")
}

/// Whether a Redis URL asks for TLS.
pub(super) fn is_rediss(text: &str) -> bool {
    has_scheme(text, "rediss:")
}

fn has_scheme(text: &str, scheme: &str) -> bool {
    text.get(..scheme.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
}

fn parse(text: &str, schemes: &[&str], example: &str) -> Result<Url, Complaint> {
    if text.is_empty() {
        return Err(Complaint::new("is empty", example));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Complaint::new(
            "has a space or a line break in it",
            "write a space in a password as %20",
        ));
    }
    let has_scheme = schemes.iter().any(|scheme| {
        let rest = text.get(..scheme.len()).zip(text.get(scheme.len()..));
        rest.is_some_and(|(start, rest)| {
            start.eq_ignore_ascii_case(scheme) && rest.starts_with("://")
        })
    });
    if !has_scheme {
        let wanted: Vec<String> = schemes.iter().map(|s| format!("{s}://")).collect();
        return Err(Complaint::new(
            format!("does not begin with {}", wanted.join(" or ")),
            example,
        ));
    }
    Url::parse(text).map_err(|cause| {
        Complaint::new(
            format!("is not a URL: {cause}"),
            format!("{example}; write / ? # @ in a password as %2F %3F %23 %40"),
        )
    })
}

fn require_host(url: &Url, example: &str) -> Result<(), Complaint> {
    match url.host_str() {
        Some(host) if !host.is_empty() => Ok(()),
        _ => Err(Complaint::new("names no host", example)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plausible_urls_pass() {
        for url in [
            "amqp://guest:guest@127.0.0.1:5672/%2f",
            "amqps://u:p%40@rabbit.example",
            "amqp://[::1]:5672/",
            "AMQP://host/vhost",
        ] {
            assert_eq!(check_amqp(url), Ok(()), "{url}");
        }
        for url in [
            "redis://127.0.0.1:6379/0",
            "rediss://u:p@h/3",
            "redis://h",
            "unix:///run/redis.sock?db=2",
            "redis+unix:///run/redis.sock",
        ] {
            assert_eq!(check_redis(url), Ok(()), "{url}");
        }
        for url in [
            "postgres://ackonce@127.0.0.1:5432/ackonce",
            "postgresql://u:p@h/d?sslmode=require",
            "postgres:///d?host=/var/run/postgresql",
            "postgres://u@%2Fvar%2Frun%2Fpostgresql/d",
        ] {
            assert_eq!(check_postgres(url), Ok(()), "{url}");
        }
    }

    /// Each URL with the beginning of what is said of it, which repeats nothing
    /// of what may be a password.
    #[track_caller]
    fn assert_refused(check: fn(&str) -> Result<(), Complaint>, cases: &[(&str, &str)]) {
        for (url, reason) in cases {
            let complaint = check(url).unwrap_err();
            let said = format!("{complaint:?}");
            assert!(complaint.message.starts_with(reason), "{url}: {said}");
            assert!(!complaint.hint.is_empty(), "{url}");
            assert!(!said.contains("hunter"), "{said}");
        }
    }

    #[test]
    fn implausible_urls_of_brokers_are_refused_without_repeating_them() {
        let cases = [
            ("", "is empty"),
            ("hunter2", "does not begin with amqp://"),
            ("http://u:hunter2@h", "does not begin with amqp://"),
            ("amqp://u:hunter 2@h", "has a space"),
            ("amqp://h/v\n", "has a space or a line break"),
            ("amqp://u:hunter2@/v", "is not a URL"),
            ("amqp://u:hunter2@h:99999", "is not a URL"),
            ("amqp:///hunter2", "names no host"),
            ("amqp://u:hunter2@h:0", "has the port 0"),
            ("amqp://u:1/hunter2@h/v", "has more than one part"),
            ("amqp://u:hunter2@h//", "has more than one part"),
            ("amqp://u:12/hunter2@h", "has an `@` after its host"),
            ("amqp://u:hunter2%ff@h", "has a %-sequence that is not"),
            ("amqp://h/%ff", "has a %-sequence"),
            ("amqp://u:hunter2%00@h", "has a part that no broker"),
            ("amqp://u:1#hunter2@h/v", "has a part after `#`"),
            ("amqp://u:1?hunter2@h/v", "has an unknown parameter"),
            ("amqp://h/v?heartbeat=5", "has the parameter `heartbeat`"),
            ("amqp://h/v?", "ends in a bare `?`"),
        ];
        assert_refused(check_amqp, &cases);
    }

    #[test]
    fn implausible_urls_of_redis_are_refused_without_repeating_them() {
        let cases = [
            ("amqp://h", "does not begin with redis://"),
            ("redis://:hunter2@", "is not a URL"),
            ("redis://h/hunter2", "has a path"),
            ("redis://h/1/2", "has a path"),
            ("redis://0.0.0.0", "has a wildcard"),
            ("redis://h#hunter2", "has a part after `#`"),
            ("rediss://h/3#insecure", "asks for TLS that verifies nobody"),
            ("unix:///", "names no socket"),
            ("redis://h?db=2", "has an unknown parameter"),
            ("redis://u:1?hunter2@h", "has an unknown parameter"),
            ("unix:///s?passwd=hunter2", "has an unknown parameter"),
        ];
        assert_refused(check_redis, &cases);
    }

    #[test]
    fn implausible_urls_of_postgresql_are_refused_without_repeating_them() {
        let cases = [
            ("host=h password=hunter2", "has a space"),
            ("postgres:///d", "names no host"),
            ("postgres://u:1#hunter2@h/d", "has a part after `#`"),
            (
                "postgres://h/d?sslrootcert=/hunter",
                "has the parameter `sslrootcert`",
            ),
            (
                "postgres://h/d?sslpassword=hunter2",
                "has the parameter `sslpassword`",
            ),
            (
                "postgres://h/d?sslmode=require&target_session_attrs=hunter2",
                "has the parameter `target_session_attrs`",
            ),
            (
                "postgres://h/d?channel_binding=require",
                "has the parameter `channel_binding`",
            ),
            ("postgres://h/d?sslmod=hunter2", "has an unknown parameter"),
            ("postgres://u:1?hunter2@h/d", "has an unknown parameter"),
        ];
        assert_refused(check_postgres, &cases);
    }
}
