//! The programs in `examples/handlers`, run as a user would: each takes a
//! message once however often it comes, and says what is wrong with others.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a broken stage is a failed test"
)]

use crate::common::program::{Programs, apply_as, with_body};
use ackonce::failure::Class;
use ackonce::handler::Keyed;

fn example(name: &str) -> String {
    format!("{}/examples/handlers/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A handler that runs an example, with `variable` naming `path`.
fn handler(programs: &Programs, name: &str, variable: &str, path: &str) -> Box<dyn Keyed> {
    let mode = name.split('.').next().unwrap();
    programs.handler(&format!(
        "argv = ['{}']\nmode = \"{mode}\"\nenv = {{ {variable} = '{}' }}",
        example(name),
        programs.path(path).display()
    ))
}

fn class(handler: &mut dyn Keyed, id: &str, body: &str) -> Option<Class> {
    let result = apply_as(handler, id, &with_body(body));
    result.err().map(|failure| failure.class)
}

#[test]
fn the_shell_examples_store_each_message_once() {
    for name in ["once.sh", "stream.sh"] {
        let programs = Programs::new();
        let mut handler = handler(&programs, name, "STORE", "store");
        if name == "stream.sh" && !std::path::Path::new("/usr/bin/jq").exists() {
            continue;
        }
        assert_eq!(
            class(&mut *handler, "1", "a"),
            Some(Class::Transient),
            "{name}"
        );
        std::fs::create_dir(programs.path("store")).unwrap();
        for id in ["1", "$(touch PWNED)", "a/b", "1"] {
            assert_eq!(class(&mut *handler, id, "body\n"), None, "{name} {id}");
        }
        assert_eq!(
            class(&mut *handler, "2", ""),
            Some(Class::Permanent),
            "{name}"
        );
        let stored: Vec<Vec<u8>> = std::fs::read_dir(programs.path("store"))
            .unwrap()
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert_eq!(stored, vec![b"body\n".to_vec(); 3], "{name}");
    }
}

#[test]
fn the_python_examples_add_each_amount_once() {
    for name in ["once.py", "stream.py"] {
        let programs = Programs::new();
        let mut handler = handler(&programs, name, "DATABASE", "orders.sqlite");
        for (id, customer, amount) in [
            ("1", "ann", 10),
            ("2", "ann", 20),
            ("1", "ann", 10),
            ("3", "bob", 5),
            ("2", "ann", 20),
        ] {
            let body = format!("{{\"customer\":\"{customer}\",\"amount\":{amount}}}");
            assert_eq!(class(&mut *handler, id, &body), None, "{name} {id}");
        }
        for body in ["", "{}", "[]", "{\"customer\":\"x\",\"amount\":\"y\"}"] {
            let class = class(&mut *handler, "4", body);
            assert_eq!(class, Some(Class::Permanent), "{name} {body}");
        }
        let failure = apply_as(&mut *handler, "5", &with_body([0xff])).unwrap_err();
        assert_eq!(failure.class, Class::Permanent, "{name}");
        assert!(failure.text.contains("not an order"), "{name}: {failure}");
        drop(handler);
        let totals = std::process::Command::new("/usr/bin/env")
            .args(["python3", "-c"])
            .arg("import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('select customer, total from account order by 1').fetchall())")
            .arg(programs.path("orders.sqlite"))
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&totals.stdout).trim(),
            "[('ann', 30), ('bob', 5)]",
            "{name}"
        );
    }
}
