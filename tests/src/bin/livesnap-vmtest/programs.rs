//! Which tests run in the VM, and where cargo has put their programs.
//!
//! They are the programs of `cargo test --workspace`, so whoever has run that has built them.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A test program to be run in the VM.
#[derive(Clone, Copy)]
struct Wanted {
    /// `package/target`, as cargo calls them.
    name: &'static str,
    /// Further arguments.
    arguments: &'static [&'static str],
}

/// What depends on the kernel and can do without QEMU. Left out are one test that knows no kernel and takes as long as all
/// the others, and those that compare durations, which mean nothing under emulation. Those that attach probes run one by
/// one: attaching and detaching loses what other threads wait for just then (see docs/probes.md). So do those of the
/// product itself, which give CPU time away and take it back on cgroup v2, all in one group.
const WANTED: [Wanted; 9] = [
    Wanted { name: "snapshot-core/snapshot_core", arguments: &["--skip=any_flipped_bit_is_found"] },
    Wanted { name: "snapshot-core/own_memory", arguments: &[] },
    Wanted { name: "livesnap-ebpf/stalls", arguments: &["--skip=own_clock", "--test-threads=1"] },
    Wanted { name: "livesnap-ebpf/tiers", arguments: &[] },
    Wanted { name: "livesnap-ebpf/kinds", arguments: &["--test-threads=1"] },
    Wanted { name: "livesnap-ebpf/refusals", arguments: &["--test-threads=1"] },
    Wanted {
        name: "livesnap-ebpf/disks",
        arguments: &["--skip=latency_are_those", "--test-threads=1"],
    },
    Wanted { name: "livesnap/demo", arguments: &[] },
    Wanted {
        name: "livesnap/livesnap",
        arguments: &[
            "actuator",
            "cgroup",
            "--skip=commanded",
            "--skip=busy_host",
            "--test-threads=1",
        ],
    },
];

/// What those tests run in their turn, as cargo calls it.
const PRODUCT: &str = "livesnap/livesnap";

/// A test program.
pub struct Test {
    /// `package/target`.
    pub name: &'static str,
    /// Where it is.
    pub program: PathBuf,
    /// Further arguments.
    pub arguments: &'static [&'static str],
}

/// Everything that cargo has built for the VM.
pub struct Programs {
    /// In the order in which they are to run.
    pub tests: Vec<Test>,
    /// The program `livesnap`, where the tests look for it.
    pub product: PathBuf,
}

/// Builds and finds the programs.
pub fn build() -> Result<Programs> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["test", "--no-run", "--locked", "--workspace"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo to build the tests")?;
    ensure!(output.status.success(), "the tests do not build");
    let told = String::from_utf8(output.stdout).context("cargo told no text")?;
    find(&told)
}

fn find(told: &str) -> Result<Programs> {
    let artifacts = told
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("cargo told {line}")))
        .collect::<Result<Vec<Value>>>()?;
    let program = |name: &str, is_test: bool| {
        let is_wanted = |artifact: &&Value| {
            name_of(artifact).as_deref() == Some(name)
                && artifact["profile"]["test"] == is_test
                && artifact["executable"].is_string()
        };
        let path = artifacts.iter().find(is_wanted).and_then(|found| found["executable"].as_str());
        path.map(PathBuf::from).with_context(|| format!("cargo has built no {name}"))
    };
    let tests = WANTED.iter().map(|&Wanted { name, arguments }| {
        Ok(Test { name, program: program(name, true)?, arguments })
    });
    Ok(Programs { tests: tests.collect::<Result<_>>()?, product: program(PRODUCT, false)? })
}

/// `package/target` of an artifact. The package is the last part of the id's path, before the version:
/// `path+file:///src/livesnap/snapshot-core#0.1.0`, or `path+file:///src/livesnap/controller#livesnap@0.1.0`.
fn name_of(artifact: &Value) -> Option<String> {
    let (path, fragment) = artifact["package_id"].as_str()?.rsplit_once('#')?;
    let package = match fragment.split_once('@') {
        Some((name, _)) => name,
        None => path.rsplit_once('/')?.1,
    };
    Some(format!("{package}/{}", artifact["target"]["name"].as_str()?))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn artifact(package_id: &str, target: &str, is_test: bool, executable: &str) -> String {
        let artifact = serde_json::json!({
            "reason": "compiler-artifact",
            "package_id": package_id,
            "target": {"name": target},
            "profile": {"test": is_test},
            "executable": executable,
        });
        format!("{artifact}\n")
    }

    #[test]
    fn programs_are_found_by_package_and_target() {
        let core = "path+file:///src/snapshot-core#0.1.0";
        let controller = "path+file:///src/controller#livesnap@0.1.0";
        let mut told = artifact(core, "snapshot_core", true, "/t/snapshot_core-1")
            + &artifact(core, "own_memory", true, "/t/own_memory-1")
            + &artifact(controller, "livesnap", true, "/t/livesnap-1")
            + &artifact(controller, "livesnap", false, "/t/livesnap");
        for probes in ["stalls", "tiers", "kinds", "refusals", "disks"] {
            told += &artifact("path+file:///src/ebpf#livesnap-ebpf@0.1.0", probes, true, "/t/ebpf");
        }
        assert!(format!("{:#}", find(&told).err().unwrap()).contains("livesnap/demo"));
        told += &artifact(controller, "demo", true, "/t/demo-1");
        let programs = find(&told).unwrap();
        assert_eq!(programs.product, PathBuf::from("/t/livesnap"));
        assert_eq!(programs.tests[1].program, PathBuf::from("/t/own_memory-1"));
        assert_eq!(programs.tests.len(), WANTED.len());
    }
}
