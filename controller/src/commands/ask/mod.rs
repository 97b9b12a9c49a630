//! `livesnap ask`: a client of the daemon, for people and scripts.

mod client;
mod limits;

use std::path::PathBuf;

use serde_json::{Value, json};
use snapshot_core::{Progress, Reason};

use self::client::Client;
use super::snapshot::taken_to;
use crate::control_loop::in_brief;
use crate::daemon::Policy;
use crate::progress::Bar;
use crate::{Failure, output};

const EXAMPLES: &str = "\
Examples:
  livesnap ask vms
  livesnap ask plan vm1 --deadline 5m
  livesnap ask snapshot vm1 --buffer 2GiB --min-cpu 50%
  livesnap ask list
  livesnap ask --json show 06443a5ca8b2f0 | jq .result.report.downtime
  livesnap ask abort 06443a5ca8b2f0

A snapshot is followed until its end, unless --detach is given, and then reported as by `livesnap snapshot`. Ctrl-C ends only the
following: the daemon goes on with the snapshot, and `follow` takes it up again.

Exit codes:
  0    done; of a snapshot that is followed: there is one, and it is sound if that was asked; of a plan: a snapshot would be begun
  1    failed: the snapshot, or its verification, or the daemon went away
  2    wrong usage
  3    refused by the daemon, or it could not be asked
  4    the snapshot was given up, or not begun, because its limits cannot be kept; or a plan says that it would be
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

/// Of which virtual machine, where to, and how.
#[derive(clap::Args)]
struct Request {
    /// Name of the virtual machine
    vm: String,
    /// Where it shall lie: below one of the daemon's directories, absolute or relative to the first [default: VM/ID]
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    #[command(flatten)]
    limits: limits::Args,
}

impl Request {
    fn json(&self) -> Value {
        json!({"vm": self.vm, "destination": self.out, "policy": Policy::from(&self.limits)})
    }
}

