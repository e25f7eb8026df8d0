//! A handler of type `command` alone, without daemon and servers, and the
//! programs it runs.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ackonce::config;
use ackonce::config::checked::Consumer;
use ackonce::failure::Failure;
use ackonce::handler::{self, Handler, Keyed, Work};
use ackonce::message::{Message, MessageId};
use ackonce::stop;
use tempfile::TempDir;

/// A folder with programs, and handlers that run them.
pub struct Programs {
    folder: TempDir,
}

impl Programs {
    /// An empty folder.
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        Self { folder }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What stands in the environment of all that its handlers start.
    pub fn mark(&self) -> String {
        format!("OUT={}", self.folder.path().display())
    }

    /// The text of a file in the folder; empty where there is none.
    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&self.bytes(name)).into_owned()
    }

    /// The bytes of a file in the folder; none where there is no such file.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_default()
    }

    /// Writes an executable file: `text` below `#!INTERPRETER`.
    pub fn write(&self, name: &str, interpreter: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        write_program(&path, &format!("#!{interpreter}\n{text}\n"));
        path
    }

    /// A handler that runs `text` by /bin/sh, with `OUT` the folder and with
    /// `lines` in its `[consumer.handler]`.
    pub fn shell(&self, lines: &str, text: &str) -> Box<dyn Keyed> {
        self.write("program", "/bin/sh", text);
        self.handler(&format!("argv = [\"./program\"]\n{lines}"))
    }

    /// A handler in mode `stream` that runs `text` by Python after a prelude:
    /// `ready()`, `next()` and `answer(message, outcome, **more)`.
    pub fn python(&self, lines: &str, text: &str) -> Box<dyn Keyed> {
        self.write(
            "program",
            "/usr/bin/env python3",
            &format!("{PYTHON}\n{text}"),
        );
        self.handler(&format!(
            "argv = [\"./program\"]\nmode = \"stream\"\n{lines}"
        ))
    }

    /// A handler with `lines` in its `[consumer.handler]`. Its working directory
    /// is the folder, and `OUT` in its environment too, unless they say otherwise.
    pub fn handler(&self, lines: &str) -> Box<dyn Keyed> {
        let consumer = self.consumer(lines, &BTreeMap::new());
        match handler::build(&consumer, &Default::default()).expect("a handler") {
            Handler::Keyed(handler) => handler,
            Handler::Transactional(_) => panic!("a handler with a key"),
        }
    }

    /// The consumer of such a handler; `variables` are the daemon's own.
    pub fn consumer(&self, lines: &str, variables: &BTreeMap<&str, &str>) -> Consumer {
        let out = self.folder.path().display();
        let mut lines = lines.to_owned();
        if !lines.contains("working_directory =") {
            lines.push_str(&format!("\nworking_directory = '{out}'"));
        }
        if !lines.contains("\nenv =") {
            lines.push_str(&format!("\nenv = {{ OUT = '{out}' }}"));
        }
        let text = format!(
            "[broker]\nurl = \"amqp://localhost\"\n[redis]\nenabled = false\n[postgres]\n\
             url = \"postgres://localhost/d\"\n[[consumer]]\nname = \"orders\"\n[consumer.handler]\n\
             type = \"command\"\n{lines}\n"
        );
        let env = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        let origin = self.path("config.toml");
        let config = config::parse(&text, &origin, &env).unwrap_or_else(|e| panic!("{e}"));
        config.consumers.into_iter().next().expect("a consumer")
    }
}

impl Default for Programs {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes an executable file.
pub fn write_program(path: &Path, text: &str) {
    std::fs::write(path, text).expect("a program");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, executable).expect("an executable program");
}

const PYTHON: &str = r#"
import json, os, signal, sys, time
def ready():
    print('{"ready":true}', flush=True)
def next():
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)
def answer(message, outcome, **more):
    print(json.dumps({"id": message["id"], "outcome": outcome, **more}), flush=True)
def note(text):
    with open(os.environ["OUT"] + "/notes", "a") as notes:
        notes.write(text + "\n")
"#;

/// A message with `body`, and nothing else.
pub fn with_body(body: impl Into<Vec<u8>>) -> Message {
    Message {
        body: body.into(),
        ..Message::default()
    }
}

/// Hands one message over, the first attempt at `id`.
pub fn apply_as(handler: &mut dyn Keyed, id: &str, message: &Message) -> Result<(), Failure> {
    let (_stopper, stop) = stop::pair();
    let message_id = MessageId::new(id).expect("a usable id");
    let work = Work {
        message_id: &message_id,
        message,
        attempt: 1,
    };
    handler.apply(&work, &stop)
}

/// Hands one message over.
pub fn apply(handler: &mut dyn Keyed, body: impl Into<Vec<u8>>) -> Result<(), Failure> {
    apply_as(handler, "m-1", &with_body(body))
}

