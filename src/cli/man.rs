//! `ackonce man`: the manual's pages, made from what `--help` says. Packages
//! call it when they are built.

use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_mangen::Man;

use super::{Cli, Exit, output};

/// Arguments of `ackonce man`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Write a page for every command into this folder, such as
    /// ackonce-dead-list.1, instead of printing the first one
    #[arg(long, value_name = "FOLDER")]
    directory: Option<PathBuf>,
}

/// Prints or writes them.
///
/// # Errors
///
/// [`Exit::System`] when a file cannot be written.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let mut command = Cli::command();
    // Spells out the name of every subcommand.
    command.build();
    match &arguments.directory {
        None => output(&String::from_utf8_lossy(&page(&command, "ackonce").1)),
        Some(folder) => write_all(&command, "ackonce", folder)?,
    }
    Ok(Exit::Success)
}

fn write_all(command: &clap::Command, name: &str, folder: &Path) -> Result<(), Exit> {
    let (file, text) = page(command, name);
    let path = folder.join(file);
    std::fs::write(&path, text).map_err(|error| {
        eprintln!("ackonce: failed to write {}: {error}", path.display());
        Exit::System
    })?;
    let shown = command.get_subcommands().filter(|c| !c.is_hide_set());
    for subcommand in shown.filter(|c| c.get_name() != "help") {
        let name = format!("{name}-{}", subcommand.get_name());
        write_all(subcommand, &name, folder)?;
    }
    Ok(())
}

/// Name of its file, and the page in roff.
fn page(command: &clap::Command, name: &str) -> (String, Vec<u8>) {
    let man = Man::new(command.clone()).title(name).section("1");
    let mut text = Vec::new();
    // Writing into memory does not fail.
    if let Err(error) = man.render(&mut text) {
        log::error!("failed to make the page {name}: {error}");
    }
    (format!("{name}.1"), text)
}
