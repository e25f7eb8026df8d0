//! Where the broker is and who logs in: `amqp://` and `amqps://` URLs, read by
//! RabbitMQ's URI rules. Connects to nothing.
//!
//! Neither errors nor `Debug` nor `Display` show any part of a URL that could
//! be the password, not even when the URL is mistyped so that the password
//! stands where host, port or vhost belong.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use thiserror::Error;
use url::{Host, Url};

use crate::config::checked::Secret;

/// What RFC 3986 leaves unencoded.
const RESERVED: AsciiSet = NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Longest user name, password and vhost name, in bytes; AMQP short strings
/// end there.
const PART_MAX_BYTES: usize = 255;

/// The transport a URL asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `amqp`: plain TCP.
    Amqp,
    /// `amqps`: TLS.
    Amqps,
}

impl Scheme {
    /// The name, as in the URL.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amqp => "amqp",
            Self::Amqps => "amqps",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Amqp => 5672,
            Self::Amqps => 5671,
        }
    }
}

/// The parts of a broker URL. `Display` shows it without the password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Plain or TLS.
    pub scheme: Scheme,
    /// Host name or IP literal, IPv6 without brackets.
    pub host: String,
    /// TCP port, never 0.
    pub port: u16,
    /// Virtual host, decoded.
    pub vhost: String,
    /// Who logs in.
    pub user: String,
    /// With what.
    pub password: Secret,
}

/// Why a broker URL cannot be used. Quotes nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Another scheme, or none.
    #[error("the URL must begin with amqp:// or amqps://")]
    Scheme,
    /// Not a URL.
    #[error(
        "{0} (percent-encode / ? # @ : and spaces in user name, password and vhost, \
         for example / as %2F)"
    )]
    Syntax(url::ParseError),
    /// Port 0.
    #[error("the port must be between 1 and 65535")]
    Port,
    /// More than one path segment, or a raw `@` in the path.
    #[error(
        "the path must be one vhost name (percent-encode / as %2F and @ as %40 in vhost, \
         user name and password)"
    )]
    Path,
    /// A query or fragment.
    #[error(
        "the URL must end after the vhost (set heartbeat, timeouts and certificates in [broker]; \
         percent-encode ? as %3F and # as %23 in vhost, user name and password)"
    )]
    Trailing,
    /// A decoded part that is not text.
    #[error("the {0} is not UTF-8 once it is percent-decoded")]
    Encoding(&'static str),
    /// A part with a NUL byte, or too long.
    #[error("the {0} must be at most 255 bytes, without NUL")]
    Unfit(&'static str),
}

impl Address {
    /// Reads `url`. Host, user, password, port and vhost default to
    /// `localhost`, `guest`, `guest`, 5672 (5671 for `amqps`) and `/`.
    ///
    /// # Errors
    ///
    /// [`AddressError`] when the URL cannot be used.
    pub fn parse(url: &Secret) -> Result<Self, AddressError> {
        let text = url.expose().trim();
        let scheme = scheme_of(text)?;
        let url = Url::parse(text).map_err(AddressError::Syntax)?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(AddressError::Trailing);
        }
        let host = match url.host() {
            None | Some(Host::Domain("")) => "localhost".to_owned(),
            Some(Host::Domain(name)) => decoded(name, "host name")?,
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
        };
        let port = url.port().unwrap_or(scheme.default_port());
        if port == 0 {
            return Err(AddressError::Port);
        }
        let user = match url.username() {
            "" => "guest".to_owned(),
            name => decoded(name, "user name")?,
        };
        let password = decoded(url.password().unwrap_or("guest"), "password")?;
        Ok(Self {
            scheme,
            host,
            port,
            vhost: vhost_of(url.path())?,
            user,
            password: Secret::new(password),
        })
    }

    /// `host:port`, with brackets around an IPv6 literal.
    #[must_use]
    pub fn host_and_port(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}://{}@{}/{}",
            self.scheme.as_str(),
            utf8_percent_encode(&self.user, &RESERVED),
            self.host_and_port(),
            utf8_percent_encode(&self.vhost, &RESERVED),
        )
    }
}

fn scheme_of(text: &str) -> Result<Scheme, AddressError> {
    let (scheme, _) = text.split_once("://").ok_or(AddressError::Scheme)?;
    if scheme.eq_ignore_ascii_case("amqp") {
        Ok(Scheme::Amqp)
    } else if scheme.eq_ignore_ascii_case("amqps") {
        Ok(Scheme::Amqps)
    } else {
        Err(AddressError::Scheme)
    }
}

