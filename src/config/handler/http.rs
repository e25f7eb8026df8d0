//! `type = "http"`.

use std::collections::BTreeSet;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use toml::de::DeValue;

use crate::config::checked::{HttpHandler, HttpMethod, KeyFormat, Secret};
use crate::config::error::{Complaint, shown};
use crate::config::reader::{Section, compare};
use crate::config::source::Span;
use crate::config::{defaults, duration, files, keys, servers, tls, urls};
use crate::failure::HTTP;

/// What it knows.
pub(super) const KEYS: &[&str] = keys::of_a_link!(
    ["method"],
    [
        "content_type",
        "headers",
        "headers_file",
        "forward_headers",
        "key_header",
        "key_format",
        "signing_secrets",
        "signing_secrets_file",
        "connect_timeout",
        "timeout",
    ]
);

/// Names that the request itself needs, or that speak of one connection.
const RESERVED: [&str; 28] = [
    "ackonce-app-id",
    "ackonce-attempt",
    "ackonce-correlation-id",
    "ackonce-expiration",
    "ackonce-priority",
    "ackonce-reply-to",
    "ackonce-timeout-ms",
    "ackonce-type",
    "ackonce-user-id",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "traceparent",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "webhook-id",
    "webhook-signature",
    "webhook-timestamp",
    "accept-encoding",
    "http2-settings",
];

/// `None` where something is wrong, which is reported.
pub(super) fn handler(section: &Section<'_>) -> Option<HttpHandler> {
    let method = section
        .text("method")
        .then(|text| parse_method(&text))
        .or(HttpMethod::Post);
    let url = servers::url(section, urls::check_http).map(|(url, ())| url);
    let plain = url
        .as_ref()
        .is_some_and(|url| !urls::is_https(url.expose()));
    let tls = tls::read(section, plain.then(|| tls::without("https")));
    let content_type = section
        .text("content_type")
        .then(|text| check_value(&text).map(|()| text));
    let key_header = section
        .text("key_header")
        .then(|name| check_name(&name))
        .or(defaults::KEY_HEADER.to_owned());
    let key_format = section
        .text("key_format")
        .then(|text| keys::one_of(&text, &KeyFormat::ALL, KeyFormat::as_str))
        .or(KeyFormat::Plain);
    let mut names = BTreeSet::from([key_header.value.to_ascii_lowercase()]);
    let headers = headers(section, &mut names);
    let forward_headers = forward_headers(section, &mut names);
    let signing_secrets = signing_secrets(section);
    let connect_timeout = section.duration("connect_timeout", &defaults::HTTP_CONNECT_TIMEOUT);
    let timeout = section.duration("timeout", &defaults::HTTP_TIMEOUT);
    compare(
        section.reader,
        (&connect_timeout, &timeout),
        |connect, whole| connect <= whole,
        |connect, whole| {
            Complaint::new(
                format!(
                    "({}) is longer than `timeout` ({})",
                    duration::format(connect),
                    duration::format(whole)
                ),
                "`timeout` is for the whole request, the connection included: raise it, or lower \
                 `connect_timeout`",
            )
        },
    );
    Some(HttpHandler {
        method: method.value,
        url: url?,
        tls,
        content_type: content_type.optional().map(|field| field.value),
        headers,
        forward_headers,
        key_header: key_header.value,
        key_format: key_format.value,
        signing_secrets,
        connect_timeout: connect_timeout.value,
        timeout: timeout.value,
    })
}

/// A status, the first digit of some, or what happens instead of one.
pub(super) fn check_code(code: &str) -> Result<String, Complaint> {
    let is_status = matches!(code.len(), 1 | 3)
        && code.bytes().all(|byte| byte.is_ascii_digit())
        && matches!(code.as_bytes().first(), Some(b'1' | b'3'..=b'5'));
    let words = || HTTP.rows.iter().map(|row| row.code);
    let is_word =
        |code: &str| words().any(|word| word == code) && !code.starts_with(char::is_numeric);
    if is_status || is_word(code) {
        return Ok(code.to_owned());
    }
    let words: Vec<&str> = words().filter(|word| is_word(word)).collect();
    let hint = match (code.strip_suffix("xx"), keys::nearest(code, &words)) {
        (Some(digit @ ("1" | "3" | "4" | "5")), _) => format!("write {digit}xx as \"{digit}\""),
        (_, Some(near)) if !code.starts_with(|c: char| c.is_ascii_digit()) => {
            format!("did you mean `{near}`?")
        }
        _ => format!(
            "write a status that is not 2xx, as in \"409\", its first digit, as in \"5\", or one \
             of {}",
            words.join(", ")
        ),
    };
    Err(Complaint::new(
        format!("has no HTTP failure: {}", shown(code)),
        hint,
    ))
}

