//! `ca_file`, `client_cert_file` and `client_key_file` of a section, and
//! whether its URL may do without TLS. Complaints repeat no part of a URL.

use std::net::IpAddr;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use url::{Host, Url};

use super::checked::{ClientCertificate, SslMode, Tls};
use super::error::Complaint;
use super::keys::{CA_FILE, CERT_FILE, KEY_FILE};
use super::reader::Section;
use super::{defaults, files};

/// Why the certificates that a section names are of no use, and the way out.
pub(super) type Useless = (&'static str, &'static str);

/// No TLS, where a URL needs another scheme for it.
pub(super) fn without(scheme: &'static str) -> Useless {
    let hint = match scheme {
        "amqps" => "begin the URL with amqps://",
        "rediss" => "begin the URL with rediss://",
        _ => "begin the URL with https://",
    };
    ("the URL does not ask for TLS", hint)
}

/// Whether any certificate is named.
pub(super) fn is_given(section: &Section<'_>) -> bool {
    [CA_FILE, CERT_FILE, KEY_FILE]
        .into_iter()
        .any(|key| section.has(key))
}

/// Those three keys. With `useless`, none of them may be there.
pub(super) fn read(section: &Section<'_>, useless: Option<Useless>) -> Tls {
    let certificates = |key| {
        let found = section.text(key);
        found
            .then(|path| certificate_file(section, &path))
            .optional()
    };
    let ca_file = certificates(CA_FILE);
    let cert_file = certificates(CERT_FILE);
    let key_file = section
        .text(KEY_FILE)
        .then(|path| key_file(section, &path))
        .optional();
    if let Some((why, hint)) = useless {
        for field in [&ca_file, &cert_file, &key_file].into_iter().flatten() {
            let key = field.key;
            section.reader.report(
                field.span,
                format!("`{key}` is given, but {why}"),
                format!("{hint}, or leave out `{key}`"),
            );
        }
    }
    for (one, other) in [(CERT_FILE, KEY_FILE), (KEY_FILE, CERT_FILE)] {
        if section.has(one) && !section.has(other) {
            section.reader.report(
                section.span_of(one),
                format!("`{one}` is given without `{other}`"),
                "a certificate and its key are of use together alone: name both files",
            );
        }
    }
    let client = cert_file
        .zip(key_file)
        .map(|(cert, key)| ClientCertificate {
            cert_file: cert.value,
            key_file: key.value,
        });
    Tls {
        ca_file: ca_file.map(|field| field.value),
        client,
    }
}

fn certificate_file(section: &Section<'_>, path: &str) -> Result<PathBuf, Complaint> {
    let (path, text) = pem_file(section, path)?;
    if text.contains("-----BEGIN CERTIFICATE-----") {
        return Ok(path);
    }
    Err(Complaint::new(
        format!("holds no certificate: {}", path.display()),
        "it must be a PEM file with at least one BEGIN CERTIFICATE line",
    ))
}

fn key_file(section: &Section<'_>, path: &str) -> Result<PathBuf, Complaint> {
    let (path, text) = pem_file(section, path)?;
    if text.contains("ENCRYPTED") {
        return Err(Complaint::new(
            format!("holds a key that needs a pass phrase: {}", path.display()),
            "nobody is there to type it: store the key without one, readable by the daemon's \
             user alone (openssl pkey -in KEY -out PLAIN_KEY)",
        ));
    }
    if text.contains("PRIVATE KEY-----") {
        return Ok(path);
    }
    Err(Complaint::new(
        format!("holds no private key: {}", path.display()),
        "it must be a PEM file with a BEGIN PRIVATE KEY line",
    ))
}

fn pem_file(section: &Section<'_>, path: &str) -> Result<(PathBuf, String), Complaint> {
    let path = files::resolve(section.reader.folder, path);
    let text = files::read_text(&path, defaults::CA_FILE_MAX)
        .map_err(|unreadable| unreadable.complaint(&path))?;
    Ok((path, text))
}

/// Refuses an AMQP or Redis URL that goes without TLS to another machine.
pub(super) fn refuse_plaintext(text: &str, tls: &str, section: &str) -> Result<(), Complaint> {
    let stays = Url::parse(text).is_ok_and(|url| {
        url.scheme() == tls || url.scheme().ends_with("unix") || is_here(url.host())
    });
    if stays {
        return Ok(());
    }
    Err(Complaint::new(
        "goes to another machine without TLS",
        format!(
            "passwords and messages could be read on the way: begin it with {tls}://; or, where \
             every network between is trusted, set allow_plaintext = true in {section}"
        ),
    ))
}

