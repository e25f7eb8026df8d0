//! The `command` handler with a process for each message: what a program gets,
//! what its end means, and that nothing of it stays. No servers are needed.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a broken stage is a failed test"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::program::{
    Programs, apply, apply_and_cancel, apply_as, hostile_messages, passed_on, running_with,
    with_body, zombies,
};
use crate::common::{eventually, try_eventually};
use ackonce::failure::{Class, ExitFailure, class_of_exit_status};
use ackonce::handler::rust::Makers;
use ackonce::message::Message;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn every_exit_status_has_the_class_of_the_table() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "exit $(cat)");
    assert_eq!(apply(&mut *handler, "0"), Ok(()));
    for status in 1..=u8::MAX {
        let failure = apply(&mut *handler, status.to_string()).unwrap_err();
        assert_eq!(failure.class, class_of_exit_status(status), "{failure}");
        assert_eq!(failure.code, Some(status.to_string()));
        let text = format!("exit status {status}, and nothing on standard error");
        assert_eq!(failure.text, text);
        assert_eq!(failure.retry_after, None);
    }
    assert_eq!(zombies(), []);
}

#[test]
fn a_signal_is_named() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "kill -$(cat) $$");
    for (signal, name) in [
        (9, "killed by SIGKILL"),
        (11, "killed by SIGSEGV"),
        (15, "killed by SIGTERM"),
        // SIGPIPE is ignored by the daemon, and not by its children.
        (13, "killed by SIGPIPE"),
        (34, "killed by signal 34"),
    ] {
        let failure = apply(&mut *handler, signal.to_string()).unwrap_err();
        assert_eq!(failure.class, Class::Transient);
        assert_eq!(failure.code, Some(format!("signal {signal}")));
        assert!(failure.text.starts_with(name), "{failure}");
    }
    assert_eq!(zombies(), []);
}

#[test]
fn a_program_that_cannot_be_started_is_the_worlds_fault() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "exit 0");
    let mut failed = |what: &str| {
        let failure = apply(&mut *handler, "x").unwrap_err();
        assert_eq!(failure.class, Class::Systemic, "{failure}");
        assert_eq!(failure.code, Some(ExitFailure::Start.code()));
        assert!(failure.text.contains(what), "{failure}");
        assert!(failure.text.contains("/program in "), "{failure}");
    };
    let path = programs.path("program");
    std::fs::write(&path, "no first line\n").unwrap();
    failed("a script needs a first line");
    std::fs::write(&path, "#!/no/such/interpreter\n").unwrap();
    failed("is not there");
    std::fs::remove_file(&path).unwrap();
    failed("is not there");
    std::fs::create_dir(&path).unwrap();
    failed("Permission denied");
    std::fs::remove_dir(&path).unwrap();
    programs.write("program", "/bin/sh", "exit 0");
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
}

#[test]
fn whatever_is_in_a_message_a_program_gets_it_as_it_is_and_as_data() {
    let programs = Programs::new();
    let out = programs.path("program").parent().unwrap().to_owned();
    programs.write(
        "program",
        "/bin/sh",
        "cat /proc/$$/environ > environ; cat /proc/$$/cmdline > argv; cat > body",
    );
    let mut handler = programs.handler(&format!(
        "argv = [\"./program\", \"--fixed\", \"two words\", \"\"]\nenv = {{ OUT = '{}', A = \"$${{b\" }}",
        out.display()
    ));
    let argv = format!(
        "/bin/sh\0{}\0--fixed\0two words\0\0",
        programs.path("program").display()
    );
    let messages = hostile_messages();
    assert!(messages.len() >= 200, "{}", messages.len());
    for (id, message) in &messages {
        assert_eq!(apply_as(&mut *handler, id, message), Ok(()), "{id:?}");
        assert_eq!(programs.bytes("body"), message.body, "{id:?}");
        assert_eq!(programs.text("argv"), argv, "{id:?}");
        let environ = programs.bytes("environ");
        let mut environ: BTreeMap<String, String> = environ
            .strip_suffix(b"\0")
            .unwrap()
            .split(|byte| *byte == 0)
            .map(|entry| String::from_utf8(entry.to_vec()).unwrap())
            .map(|entry| {
                let (name, value) = entry.split_once('=').unwrap();
                (name.to_owned(), value.to_owned())
            })
            .collect();
        let headers: serde_json::Value =
            serde_json::from_str(&environ.remove("ACKONCE_HEADERS").unwrap()).unwrap();
        assert_eq!(headers, serde_json::Value::Object(message.headers.clone()));
        let deadline = environ.remove("ACKONCE_DEADLINE").unwrap();
        assert!(
            deadline.parse::<f64>().unwrap() > 1_700_000_000.0,
            "{deadline}"
        );
        let key = environ.remove("ACKONCE_IDEMPOTENCY_KEY").unwrap();
        assert!(key.starts_with("orders:"), "{key}");
        assert!(key.bytes().all(|byte| byte.is_ascii_graphic()), "{key}");
        let expected = [
            ("A", "${b"),
            ("ACKONCE_ATTEMPT", "1"),
            ("ACKONCE_BODY_BYTES", &message.body.len().to_string()),
            ("ACKONCE_CONSUMER", "orders"),
            ("ACKONCE_CONTENT_TYPE", id),
            ("ACKONCE_EXCHANGE", id),
            ("ACKONCE_MESSAGE_ID", id),
            ("ACKONCE_PUBLISHED_AT", "1700000000"),
            ("ACKONCE_REDELIVERED", &message.redelivered.to_string()),
            ("ACKONCE_ROUTING_KEY", id),
            ("OUT", out.to_str().unwrap()),
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            // Shells set it themselves.
            ("PWD", environ.get("PWD").map_or("", String::as_str)),
        ];
        let expected: BTreeMap<String, String> = expected
            .into_iter()
            .filter(|(name, value)| *name != "PWD" || !value.is_empty())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        assert_eq!(environ, expected, "{id:?}");
    }
    assert!(!programs.path("PWNED").exists());
}