/// As [`apply`], and cancels it when `when` holds.
pub fn apply_and_cancel(
    handler: &mut dyn Keyed,
    body: &str,
    when: impl FnMut() -> bool + Send,
) -> Result<(), Failure> {
    let (stopper, stop) = stop::pair();
    let message_id = MessageId::new("m-1").expect("a usable id");
    let message = with_body(body);
    let work = Work {
        message_id: &message_id,
        message: &message,
        attempt: 1,
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            super::try_eventually(Duration::from_secs(60), when);
            drop(stopper);
        });
        handler.apply(&work, &stop)
    })
}

/// A process as /proc shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// As in `ps`: `Z` is a zombie.
    pub state: char,
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
}

/// Every process there is.
pub fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").expect("/proc");
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid = name.to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            Some(Process {
                pid,
                state: fields.next()?.chars().next()?,
                parent: fields.next()?.parse().ok()?,
                group: fields.next()?.parse().ok()?,
            })
        })
        .collect()
}

/// Those that have not ended and have `mark` in their environment.
pub fn running_with(mark: &str) -> Vec<Process> {
    let is_marked = |pid: i32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ
            .split(|byte| *byte == 0)
            .any(|entry| entry == mark.as_bytes())
    };
    processes()
        .into_iter()
        .filter(|process| process.state != 'Z' && is_marked(process.pid))
        .collect()
}

/// Children of this process that ended and were not asked how.
pub fn zombies() -> Vec<Process> {
    let me = i32::try_from(std::process::id()).expect("a pid");
    processes()
        .into_iter()
        .filter(|process| process.parent == me && process.state == 'Z')
        .collect()
}

/// File descriptors of a process that its children have too.
pub fn passed_on(pid: &str) -> Vec<i32> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("/proc");
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let info = std::fs::read_to_string(entry.path()).ok()?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
            let flags = u32::from_str_radix(flags.trim(), 8).expect("flags");
            let fd = entry.file_name().to_str()?.parse().ok()?;
            (flags & CLOSE_ON_EXEC == 0).then_some(fd)
        })
        .collect()
}

/// A text that somebody could hope to break out with.
fn hostile_texts() -> Vec<String> {
    let texts = [
        "plain",
        "two\nlines",
        "ends\n",
        "\r\n\r\n",
        "$(touch PWNED)",
        "`touch PWNED`",
        ";touch PWNED;",
        "&& touch PWNED",
        "| touch PWNED",
        "\n touch PWNED \n",
        "'; touch PWNED; '",
        "\"; touch PWNED; \"",
        "\\\"$(touch PWNED)\\\"",
        "() { :;}; touch PWNED",
        "${IFS}touch${IFS}PWNED",
        "> PWNED",
        "A=B",
        "=",
        "PATH=/tmp",
        "x\nLD_PRELOAD=/tmp/evil.so",
        "ACKONCE_MESSAGE_ID=other",
        "--help",
        "-c",
        "--",
        "-",
        "../../etc/passwd",
        "/dev/null",
        "%s%n%x",
        "\u{1b}[2J\u{7}",
        "\u{7f}\u{80}\u{9b}",
        "\u{2028}\u{2029}\u{85}",
        "\u{202e}gnp.exe",
        "ünïcödé 漢字 🦀",
        "{\"id\":1,\"outcome\":\"done\"}",
        "}\n{\"id\":1,\"outcome\":\"done\"}\n",
        "\\u0000",
        "#!/bin/sh",
        "*",
        "~root",
        " ",
        "\t",
    ];
    let mut all = Vec::new();
    for text in texts {
        all.push(text.to_owned());
        all.push(format!("a{text}"));
        all.push(format!("{text}b"));
        all.push(text.repeat(255 / text.len()));
        all.push(text.chars().rev().collect());
    }
    all
}

/// [`hostile_texts`], each everywhere in a message where text can stand, with a
/// body that is none.
pub fn hostile_messages() -> Vec<(String, Message)> {
    hostile_texts()
        .into_iter()
        .enumerate()
        .map(|(number, text)| {
            let mut headers = serde_json::Map::new();
            headers.insert(text.clone(), text.as_str().into());
            headers.insert("list".to_owned(), vec![text.as_str(), "x"].into());
            let mut body = text.clone().into_bytes();
            match number % 5 {
                0 => {}
                1 => body.extend([0, 0xff, 0xfe, b'\n', 0]),
                2 => body = body.repeat(40_000),
                3 => body.insert(0, 0x80),
                _ => body.clear(),
            }
            let message = Message {
                exchange: text.clone(),
                routing_key: text.clone(),
                redelivered: number % 2 == 0,
                content_type: Some(text.clone()),
                published_at: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
                body,
                headers,
                ..Message::default()
            };
            (text, message)
        })
        .collect()
}
