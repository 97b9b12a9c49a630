//! Writes the files that this crate describes: `cargo xtask dashboards`. Run in the workspace's root.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    if let Err(problems) = livesnap_dashboards::check() {
        bail!("nothing was written:\n{}", problems.join("\n"));
    }
    for (path, text) in livesnap_dashboards::files() {
        let path = Path::new(&path);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
