//! `cargo xtask dashboards --types`: the dashboards against Grafana's own types, by Grafana's package and TypeScript.
//!
//! Not a part of `cargo xtask test`: it needs npm, and packages from its registry.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::step::{program, run};

const DASHBOARDS: &str = "dashboards/grafana";
/// The types, put together from the package's, and the package's version.
const TYPES: &str = "dashboards/schema";
const WORK: &str = "target/livesnap-schema";

/// Makes a program of each dashboard, in which it is a value of the schema's type, and has the compiler check it.
pub fn check() -> Result<()> {
    fs::create_dir_all(WORK).with_context(|| format!("cannot make {WORK}"))?;
    for path in files(TYPES)? {
        let to = Path::new(WORK).join(path.file_name().context("no name")?);
        fs::copy(&path, to).with_context(|| format!("cannot copy {}", path.display()))?;
    }
    let mut programs = Vec::new();
    for path in files(DASHBOARDS)? {
        let json =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.with_extension("ts");
        let name = name.file_name().context("no name")?.to_owned();
        let text = format!(
            "import type {{ Classic }} from \"./classic.js\";\nexport const board: Classic = {json}"
        );
        fs::write(Path::new(WORK).join(&name), text)
            .with_context(|| format!("cannot write {}", Path::new(&name).display()))?;
        programs.push(name);
    }
    ensure!(!programs.is_empty(), "{DASHBOARDS} has no dashboards");

    let mut install = program(
        "npm",
        ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"],
    );
    install.current_dir(WORK);
    run("install Grafana's types", install)?;
    let mut compile = program(
        "node_modules/.bin/tsc",
        ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"],
    );
    compile.args(["--module", "nodenext", "--moduleResolution", "nodenext"]);
    compile.args(programs).current_dir(WORK);
    run("types of the dashboards", compile)
}

/// The files in a directory.
fn files(directory: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {directory}"))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()).collect())
}
