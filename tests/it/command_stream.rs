//! The `command` handler in mode `stream`: one program for many messages, told
//! apart by line, believed only as far as it can be understood, and replaced
//! when it ends. No servers are needed.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a broken stage is a failed test"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::eventually;
use crate::common::program::{
    Programs, apply, apply_and_cancel, apply_as, hostile_messages, running_with, with_body, zombies,
};
use ackonce::failure::{Class, Failure};
use ackonce::handler::Keyed;
use ackonce::message::Message;
use base64::Engine as _;

/// Answers each message with what its body asks for.
const OBEDIENT: &str = r#"
note("started")
ready()
while True:
    m = next()
    note(m["body"])
    if m["body"] == "die":
        print("dying words", file=sys.stderr)
        sys.exit(3)
    elif m["body"] == "kill":
        os.kill(os.getpid(), 9)
    elif m["body"] == "mute":
        time.sleep(1000)
    elif m["body"] == "close":
        os.close(1)
        time.sleep(1000)
    elif m["body"].startswith("raw "):
        os.write(1, m["body"][4:].replace("ID", str(m["id"])).encode())
    elif m["body"].startswith("late "):
        answer(m, "done")
        time.sleep(float(m["body"][5:]))
        print("unasked", flush=True)
        note("has spoken")
    else:
        answer(m, m["body"], error="because", retry_after_ms=1500)
"#;

fn failed(handler: &mut dyn Keyed, body: &str, class: Class, code: Option<&str>) -> Failure {
    let failure = apply(handler, body).unwrap_err();
    assert_eq!(failure.class, class, "{body}: {failure}");
    assert_eq!(failure.code.as_deref(), code, "{body}: {failure}");
    failure
}

/// How often the program was started.
fn starts(programs: &Programs) -> usize {
    let notes = programs.text("notes");
    notes.lines().filter(|line| *line == "started").count()
}

#[test]
fn one_process_answers_for_all_messages() {
    let programs = Programs::new();
    let mut handler = programs.python("", OBEDIENT);
    assert_eq!(
        starts(&programs),
        0,
        "nothing runs before there is a message"
    );
    for _ in 0..300 {
        assert_eq!(apply(&mut *handler, "done"), Ok(()));
    }
    for (outcome, class) in [
        ("retry", Class::Transient),
        ("reject", Class::Permanent),
        ("pause", Class::Systemic),
    ] {
        let failure = failed(&mut *handler, outcome, class, None);
        assert_eq!(failure.text, "because");
        assert_eq!(failure.retry_after, Some(Duration::from_millis(1_500)));
    }
    assert_eq!(starts(&programs), 1);
    let mark = programs.mark();
    assert_eq!(running_with(&mark).len(), 1);
    drop(handler);
    assert_eq!(running_with(&mark), []);
    assert_eq!(zombies(), []);
}

#[test]
fn a_program_that_ends_or_says_what_has_no_meaning_costs_one_attempt() {
    let programs = Programs::new();
    let mut handler = programs.python("timeout = \"2s\"\nkill_after = \"100ms\"", OBEDIENT);
    let long = format!("raw {}", "x".repeat(70_000));
    let mut started = 1;
    assert_eq!(apply(&mut *handler, "done"), Ok(()));
    for (body, code, text) in [
        ("die", "broken", "(exit status 3): dying words"),
        ("kill", "broken", "(killed by SIGKILL)"),
        (
            "close",
            "broken",
            "it closed standard output (then ended: killed by SIGTERM)",
        ),
        (
            "mute",
            "timeout",
            "no answer after 2s (then ended: killed by SIGTERM)",
        ),
        ("raw done\n", "broken", "its answer is not understood"),
        ("raw \n", "broken", "its answer is not understood"),
        ("raw {\"id\":ID}\n", "broken", "missing field `outcome`"),
        (
            "raw {\"id\":ID,\"outcome\":\"fine\"}\n",
            "broken",
            "unknown variant `fine`",
        ),
        (
            "raw {\"id\":0,\"outcome\":\"done\"}\n",
            "broken",
            "answer is to message 0",
        ),
        (
            "raw {\"id\":ID,\"outcome\":\"done\"",
            "timeout",
            "no answer after 2s",
        ),
        (
            "raw {\"id\":ID,\"outcome\":\"done\",\"retry_after\":1}\n",
            "broken",
            "unknown field `retry_after`",
        ),
        (long.as_str(), "broken", "a line of more than 65536 bytes"),
    ] {
        let failure = failed(&mut *handler, body, Class::Transient, Some(code));
        assert!(failure.text.contains(text), "{body:.60}: {failure}");
        assert!(failure.text.chars().count() <= 2_000);
        assert_eq!(running_with(&programs.mark()), [], "{body:.60}");
        assert_eq!(starts(&programs), started, "{body:.60}");
        assert_eq!(apply(&mut *handler, "done"), Ok(()));
        started += 1;
        assert_eq!(starts(&programs), started, "{body:.60}");
    }
    assert_eq!(zombies(), []);
}

