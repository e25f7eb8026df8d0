//! The command line: arguments in, exit status out. One file per subcommand,
//! none with logic of its own.

pub mod publish;

use std::path::PathBuf;

use clap::Args;

use crate::config::Config;

/// Exit statuses, those above 63 as in sysexits.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Success,
    /// 1: done in part.
    Partial,
    /// 2: the arguments make no sense.
    Usage,
    /// 69: a server cannot be reached.
    Unreachable,
    /// 78: the configuration, or what it describes, is not right.
    Config,
}

/// Where the configuration is.
#[derive(Debug, Args)]
pub struct ConfigArgument {
    /// Configuration file
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = "/etc/ackonce/config.toml"
    )]
    pub config: PathBuf,
}

impl ConfigArgument {
    fn load(&self) -> Result<Config, Exit> {
        Err(Exit::Config)
    }
}
