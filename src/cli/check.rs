//! `ackonce check`: is everything as the daemon needs it?

use clap::Args;

use super::{ConfigArgument, Exit, output};
use crate::config;
use crate::handler::{self, rust::Makers};
use crate::inspect::{self, Finding, Severity};

/// Arguments of `ackonce check`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    config: ConfigArgument,

    /// Look at the configuration alone, not at the servers
    #[arg(long)]
    offline: bool,

    /// Print the configuration with every default filled in, without secrets,
    /// and look at nothing else
    #[arg(long)]
    print: bool,
}

/// Reports everything it finds, on standard output.
///
/// # Errors
///
/// The exit status of the worst finding.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    if arguments.print {
        output(&config::to_toml(&config, false));
        return Ok(Exit::Success);
    }
    for consumer in &config.consumers {
        handler::build(consumer, &Makers::default()).map_err(|error| {
            eprintln!("{error}");
            Exit::Config
        })?;
    }
    let path = arguments.config.config.display();
    println!(
        "ok       configuration: {path}, {} consumer(s)",
        config.consumers.len()
    );
    for path in config::exposed_keys(&config) {
        output(&format!(
            "warning  key file: {} can be read by everybody on this machine\n         hint: chmod \
             o= it, and let the daemon's user or group own it\n",
            path.display()
        ));
    }
    if arguments.offline {
        return Ok(Exit::Success);
    }
    let findings = inspect::servers(&config);
    for finding in &findings {
        output(&format!("{finding}\n"));
    }
    match findings.iter().map(|f: &Finding| f.severity).max() {
        Some(Severity::Unreachable) => Err(Exit::Unreachable),
        Some(Severity::Denied) => Err(Exit::Denied),
        Some(Severity::Wrong) => Err(Exit::Config),
        Some(Severity::Good | Severity::Warning) | None => Ok(Exit::Success),
    }
}