/// Whoever answers twice is out of step, and no later message may be taken for
/// the one that is answered.
#[test]
fn what_is_said_unasked_is_never_an_answer() {
    let programs = Programs::new();
    let mut handler = programs.python("", OBEDIENT);
    let twice = "raw {\"id\":ID,\"outcome\":\"done\"}\n{\"id\":ID,\"outcome\":\"done\"}\n";
    assert_eq!(apply(&mut *handler, twice), Ok(()));
    assert_eq!(apply(&mut *handler, "done"), Ok(()));
    assert_eq!(starts(&programs), 2);
    assert_eq!(apply(&mut *handler, "late 0.01"), Ok(()));
    let notes = programs.path("notes");
    eventually("it speaks unasked", || text(&notes).contains("has spoken"));
    failed(&mut *handler, "reject", Class::Permanent, None);
    assert_eq!(starts(&programs), 3);
}

#[test]
fn a_program_that_ends_between_messages_costs_none() {
    let programs = Programs::new();
    let mut handler = programs.python(
        "",
        "note('started')\nready()\nanswer(next(), 'done')\nsys.exit(1)",
    );
    for round in 1..=5 {
        assert_eq!(apply(&mut *handler, "x"), Ok(()));
        assert_eq!(starts(&programs), round);
        // A process gives its memory up before its pipes: only then is it over.
        eventually("it is gone", || {
            running_with(&programs.mark()).is_empty() && !zombies().is_empty()
        });
    }
}

#[test]
fn a_program_that_does_not_get_ready_is_the_worlds_fault() {
    let programs = Programs::new();
    let lines = "start_timeout = \"1s\"\nkill_after = \"100ms\"";
    for (text, problem) in [
        (
            "print('no licence', file=sys.stderr); sys.exit(78)",
            "(exit status 78): no licence",
        ),
        ("import nothing_like_it", "ModuleNotFoundError"),
        (
            "time.sleep(1000)",
            "not ready after 1s (then ended: killed by SIGTERM)",
        ),
        ("os.close(1); time.sleep(1000)", "it closed standard output"),
        (
            "print('hello', flush=True); time.sleep(1000)",
            "has to be {\"ready\":true}, and is `hello`",
        ),
        (
            "print('{\"ready\":false}', flush=True); time.sleep(1000)",
            "not ready",
        ),
        (
            "os.write(1, b'x' * 100000); time.sleep(1000)",
            "a line of more than 65536 bytes",
        ),
    ] {
        let mut handler = programs.python(lines, text);
        let failure = failed(&mut *handler, "x", Class::Systemic, Some("start"));
        assert!(
            failure.text.starts_with("the program did not get ready: "),
            "{failure}"
        );
        assert!(failure.text.contains(problem), "{text}: {failure}");
        assert_eq!(running_with(&programs.mark()), [], "{text}");
    }
    let mut handler = programs.python(lines, "ready()");
    std::fs::remove_file(programs.path("program")).unwrap();
    let failure = failed(&mut *handler, "x", Class::Systemic, Some("start"));
    assert!(failure.text.contains("failed to start"), "{failure}");
    assert_eq!(zombies(), []);
}

