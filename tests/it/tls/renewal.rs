//! Certificates that are renewed under a running daemon, on both sides: it
//! comes back with the new ones, and nobody has to tell it.

use super::{GOOD_NAMES, Link, OK, Secured, only_error, said, shows};
use crate::common::{Admin, Authority, Consumer, ORDERS, eventually, numbered, numbered_ids};

/// What the metrics call its server.
fn server(link: Link) -> &'static str {
    match link {
        Link::Broker => "rabbitmq",
        Link::Redis => "redis",
        Link::Postgres => "postgresql",
    }
}

fn comes_back_with_renewed_certificates(link: Link) {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let leaf = old.issue_files(GOOD_NAMES, 1);
    let (secured, world) = Secured::start(link, &leaf, Some(&old));
    let former = old.issue_files("DNS:former", 1);
    let friend = old.issue_files("DNS:friend", 1);
    let ca_file = format!("{}.ca_file", link.section());
    // One session, which is there before and must be another one afterwards.
    let config = world
        .config()
        .consumer(Consumer::orders().set("workers", 1))
        .set(&format!("{}.url", link.section()), secured.url(&world))
        .set(&ca_file, old.file().to_str().unwrap());
    let daemon = world.run(&shows(config.clone(), link, &friend));
    let admin = Admin::of(&daemon);
    let up = format!("server_up {}", server(link));
    world.broker.send(ORDERS, numbered("before", 20));
    world.wait_for_effects(20);
    admin.wait_for(&[(&up, 1.0)]);

    old.replace(&new);
    friend.replace(&new.issue_files("DNS:friend", 1));
    let leaf = new.issue_files(GOOD_NAMES, 1);
    let secured = secured.renew(&world, (&leaf, &new), || {
        world.broker.send(ORDERS, numbered("meanwhile", 20));
        if let Link::Redis = link {
            // Found out before it is back: a restart at once would not show.
            admin.wait_for(&[(&up, 0.0)]);
        }
    });
    let reconnects = format!("reconnects_total {}", server(link));
    eventually("the daemon is connected anew", || {
        daemon.assert_alive();
        let series = admin.metrics();
        series.value(&reconnects) >= 1.0 && series.value(&up) == 1.0
    });
    world.broker.send(ORDERS, numbered("after", 20));
    world.wait_for_effects(60);
    if let Link::Redis = link {
        // It is used again, and not only connected to.
        admin.wait_for(&[("messages_total applied", 60.0)]);
        world.broker.send(ORDERS, numbered("after", 20));
        admin.wait_for(&[("duplicates_total redis", 20.0)]);
    }
    if let Link::Postgres = link {
        let issuers = world.db.texts(
            "select distinct coalesce(issuer_dn, 'none') from pg_stat_ssl \
             join pg_stat_activity using (pid) where application_name like 'ackonce %'",
        );
        assert_eq!(issuers, ["/CN=authority new"]);
    }
    // What it had before would not do any more.
    let output = world.ackonce(&shows(config, link, &former), &["check"]);
    assert_ne!(output.status.code(), Some(OK), "{}", said(&output));
    only_error(&output, link);
    daemon.stop();
    let ids = ["before", "meanwhile", "after"].map(|name| numbered_ids(name, 20));
    world.assert_each_applied_once(&ids.concat());
    drop(secured);
}

#[test]
fn a_renewed_certificate_for_the_broker_is_used_without_a_restart() {
    comes_back_with_renewed_certificates(Link::Broker);
}

#[test]
fn a_renewed_certificate_for_redis_is_used_without_a_restart() {
    comes_back_with_renewed_certificates(Link::Redis);
}

#[test]
fn a_renewed_certificate_for_postgresql_is_used_without_a_restart() {
    comes_back_with_renewed_certificates(Link::Postgres);
}
