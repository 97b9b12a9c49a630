//! `livesnap serve`: the daemon.

use std::path::PathBuf;

use snapshot_core::Reason;

use crate::Failure;
use crate::daemon::{self, Config, DaemonError};

const EXAMPLES: &str = "\
Examples:
  livesnap serve --config /etc/livesnap/livesnap.toml
  curl --unix-socket /run/livesnap/livesnap.sock http://localhost/vms
  curl --unix-socket /run/livesnap/livesnap.sock --json '{\"vm\": \"vm1\"}' http://localhost/snapshot

docs/daemon.md tells how to use it, packaging/livesnap.toml explains every key of the configuration, and GET
/openapi.json describes the API. SIGTERM and Ctrl-C end it; guests run on however it ends.

Exit codes:
  0  ended as it was told to
  1  failed
  2  wrong usage
  3  refused: the configuration cannot be used, or another daemon is at work";

/// Serve an HTTP API that takes snapshots of this host's virtual machines
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The configuration; without one every key has its default, and there is no virtual machine
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How each line of the log on standard error is written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log: LogFormat,
}

/// How each line of the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// An object for programs
    Json,
}

impl Args {
    /// How the log is written.
    pub const fn log(&self) -> LogFormat {
        self.log
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref())
        .map_err(|error| Failure::refused(Reason::BadArgument, error))?;
    daemon::run(config).map_err(|error| match error {
        // Not refused: whoever keeps it running shall start it again.
        DaemonError::Failed => Failure::new(Reason::Internal, error),
        error => Failure::refused(Reason::Io, error),
    })
}