/// What the daemon is asked.
#[derive(clap::Subcommand)]
enum What {
    /// List the virtual machines, and what would refuse a snapshot
    Vms,
    /// Forecast whether a snapshot would keep its limits, without taking one
    Plan {
        #[command(flatten)]
        request: Request,
    },
    /// Take a snapshot, and follow it until its end
    Snapshot {
        #[command(flatten)]
        request: Request,
        /// Have it read again when it is completed
        #[arg(long)]
        verify: bool,
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
        What::Vms => args.list(&client, "/vms", "vms", vm_row),
        What::Plan { request } => {
            let told = client.call("POST", "/snapshot/plan", Some(&request.json()))?;
            match told["forecast"]["in_words"].as_str() {
                _ if args.json => output::json(&told)?,
                Some(text) => output::line(text)?,
                None => {}
            }
            if told["is_feasible"] == true { Ok(()) } else { Err(ended(&told)) }
        }
        What::Snapshot { request, verify, detach } => {
            let mut request = request.json();
            request["verify"] = (*verify).into();
            let operation = client.call("POST", "/snapshot", Some(&request))?;
            if *detach {
                return args.show(&operation);
            }
            let id = operation["id"].as_str().unwrap_or_default();
            args.follow(&client, id)
        }
        What::List => args.list(&client, "/snapshot", "operations", row),
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

    /// Shows a list, each of `field` as a line.
    fn list(
        &self,
        client: &Client,
        path: &str,
        field: &str,
        row: fn(&Value) -> String,
    ) -> Result<(), Failure> {
        let page = client.call("GET", path, None)?;
        if self.json {
            return output::json(&page);
        }
        page[field].as_array().into_iter().flatten().try_for_each(|known| output::line(row(known)))
    }

    /// Shows an operation as it changes, on a terminal by a bar; its end is the command's.
    fn follow(&self, client: &Client, id: &str) -> Result<(), Failure> {
        let (mut bar, mut shown, mut last) = (Bar::new(), String::new(), Value::Null);
        for operation in client.follow(&format!("{}/events", path(id)?))? {
            last = operation?;
            if self.json {
                output::line(output::json_line(&last)?)?;
                continue;
            }
            match progress(&last).filter(|_| bar.is_seen()) {
                Some(progress) => bar.show(&progress, &control(&last)),
                None => {
                    let row = row(&last);
                    if row != shown {
                        bar.end();
                        output::line(&row)?;
                        shown = row;
                    }
                }
            }
        }
        bar.end();
        match last["state"].as_str() {
            Some("completed") => {
                let report = last["result"]["in_words"].as_str().filter(|_| !self.json);
                let destination = last["destination"].as_str().unwrap_or_default();
                if let Some(report) = report {
                    output::line(format_args!("{}\n{report}", taken_to(&destination)))?;
                }
                let verification = &last["verification"];
                let is_sound = verification["state"] != "failed";
                if is_sound { Ok(()) } else { Err(failure(&verification["error"])) }
            }
            Some("aborted" | "failed") => Err(ended(&last)),
            _ => {
                let lost = "the daemon has gone away: `follow` the operation when it is back";
                Err(Failure::new(Reason::Io, lost))
            }
        }
    }
}

/// How far an operation's session is, while there is one.
fn progress(operation: &Value) -> Option<Progress> {
    if operation["ended_at"].is_string() {
        return None;
    }
    let mut progress = operation["progress"].clone();
    let fields = progress.as_object_mut()?;
    fields.retain(|_, value| !value.is_null());
    // Where it waits, there is no such phase.
    fields.insert("phase".into(), operation["state"].clone());
    serde_json::from_value(progress).ok()
}

/// What its controller does, for the bar.
fn control(operation: &Value) -> String {
    let control = &operation["progress"]["control"];
    let forecast = &control["forecast"];
    let peak = forecast["peak_buffer_bytes"].as_f64();
    let forecast = peak.map(|peak| (peak, forecast["completion_seconds"].as_f64()));
    let ratio = control["cpu_ratio_mean"].as_f64();
    ratio.map_or(String::new(), |ratio| in_brief(ratio, forecast))
}

/// A virtual machine in one line.
fn vm_row(vm: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let refusals = vm["seen"]["refusals"].as_array();
    let refusals: Vec<_> =
        refusals.into_iter().flatten().map(|refusal| text(&refusal["reason"])).collect();
    let refused = match (vm["seen"]["error"]["reason"].as_str(), &refusals[..]) {
        (Some(reason), _) => format!("  {reason}"),
        (None, []) => String::new(),
        (None, refusals) => format!("  refused: {}", refusals.join(", ")),
    };
    format!(
        "{}  {:<11}  last {}  next {}{refused}",
        text(&vm["name"]),
        text(&vm["seen"]["state"]),
        text(&vm["last_completed_at"]),
        text(&vm["next_at"]),
    )
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
    let verified = match operation["verification"]["state"].as_str() {
        Some("running") => "  being verified",
        Some("sound") => "  sound",
        Some("failed") => "  not sound",
        _ => "",
    };
    let removed = if operation["removed_at"].is_null() { "" } else { "  removed" };
    let reason = operation["error"]["reason"].as_str();
    let reason = reason.map_or(String::new(), |reason| format!("  {reason}"));
    format!(
        "{}  {}  {:<10} {percent:>5}  {}{schedule}{reason}{verified}{removed}",
        text("id"),
        text("vm"),
        text("state"),
        text("destination"),
    )
}

/// Why there is no snapshot.
fn ended(operation: &Value) -> Failure {
    failure(&operation["error"])
}

/// An error that the daemon tells of.
fn failure(error: &Value) -> Failure {
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
    #![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

    use snapshot_core::Phase;

    use super::*;

    #[test]
    fn an_operation_is_a_line() {
        let operation = json!({
            "id": "07", "vm": "vm1", "state": "copying", "destination": "/backup/vm1/07",
            "progress": {"saved_bytes": 50, "total_bytes": 200}, "error": null,
        });
        assert_eq!(row(&operation), "07  vm1  copying     25 %  /backup/vm1/07");
        let old = json!({
            "id": "06", "vm": "vm1", "state": "completed", "destination": "/backup/vm1/06",
            "verification": {"state": "sound"}, "removed_at": "2026-01-01T00:00:00Z",
        });
        assert_eq!(row(&old), "06  vm1  completed      -  /backup/vm1/06  sound  removed");
        let failed = json!({
            "id": "08", "vm": "vm1", "state": "failed", "schedule": "hourly", "destination": "/backup/vm1/08",
            "progress": null, "error": {"reason": "io", "detail": "no"},
        });
        assert_eq!(row(&failed), "08  vm1  failed         -  /backup/vm1/08  by hourly  io");
        assert_eq!((ended(&failed).reason, ended(&failed).to_string()), (Reason::Io, "no".into()));
    }

    #[test]
    fn a_virtual_machine_is_a_line() {
        let vm = json!({
            "name": "vm1", "last_completed_at": null, "next_at": "2026-01-02T00:00:00Z",
            "seen": {"state": "running", "refusals": [{"reason": "hugetlb"}, {"reason": "vfio"}], "error": null},
        });
        let line = "vm1  running      last -  next 2026-01-02T00:00:00Z  refused: hugetlb, vfio";
        assert_eq!(vm_row(&vm), line);
        assert_eq!(
            vm_row(&json!({"name": "vm2", "seen": null})),
            "vm2  -            last -  next -"
        );
    }

    #[test]
    fn the_bar_is_shown_what_a_session_of_its_own_would_show() {
        let operation = json!({"state": "copying", "ended_at": null, "progress": {
            "total_bytes": 8, "saved_bytes": 3, "first_touches": [{"thread": 7, "faults": 1, "bytes": 2, "wait_ns": 0}], "service": null,
            "control": {"cpu_ratio_mean": 0.5, "forecast": {"peak_buffer_bytes": 1024.0, "completion_seconds": 3.2}},
        }});
        let shown = progress(&operation).unwrap();
        assert_eq!((shown.phase, shown.total_bytes, shown.saved_bytes), (Phase::Copying, 8, 3));
        assert_eq!(control(&operation), "  guest CPU 50 %  forecast 1.0 KiB of buffer, 3 s");
        for state in ["queued", "completed", "failed"] {
            let mut operation = operation.clone();
            operation["state"] = json!(state);
            operation["ended_at"] = json!((state != "queued").then_some("now"));
            assert_eq!(progress(&operation), None, "{state}");
        }
    }

    #[test]
    fn nothing_but_an_id_gets_into_a_path() {
        assert!(matches!(path("06443a5ca8b2f0"), Ok(path) if path == "/snapshot/06443a5ca8b2f0"));
        for id in ["", "..", "a/b", "a b", "a\r\nHost: b", "%2e", "ä"] {
            assert!(path(id).is_err(), "{id:?}");
        }
    }
}