fn parse_method(text: &str) -> Result<HttpMethod, Complaint> {
    let known = HttpMethod::ALL.into_iter().find(|m| m.as_str() == text);
    known.ok_or_else(|| {
        let hint = match text.to_ascii_uppercase().as_str() {
            "GET" | "HEAD" | "OPTIONS" | "TRACE" => {
                "such a request is not meant to have an effect: allowed are POST, PUT and PATCH"
            }
            _ => "allowed: POST, PUT, PATCH, in capitals",
        };
        Complaint::new(format!("cannot be {}", shown(text)), hint)
    })
}

/// `headers` and `headers_file`, each name once.
fn headers(section: &Section<'_>, names: &mut BTreeSet<String>) -> Vec<(String, Secret)> {
    let mut headers = Vec::new();
    if section.has("headers") {
        section.reader.source.hide(section.span_of("headers"));
    }
    let report = |span: Span, complaint: Complaint| {
        let message = format!("`headers` {}", complaint.message);
        section.reader.report(span, message, complaint.hint);
    };
    for (name, span, value) in section.entries("headers") {
        let DeValue::String(text) = value.get_ref() else {
            let hint = format!(
                "write it like headers = {{ {} = \"…\" }}",
                name.escape_debug()
            );
            section.wrong_type(
                "headers",
                value.span().into(),
                "texts",
                value.get_ref(),
                &hint,
            );
            continue;
        };
        let Some(text) = section.expand("headers", text, value.span().into()) else {
            continue;
        };
        match header(name, &text, names) {
            Ok(header) => headers.push(header),
            Err(complaint) => report(span, complaint),
        }
    }
    if section.has("headers_file") {
        let read = section.text("headers_file").then(|path| {
            lines(section, &path)?
                .iter()
                .map(|l| header_line(l, names))
                .collect()
        });
        let read: Option<Vec<_>> = read.optional().map(|field| field.value);
        headers.extend(read.into_iter().flatten());
    }
    headers.sort_by(|(a, _), (b, _)| a.cmp(b));
    if headers.len() > defaults::HTTP_HEADERS_MAX {
        let complaint = Complaint::new(
            format!("has too many: {}", headers.len()),
            format!(
                "allowed: up to {}, those of `headers_file` included",
                defaults::HTTP_HEADERS_MAX
            ),
        );
        report(section.span_of("headers"), complaint);
    }
    headers
}

/// A line of `headers_file` with its number.
fn header_line(
    (number, line): &(usize, String),
    names: &mut BTreeSet<String>,
) -> Result<(String, Secret), Complaint> {
    let parts = line.split_once(':').ok_or_else(|| {
        Complaint::new(
            format!("names a file whose line {number} has no colon"),
            "write each header on a line of its own, as in Authorization: Bearer …",
        )
    });
    let (name, value) = parts?;
    header(name.trim_end(), value.trim(), names).map_err(|complaint| Complaint {
        message: format!("names a file whose line {number} {}", complaint.message),
        ..complaint
    })
}

/// Says nothing of the value, which may be a secret.
fn header(
    name: &str,
    value: &str,
    names: &mut BTreeSet<String>,
) -> Result<(String, Secret), Complaint> {
    let name = check_name(name)?;
    check_value(value).map_err(|complaint| Complaint {
        message: format!(
            "has a value for {} that {}",
            shown(&name),
            complaint.message
        ),
        ..complaint
    })?;
    check_first(&name, names)?;
    Ok((name, Secret::new(value.to_owned())))
}

fn forward_headers(section: &Section<'_>, names: &mut BTreeSet<String>) -> Vec<String> {
    let most = defaults::HTTP_FORWARD_MAX;
    let found = section
        .list("forward_headers", "[\"x-tenant\"]", check_name)
        .then(|list| {
            if list.len() > most {
                return Err(Complaint::new(
                    format!("has too many names: {}", list.len()),
                    format!("allowed: up to {most}"),
                ));
            }
            list.into_iter()
                .map(|(name, _)| check_first(&name, names).map(|()| name))
                .collect()
        });
    found.or(Vec::new()).value
}

fn check_first(name: &str, names: &mut BTreeSet<String>) -> Result<(), Complaint> {
    if names.insert(name.to_ascii_lowercase()) {
        return Ok(());
    }
    Err(Complaint::new(
        format!("has a header that is there already: {}", shown(name)),
        "names of headers do not depend on capitals: keep one of them",
    ))
}

fn check_name(name: &str) -> Result<String, Complaint> {
    let most = defaults::HEADER_NAME_MAX;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !(1..=most).contains(&name.len()) || !name.bytes().all(allowed) {
        return Err(Complaint::new(
            format!("has no name of an HTTP header: {}", shown(name)),
            format!("allowed: 1 to {most} of a-z A-Z 0-9 ! # $ % & ' * + - . ^ _ ` | ~"),
        ));
    }
    if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
        return Err(Complaint::new(
            format!("has a header that the handler sets itself: {}", shown(name)),
            "leave it out",
        ));
    }
    Ok(name.to_owned())
}

fn check_value(value: &str) -> Result<(), Complaint> {
    let most = defaults::HTTP_VALUE_MAX;
    let visible = value
        .bytes()
        .all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if visible && value.trim() == value && (1..=most).contains(&value.len()) {
        return Ok(());
    }
    Err(Complaint::new(
        "cannot be the value of a header",
        format!("allowed: 1 to {most} visible ASCII characters, with spaces between them"),
    ))
}

