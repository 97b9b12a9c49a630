//! The hidden command `livesnap man-pages DIR`: the manual, made of what `--help` says. Packaging runs it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use snapshot_core::Reason;

use crate::{Cli, Failure};

/// Where to.
#[derive(clap::Args)]
pub struct Args {
    /// The directory to write to, made if it is not there
    dir: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    write_to(&args.dir).map_err(|error| {
        let dir = args.dir.display();
        Failure::new(Reason::Io, format!("could not write man pages to {dir}: {error}"))
    })
}

/// A page for livesnap, and one for each command that users see.
fn write_to(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let visible = root.get_subcommands().filter(|command| !command.is_hide_set());
    for command in visible.chain([&root]) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        page(command, &mut File::create(dir.join(format!("{name}.1")))?)?;
    }
    Ok(())
}

fn page(command: &Command, to: &mut dyn Write) -> io::Result<()> {
    // What follows the options is laid out by its lines; as part of the page it would be filled like prose.
    let layout = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let rest = command.clone().after_help(Resettable::Reset);
    let version = format!("livesnap {}", env!("CARGO_PKG_VERSION"));
    Man::new(rest).source(version).manual("livesnap").render(to)?;
    let mut sections = Roff::new();
    for block in layout.split("\n\n").filter(|block| !block.is_empty()) {
        let (first, others) = block.split_once('\n').unwrap_or((block, ""));
        match first {
            "Examples:" => literal(&mut sections, "EXAMPLES", others),
            "Exit codes:" => literal(&mut sections, "EXIT STATUS", others),
            _ => literal(&mut sections, "NOTES", block),
        }
    }
    sections.to_writer(to)
}

/// A section whose lines stay as they are.
fn literal(page: &mut Roff, title: &str, text: &str) {
    page.control("SH", [title]).control("nf", []);
    for line in text.lines() {
        page.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
    }
    page.control("fi", []);
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn there_is_a_page_for_each_command_that_users_see() {
        let dir = tempfile::tempdir().unwrap();
        write_to(dir.path()).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();

        assert!(read("livesnap.1").contains("livesnap\\-snapshot(1)"));
        let page = read("livesnap-snapshot.1");
        for expected in [
            ".TH livesnap-snapshot 1",
            "\\fB\\-\\-pause\\-limit\\fR",
            ".SH EXAMPLES\n.nf\nlivesnap snapshot \\-\\-qmp /run/vm1/qmp.sock",
            ".SH \"EXIT STATUS\"\n.nf\n0    there is a snapshot",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        let hidden =
            |name: &str| ["guard", "child", "man-pages", "help"].iter().any(|it| name.contains(it));
        assert!(!names.iter().any(|name| hidden(name.to_str().unwrap())), "{names:?}");
    }
}
