//! Builds the BPF programs (`programs/`) and hands their objects to the library.
//!
//! They need a compiler with a core library for BPF, which rustup's stable one has not; Debian's `rustc-web`
//! has. Where the tools are missing the build goes on with empty objects, and the library reports the probes as
//! absent. Where they are there, a failed build of the programs is a failed build.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's compiler: of the same language as ours, and with a core for BPF.
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
/// These use unstable features, of this target alone: assembly. Nothing else may.
const BOOTSTRAP: &str = "aya_ebpf,livesnap_ebpf_programs";
/// Line information for the verifier's messages, and BTF, without which maps have no types.
const RUSTFLAGS: &str = "-C debuginfo=2 -C link-arg=--btf";
const OBJECTS: [&str; 4] = ["disk_raw_tp", "disk_tracepoint", "stall", "stall_tp_btf"];

fn main() -> Result<(), Box<dyn Error>> {
    for path in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "common/src", RUSTC]
    {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    match missing() {
        Some(missing) => {
            println!(
                "cargo::warning=livesnap is built without BPF programs, for {missing}: run `cargo xtask setup`"
            );
            // Is never there, which has cargo ask again at each build, so that tools that came meanwhile are found.
            println!("cargo::rerun-if-changed=missing-tools");
            for object in OBJECTS {
                fs::write(object_path(&out, object), [])?;
            }
        }
        None => build(&out)?,
    }
    Ok(())
}

fn object_path(out: &Path, object: &str) -> PathBuf {
    out.join(object).with_extension("o")
}

/// What the programs cannot be built without.
fn missing() -> Option<String> {
    let linker = find_linker();
    if let Some(path) = &linker {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let core = Command::new(RUSTC).args(["--print", "target-libdir", "--target", TARGET]).output();
    let has_core = core.is_ok_and(|output| {
        let directory = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success() && Path::new(&directory).is_dir()
    });
    if !has_core {
        return Some(format!("{RUSTC} is missing or has no core library for {TARGET}"));
    }
    linker.is_none().then(|| "bpf-linker is missing".to_owned())
}

fn find_linker() -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    cargo_home
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn build(out: &Path) -> Result<(), Box<dyn Error>> {
    // target/PROFILE/build/PACKAGE/out: one directory for all profiles, which differ in nothing for BPF.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not within a target directory")?;
    let target = target.join("bpf");
    let mut cargo = Command::new(env::var_os("CARGO").ok_or("CARGO is not set")?);
    // What cargo and rustup set for this build would bend that one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && text != "CARGO_HOME" || text.starts_with("RUST") {
            cargo.env_remove(&name);
        }
    }
    if let Some(directory) = find_linker().as_deref().and_then(Path::parent) {
        let path = env::var_os("PATH").unwrap_or_default();
        let directories = [directory.to_owned()].into_iter().chain(env::split_paths(&path));
        cargo.env("PATH", env::join_paths(directories)?);
    }
    cargo
        .args(["build", "--release", "--locked", "--target", TARGET])
        .current_dir("programs")
        .env("RUSTC", RUSTC)
        .env("RUSTC_BOOTSTRAP", BOOTSTRAP)
        .env("RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_TARGET_DIR", &target);
    let status = cargo.status()?;
    if !status.success() {
        return Err(
            format!("building the BPF programs failed: {cargo:?} ended with {status}").into()
        );
    }
    for object in OBJECTS {
        fs::copy(target.join(TARGET).join("release").join(object), object_path(out, object))?;
    }
    Ok(())
}
