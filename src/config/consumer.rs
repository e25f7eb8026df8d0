//! `[[consumer]]` with its claim, handler and identity.

use std::collections::BTreeMap;
use std::time::Duration;

use super::checked::{Claim, Consumer, Identity};
use super::error::{Complaint, shown};
use super::names::Names;
use super::reader::{Field, Section, compare};
use super::source::Span;
use super::{defaults, duration, handler, keys, retry, topology};

/// Every consumer that could be read whole; the rest is reported. No consumer
/// may keep a message waiting for longer than `retention`.
pub(super) fn consumers(root: &Section<'_>, retention: &Field<Duration>) -> Vec<Consumer> {
    let sections = root.sections("consumer", &keys::CONSUMER);
    if sections.is_empty() {
        root.reader.report(
            root.span_of("consumer"),
            "there is no consumer",
            "add a [[consumer]] with its name and its [consumer.handler]",
        );
    }
    let mut seen = BTreeMap::new();
    let mut names = Names::default();
    sections
        .iter()
        .filter_map(|section| consumer(section, retention, &mut seen, &mut names))
        .collect()
}

fn consumer(
    section: &Section<'_>,
    retention: &Field<Duration>,
    seen: &mut BTreeMap<String, Span>,
    names: &mut Names,
) -> Option<Consumer> {
    let name = section
        .text("name")
        .then(check_name)
        .required("add name = \"…\": it names the consumer in ledger, claims and logs");
    if let Some(name) = &name {
        refuse_second(section, name, seen);
    }
    let workers = section.integer("workers", &defaults::WORKERS);
    let prefetch = section.integer("prefetch", &defaults::PREFETCH);
    let batch_max = section.integer("batch_max", &defaults::BATCH_MAX);
    compare(
        section.reader,
        (&prefetch, &batch_max),
        |prefetch, batch_max| usize::from(prefetch) >= batch_max,
        |prefetch, batch_max| {
            Complaint::new(
                format!("({prefetch}) is below `batch_max` ({batch_max})"),
                "a batch cannot hold more than was prefetched: raise `prefetch` or lower \
                 `batch_max`",
            )
        },
    );
    let max_body = section.size("max_body", &defaults::MAX_BODY);
    let identity = section
        .text("identity")
        .then(|text| parse_identity(&text))
        .or(defaults::IDENTITY);
    let confirm_duplicates = section.boolean("confirm_duplicates", defaults::CONFIRM_DUPLICATES);
    let max_deaths = section.integer("max_deaths", &defaults::MAX_DEATHS);
    let retry = retry::retry(section, retention);
    let claim = claim(section);
    let topology = topology::topology(section, name.as_ref(), retry.as_ref(), names);
    let (handler, codes) = handler::handler(section);
    let failures = retry::failures(section, codes);
    Some(Consumer {
        name: name?.value,
        workers: workers.value,
        prefetch: prefetch.value,
        batch_max: batch_max.value,
        max_body: max_body.value,
        identity: identity.value,
        confirm_duplicates: confirm_duplicates.value,
        max_deaths: max_deaths.value,
        retry: retry?,
        failures,
        claim,
        topology: topology?,
        handler: handler?,
    })
}

fn check_name(name: String) -> Result<String, Complaint> {
    let most = defaults::CONSUMER_NAME_MAX;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if (1..=most).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(name);
    }
    Err(Complaint::new(
        format!("cannot be {}", shown(&name)),
        format!("allowed: 1 to {most} characters of a-z A-Z 0-9 . _ -"),
    ))
}

fn refuse_second(section: &Section<'_>, name: &Field<String>, seen: &mut BTreeMap<String, Span>) {
    match seen.get(&name.value) {
        None => {
            seen.insert(name.value.clone(), name.span);
        }
        Some(first) => {
            let line = section.reader.source.line_number(first.start);
            section.reader.report(
                name.span,
                format!("`name` {} is taken by line {line}", shown(&name.value)),
                "names keep the consumers apart in ledger and claims: choose another",
            );
        }
    }
}

