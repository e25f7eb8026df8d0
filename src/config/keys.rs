//! Every section and key there is, and what was meant by one there is not.

use super::error::{Complaint, shown};

/// A section and its keys, subsections included.
#[derive(Debug)]
pub struct Keys {
    /// The section as it is typed, with its brackets.
    pub title: &'static str,
    /// The keys, in the order they are printed.
    pub keys: &'static [&'static str],
}

impl Keys {
    /// `in [broker]`, `at the top level`.
    pub(super) fn whereabouts(&self) -> String {
        let word = if self.title.starts_with('[') {
            "in"
        } else {
            "at"
        };
        format!("{word} {}", self.title)
    }
}

/// The keys about certificates.
pub(super) const CA_FILE: &str = "ca_file";
pub(super) const CERT_FILE: &str = "client_cert_file";
pub(super) const KEY_FILE: &str = "client_key_file";

/// The keys of a section that leads to a server: those in front, those of its
/// URL and of TLS with it, those behind.
macro_rules! of_a_link {
    ([$($front:literal),*], [$($behind:literal),* $(,)?]) => {
        &[
            $($front,)*
            "url",
            "url_file",
            $crate::config::keys::CA_FILE,
            $crate::config::keys::CERT_FILE,
            $crate::config::keys::KEY_FILE,
            $($behind,)*
        ]
    };
}
pub(super) use of_a_link;

/// The sections of the file.
pub const ROOT: Keys = Keys {
    title: "the top level",
    keys: &[
        "broker", "redis", "postgres", "ledger", "daemon", "admin", "log", "consumer",
    ],
};
/// `[broker]`
pub const BROKER: Keys = Keys {
    title: "[broker]",
    keys: of_a_link!([], ["allow_plaintext", "heartbeat", "connect_timeout"]),
};
/// `[redis]`
pub const REDIS: Keys = Keys {
    title: "[redis]",
    keys: of_a_link!(
        ["enabled"],
        [
            "allow_plaintext",
            "key_prefix",
            "connect_timeout",
            "timeout"
        ]
    ),
};
/// `[postgres]`
pub const POSTGRES: Keys = Keys {
    title: "[postgres]",
    keys: of_a_link!(
        [],
        [
            "allow_plaintext",
            "connect_timeout",
            "statement_timeout",
            "lock_timeout",
            "idle_in_transaction_timeout",
            "auto_migrate",
        ]
    ),
};
/// `[ledger]`
pub const LEDGER: Keys = Keys {
    title: "[ledger]",
    keys: &["retention", "prune_every", "prune_batch"],
};
/// `[daemon]`
pub const DAEMON: Keys = Keys {
    title: "[daemon]",
    keys: &["shutdown_timeout", "reconnect_min", "reconnect_max"],
};
/// `[admin]`
pub const ADMIN: Keys = Keys {
    title: "[admin]",
    keys: &["enabled", "listen", "stall_after"],
};
/// `[log]`
pub const LOG: Keys = Keys {
    title: "[log]",
    keys: &["format"],
};
/// `[[consumer]]`
pub const CONSUMER: Keys = Keys {
    title: "[[consumer]]",
    keys: &[
        "name",
        "workers",
        "prefetch",
        "batch_max",
        "max_body",
        "identity",
        "confirm_duplicates",
        "max_deaths",
        "retry",
        "failures",
        "claim",
        "topology",
        "handler",
    ],
};
/// `[consumer.retry]`
pub const RETRY: Keys = Keys {
    title: "[consumer.retry]",
    keys: &["max_attempts", "backoff", "jitter_percent", "breaker"],
};
/// `[consumer.failures]`
pub const FAILURES: Keys = Keys {
    title: "[consumer.failures]",
    keys: &["transient", "permanent", "systemic"],
};
/// `[consumer.claim]`
pub const CLAIM: Keys = Keys {
    title: "[consumer.claim]",
    keys: &["lease", "renew_every", "done_ttl", "recheck_every"],
};
/// `[consumer.topology]`
pub const TOPOLOGY: Keys = Keys {
    title: "[consumer.topology]",
    keys: &[
        "mode",
        "queue",
        "queue_type",
        "delivery_limit",
        "dead_letters",
        "dead_letter_exchange",
        "dead_letter_queue",
        "binding",
    ],
};
/// `[[consumer.topology.binding]]`
pub const BINDING: Keys = Keys {
    title: "[[consumer.topology.binding]]",
    keys: &["exchange", "exchange_type", "routing_key", "arguments"],
};
/// `[consumer.handler]`
pub const HANDLER: Keys = Keys {
    title: "[consumer.handler]",
    keys: of_a_link!(
        ["type", "effect", "file", "sql", "batch", "method"],
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
            "argv",
            "mode",
            "working_directory",
            "env",
            "pass_env",
            "timeout",
            "kill_after",
            "start_timeout",
        ]
    ),
};

/// Every section.
pub const ALL: [&Keys; 15] = [
    &ROOT, &BROKER, &REDIS, &POSTGRES, &LEDGER, &DAEMON, &ADMIN, &LOG, &CONSUMER, &RETRY,
    &FAILURES, &CLAIM, &TOPOLOGY, &BINDING, &HANDLER,
];

/// A hint for `unknown` in `section`: a name like it, else the section it
/// belongs to, else all there are.
pub(super) fn hint(unknown: &str, section: &Keys) -> String {
    if let Some(near) = nearest(unknown, section.keys) {
        return format!("did you mean `{near}`?");
    }
    let homes: Vec<&str> = ALL
        .iter()
        .filter(|home| home.keys.contains(&unknown))
        .map(|home| home.title)
        .collect();
    if !homes.is_empty() {
        return format!("`{unknown}` belongs to {}", homes.join(" or "));
    }
    format!("{} has: {}", section.title, section.keys.join(", "))
}

/// The candidate that `word` is most likely a slip of, if any is near: at most
/// a third of it differs.
pub(super) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let longest = candidates.iter().map(|candidate| candidate.len()).max()?;
    if word.len() > 2 * longest {
        return None;
    }
    let word = word.to_lowercase().replace('-', "_");
    candidates
        .iter()
        .map(|candidate| {
            let plain = candidate.replace('-', "_");
            (strsim::damerau_levenshtein(&word, &plain), *candidate)
        })
        .filter(|(distance, candidate)| *distance * 3 <= candidate.len().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The one of `choices` that is called `text`.
pub(super) fn one_of<T: Copy>(
    text: &str,
    choices: &[T],
    name: fn(T) -> &'static str,
) -> Result<T, Complaint> {
    if let Some(choice) = choices.iter().find(|choice| name(**choice) == text) {
        return Ok(*choice);
    }
    let names: Vec<&str> = choices.iter().map(|choice| name(*choice)).collect();
    let hint = match nearest(text, &names) {
        Some(near) => format!("did you mean `{near}`? allowed: {}", names.join(", ")),
        None => format!("allowed: {}", names.join(", ")),
    };
    Err(Complaint::new(format!("cannot be {}", shown(text)), hint))
}