/// What the broker's side replaces already, replaced here too: the library can
/// be handed anything.
#[test]
fn a_nul_character_does_not_keep_a_program_from_starting() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "printf %s \"$ACKONCE_EXCHANGE\" > exchange");
    let message = Message {
        exchange: "a\0b".to_owned(),
        ..with_body("x")
    };
    assert_eq!(apply_as(&mut *handler, "m", &message), Ok(()));
    assert_eq!(programs.text("exchange"), "a\u{fffd}b");
}

#[test]
fn headers_that_no_environment_holds_are_the_messages_fault() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "exit 0");
    let mut message = with_body("x");
    message
        .headers
        .insert("x".to_owned(), "y".repeat(300_000).into());
    let failure = apply_as(&mut *handler, "m", &message).unwrap_err();
    assert_eq!(failure.class, Class::Permanent);
    assert!(failure.text.contains("headers"), "{failure}");
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
}

#[test]
fn the_environment_is_what_the_configuration_says_and_nothing_of_the_daemons() {
    let programs = Programs::new();
    programs.write("program", "/bin/sh", "cat /proc/$$/environ > environ");
    let variables = BTreeMap::from([
        ("LANG", "C.UTF-8"),
        ("PATH", "/opt/bin:/bin:/usr/bin"),
        ("SECRET", "hunter2"),
    ]);
    let consumer = programs.consumer(
        "argv = [\"./program\"]\npass_env = [\"LANG\", \"PATH\", \"UNSET\"]\nenv = { TOKEN = \"${SECRET}!\" }",
        &variables,
    );
    let built = ackonce::handler::build(&consumer, &Makers::default()).unwrap();
    let ackonce::handler::Handler::Keyed(mut handler) = built else {
        panic!("a handler with a key");
    };
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    let environ = programs.text("environ");
    let names: Vec<&str> = environ
        .split_terminator('\0')
        .map(|entry| entry.split_once('=').unwrap().0)
        .filter(|name| !name.starts_with("ACKONCE_") && *name != "PWD")
        .collect();
    assert_eq!(names, ["LANG", "PATH", "TOKEN"]);
    for entry in [
        "LANG=C.UTF-8",
        "PATH=/opt/bin:/bin:/usr/bin",
        "TOKEN=hunter2!",
    ] {
        assert!(environ.split('\0').any(|own| own == entry), "{environ}");
    }
    // What this process has, as cargo's variables, is not passed on.
    assert!(std::env::vars().any(|(name, _)| name.starts_with("CARGO")));
    assert!(!environ.contains("CARGO"), "{environ}");
}

#[test]
fn a_program_need_not_read_its_input_and_may_close_it() {
    let programs = Programs::new();
    let body = vec![b'x'; 16 << 20];
    for text in ["exit 0", "exec <&-; exit 0", "head -c 1 > first"] {
        let mut handler = programs.shell("", text);
        assert_eq!(apply(&mut *handler, body.clone()), Ok(()), "{text}");
    }
    let mut handler = programs.shell("", "wc -c > count");
    assert_eq!(apply(&mut *handler, body), Ok(()));
    assert_eq!(programs.text("count").trim(), (16 << 20).to_string());
    assert_eq!(apply(&mut *handler, ""), Ok(()));
    assert_eq!(programs.text("count").trim(), "0");
}

