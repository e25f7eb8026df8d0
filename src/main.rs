//! The `ackonce` program: arguments in, exit status out.

use std::process::ExitCode;

fn main() -> ExitCode {
    ackonce::cli::main().into()
}
