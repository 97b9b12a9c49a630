//! `livesnap completions`: what a shell needs to complete this command line.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{Cli, Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap completions bash > /usr/share/bash-completion/completions/livesnap
  livesnap completions zsh > /usr/local/share/zsh/site-functions/_livesnap
  livesnap completions fish > ~/.config/fish/completions/livesnap.fish";

/// Print the completion script for a shell
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "livesnap", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}