/// The body is there before the program is: no death of the daemon can leave it
/// with a part.
#[test]
fn the_input_is_whole_before_the_program_starts() {
    let programs = Programs::new();
    let mut handler = programs.shell("", "stat -L -c %s /proc/self/fd/0 > size");
    assert_eq!(apply(&mut *handler, vec![0; 1_234_567]), Ok(()));
    assert_eq!(programs.text("size"), "1234567\n");
}

#[test]
fn output_without_end_neither_blocks_nor_fills_the_journal() {
    let programs = Programs::new();
    let mut handler = programs.shell(
        "",
        "yes out | head -c 20000000; yes err | head -c 20000000 >&2; echo last words >&2; exit 3",
    );
    let failure = apply(&mut *handler, "x").unwrap_err();
    assert_eq!(failure.code.as_deref(), Some("3"));
    assert!(
        failure.text.starts_with("exit status 3: last words\n…"),
        "{failure}"
    );
    assert!(failure.text.ends_with("\nerr\nlast words"), "{failure}");
    assert!(failure.text.chars().count() <= 2_000);
}

#[test]
fn what_a_program_says_is_made_harmless() {
    let programs = Programs::new();
    let mut handler = programs.shell("", r"printf 'a\033[2Jb\000\377c\nreason\n' >&2; exit 65");
    let failure = apply(&mut *handler, "x").unwrap_err();
    assert_eq!(failure.class, Class::Permanent);
    assert_eq!(
        failure.text,
        "exit status 65: reason\na\\u{1b}[2Jb\\u{0}\u{fffd}c\nreason"
    );
}

/// A program that makes a grandchild, notes both, and obeys nobody.
const STUBBORN: &str = "trap '' TERM; (trap '' TERM; touch started; sleep 1000; sleep 1000) & sleep 1000; sleep 1000; sleep 1000";

#[test]
fn the_timeout_ends_the_whole_group_whatever_it_ignores() {
    let programs = Programs::new();
    let out = programs.mark();
    let mut handler = programs.shell("timeout = \"1s\"\nkill_after = \"200ms\"", STUBBORN);
    let failure = apply(&mut *handler, "x").unwrap_err();
    assert_eq!(failure.class, Class::Transient);
    assert_eq!(failure.code.as_deref(), Some("timeout"));
    let text = "ended after its 1s: killed by SIGKILL, and nothing on standard error";
    assert_eq!(failure.text, text);
    assert!(programs.path("started").exists());
    eventually("nothing of it runs", || running_with(&out).is_empty());
    assert_eq!(zombies(), []);
}

#[test]
fn a_program_may_use_the_time_between_the_two_signals() {
    let programs = Programs::new();
    let mut handler = programs.shell(
        "timeout = \"500ms\"\nkill_after = \"1m\"",
        "trap 'echo cleaning up >&2; touch clean; exit 0' TERM; sleep 1000 & wait",
    );
    let failure = apply(&mut *handler, "x").unwrap_err();
    // Whatever it says then: it was not done in time.
    assert_eq!(failure.code.as_deref(), Some("timeout"));
    assert_eq!(
        failure.text,
        "ended after its 500ms: exit status 0: cleaning up"
    );
    assert!(programs.path("clean").exists());
}

#[test]
fn a_cancelled_attempt_ends_the_whole_group() {
    let programs = Programs::new();
    let out = programs.mark();
    let mut handler = programs.shell("timeout = \"1h\"\nkill_after = \"0ms\"", STUBBORN);
    let started = programs.path("started");
    let failure = apply_and_cancel(&mut *handler, "x", || started.exists()).unwrap_err();
    assert_eq!(failure.class, Class::Transient);
    assert!(failure.text.contains("cancelled"), "{failure}");
    eventually("nothing of it runs", || running_with(&out).is_empty());
    assert_eq!(zombies(), []);
}

#[test]
fn what_a_program_leaves_behind_in_its_group_ends_with_it() {
    let programs = Programs::new();
    let out = programs.mark();
    for (text, result) in [
        ("sleep 1000 & exit 0", Ok(())),
        ("sleep 1000 >/dev/null 2>&1 & exit 0", Ok(())),
        ("sleep 1000 & exit 3", Err("3".to_owned())),
    ] {
        let mut handler = programs.shell("timeout = \"1h\"", text);
        let code = apply(&mut *handler, "x").map_err(|failure| failure.code.unwrap());
        assert_eq!(code, result, "{text}");
        eventually("nothing of it runs", || running_with(&out).is_empty());
    }
    assert_eq!(zombies(), []);
}

