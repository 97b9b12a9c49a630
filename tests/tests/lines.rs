//! A snapshot of a real QEMU as a program follows it: by lines on standard output, however it reads them; and limits that it
//! changes meanwhile.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ChildStdout, Command};
use std::time::Duration;

use livesnap_tests::check::check_files;
use livesnap_tests::is_root_or_skip;
use livesnap_tests::livesnap::{self, Running, snapshot};
use livesnap_tests::qemu::{Builder, Load, Qemu};
use livesnap_tests::slow_disk::SlowDisk;
use rustix::pipe::fcntl_setpipe_size;
use serde_json::Value;

const BOOT: Duration = Duration::from_secs(120);
/// So slow that a snapshot takes seconds.
const SLOW: u64 = 16 << 20;
/// So slow that it takes minutes.
const CRAWL: u64 = 2 << 20;
/// Less than two lines take.
const PIPE_BYTES: usize = 4096;

const PHASES: [&str; 7] =
    ["preparing", "arming", "frozen", "copying", "draining", "committing", "completed"];

fn boot(builder: &Builder) -> Qemu {
    let mut qemu = builder.start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu
}

fn command(qemu: &Qemu, out: &Path, more: &[&str]) -> Command {
    let mut command =
        livesnap::command(["snapshot", "--json-lines", "--on-infeasible=wait", "--qmp"]).unwrap();
    command.arg(qemu.qmp_socket()).arg("--out").arg(out).args(more);
    command
}

fn lines(stdout: ChildStdout) -> impl Iterator<Item = Value> {
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    lines.map(|line| serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
}

/// The phases that are told, one after the other.
fn phases(told: &[Value]) -> Vec<&str> {
    let mut phases: Vec<_> = told.iter().filter_map(|line| line["phase"].as_str()).collect();
    phases.dedup();
    phases
}

/// Whether both have the same fields, as far as both have any.
fn are_alike(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            one.keys().eq(other.keys())
                && one.iter().all(|(name, value)| are_alike(value, &other[name]))
        }
        (Value::Null, _) | (_, Value::Null) => true,
        (one, other) => std::mem::discriminant(one) == std::mem::discriminant(other),
    }
}

fn sum_of_buckets(durations: &Value) -> u64 {
    let buckets = durations["buckets"].as_array().unwrap();
    buckets.iter().map(|bucket| bucket[1].as_u64().unwrap()).sum()
}