/// The wait before the n-th start is drawn from up to 100 ms × 2^n.
#[test]
fn restarts_come_ever_less_often_and_an_answer_forgives() {
    let programs = Programs::new();
    let mut handler = programs.python("", "note(repr(time.time()))\nsys.exit(1)");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        failed(&mut *handler, "x", Class::Systemic, Some("start"));
    }
    let tried = programs.text("notes").lines().count();
    // Without the wait it would be started some 200 times.
    assert!((3..=30).contains(&tried), "{tried}");
    // A handler that is told to stop does not wait for its next start.
    let failure = apply_and_cancel(&mut *handler, "x", || true).unwrap_err();
    assert!(
        failure.class == Class::Systemic || failure.text.contains("cancelled"),
        "{failure}"
    );
}

#[test]
fn a_cancelled_message_ends_the_program_and_the_next_gets_another() {
    let programs = Programs::new();
    let mut handler = programs.python("timeout = \"1h\"\nkill_after = \"100ms\"", OBEDIENT);
    let notes = programs.path("notes");
    let has_begun = || text(&notes).contains("mute");
    let failure = apply_and_cancel(&mut *handler, "mute", has_begun).unwrap_err();
    assert!(failure.text.contains("cancelled"), "{failure}");
    assert_eq!(running_with(&programs.mark()), []);
    assert_eq!(apply(&mut *handler, "done"), Ok(()));
    assert_eq!(zombies(), []);
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Its input is closed; then SIGTERM; then SIGKILL; each with its own time.
#[test]
fn a_handler_that_is_dropped_leaves_no_process() {
    let programs = Programs::new();
    for (name, text, last_note) in [
        (
            "polite",
            "ready(); answer(next(), 'done'); sys.stdin.read(); note('end of input')",
            "end of input",
        ),
        (
            "deaf",
            "def stop(*_):\n    note('SIGTERM')\n    os._exit(0)\nsignal.signal(signal.SIGTERM, stop)\n\
             ready(); answer(next(), 'done')\nwhile True: time.sleep(1)",
            "SIGTERM",
        ),
        (
            "stubborn",
            "signal.signal(signal.SIGTERM, lambda *_: note('SIGTERM, so what'))\n\
             ready(); answer(next(), 'done')\nif os.fork() == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
             while True: time.sleep(1)",
            "SIGTERM, so what",
        ),
    ] {
        let mut handler = programs.python("kill_after = \"1s\"", text);
        assert_eq!(apply(&mut *handler, "x"), Ok(()), "{name}");
        drop(handler);
        eventually("nothing of it runs", || {
            running_with(&programs.mark()).is_empty()
        });
        assert_eq!(
            programs.text("notes").lines().last(),
            Some(last_note),
            "{name}"
        );
    }
    assert_eq!(zombies(), []);
}

#[test]
fn a_program_that_stops_reading_or_answers_too_soon_is_not_waited_for() {
    let programs = Programs::new();
    let body = "x".repeat(4 << 20);
    let mut handler = programs.python(
        "timeout = \"1s\"\nkill_after = \"100ms\"",
        "ready(); time.sleep(1000)",
    );
    failed(&mut *handler, &body, Class::Transient, Some("timeout"));
    let mut handler = programs.python("", "ready(); os.close(0); time.sleep(1000)");
    let failure = failed(&mut *handler, &body, Class::Transient, Some("broken"));
    assert!(
        failure.text.contains("it closed standard input"),
        "{failure}"
    );
    let mut handler = programs.python(
        "",
        "ready(); sys.stdin.read(1); print('{\"id\":1,\"outcome\":\"done\"}', flush=True); time.sleep(1000)",
    );
    let failure = failed(&mut *handler, &body, Class::Transient, Some("broken"));
    assert!(
        failure.text.contains("before it had read the message"),
        "{failure}"
    );
}

#[test]
fn standard_error_without_end_blocks_nobody_and_its_end_is_kept() {
    let programs = Programs::new();
    let mut handler = programs.python(
        "timeout = \"1m\"",
        r#"
ready()
for n in range(3):
    m = next()
    for i in range(200000):
        os.write(2, b"noise %d %d\n" % (n, i))
    if n < 2:
        answer(m, "done")
sys.exit("out of \x1b[31mpaper")
"#,
    );
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    let failure = failed(&mut *handler, "x", Class::Transient, Some("broken"));
    assert!(
        failure
            .text
            .contains("(exit status 1): out of \\u{1b}[31mpaper\n…"),
        "{failure}"
    );
    assert!(failure.text.contains("\nnoise 2 199999\n"), "{failure}");
    assert!(failure.text.chars().count() <= 2_000);
}

#[test]
fn what_was_said_about_another_message_is_not_held_against_this_one() {
    let programs = Programs::new();
    let mut handler = programs.python(
        "",
        r#"
ready()
m = next()
print("about the first", file=sys.stderr, flush=True)
time.sleep(0.2)
answer(m, "done")
m = next()
sys.exit("about the second")
"#,
    );
    assert_eq!(apply(&mut *handler, "x"), Ok(()));
    let failure = failed(&mut *handler, "x", Class::Transient, Some("broken"));
    assert!(failure.text.ends_with(": about the second"), "{failure}");
}

#[test]
fn whatever_is_in_a_message_a_program_gets_it_as_it_is() {
    let programs = Programs::new();
    let mut handler = programs.python(
        "",
        r#"
ready()
while True:
    line = sys.stdin.buffer.readline()
    if not line:
        break
    with open(os.environ["OUT"] + "/line", "wb") as out:
        out.write(line)
    with open("/proc/self/cmdline", "rb") as argv, open(os.environ["OUT"] + "/argv", "wb") as out:
        out.write(argv.read())
    answer(json.loads(line), "done")
"#,
    );
    let argv = format!("python3\0{}\0", programs.path("program").display());
    let messages = hostile_messages();
    assert!(messages.len() >= 200, "{}", messages.len());
    for (number, (id, message)) in messages.iter().enumerate() {
        assert_eq!(apply_as(&mut *handler, id, message), Ok(()), "{id:?}");
        let line = programs.bytes("line");
        assert_eq!(
            line.iter().filter(|byte| **byte == b'\n').count(),
            1,
            "{id:?}"
        );
        assert!(line.is_ascii(), "{id:?}");
        let got: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let body = match got.get("body") {
            Some(body) => body.as_str().unwrap().as_bytes().to_vec(),
            None => base64::engine::general_purpose::STANDARD
                .decode(got["body_base64"].as_str().unwrap())
                .unwrap(),
        };
        assert_eq!(body, message.body, "{id:?}");
        let key = got["key"].as_str().unwrap();
        assert!(key.starts_with("orders:") && key.bytes().all(|b| b.is_ascii_graphic()));
        assert!(got["deadline"].as_f64().unwrap() > 1_700_000_000.0);
        let mut rest = got.as_object().unwrap().clone();
        for read in ["body", "body_base64", "key", "deadline"] {
            rest.remove(read);
        }
        let expected = serde_json::json!({
            "id": number + 1,
            "consumer": "orders",
            "message_id": id,
            "attempt": 1,
            "redelivered": message.redelivered,
            "exchange": id,
            "routing_key": id,
            "content_type": id,
            "content_encoding": null,
            "type": null,
            "correlation_id": null,
            "reply_to": null,
            "app_id": null,
            "user_id": null,
            "expiration": null,
            "priority": null,
            "published_at": 1_700_000_000,
            "headers": message.headers,
        });
        assert_eq!(serde_json::Value::Object(rest), expected, "{id:?}");
        assert_eq!(programs.text("argv"), argv, "{id:?}");
    }
    assert!(!programs.path("PWNED").exists());
}

#[test]
fn what_a_message_does_not_have_is_null() {
    let programs = Programs::new();
    let mut handler = programs.python(
        "",
        "ready()\nm = next()\nnote(json.dumps([m['content_type'], m['published_at'], m['headers']]))\n\
         answer(m, 'done')\nnext()",
    );
    let message = Message {
        published_at: None,
        ..with_body("x")
    };
    assert_eq!(apply_as(&mut *handler, "m", &message), Ok(()));
    assert_eq!(programs.text("notes"), "[null, null, {}]\n");
}
