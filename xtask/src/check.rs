//! `cargo xtask test`: everything that must hold before a change is merged; CI runs this and nothing else.

use std::env;

use anyhow::Result;

use crate::step::{cargo, run};
use crate::{setup, vmtest};

/// Stops at the first step that fails.
pub fn run_all() -> Result<()> {
    setup::run()?;
    run("format", cargo(["fmt", "--all", "--check"]))?;
    // Not of the workspace, for another compiler builds them.
    let programs = ["fmt", "--manifest-path", "ebpf/programs/Cargo.toml", "--check"];
    run("format of the BPF programs", cargo(programs))?;
    run(
        "lints",
        cargo(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    )?;

    let mut docs = cargo(["doc", "--locked", "--workspace", "--no-deps"]);
    docs.env("RUSTDOCFLAGS", "-D warnings");
    run("docs", docs)?;

    run("build", cargo(["build", "--locked", "--workspace"]))?;
    let mut tests = cargo(["test", "--locked", "--workspace"]);
    // Where nobody watches, a test that skips for want of root would be a test that never runs.
    if env::var("CI").is_ok_and(|value| value == "true") {
        tests.env("REQUIRE_PRIVILEGED", "1");
    }
    run("tests", tests)?;
    vmtest::run_on_kernels(&[])?;

    setup::cargo_deny()?;
    // Not the advisories: they come from the network, and change without a change of ours.
    run("licences", cargo(["deny", "--offline", "check", "bans", "licenses", "sources"]))
}
