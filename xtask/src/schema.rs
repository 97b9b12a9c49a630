//! `cargo xtask dashboards --types`: the dashboards against Grafana's own types, by Grafana's package and TypeScript.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::npm::{self, files};
use crate::step::{program, run};

const DASHBOARDS: &str = "dashboards/grafana";
/// The types, put together from the package's, and the package's version.
const TYPES: &str = "dashboards/schema";
const WORK: &str = "target/livesnap-schema";

/// Makes a program of each dashboard, in which it is a value of the schema's type, and has the compiler check it.
pub fn check() -> Result<()> {
    npm::install(TYPES, WORK)?;
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

    let mut compile = program(
        "node_modules/.bin/tsc",
        ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"],
    );
    compile.args(["--module", "nodenext", "--moduleResolution", "nodenext"]);
    compile.args(programs).current_dir(WORK);
    run("types of the dashboards", compile)
}
