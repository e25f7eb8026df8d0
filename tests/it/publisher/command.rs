//! `ackonce publish`, without its process.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::PathBuf;

use ackonce::cli::Exit;
use ackonce::cli::publish::{MessageArguments, publish};
use ackonce::config::checked::Broker;
use ackonce::stop::{self, Stop};

use super::rig::{Line, Queue, amqp_url, broker, broker_at};

fn run(arguments: &MessageArguments, broker: &Broker, input: &str) -> (Exit, String) {
    let (_stopper, stop) = stop::pair();
    run_until(&stop, arguments, broker, input.as_bytes())
}

fn run_until(
    stop: &Stop,
    arguments: &MessageArguments,
    broker: &Broker,
    input: impl BufRead,
) -> (Exit, String) {
    let mut report = Vec::new();
    let exit = publish(arguments, broker, input, stop, &mut report);
    (exit, String::from_utf8(report).unwrap())
}

/// Does something when the first line is read through.
struct Then<F>(Option<F>);

impl<F: FnOnce()> Read for Then<F> {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        if let Some(act) = self.0.take() {
            act();
        }
        Ok(0)
    }
}

/// A line, then what `act` does, then another line.
fn between(act: impl FnOnce()) -> impl BufRead {
    let line = &b"{\"body\": 1}\n"[..];
    BufReader::with_capacity(1, line.chain(Then(Some(act))).chain(line))
}

fn lines_to(queue: &Queue) -> MessageArguments {
    MessageArguments {
        queue: Some(queue.name.clone()),
        file: Some(PathBuf::from("-")),
        ..MessageArguments::default()
    }
}

#[test]
fn the_command_publishes_one_message_from_its_arguments_or_its_input() {
    let queue = Queue::new();
    let arguments = MessageArguments {
        queue: Some(queue.name.clone()),
        body: Some("hello".to_owned()),
        message_id: Some("m-1".to_owned()),
        headers: vec![("a".to_owned(), "b".to_owned())],
        ..MessageArguments::default()
    };
    let (exit, report) = run(&arguments, &broker(), "");
    assert_eq!(exit, Exit::Success, "{report}");
    assert_eq!(
        report,
        "published 1, confirmed 1, returned 0, nacked 0, unknown 0\n"
    );
    let delivery = queue.next().unwrap();
    assert_eq!(delivery.body, b"hello");
    assert_eq!(delivery.properties.message_id().as_deref(), Some("m-1"));

    let arguments = MessageArguments {
        body: None,
        ..arguments
    };
    let (exit, report) = run(&arguments, &broker(), "from\ninput\n");
    assert_eq!(exit, Exit::Success, "{report}");
    assert_eq!(queue.next().unwrap().body, b"from\ninput\n");
}

#[test]
fn the_command_publishes_every_line_and_names_those_that_did_not_arrive() {
    let queue = Queue::new();
    let input: String = (1..=3_000)
        .map(|number| match number {
            1_500 => r#"{"body": 1, "routing_key": "publisher-test.no-such-queue", "message_id": "lost"}"#
                .to_owned()
                + "\n",
            _ => format!("{{\"body\": {{\"n\": {number}}}}}\n"),
        })
        .collect();
    let (exit, report) = run(&lines_to(&queue), &broker(), &input);
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(
        report.contains("line 1500 (message id \"lost\"): returned"),
        "{report}"
    );
    assert!(
        report.ends_with("published 3000, confirmed 2999, returned 1, nacked 0, unknown 0\n"),
        "{report}"
    );
    assert_eq!(queue.next().unwrap().body, br#"{"n": 1}"#);
}

#[test]
fn the_command_stops_at_a_bad_line_and_says_which() {
    let queue = Queue::new();
    let (exit, report) = run(
        &lines_to(&queue),
        &broker(),
        "{\"body\": 1}\n\n{\"body\": 3}\n",
    );
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(
        report.contains("stopped at line 2: it is empty"),
        "{report}"
    );
    assert!(report.contains("published 1, confirmed 1"), "{report}");

    let long = format!("{{\"body\": 1, \"message_id\": \"{}\"}}\n", "x".repeat(256));
    let (exit, report) = run(&lines_to(&queue), &broker(), &long);
    assert_eq!(exit, Exit::Usage, "{report}");
    assert!(
        report.contains("line 1") && report.contains("message id has 256"),
        "{report}"
    );
}

#[test]
fn the_command_says_so_when_there_is_no_broker() {
    let queue = Queue::new();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let gone = broker_at(&format!("amqp://127.0.0.1:{free}/"));
    let (exit, report) = run(&lines_to(&queue), &gone, "{\"body\": 1}\n");
    assert_eq!(exit, Exit::Unreachable, "{report}");
    assert!(report.contains("connection refused"), "{report}");
}

#[test]
fn the_command_says_what_kind_of_broker_it_did_not_get() {
    let queue = Queue::new();
    let mut stranger = url::Url::parse(&amqp_url()).unwrap();
    stranger.set_username("nobody").unwrap();
    let (exit, report) = run(&lines_to(&queue), &broker_at(stranger.as_str()), "");
    assert_eq!(exit, Exit::Denied, "{report}");
}

#[test]
fn the_command_tells_a_lost_connection_from_a_message_at_fault() {
    let queue = Queue::new();
    let line = Line::new();
    let broker_by_line = broker_at(&line.url);
    let (_stopper, stop) = stop::pair();
    let input = between(move || line.cut());
    let (exit, report) = run_until(&stop, &lines_to(&queue), &broker_by_line, input);
    assert_eq!(exit, Exit::Unreachable, "{report}");
    assert!(report.contains("lost the connection"), "{report}");

    let nowhere = r#"{"body": 1, "exchange": "publisher-test.no-such-exchange"}"#;
    let (exit, report) = run(&lines_to(&queue), &broker(), nowhere);
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(report.contains("no exchange"), "{report}");
}

#[test]
fn the_command_told_to_stop_says_what_was_confirmed() {
    let queue = Queue::new();
    let (stopper, stop) = stop::pair();
    let input = between(move || drop(stopper));
    let (exit, report) = run_until(&stop, &lines_to(&queue), &broker(), input);
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(
        report.ends_with(
            "stopped at line 2: interrupted\n\
             published 1, confirmed 1, returned 0, nacked 0, unknown 0\n"
        ),
        "{report}"
    );
    assert_eq!(queue.next().unwrap().body, b"1");
}