/// Whether `host` is this machine, whatever a name server says.
fn is_here(host: Option<Host<&str>>) -> bool {
    match host {
        Some(Host::Domain(name)) => is_loopback(&percent_decode_str(name).decode_utf8_lossy()),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.to_canonical().is_loopback(),
        None => false,
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse();
    host.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address: IpAddr| address.to_canonical().is_loopback())
}

/// What of `[postgres]` decides about TLS beside the URL.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    /// `allow_plaintext`.
    pub(super) allow_plaintext: bool,
    /// There is a `ca_file`.
    pub(super) has_ca: bool,
    /// There is any of the three files.
    pub(super) has_files: bool,
}

impl Terms {
    pub(super) fn of(section: &Section<'_>, allow_plaintext: bool) -> Self {
        Self {
            allow_plaintext,
            has_ca: section.has(CA_FILE),
            has_files: is_given(section),
        }
    }
}

/// The mode of a PostgreSQL URL: what it asks for, where that is safe, or else
/// the right one for its host.
pub(super) fn ssl_mode(text: &str, terms: Terms) -> Result<SslMode, Complaint> {
    let url = Url::parse(text).map_err(|cause| {
        let hint = "write it like postgres://USER:PASSWORD@HOST:5432/DATABASE";
        Complaint::new(format!("is not a URL: {cause}"), hint)
    })?;
    let word = url
        .query_pairs()
        .filter(|(name, _)| matches!(name.as_ref(), "sslmode" | "ssl-mode"))
        .last()
        .map(|(_, word)| word);
    let typed = word.as_deref().map(SslMode::read);
    if typed == Some(None) {
        return Err(Complaint::new(
            "has an unknown sslmode",
            "allowed: verify-full, verify-ca, require, prefer, disable",
        ));
    }
    let (word, typed) = (word.as_deref().unwrap_or_default(), typed.flatten());
    let place = Place::of(&url);
    let is_unsafe = place == Place::Away && !terms.allow_plaintext;
    let weak = |what: &str| {
        Err(Complaint::new(
            format!("has sslmode={word}, which {what}, and leads to another machine"),
            "write sslmode=verify-full, with `ca_file` for an authority of your own; or, where \
             every network between is trusted, set allow_plaintext = true in [postgres]",
        ))
    };
    match typed {
        Some(SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull)
            if place == Place::Socket =>
        {
            Err(Complaint::new(
                "asks for TLS over a Unix socket",
                "leave sslmode out: a socket does not leave this machine",
            ))
        }
        _ if place == Place::Socket => Ok(SslMode::Disable),
        None if terms.has_files || is_unsafe => Ok(SslMode::VerifyFull),
        None => Ok(SslMode::Prefer),
        Some(SslMode::VerifyCa) if !terms.has_ca => Err(Complaint::new(
            "has sslmode=verify-ca without `ca_file`",
            "any host's certificate would do: write sslmode=verify-full, or set `ca_file` to an \
             authority of your own",
        )),
        Some(SslMode::Disable) if is_unsafe => weak("does without TLS"),
        Some(SslMode::Prefer) if is_unsafe => weak("does without TLS if need be"),
        Some(SslMode::Require) if is_unsafe => weak("verifies nobody"),
        Some(mode) => Ok(mode),
    }
}

/// Why certificates are of no use with `mode`.
pub(super) fn useless_with(mode: SslMode) -> Option<Useless> {
    match mode {
        SslMode::Disable => Some((
            "the URL does without TLS",
            "let it lead to a host, with sslmode=verify-full or without sslmode",
        )),
        SslMode::Prefer | SslMode::Require => Some((
            "the URL's sslmode verifies nobody",
            "write sslmode=verify-full, or leave sslmode out",
        )),
        SslMode::VerifyCa | SslMode::VerifyFull => None,
    }
}

/// Where a PostgreSQL URL leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A Unix socket.
    Socket,
    /// A TCP port of this machine.
    Here,
    /// Another machine, or one that only a name server knows.
    Away,
}

