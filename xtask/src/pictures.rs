//! `cargo xtask dashboards --pictures`: the pictures in `docs/dashboards`, of the dashboards' files and of what a real
//! Prometheus answers, drawn by Grafana's component library.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::step::{cargo, program, run};
use crate::{npm, setup};

/// The program that draws.
const PROGRAM: &str = "dashboards/pictures";
const WORK: &str = "target/livesnap-pictures";
/// What Prometheus answered, in a file for each dashboard.
const ANSWERS: &str = "target/livesnap-pictures/answers";
const DASHBOARDS: &str = "dashboards/grafana";
const PICTURES: &str = "docs/dashboards";

/// Runs the test of the dashboards, which keeps the answers, and draws.
pub fn draw() -> Result<()> {
    setup::run()?;
    npm::install(PROGRAM, WORK)?;
    let mut bundle = program(
        "node_modules/.bin/esbuild",
        ["draw.jsx", "--bundle", "--outfile=draw.js", "--log-level=warning"],
    );
    // Fonts of an editor that is in the library, and on no dashboard.
    bundle.args(["--loader:.ttf=empty", "--define:process.env.NODE_ENV=\"production\""]);
    bundle.current_dir(WORK);
    run("bundle what draws", bundle)?;

    fs::create_dir_all(ANSWERS).with_context(|| format!("cannot make {ANSWERS}"))?;
    run("build", cargo(["build", "--package", "livesnap"]))?;
    let mut test = cargo(["test", "--package", "livesnap-tests", "--test", "dashboards"]);
    let root = env::current_dir().context("cannot tell the current directory")?;
    test.env("LIVESNAP_ANSWERS", root.join(ANSWERS));
    run("answers of a Prometheus", test)?;

    let page = Path::new(WORK).join("index.html");
    let mut draw =
        cargo(["run", "--package", "livesnap-tests", "--bin", "livesnap-pictures", "--"]);
    draw.arg(page).args([DASHBOARDS, ANSWERS, PICTURES]);
    run("draw", draw)
}