/// No path and `/` both mean the vhost `/`, as RabbitMQ's own tools have it.
///
/// A raw `@` in the path is legal, yet far more often the rest of a password
/// with a `/` in it, which must not be taken for a vhost and shown.
fn vhost_of(path: &str) -> Result<String, AddressError> {
    let name = path.strip_prefix('/').unwrap_or(path);
    if name.contains(['/', '@']) {
        return Err(AddressError::Path);
    }
    if name.is_empty() {
        return Ok("/".to_owned());
    }
    decoded(name, "vhost")
}

fn decoded(part: &str, name: &'static str) -> Result<String, AddressError> {
    let text = percent_decode_str(part)
        .decode_utf8()
        .map_err(|_| AddressError::Encoding(name))?;
    if text.len() > PART_MAX_BYTES || text.contains('\0') {
        return Err(AddressError::Unfit(name));
    }
    Ok(text.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Address, AddressError> {
        Address::parse(&Secret::new(url.to_owned()))
    }

    #[test]
    fn every_part_has_rabbitmqs_default() {
        for url in [
            "amqp://",
            "amqp:///",
            "amqp://localhost",
            "AMQP://localhost/",
            "amqp://guest:guest@localhost:5672/%2f",
            " amqp://localhost:5672\n",
        ] {
            let address = parse(url).unwrap_or_else(|error| panic!("{url:?}: {error}"));
            assert_eq!(
                address.to_string(),
                "amqp://guest@localhost:5672/%2F",
                "{url:?}"
            );
            assert_eq!(address.vhost, "/");
            assert_eq!(address.password.expose(), "guest");
        }
        assert_eq!(parse("amqps://rabbit").unwrap().port, 5671);
    }

    #[test]
    fn parts_are_percent_decoded_and_shown_encoded_without_the_password() {
        let address = parse("amqps://us%40er:p%2F%40ss%C3%A9@mq.example:1234/a%2Fb%20c").unwrap();
        assert_eq!(address.scheme, Scheme::Amqps);
        assert_eq!(address.user, "us@er");
        assert_eq!(address.password.expose(), "p/@ssé");
        assert_eq!(address.vhost, "a/b c");
        assert_eq!(
            address.to_string(),
            "amqps://us%40er@mq.example:1234/a%2Fb%20c"
        );
        assert!(!format!("{address:?}").contains("@ss"));
    }

    #[test]
    fn ip_literals_work() {
        let six = parse("amqp://[::1]:5673/v").unwrap();
        assert_eq!((six.host.as_str(), six.port), ("::1", 5673));
        assert_eq!(six.to_string(), "amqp://guest@[::1]:5673/v");
        assert_eq!(parse("amqp://127.0.0.1").unwrap().host, "127.0.0.1");
    }

    #[test]
    fn a_password_that_was_not_encoded_is_never_shown() {
        for url in [
            "amqp://user:hunter2#x@host/",
            "amqp://user:1234#hunter2@host/",
            "amqp://user:1234?hunter2@host/",
            "amqp://user:1234/hunter2@host",
            "amqp://user:1234/hunter2@host/vhost",
            "amqp://user:hunter2/x@host/vhost",
            "http://user:hunter2@host/",
            "user:hunter2@host",
            "amqp:user:hunter2@host",
            "amqp://user:hunter2@host:0/",
            "amqp://user:hunter2@host:99999/",
            "amqp://user:hunter2%FF@host/",
            "amqp://user:hunter2%00@host/",
            "amqp://user:hunter2@/",
            "amqp://user:hunter2@host/a/b",
            "amqp://user:hunter2@host/v?heartbeat=hunter2",
            "hunter2",
            "",
        ] {
            let error = parse(url).expect_err(url);
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in ".{0,64}") {
            let _ = parse(&text);
            let _ = parse(&format!("amqp://{text}"));
        }

        #[test]
        fn encoded_parts_come_back_as_they_were(
            user in "[^\0]{1,40}",
            password in "[^\0]{1,40}",
            vhost in "[^\0]{1,40}",
        ) {
            let encode = |part| utf8_percent_encode(part, NON_ALPHANUMERIC).to_string();
            let url = format!(
                "amqp://{}:{}@host/{}", encode(&user), encode(&password), encode(&vhost),
            );
            // The path "." and ".." are taken away by URL normalisation, even
            // encoded; they are no vhost names anybody has.
            proptest::prop_assume!(vhost != "." && vhost != "..");
            let address = parse(&url).unwrap();
            proptest::prop_assert_eq!(address.user, user);
            proptest::prop_assert_eq!(address.password.expose(), password);
            proptest::prop_assert_eq!(address.vhost, vhost);
        }
    }
}
