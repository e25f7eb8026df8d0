//! A handler whose effect is outside the database: at least once, and exactly
//! once because what receives it honours the key. Here that is a folder, in
//! which a file of one name can be made only once. In the configuration:
//!
//! ```toml
//! [consumer.handler]
//! type = "rust"
//! effect = "keyed"
//! ```
//!
//! Run it with `cargo run --example keyed -- CONFIG FOLDER`.

use std::fs::{File, rename};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ackonce::worker::{Cancelled, Daemon, KeyedHandler, Message, Outcome, StartError};

/// Each message becomes a file, whose name is its key.
struct Files {
    folder: PathBuf,
}

impl KeyedHandler for Files {
    fn apply(&mut self, message: &Message<'_>, _: &Cancelled<'_>) -> Result<(), Outcome> {
        // A key is visible ASCII; each `%` in it begins an encoded byte, so
        // this makes no two keys the same.
        let name = message.key().replace('/', "%2F");
        let path = self.folder.join(&name);
        if path.exists() {
            return Ok(());
        }
        // Written beside it and moved there whole: a crash leaves no half.
        let draft = self.folder.join(format!(".{name}"));
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(message.body())?;
            file.sync_all()?;
            rename(&draft, &path)
        };
        write().map_err(|error| match error.kind() {
            // A name that is too long: this message's own fault.
            ErrorKind::InvalidFilename => Outcome::reject(error.to_string()),
            // No folder, no room, no right: no message can be applied.
            _ => Outcome::pause(format!("failed to write a file: {error}")),
        })
    }
}

/// The daemon of the configuration at `path`, until it is told to stop.
///
/// # Errors
///
/// Everything that is wrong with the configuration.
pub fn run(path: &str, folder: &Path) -> Result<ExitCode, StartError> {
    let folder = folder.to_owned();
    let files = move || Files {
        folder: folder.clone(),
    };
    Ok(Daemon::from_config(path)?
        .keyed_handler("orders", files)
        .run())
}

#[allow(dead_code, reason = "the tests call `run`")]
fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(folder)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: keyed CONFIG FOLDER");
        return ExitCode::from(2);
    };
    run(&path, Path::new(&folder)).unwrap_or_else(|error| {
        eprintln!("{error}");
        error.exit_code()
    })
}
