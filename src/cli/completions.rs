//! `ackonce completions`: what a shell needs to complete the command line.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Exit, output};

/// Arguments of `ackonce completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Packages install them. By hand: bash: ~/.local/share/bash-completion/completions/ackonce; zsh: \
_ackonce in a folder of $fpath; fish: ~/.config/fish/completions/ackonce.fish.")]
pub struct Arguments {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Prints them on standard output.
///
/// # Errors
///
/// None: the exit status is 0.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let mut command = Cli::command();
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "ackonce", &mut script);
    output(&String::from_utf8_lossy(&script));
    Ok(Exit::Success)
}