/// Said on the page about handlers.
#[test]
fn what_leaves_the_group_is_out_of_reach() {
    let programs = Programs::new();
    let out = programs.mark();
    let mut handler = programs.shell(
        "timeout = \"1h\"",
        "setsid sh -c 'echo $$ > far; exec sleep 1000' & until [ -s far ]; do sleep 0.01; done",
    );
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    let far: i32 = programs.text("far").trim().parse().unwrap();
    eventually("it runs alone", || running_with(&out).len() == 1);
    kill(Pid::from_raw(far), Signal::SIGKILL).unwrap();
    eventually("nothing of it runs", || running_with(&out).is_empty());
}

#[test]
fn last_words_said_through_another_process_are_heard() {
    let programs = Programs::new();
    programs.write(
        "program",
        "/bin/bash",
        "exec 2> >(sed -u 's/^/sed: /' >&2); echo oh >&2; exit 4",
    );
    let mut handler = programs.handler("argv = [\"./program\"]");
    let failure = apply(&mut *handler, "x").unwrap_err();
    assert_eq!(failure.text, "exit status 4: sed: oh");
}

/// What whoever started this process has left open in it, and a child has too;
/// `ls` opens the folder itself beside them.
#[test]
fn a_program_inherits_three_file_descriptors_and_no_ignored_sigpipe() {
    let programs = Programs::new();
    let mut expected: Vec<String> = passed_on("self").iter().map(i32::to_string).collect();
    let file = std::fs::File::open("/proc/self/stat").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut handler = programs.handler(
        "argv = [\"/bin/sh\", \"-c\", \"ls /proc/self/fd > fds; grep -E '^Sig(Blk|Ign)' \
         /proc/self/status > signals\"]",
    );
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    drop((file, listener, socket));
    let text = programs.text("fds");
    let mut fds: Vec<&str> = text.lines().collect();
    for own in ["0", "1", "2"] {
        assert!(fds.contains(&own), "{fds:?}");
        expected.retain(|fd| fd != own);
    }
    fds.retain(|fd| !["0", "1", "2"].contains(fd));
    assert_eq!(
        fds.len(),
        expected.len() + 1,
        "{fds:?}, and not {expected:?}"
    );
    assert!(
        expected.iter().all(|fd| fds.contains(&fd.as_str())),
        "{fds:?}"
    );
    let sigpipe = 1 << 12;
    let ignored = |text: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        u64::from_str_radix(line.expect("a line").trim(), 16).unwrap()
    };
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    assert_eq!(ignored(&own) & sigpipe, sigpipe);
    // The C library uses the first two real-time signals itself.
    let others = 0x7fff_ffff & !sigpipe;
    let its = ignored(&programs.text("signals"));
    assert_eq!(its & sigpipe, 0);
    assert_eq!(its & others, ignored(&own) & others);
    assert!(
        programs
            .text("signals")
            .contains("SigBlk:\t0000000000000000")
    );
}

#[test]
fn many_workers_at_once_do_not_hold_one_anothers_pipes() {
    let programs = Programs::new();
    programs.write(
        "program",
        "/bin/sh",
        "read status; echo \"$status\" >&2; exit $status",
    );
    let consumer = programs.consumer("argv = [\"./program\"]\ntimeout = \"1m\"", &BTreeMap::new());
    std::thread::scope(|scope| {
        for worker in 0..8_u32 {
            let consumer = &consumer;
            scope.spawn(move || {
                let built = ackonce::handler::build(consumer, &Makers::default()).unwrap();
                let ackonce::handler::Handler::Keyed(mut handler) = built else {
                    panic!("a handler with a key");
                };
                for round in 0..40 {
                    let status = (worker * 40 + round) % 200 + 1;
                    let failure = apply(&mut *handler, format!("{status}\n")).unwrap_err();
                    assert_eq!(failure.text, format!("exit status {status}: {status}"));
                }
            });
        }
    });
    assert_eq!(zombies(), []);
}

/// The way out that the page about handlers names for a daemon that is killed.
#[test]
fn setpriv_ends_a_program_with_the_worker_that_started_it() {
    let programs = Programs::new();
    let setpriv = std::path::Path::new("/usr/bin/setpriv");
    if !setpriv.exists() {
        return;
    }
    let out = programs.mark();
    programs.write("program", "/bin/sh", "touch started; exec sleep 1000");
    let lines = "argv = [\"/usr/bin/setpriv\", \"--pdeathsig\", \"KILL\", \"./program\"]";
    let mut handler = programs.handler(lines);
    let started = programs.path("started");
    // The wish to cancel is set as soon as it runs: what is proved is only that
    // such an argv works here.
    let failure = apply_and_cancel(&mut *handler, "x", || started.exists()).unwrap_err();
    assert!(failure.text.contains("cancelled"), "{failure}");
    assert!(try_eventually(Duration::from_secs(60), || running_with(
        &out
    )
    .is_empty()));
}
