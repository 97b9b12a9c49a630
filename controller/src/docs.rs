//! Holds `docs/cli.md` and `docs/reasons.md` to what the program itself says.
//!
//! After a change: `REWRITE_DOCS=1 cargo test -p livesnap docs`.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::CommandFactory as _;
use snapshot_core::Reason;

use crate::Cli;
use crate::daemon::problem::Word;
use crate::failure::{CANCELLED, FAILED, GIVEN_UP, REFUSED};

/// Compares `text` with the file `name`, or writes it there.
fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os("REWRITE_DOCS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let remedy = "REWRITE_DOCS=1 cargo test -p livesnap docs";
    assert!(found == text, "docs/{name} is not what the program says; run: {remedy}");
}

#[test]
fn the_command_line_is_documented() {
    let mut root = Cli::command().term_width(100);
    root.build();
    let mut text =
        "# Command line\n\nWhat `livesnap --help` and each command's `--help` say.\n".to_owned();
    let mut section = |title: &str, help: String| {
        let lines: Vec<_> = help.lines().map(str::trim_end).collect();
        writeln!(text, "\n## {title}\n\n```text\n{}\n```", lines.join("\n").trim_end()).unwrap();
    };
    section("livesnap", root.render_long_help().to_string());
    for command in root.get_subcommands_mut().filter(|command| !command.is_hide_set()) {
        // clap's own; it has nothing to say.
        if command.get_name() != "help" {
            section(
                &format!("livesnap {}", command.get_name()),
                command.render_long_help().to_string(),
            );
        }
    }
    check("cli.md", &text);
}

#[test]
fn every_reason_is_documented() {
    let mut text = format!(
        "# Reasons and exit codes\n\n\
         The exit code tells how far a command came, the reason why it came no further. A reason is a stable word: \
         it stands in JSON output as `reason`, and its meaning does not change.\n\n\
         | exit code | meaning |\n| --- | --- |\n\
         | 0 | done, and sound |\n\
         | {FAILED} | failed, or not sound |\n\
         | 2 | wrong usage |\n\
         | {REFUSED} | refused before anything was touched |\n\
         | {GIVEN_UP} | given up, or not begun, because the limits cannot be kept |\n\
         | {CANCELLED} | interrupted (reason `{}`) |\n\n\
         | reason | meaning |\n| --- | --- |\n",
        Reason::Cancelled
    );
    for reason in Reason::ALL {
        writeln!(text, "| `{reason}` | {} |", reason.meaning()).unwrap();
    }
    text.push_str(
        "\n## Of the daemon's API\n\n\
         A call that fails says why in problem details (RFC 9457). An operation that fails is no failed call: its `error` has \
         one of the reasons above.\n\n\
         | status | reason | meaning |\n| --- | --- | --- |\n",
    );
    for word in Word::ALL {
        let (status, word, meaning) = (word.status().as_u16(), word.as_str(), word.meaning());
        writeln!(text, "| {status} | `{word}` | {meaning} |").unwrap();
    }
    check("reasons.md", &text);
}