/// `signing_secrets` or `signing_secrets_file`; none is no signature.
fn signing_secrets(section: &Section<'_>) -> Vec<Secret> {
    let most = defaults::SIGNING_SECRETS_MAX;
    let count = |secrets: Vec<Secret>| {
        if secrets.len() <= most {
            return Ok(secrets);
        }
        Err(Complaint::new(
            format!("has too many secrets: {}", secrets.len()),
            format!("allowed: up to {most}, the newest first"),
        ))
    };
    if section.has("signing_secrets") {
        section
            .reader
            .source
            .hide(section.span_of("signing_secrets"));
    }
    if section.has("signing_secrets") && section.has("signing_secrets_file") {
        section.reader.report(
            section.span_of("signing_secrets_file"),
            format!(
                "both `signing_secrets` and `signing_secrets_file` in {}",
                section.keys.title
            ),
            "keep one of them",
        );
        return Vec::new();
    }
    let found = if section.has("signing_secrets_file") {
        section.text("signing_secrets_file").then(|path| {
            let lines = lines(section, &path)?;
            if lines.is_empty() {
                return Err(Complaint::new(
                    "names a file without a secret",
                    "write one on each line, as in whsec_…",
                ));
            }
            lines.iter().map(|(_, line)| check_secret(line)).collect()
        })
    } else {
        let list = section.list("signing_secrets", "[\"${SECRET}\"]", check_secret);
        list.then(|list| Ok(list.into_iter().map(|(secret, _)| secret).collect()))
    };
    found.then(count).or(Vec::new()).value
}

/// A secret as Standard Webhooks writes it.
fn check_secret(text: &str) -> Result<Secret, Complaint> {
    let digits = text
        .strip_prefix(defaults::SIGNING_SECRET_PREFIX)
        .unwrap_or(text);
    let length = BASE64_STANDARD.decode(digits).ok().map(|key| key.len());
    if length.is_some_and(|length| defaults::SIGNING_SECRET_BYTES.contains(&length)) {
        return Ok(Secret::new(text.to_owned()));
    }
    Err(Complaint::new(
        "has no signing secret",
        format!(
            "a secret is {}, then {} to {} bytes in base64, as `openssl rand -base64 32` gives \
             them",
            defaults::SIGNING_SECRET_PREFIX,
            defaults::SIGNING_SECRET_BYTES.start(),
            defaults::SIGNING_SECRET_BYTES.end()
        ),
    ))
}

/// The lines of a file that holds secrets, with their numbers; without those
/// that are empty or begin with `#`.
fn lines(section: &Section<'_>, path: &str) -> Result<Vec<(usize, String)>, Complaint> {
    let path = files::resolve(section.reader.folder, path);
    let text = files::read_text(&path, defaults::URL_FILE_MAX)
        .map_err(|unreadable| unreadable.complaint(&path))?;
    let lines = text.lines().map(str::trim).zip(1..);
    let lines = lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
    Ok(lines
        .map(|(line, number)| (number, line.to_owned()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_statuses_their_first_digits_and_the_words_of_the_table() {
        for code in [
            "1", "3", "4", "5", "100", "301", "404", "429", "599", "resolve", "tls", "header",
        ] {
            assert_eq!(check_code(code), Ok(code.to_owned()));
        }
        for (code, hint) in [
            ("", "not 2xx"),
            ("2", "not 2xx"),
            ("200", "not 2xx"),
            ("40", "not 2xx"),
            ("4xx", "as \"4\""),
            ("timout", "`timeout`"),
            ("23505", "not 2xx"),
        ] {
            let complaint = check_code(code).unwrap_err();
            assert!(complaint.hint.contains(hint), "{code}: {complaint:?}");
        }
    }

    #[test]
    fn names_that_would_change_the_request_are_refused() {
        for name in [
            "",
            "a b",
            "a:",
            "a\r\nb",
            "ü",
            "Host",
            "content-Length",
            "TRANSFER-ENCODING",
            "webhook-id",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in ["x-tenant", "Authorization", "User-Agent", "accept"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn values_that_would_end_a_header_are_refused() {
        for value in ["", " a", "a ", "a\r\nb: c", "a\nb", "a\0", "a\tb", "ü"] {
            assert!(check_value(value).is_err(), "{value:?}");
        }
        assert!(check_value("Bearer a+b/c= d").is_ok());
    }

    #[test]
    fn a_secret_is_as_long_as_the_standard_asks() {
        for (bytes, fits) in [(0, false), (23, false), (24, true), (64, true), (65, false)] {
            let text = BASE64_STANDARD.encode(vec![7; bytes]);
            assert_eq!(check_secret(&text).is_ok(), fits, "{bytes}");
            assert_eq!(
                check_secret(&format!("whsec_{text}")).is_ok(),
                fits,
                "{bytes}"
            );
        }
        assert!(check_secret("whsec_not base64").is_err());
    }
}
