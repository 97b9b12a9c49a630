//! `livesnap ask`: a client of the daemon, for people and scripts.

mod client;

use std::path::PathBuf;

use serde_json::{Value, json};
use snapshot_core::Reason;

use self::client::Client;
use crate::{Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap ask snapshot vm1
  livesnap ask list
  livesnap ask --json show 06443a5ca8b2f0 | jq .result.report.downtime
  livesnap ask abort 06443a5ca8b2f0

A snapshot is followed until its end, unless --detach is given. Ctrl-C ends only the following: the daemon goes on with the
snapshot, and `follow` takes it up again.

Exit codes:
  0    done; of a snapshot that is followed: there is one
  1    failed: the snapshot, or the daemon went away
  2    wrong usage
  3    refused by the daemon, or it could not be asked
  4    the snapshot was given up, or not begun, because its limits cannot be kept
  130  the snapshot was aborted";

/// Ask the daemon for snapshots, and how they are
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The daemon's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/livesnap/livesnap.sock")]
    daemon: PathBuf,
    /// Print what the daemon answers, as JSON; while a snapshot is followed, one object a line
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

/// What the daemon is asked.
#[derive(clap::Subcommand)]
enum What {
    /// Take a snapshot, and follow it until its end
    Snapshot {
        /// Name of the virtual machine
        vm: String,
        /// Where it shall lie: below one of the daemon's directories, absolute or relative to the first [default: VM/ID]
        #[arg(long, value_name = "DIR")]
        out: Option<String>,
        /// Do not follow it
        #[arg(long)]
        detach: bool,
    },
    /// List the newest operations
    List,
    /// Show an operation
    Show {
        /// The operation
        id: String,
    },
    /// Follow an operation until its end
    Follow {
        /// The operation
        id: String,
    },
    /// Give an operation up; the guest runs on
    Abort {
        /// The operation
        id: String,
    },
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.daemon);
    match &args.what {
        What::Snapshot { vm, out, detach } => {
            let request = json!({"vm": vm, "destination": out});
            let operation = client.call("POST", "/snapshot", Some(&request))?;
            if *detach {
                return args.show(&operation);
            }
            let id = operation["id"].as_str().unwrap_or_default();
            args.follow(&client, id)
        }
        What::List => {
            let page = client.call("GET", "/snapshot", None)?;
            if args.json {
                return output::json(&page);
            }
            let operations = page["operations"].as_array();
            operations.into_iter().flatten().try_for_each(|operation| output::line(row(operation)))
        }
        What::Show { id } => args.show(&client.call("GET", &path(id)?, None)?),
        What::Follow { id } => args.follow(&client, id),
        What::Abort { id } => {
            args.show(&client.call("POST", &format!("{}/abort", path(id)?), None)?)
        }
    }
}

impl Args {
    fn show(&self, operation: &Value) -> Result<(), Failure> {
        if self.json { output::json(operation) } else { output::line(row(operation)) }
    }

    /// Shows an operation as it changes; its end is the command's.
    fn follow(&self, client: &Client, id: &str) -> Result<(), Failure> {
        let (mut shown, mut last) = (String::new(), Value::Null);
        for operation in client.follow(&format!("{}/events", path(id)?))? {
            last = operation?;
            let row = row(&last);
            if self.json {
                output::line(output::json_line(&last)?)?;
            } else if row != shown {
                output::line(&row)?;
                shown = row;
            }
        }
        match last["state"].as_str() {
            Some("completed") => Ok(()),
            Some("aborted" | "failed") => Err(ended(&last)),
            _ => {
                let lost = "the daemon has gone away: `follow` the operation when it is back";
                Err(Failure::new(Reason::Io, lost))
            }
        }
    }
}

/// An operation in one line.
fn row(operation: &Value) -> String {
    let text = |field: &str| operation[field].as_str().unwrap_or("-");
    let count = |field: &str| operation["progress"][field].as_u64();
    let percent = match (count("saved_bytes"), count("total_bytes")) {
        (Some(saved), Some(total)) if total > 0 => {
            format!("{} %", saved.saturating_mul(100) / total)
        }
        _ => "-".into(),
    };
    let schedule = operation["schedule"].as_str();
    let schedule = schedule.map_or(String::new(), |schedule| format!("  by {schedule}"));
    let reason = operation["error"]["reason"].as_str();
    let reason = reason.map_or(String::new(), |reason| format!("  {reason}"));
    format!(
        "{}  {}  {:<10} {percent:>5}  {}{schedule}{reason}",
        text("id"),
        text("vm"),
        text("state"),
        text("destination"),
    )
}

/// Why there is no snapshot.
fn ended(operation: &Value) -> Failure {
    let error = &operation["error"];
    let detail = error["detail"].as_str().unwrap_or("the daemon does not say why");
    Failure::new(reason(&error["reason"]).unwrap_or(Reason::Internal), detail)
}

/// A word that both the daemon's answers and this program have.
fn reason(word: &Value) -> Option<Reason> {
    serde_json::from_value(word.clone()).ok()
}

/// Where an operation is told of.
fn path(id: &str) -> Result<String, Failure> {
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        let error = format!("{id:?} is no operation: `livesnap ask list` lists them");
        return Err(Failure::refused(Reason::BadArgument, error));
    }
    Ok(format!("/snapshot/{id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_a_line() {
        let operation = json!({
            "id": "07", "vm": "vm1", "state": "copying", "destination": "/backup/vm1/07",
            "progress": {"saved_bytes": 50, "total_bytes": 200}, "error": null,
        });
        assert_eq!(row(&operation), "07  vm1  copying     25 %  /backup/vm1/07");
        let failed = json!({
            "id": "08", "vm": "vm1", "state": "failed", "schedule": "hourly", "destination": "/backup/vm1/08",
            "progress": null, "error": {"reason": "io", "detail": "no"},
        });
        assert_eq!(row(&failed), "08  vm1  failed         -  /backup/vm1/08  by hourly  io");
        assert_eq!((ended(&failed).reason, ended(&failed).to_string()), (Reason::Io, "no".into()));
    }

    #[test]
    fn nothing_but_an_id_gets_into_a_path() {
        assert!(matches!(path("06443a5ca8b2f0"), Ok(path) if path == "/snapshot/06443a5ca8b2f0"));
        for id in ["", "..", "a/b", "a b", "a\r\nHost: b", "%2e", "ä"] {
            assert!(path(id).is_err(), "{id:?}");
        }
    }
}
