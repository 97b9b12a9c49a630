//! Set-up, tests, demo and benchmarks: `cargo xtask help`.
//!
//! Run by people and by CI. It depends on nothing of the workspace, so that it can install what the
//! workspace needs to be built.

#![forbid(unsafe_code)]

mod apt;
mod bpf;
mod check;
mod kernel;
mod npm;
mod package;
mod pictures;
mod schema;
mod schemathesis;
mod setup;
mod step;
mod unpack;
mod vmtest;

use std::env;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::step::cargo;

const HELP: &str = "\
Usage: cargo xtask COMMAND [ARGUMENTS]

  setup   install what is missing: libclang, kernel headers, QEMU >= 9,
          a guest kernel, the compiler of the BPF programs; says what beforehand
  demo    snapshot a VM under load, restore it, and verify the copy; seconds
  test    setup, then everything that CI checks: format, lints, docs, build, tests (on other
          kernels too), licences
  deb     the Debian package, in target/debian; --check installs it into a new root and
          runs it there
  vmtest  the tests that depend on the kernel, in VMs with Linux 6.1 and 6.12;
          --kernel VERSION for one of them, NAME for some of the tests
  bench   measure downtime, stalls and total time against QEMU's own snapshots;
          --quick for a first look, --update-docs for docs/performance.*;
          --probes alone: what the probes cost a fault, and a request, and watch a guest;
          --control: what the controller makes of slow destinations;
          --api [ROUNDS]: what clients of the daemon cost a guest that is being snapshotted
  soak    take and check snapshot after snapshot of one busy VM; --runs N
  sim     judge the control core on simulated guests and disks; --seeds N, --seed K
  dashboards  write dashboards/ and docs/runbooks from the crate livesnap-dashboards;
          --types: hold the dashboards against Grafana's types;
          --pictures: draw them for docs/dashboards; for both npm must be there
  help    this text

Every command but sim, dashboards and help begins with setup, which does nothing on a machine that has all.
ARGUMENTS of demo, bench and soak are passed on; `cargo xtask demo --help` lists them.
Tests that need root are skipped, with a word, unless REQUIRE_PRIVILEGED=1 (CI=true sets it).
";

fn main() -> Result<()> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent directory")?;
    env::set_current_dir(root).with_context(|| format!("cannot change to {}", root.display()))?;

    let mut arguments = env::args().skip(1);
    let command = arguments.next().unwrap_or_else(|| "help".to_owned());
    let rest: Vec<String> = arguments.collect();
    match command.as_str() {
        "setup" => setup::run(),
        "test" => check::run_all(),
        "deb" => package::build(&rest),
        "vmtest" => vmtest::run_on_kernels(&rest),
        "bench" if rest == ["--probes"] => bench_probes(),
        "bench" if rest.first().is_some_and(|word| word == "--api") => bench_api(&rest[1..]),
        "demo" | "bench" | "soak" => run_tool(&format!("livesnap-{command}"), &rest),
        "sim" => simulate(&rest),
        "dashboards" if rest == ["--types"] => schema::check(),
        "dashboards" if rest == ["--pictures"] => pictures::draw(),
        "dashboards" => step::run("dashboards", cargo(["run", "--package", "livesnap-dashboards"])),
        "help" | "--help" | "-h" => {
            eprint!("{HELP}");
            Ok(())
        }
        _ => bail!("there is no command {command:?}; see `cargo xtask help`"),
    }
}

/// Measures what the probes cost a fault, and a request to a disk, and `watch` a guest.
fn bench_probes() -> Result<()> {
    setup::run()?;
    step::run("build", cargo(["build", "--release", "--package", "livesnap"]))?;
    let watch = ["run", "--release", "--package", "livesnap-tests", "--example", "watch_cost"];
    step::run("watch_cost", cargo(watch))?;
    ["probe_cost", "disk_cost"].into_iter().try_for_each(|name| {
        let example = ["run", "--release", "--package", "livesnap-ebpf", "--example", name];
        step::run(name, cargo(example))
    })
}

/// Measures what clients of the daemon cost a guest that is being snapshotted.
fn bench_api(arguments: &[String]) -> Result<()> {
    setup::run()?;
    setup::wrk()?;
    step::run("build", cargo(["build", "--release", "--package", "livesnap"]))?;
    let example = ["run", "--release", "--package", "livesnap-tests", "--example", "api_cost"];
    let mut measure = cargo(example);
    measure.arg("--").args(arguments);
    step::run("api_cost", measure)
}

/// Builds the product and a program of the tests package, and runs the latter.
fn run_tool(name: &str, arguments: &[String]) -> Result<()> {
    setup::run()?;
    step::run("build", cargo(["build", "--release", "--package", "livesnap"]))?;
    let mut tool = cargo(["run", "--release", "--package", "livesnap-tests", "--bin", name, "--"]);
    tool.args(arguments);
    step::run(name, tool)
}

/// The simulator needs nothing but the compiler.
fn simulate(arguments: &[String]) -> Result<()> {
    let mut tool = cargo(["run", "--release", "--package", "livesnap-sim", "--"]);
    tool.args(arguments);
    step::run("sim", tool)
}