impl Place {
    /// As sqlx reads the URL: a socket before any host, and of several hosts
    /// the last one.
    fn of(url: &Url) -> Self {
        let first = url
            .host_str()
            .map(|host| percent_decode_str(host).decode_utf8_lossy());
        let others = url
            .query_pairs()
            .filter(|(name, _)| matches!(name.as_ref(), "host" | "hostaddr"))
            .map(|(_, value)| value);
        let hosts: Vec<_> = first.into_iter().chain(others).collect();
        if hosts.iter().any(|host| host.starts_with('/')) {
            return Self::Socket;
        }
        match hosts.last() {
            Some(host) if is_loopback(host) => Self::Here,
            _ => Self::Away,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Terms = Terms {
        allow_plaintext: false,
        has_ca: false,
        has_files: false,
    };

    #[test]
    fn only_this_machine_is_reached_without_tls() {
        for url in [
            "amqp://127.0.0.1",
            "amqp://u:p@127.8.9.1:5672/v",
            "amqp://localhost/v",
            "amqp://LOCALHOST",
            "amqp://[::1]:5672",
            "amqp://[::ffff:127.0.0.1]",
            "amqp://%31%32%37.0.0.1",
            "amqps://mq.example",
        ] {
            assert_eq!(refuse_plaintext(url, "amqps", "[broker]"), Ok(()), "{url}");
        }
        for url in [
            "amqp://mq.example",
            "amqp://u:hunter2@10.0.0.1",
            "amqp://localhost.example",
            "amqp://127.0.0.1.example",
            "amqp://127.1",
            "amqp://0.0.0.0",
            "amqp://[::]",
            "amqp://[2001:db8::1]",
        ] {
            let refused = refuse_plaintext(url, "amqps", "[broker]").unwrap_err();
            assert!(
                refused.hint.contains("allow_plaintext = true in [broker]"),
                "{refused:?}"
            );
            assert!(!format!("{refused:?}").contains("hunter"), "{refused:?}");
        }
        for url in [
            "unix:///run/redis.sock",
            "redis+unix:///run/redis.sock",
            "rediss://r",
        ] {
            assert_eq!(refuse_plaintext(url, "rediss", "[redis]"), Ok(()), "{url}");
        }
        assert!(refuse_plaintext("redis://r", "rediss", "[redis]").is_err());
    }

    #[test]
    fn a_postgres_url_gets_the_mode_that_is_right_for_its_host() {
        for (url, mode) in [
            ("postgres://db.example/d", SslMode::VerifyFull),
            (
                "postgres://db.example/d?sslmode=verify-full",
                SslMode::VerifyFull,
            ),
            ("postgres://127.0.0.1/d", SslMode::Prefer),
            ("postgres://localhost/d?sslmode=disable", SslMode::Disable),
            ("postgres://[::1]/d?ssl-mode=require", SslMode::Require),
            ("postgres:///d?host=/run/postgresql", SslMode::Disable),
            (
                "postgres://db.example/d?host=/run/postgresql",
                SslMode::Disable,
            ),
            ("postgres://u@%2Frun%2Fpostgresql/d", SslMode::Disable),
            ("postgres:///d?host=db.example", SslMode::VerifyFull),
            (
                "postgres://localhost/d?hostaddr=10.0.0.1",
                SslMode::VerifyFull,
            ),
            ("postgres://10.0.0.1/d?host=127.0.0.1", SslMode::Prefer),
        ] {
            assert_eq!(ssl_mode(url, NOTHING), Ok(mode), "{url}");
        }
        let files = Terms {
            has_ca: true,
            has_files: true,
            ..NOTHING
        };
        for (url, mode) in [
            ("postgres://127.0.0.1/d", SslMode::VerifyFull),
            (
                "postgres://db.example/d?sslmode=verify-ca",
                SslMode::VerifyCa,
            ),
        ] {
            assert_eq!(ssl_mode(url, files), Ok(mode), "{url}");
        }
        let allowed = Terms {
            allow_plaintext: true,
            ..NOTHING
        };
        for (url, mode) in [
            ("postgres://db.example/d", SslMode::Prefer),
            ("postgres://db.example/d?sslmode=allow", SslMode::Disable),
            ("postgres://db.example/d?sslmode=require", SslMode::Require),
        ] {
            assert_eq!(ssl_mode(url, allowed), Ok(mode), "{url}");
        }
    }

    #[test]
    fn a_mode_that_verifies_nobody_is_refused_for_another_machine() {
        for (url, message) in [
            (
                "postgres://u:hunter2@h/d?sslmode=disable",
                "has sslmode=disable, which",
            ),
            ("postgres://h/d?sslmode=allow", "has sslmode=allow, which"),
            ("postgres://h/d?sslmode=prefer", "has sslmode=prefer, which"),
            (
                "postgres://h/d?sslmode=require",
                "has sslmode=require, which",
            ),
            (
                "postgres://h/d?sslmode=verify-full&sslmode=require",
                "has sslmode=require",
            ),
            (
                "postgres://h/d?sslmode=verify-ca",
                "has sslmode=verify-ca without `ca_file`",
            ),
            ("postgres://h/d?sslmode=hunter2", "has an unknown sslmode"),
            (
                "postgres://%2Frun/d?sslmode=require",
                "asks for TLS over a Unix socket",
            ),
        ] {
            let refused = ssl_mode(url, NOTHING).unwrap_err();
            assert!(refused.message.starts_with(message), "{url}: {refused:?}");
            assert!(!format!("{refused:?}").contains("hunter"), "{refused:?}");
        }
    }
}
