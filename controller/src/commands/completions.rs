//! `livesnap completions`: what a shell needs to complete this command line.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{Cli, Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap completions bash > /usr/share/bash-completion/completions/livesnap
  livesnap completions zsh > /usr/local/share/zsh/site-functions/_livesnap
  livesnap completions fish > ~/.config/fish/completions/livesnap.fish

Exit codes:
  0  printed
  2  wrong usage";

/// Print the completion script for a shell
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    output::line(script(args.shell).trim_end())
}

fn script(shell: Shell) -> String {
    let all = Cli::command();
    // Hidden commands would be offered too.
    let visible = all.get_subcommands().filter(|command| !command.is_hide_set());
    let mut shown = clap::Command::new("livesnap")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(visible.cloned());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, "livesnap", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_can_run_is_offered_and_nothing_else() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            assert!(script.contains("snapshot") && script.contains("pause-limit"), "{shell}");
            assert!(!script.contains("demo-guest") && !script.contains("guard"), "{shell}");
        }
    }
}