/// Reads `message-id`, `header:NAME`, `json:/POINTER` or `body`.
fn parse_identity(text: &str) -> Result<Identity, Complaint> {
    if text == "message-id" {
        return Ok(Identity::MessageId);
    }
    if text == "body" {
        return Ok(Identity::Body);
    }
    if let Some(name) = text.strip_prefix("header:") {
        let most = defaults::HEADER_NAME_MAX;
        if (1..=most).contains(&name.len()) {
            return Ok(Identity::Header(name.to_owned()));
        }
        return Err(Complaint::new(
            "names no usable header",
            format!("write header:NAME with a name of 1 to {most} bytes"),
        ));
    }
    if let Some(pointer) = text.strip_prefix("json:") {
        return check_pointer(pointer).map(|()| Identity::Json(pointer.to_owned()));
    }
    let hint = match keys::nearest(text, &["message-id", "body"]) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "allowed: message-id, header:NAME, json:/POINTER, body".to_owned(),
    };
    Err(Complaint::new(format!("cannot be {}", shown(text)), hint))
}

fn check_pointer(pointer: &str) -> Result<(), Complaint> {
    if !pointer.starts_with('/') {
        return Err(Complaint::new(
            "has a JSON pointer that does not begin with `/`",
            "write it like json:/order/id",
        ));
    }
    let escapes_are_whole = pointer
        .split('~')
        .skip(1)
        .all(|after| after.starts_with(['0', '1']));
    if !escapes_are_whole {
        return Err(Complaint::new(
            "has a JSON pointer with a lone `~`",
            "write ~ in a name as ~0, and / as ~1",
        ));
    }
    Ok(())
}

fn claim(consumer: &Section<'_>) -> Claim {
    let section = consumer.section("claim", &keys::CLAIM);
    let lease = section.duration("lease", &defaults::LEASE);
    let renew_every = section.duration("renew_every", &defaults::RENEW_EVERY);
    let done_ttl = section.duration("done_ttl", &defaults::DONE_TTL);
    let recheck_every = section.duration("recheck_every", &defaults::RECHECK_EVERY);
    compare(
        section.reader,
        (&renew_every, &lease),
        |renew_every, lease| renew_every.saturating_mul(2) <= lease,
        |renew_every, lease| {
            Complaint::new(
                format!(
                    "({}) is more than half of `lease` ({})",
                    duration::format(renew_every),
                    duration::format(lease)
                ),
                "a lease shorter than its renewal runs out while the work goes on: lower \
                 `renew_every` or raise `lease`",
            )
        },
    );
    compare(
        section.reader,
        (&done_ttl, &lease),
        |done_ttl, lease| done_ttl >= lease,
        |done_ttl, lease| {
            Complaint::new(
                format!(
                    "({}) is shorter than `lease` ({})",
                    duration::format(done_ttl),
                    duration::format(lease)
                ),
                "remember applied messages at least as long as claimed ones",
            )
        },
    );
    Claim {
        lease: lease.value,
        renew_every: renew_every.value,
        done_ttl: done_ttl.value,
        recheck_every: recheck_every.value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_identity_is_read() {
        for (text, identity) in [
            ("message-id", Identity::MessageId),
            ("body", Identity::Body),
            ("header:x-id", Identity::Header("x-id".into())),
            ("json:/a~1b/~0/0", Identity::Json("/a~1b/~0/0".into())),
            ("json:/", Identity::Json("/".into())),
        ] {
            assert_eq!(parse_identity(text), Ok(identity), "{text}");
        }
    }

    #[test]
    fn an_identity_that_finds_nothing_is_refused() {
        let long = format!("header:{}", "x".repeat(129));
        for text in [
            "",
            "message_id",
            "Body",
            "header:",
            &long,
            "json:",
            "json:id",
            "json:/~",
            "json:/~2",
        ] {
            assert!(parse_identity(text).is_err(), "{text}");
        }
        let slip = parse_identity("message_id").unwrap_err();
        assert_eq!(slip.hint, "did you mean `message-id`?");
    }
}
