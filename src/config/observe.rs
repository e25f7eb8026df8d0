//! `[admin]` and `[log]`: what the daemon shows of itself.

use std::net::SocketAddr;

use super::checked::{Admin, LogFormat};
use super::error::{Complaint, shown};
use super::reader::Section;
use super::{defaults, keys};

/// `None` when it is switched off.
pub(super) fn admin(root: &Section<'_>) -> Option<Admin> {
    let section = root.section("admin", &keys::ADMIN);
    let enabled = section.boolean("enabled", defaults::ADMIN_ENABLED);
    let listen = section
        .text("listen")
        .then(|text| text.parse::<SocketAddr>().map_err(|_| no_address(&text)))
        .or(defaults::ADMIN_LISTEN);
    let stall_after = section.duration("stall_after", &defaults::STALL_AFTER);
    enabled.value.then_some(Admin {
        listen: listen.value,
        stall_after: stall_after.value,
    })
}

fn no_address(text: &str) -> Complaint {
    Complaint::new(
        format!("cannot be {}", shown(text)),
        "write an IP address and a port: \"127.0.0.1:9478\", \"[::1]:9478\"; port 0 lets the \
         system choose",
    )
}

pub(super) fn log_format(root: &Section<'_>) -> LogFormat {
    let section = root.section("log", &keys::LOG);
    section
        .text("format")
        .then(|text| {
            let known = LogFormat::ALL.into_iter().find(|f| f.as_str() == text);
            known.ok_or_else(|| {
                Complaint::new(format!("cannot be {}", shown(&text)), "allowed: text, json")
            })
        })
        .or(defaults::LOG_FORMAT)
        .value
}
