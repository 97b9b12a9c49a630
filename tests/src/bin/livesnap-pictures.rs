//! Has a browser draw dashboards of Grafana, and keeps the pictures: the last step of `cargo xtask dashboards --pictures`.
//!
//! What draws is `dashboards/pictures`, bundled; what it draws are the dashboards' files, with the answers that the test of
//! the dashboards got from Prometheus.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use livesnap_tests::browser::Browser;

/// As wide as the page makes it.
const WIDTH: u32 = 1600;
/// A page that is not drawn after so long never will be.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Arguments {
    /// The page that draws.
    page: PathBuf,
    /// The dashboards' files.
    dashboards: PathBuf,
    /// The answers, in files of the same names.
    answers: PathBuf,
    /// Where the pictures shall lie.
    pictures: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { page, dashboards, answers, pictures } = Arguments::parse();
    let page = page.canonicalize().with_context(|| format!("there is no {}", page.display()))?;
    let entries =
        fs::read_dir(&answers).with_context(|| format!("cannot list {}", answers.display()))?;
    for entry in entries {
        let answers = entry.context("cannot list the answers")?.path();
        let name = answers.file_name().context("an answer has no name")?;
        let stem = answers.file_stem().and_then(|stem| stem.to_str()).context("no name")?;
        let picture = stem.strip_prefix("livesnap-").unwrap_or(stem);
        let picture = pictures.join(picture).with_extension("png");
        let png = draw(&page, &read(&dashboards.join(name))?, &read(&answers)?)?;
        fs::write(&picture, png).with_context(|| format!("cannot write {}", picture.display()))?;
    }
    Ok(())
}

/// A picture of a dashboard, as PNG.
fn draw(page: &Path, dashboard: &str, answers: &str) -> Result<Vec<u8>> {
    let mut browser = Browser::start(WIDTH, WIDTH)?;
    browser.open(&format!("file://{}", page.display()))?;
    let height = browser.value(&format!("heightOf({dashboard})"))?;
    let height = height.as_u64().and_then(|height| height.try_into().ok());
    browser.resize(WIDTH, height.context("the page does not tell its height")?)?;
    browser.value(&format!("draw({dashboard}, {answers})"))?;
    browser.wait("window.isDrawn === true", LIMIT)?;
    let png = browser.screenshot()?;
    ensure!(browser.complaints().is_empty(), "the page complains: {:?}", browser.complaints());
    Ok(png)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
