//! `cargo xtask vmtest`: runs tests in VMs with other kernels than this machine's.
//!
//! ```text
//! programs   builds the tests, and finds the programs in what cargo tells
//! image      puts them with their libraries into an initramfs
//! machine    boots it, passes the console on, and judges it
//! ```
//!
//! Run by people, and by CI. QEMU emulates the VM, so this tells of correctness and never of speed.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "standard output is what this program is for")]

mod image;
mod machine;
mod programs;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use livesnap_tests::initramfs::guest_directory;
use livesnap_tests::interrupt;
use livesnap_tests::kernel::Kernel;

/// Run the tests that depend on the kernel in VMs with other kernels
#[derive(Parser)]
#[command(name = "livesnap-vmtest", version)]
struct Args {
    /// A kernel, such as 6.12; `cargo xtask vmtest` has unpacked it
    #[arg(long = "kernel", value_name = "VERSION", required = true)]
    kernels: Vec<String>,
    /// Time limit for each kernel, in seconds
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Only tests with one of these in their names
    filters: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("livesnap-vmtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    interrupt::watch()?;
    let programs = programs::build()?;
    let mut failures = Vec::new();
    for version in &args.kernels {
        let directory = guest_directory()?.join("kernels").join(version);
        let kernel = Kernel::unpacked(&directory)
            .with_context(|| format!("run `cargo xtask vmtest --kernel {version}`"))?;
        let began = Instant::now();
        let initramfs = image::build(&kernel, &programs, &args.filters)?;
        let console = machine::run(&kernel.image, &initramfs, Duration::from_secs(args.timeout))?;
        let names: Vec<&str> = programs.tests.iter().map(|test| test.name).collect();
        let verdict = machine::judge(&console, &names, args.filters.is_empty());
        let seconds = began.elapsed().as_secs_f64();
        match verdict {
            Ok(passed) => println!("Linux {version}: {passed} tests passed in {seconds:.1} s"),
            Err(error) => {
                println!("Linux {version}: FAILED in {seconds:.1} s: {error:#}");
                failures.push(version.as_str());
            }
        }
    }
    ensure!(failures.is_empty(), "tests failed on Linux {}", failures.join(", "));
    Ok(())
}
