//! The tools that the BPF programs are built with: a compiler with a core library for BPF, and a linker that reads
//! what this compiler writes.
//!
//! Debian's `rustc-web` is the compiler: rustup's stable one has no core for BPF. bpf-linker must be built with
//! the LLVM of just that compiler, which is Debian's as well. Where there is no such compiler livesnap is built without
//! probes, and says so; where there is one, everything else must work.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt;
use crate::step::{cargo, output, program, run};

/// Where the package puts it. The rustup of whoever runs this comes first in `PATH`, so by its whole name.
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
const PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
const LINKER: &str = "bpf-linker";
const LINKER_VERSION: &str = "0.13.0";
/// LLVM versions that this bpf-linker can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// What an installed linker was built with; a new LLVM needs a new one.
const LINKER_NOTE: &str = "target/bpf/linker-llvm";

/// Installs what is missing.
pub fn install() -> Result<()> {
    if !has_core() && !install_compiler()? {
        return Ok(());
    }
    let version = output(program(RUSTC, ["-vV"]))?;
    let llvm = llvm_major(&version)
        .with_context(|| format!("{RUSTC} does not tell its LLVM version: {version}"))?;
    if !LINKER_LLVM.contains(&llvm) {
        eprintln!(
            "warning: {RUSTC} writes the bitcode of LLVM {llvm}, and {LINKER} {LINKER_VERSION} reads that of {} to {}: \
             livesnap is built without probes",
            LINKER_LLVM.start(),
            LINKER_LLVM.end()
        );
        return Ok(());
    }
    let built_with = fs::read_to_string(LINKER_NOTE).ok().and_then(|text| text.trim().parse().ok());
    let is_there = output(program(LINKER, ["--version"]))
        .is_ok_and(|text| text.trim() == format!("{LINKER} {LINKER_VERSION}"));
    // One that somebody else has put there is trusted; the build of the programs shows whether it fits.
    if is_there && built_with.is_none_or(|major: u32| major == llvm) {
        return Ok(());
    }
    install_linker(llvm)
}

fn has_core() -> bool {
    output(program(RUSTC, ["--print", "target-libdir", "--target", TARGET]))
        .is_ok_and(|directory| Path::new(directory.trim()).is_dir())
}

/// False if there is none to be had.
fn install_compiler() -> Result<bool> {
    if !apt::is_known(PACKAGES[0]) {
        apt::update()?;
    }
    if let Some(package) = PACKAGES.into_iter().find(|package| !apt::is_known(package)) {
        eprintln!(
            "warning: apt knows no {package}, the compiler of the BPF programs: livesnap is built without probes"
        );
        return Ok(false);
    }
    eprintln!(
        "will install {}: the compiler of the BPF programs, and its core library",
        PACKAGES.join(", ")
    );
    if let Err(error) = apt::install(&PACKAGES, None) {
        eprintln!("warning: {error:#}: livesnap is built without probes");
        return Ok(false);
    }
    ensure!(has_core(), "{} is installed, and {RUSTC} has no core for {TARGET}", PACKAGES[1]);
    Ok(true)
}

fn install_linker(llvm: u32) -> Result<()> {
    let library = find_llvm(llvm)?;
    // The build asks for a prefix with the library's plain name, which only the development package has.
    let prefix = std::env::current_dir()?.join("target/bpf/llvm");
    let directory = prefix.join("lib");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let link = directory.join("libLLVM.so");
    if link.is_symlink() {
        fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    }
    symlink(&library, &link).with_context(|| format!("cannot create {}", link.display()))?;

    let feature = format!("llvm-{llvm}");
    let arguments = ["install", LINKER, "--version", LINKER_VERSION, "--locked", "--force"];
    let mut install = cargo(arguments);
    install.args(["--no-default-features", "--features", &feature]).env("LLVM_PREFIX", &prefix);
    run(&format!("install {LINKER} for LLVM {llvm}"), install)?;
    fs::write(LINKER_NOTE, format!("{llvm}\n"))
        .with_context(|| format!("cannot write {LINKER_NOTE}"))
}

/// The library that the compiler itself uses.
fn find_llvm(major: u32) -> Result<PathBuf> {
    let listing = output(program("ldconfig", ["-p"])).or_else(|_| {
        // Not in everybody's PATH.
        output(program("/sbin/ldconfig", ["-p"]))
    })?;
    llvm_library(&listing, major)
        .with_context(|| format!("the libraries of this machine have no LLVM {major}"))
}

/// The major number of LLVM in what `rustc -vV` prints.
fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

/// LLVM's library of one major version in what `ldconfig -p` prints.
fn llvm_library(listing: &str, major: u32) -> Option<PathBuf> {
    let prefix = format!("libLLVM.so.{major}.");
    let line = listing.lines().find(|line| line.trim_start().starts_with(&prefix))?;
    Some(PathBuf::from(line.split_once(" => ")?.1.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_tells_its_llvm() {
        assert_eq!(llvm_major("rustc 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }

    #[test]
    fn the_library_of_that_version_is_taken() {
        let listing = "\tlibLLVM.so.21.1 (libc6,x86-64) => /lib/libLLVM.so.21.1\n\
                       \tlibLLVM.so.22.1 (libc6,x86-64) => /lib/libLLVM.so.22.1\n";
        assert_eq!(llvm_library(listing, 22), Some("/lib/libLLVM.so.22.1".into()));
        assert_eq!(llvm_library(listing, 23), None);
    }
}