#[test]
fn a_program_follows_a_snapshot_by_lines_however_it_reads_them() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder().load(Load { ring_mib: 48, ..Load::default() }));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("snapshot");
    let slow = SlowDisk::new(dir.path(), SLOW).unwrap();

    let mut running = Running::start(slow.command(&command(&qemu, &out, &[]))).unwrap();
    let told: Vec<Value> = lines(running.take_stdout().unwrap()).collect();
    assert!(running.wait().unwrap().status.success());
    assert_eq!(phases(&told), PHASES);
    let (end, course) = told.split_last().unwrap();
    assert!(course.iter().all(|line| line["event"] == "progress"), "{course:#?}");
    let mut end = end.clone();
    assert_eq!(end.as_object_mut().unwrap().remove("event").unwrap(), "end");
    let counts = |field: &str| {
        let counts = course.iter().map(move |line| line[field].as_u64().unwrap());
        counts.collect::<Vec<_>>()
    };
    for field in ["saved_bytes", "written_bytes", "faults", "elapsed_ns"] {
        assert!(counts(field).is_sorted(), "{field}: {:?}", counts(field));
    }
    let last = course.last().unwrap();
    assert_eq!(last["faults"], end["report"]["faults"], "{last:#}");
    assert_eq!(sum_of_buckets(&last["service"]), end["report"]["service"]["count"]);
    assert!(last["control"]["forecast"]["drain_bytes_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(course[0]["stalls"], Value::Null, "nothing is counted before the consistency point");
    if end["probes"]["stalls"].is_object() {
        let count = &end["probes"]["stalls"]["copy"]["count"];
        assert_eq!(&last["stalls"]["count"], count, "{last:#}");
        assert_eq!(sum_of_buckets(&last["stalls"]), *count);
    }
    if end["disk"]["ours"].is_object() {
        assert!(sum_of_buckets(&last["disk_writes"]["livesnap"]) > 0, "{last:#}");
    }
    fs::remove_dir_all(&out).unwrap();
    let by_json = snapshot(&qemu, &out, &[]).unwrap();
    let names = |told: &Value| told.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&end), names(&by_json));
    for part in ["report", "control"] {
        assert!(are_alike(&end[part], &by_json[part]), "{end:#} is not like {by_json:#}");
    }
    fs::remove_dir_all(&out).unwrap();

    // A reader that reads nothing until there is a snapshot.
    let mut running = Running::start(slow.command(&command(&qemu, &out, &[]))).unwrap();
    let stdout = running.take_stdout().unwrap();
    fcntl_setpipe_size(&stdout, PIPE_BYTES).unwrap();
    running.reach("copying").unwrap();
    qemu.wait_laps(1, BOOT).unwrap();
    running.reach("completed").unwrap();
    let told: Vec<Value> = lines(stdout).collect();
    assert!(running.wait().unwrap().status.success());
    assert_eq!(phases(&told), PHASES);
    assert_eq!(told.last().unwrap()["outcome"], "completed");
    fs::remove_dir_all(&out).unwrap();

    // One that goes away.
    let mut running = Running::start(slow.command(&command(&qemu, &out, &[]))).unwrap();
    drop(running.take_stdout().unwrap());
    let ended = running.wait().unwrap();
    assert!(ended.status.success(), "{}", ended.log);
    check_files(&out.join("ram.mapped-ram"), None).unwrap();
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
}

#[test]
fn limits_change_while_a_snapshot_runs() {
    if !is_root_or_skip("cgroups").unwrap() {
        return;
    }
    let mut qemu = boot(&Qemu::builder());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (out, record) = (dir.path().join("snapshot"), dir.path().join("record"));
    let slow = SlowDisk::new(dir.path(), CRAWL).unwrap();
    let mut command = command(&qemu, &out, &["--policy-updates", "--buffer=64MiB", "--record"]);
    command.arg(&record);
    let mut running = Running::start_listening(slow.command(&command)).unwrap();
    let mut told = lines(running.take_stdout().unwrap());
    let mut next = |event: &str| {
        told.find(|line| line["event"] == event).unwrap_or_else(|| panic!("no {event} was told"))
    };
    for (line, detail) in [
        ("{\"colour\": \"red\"}", "unknown field"),
        ("{\"min_cpu_ratio\": 2}", "at most 1"),
        ("{\"buffer_bytes\": 1000000}", "at least 67108864"),
    ] {
        running.tell(line).unwrap();
        let answer = next("policy");
        assert_eq!(answer["accepted"], false, "{answer:#}");
        assert!(answer["detail"].as_str().unwrap().contains(detail), "{answer:#}");
    }
    running.reach("copying").unwrap();
    running.tell("{\"deadline_seconds\": 2, \"on_infeasible\": \"abort\"}").unwrap();
    let answer = next("policy");
    assert_eq!(answer["accepted"], true, "{answer:#}");
    assert_eq!(answer["policy"]["deadline_seconds"], 2.0, "{answer:#}");
    let end = next("end");
    assert_eq!((&end["outcome"], &end["reason"]), (&"aborted".into(), &"deadline".into()));
    let ended = running.wait().unwrap();
    assert_eq!(ended.status.code(), Some(4), "{}", ended.log);
    assert!(!out.exists());
    qemu.wait_unprotected(BOOT).unwrap();
    qemu.wait_laps(1, BOOT).unwrap();

    let record = fs::read_to_string(&record).unwrap();
    assert!(record.lines().skip(1).any(|line| line.contains("\"policy\"")), "{record}");
    let decisions = livesnap_sim::record::replay(record.as_bytes()).unwrap();
    assert_eq!(end["control"]["decisions"], decisions, "{end:#}");
}
