//! `ackonce dead export`: letters as lines of a file.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::desk::{self, DeskArguments, look};
use crate::cli::filters::{self, FilterArguments};
use crate::cli::terminal::interruptible;
use crate::cli::{Exit, output};
use crate::dead_letter::file;
use crate::dead_letter::filter::Filter;
use crate::stop::Stop;

/// Arguments of `ackonce dead export`.
#[derive(Debug, Clone, Args)]
#[command(after_help = help())]
pub(super) struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    #[command(flatten)]
    filters: FilterArguments,

    /// Write to FILE, which must not exist; standard output unless given
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn help() -> String {
    format!(
        "Each line is an object: consumer, position, id, fingerprint, died_at, reason, class, \
         code, error, attempts, exchange, routing_key, repaired, properties, and body, or \
         body_base64 where it is not UTF-8. Headers keep their AMQP types: what JSON has no type \
         for is {{\"amqp\": TYPE, \"value\": …}}. `ackonce dead import` reads it back. A file can \
         be read by its owner alone; one that could not be finished is removed.\n\n{}\n\n{}\n\n{}",
        filters::HELP,
        desk::HELP,
        desk::STATUS
    )
}

/// Writes them.
pub(super) fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let filter = arguments.filters.filter()?;
    let arguments = arguments.clone();
    interruptible(move |stop| export(&arguments, &filter, stop))
}

fn export(arguments: &Arguments, filter: &Filter, stop: &Stop) -> Result<Exit, Exit> {
    let (config, consumer) = arguments.desk.load()?;
    let desk = arguments.desk.open(&config, &consumer, "dead export")?;
    let Some(path) = &arguments.output else {
        let seen = look(desk, filter, stop, |letter| {
            output(&file::line(letter, &consumer));
            Ok(())
        })?;
        eprintln!("ackonce: {} of {} letters exported", seen.meant, seen.read);
        return Ok(Exit::Success);
    };
    let mut out = Out::create(path)?;
    let looked = look(desk, filter, stop, |letter| {
        out.write(&file::line(letter, &consumer))
    });
    match looked.and_then(|seen| out.sync().map(|()| seen)) {
        Ok(seen) => {
            let (meant, path) = (seen.meant, path.display());
            eprintln!(
                "ackonce: {meant} of {} letters exported to {path}",
                seen.read
            );
            Ok(Exit::Success)
        }
        Err(exit) => {
            out.remove();
            Err(exit)
        }
    }
}

/// A file that did not exist before.
pub(super) struct Out {
    path: PathBuf,
    file: BufWriter<File>,
    lines: u64,
}

impl Out {
    /// Makes it, for its owner's eyes: letters are other people's data.
    pub(super) fn create(path: &Path) -> Result<Self, Exit> {
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        match created {
            Ok(file) => Ok(Self {
                path: path.to_owned(),
                file: BufWriter::new(file),
                lines: 0,
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                eprintln!(
                    "ackonce: {} exists, and no file is written over\n  hint: give another name",
                    path.display()
                );
                Err(Exit::Usage)
            }
            Err(error) => {
                eprintln!("ackonce: failed to create {}: {error}", path.display());
                Err(Exit::System)
            }
        }
    }

    /// Adds a line.
    pub(super) fn write(&mut self, line: &str) -> Result<(), Exit> {
        self.lines += 1;
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|error| self.failed(&error))
    }

    /// Whether no line was added.
    pub(super) fn is_empty(&self) -> bool {
        self.lines == 0
    }

    /// Has it all on disk when it returns, the name included.
    pub(super) fn sync(&mut self) -> Result<(), Exit> {
        let synced = self
            .file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .and_then(|()| {
                let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
            });
        synced.map_err(|error| self.failed(&error))
    }

    /// Takes it away again.
    pub(super) fn remove(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            let path = self.path.display();
            eprintln!("ackonce: failed to remove {path}, which is not complete: {error}");
        }
    }

    fn failed(&self, error: &io::Error) -> Exit {
        eprintln!("ackonce: failed to write {}: {error}", self.path.display());
        Exit::System
    }
}
