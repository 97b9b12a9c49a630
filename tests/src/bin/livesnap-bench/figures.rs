//! What was measured, and on what: to and from a file, and into a page of docs/.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What the tool writes into a page stands between these.
const BEGIN: &str = "<!-- begin: written by cargo xtask bench -->\n";
const END: &str = "<!-- end -->";

/// All figures, each case with its own, and where they come from.
#[derive(Debug)]
pub struct Figures<Case> {
    pub source: Source,
    pub cases: Vec<Case>,
}

/// Where figures come from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Source {
    command: String,
    date: String,
    host: String,
    qemu: String,
}

impl Source {
    /// This command, on this machine, now.
    fn here() -> Result<Self> {
        let words = ["cargo xtask bench".to_owned()].into_iter().chain(std::env::args().skip(1));
        Ok(Self {
            command: words.collect::<Vec<_>>().join(" "),
            date: said_by("date", &["--utc", "+%Y-%m-%d %H:%M UTC"])?,
            host: host()?,
            qemu: said_by("qemu-system-x86_64", &["--version"])?,
        })
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, date, host, qemu } = self;
        write!(formatter, "`{command}`, {date}; {host}; {qemu}, TCG")
    }
}

impl<Case: Serialize + DeserializeOwned> Figures<Case> {
    /// From `file`, or else by measuring: `measure` gives what belongs to one of `plan`. All that there is so far is
    /// written to `json` after each.
    ///
    /// # Errors
    /// If there is no such file or no such figures in it; those of `measure`.
    pub fn read_or_measure<Plan>(
        file: Option<&Path>,
        json: Option<&Path>,
        plan: impl IntoIterator<Item = Plan>,
        mut measure: impl FnMut(Plan) -> Result<Vec<Case>>,
    ) -> Result<Self> {
        if let Some(path) = file {
            return Self::read(path);
        }
        let mut figures = Self { source: Source::here()?, cases: Vec::new() };
        for plan in plan {
            figures.cases.extend(measure(plan)?);
            if let Some(path) = json {
                figures.write(path)?;
            }
        }
        Ok(figures)
    }

    fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_lines(&text).with_context(|| format!("{} holds no such figures", path.display()))
    }

    fn from_lines(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let source = serde_json::from_str(lines.next().context("it is empty")?)?;
        let cases = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Self { source, cases })
    }

    /// JSON: a line for the source, and one for each case.
    fn to_lines(&self) -> Result<String> {
        let mut text = serde_json::to_string(&self.source)? + "\n";
        for case in &self.cases {
            text += &(serde_json::to_string(case)? + "\n");
        }
        Ok(text)
    }

    fn write(&self, path: &Path) -> Result<()> {
        write(path, &self.to_lines().context("cannot make JSON")?)
    }

    /// Puts `tables` into the page, and all figures beside it.
    ///
    /// # Errors
    /// If the page cannot be read or written, or has no place for tables.
    pub fn put_into(&self, page: &Path, tables: &str) -> Result<()> {
        let text =
            fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        write(page, &replace_tables(&text, tables)?)?;
        self.write(&page.with_extension("jsonl"))
    }
}

/// `text` with what stands between the markers replaced.
fn replace_tables(text: &str, tables: &str) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).context("the page has no marker of a beginning")?;
    let (_, after) = rest.split_once(END).context("the page has no marker of an end")?;
    Ok(format!("{before}{BEGIN}{tables}{END}{after}"))
}

/// Writes a file.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// CPUs, memory and kernel of this machine.
fn host() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let memory = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .context("/proc/meminfo has no MemTotal")?;
    let kernel = said_by("uname", &["--kernel-release"])?;
    let model = model.map_or("unknown", |(_, model)| model);
    Ok(format!("{count} CPUs ({model}), {} GiB RAM, Linux {kernel}", kib.div_ceil(1 << 20)))
}

/// The first line that a command prints.
fn said_by(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().with_context(|| format!("{program} says nothing"))?.to_owned())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let page = |tables: &str| format!("before\n{BEGIN}{tables}{END}\nafter\n");
        assert_eq!(replace_tables(&page("old\n"), "new\n").unwrap(), page("new\n"));
        assert!(replace_tables("no markers", "new").is_err());
    }

    #[test]
    fn figures_are_read_as_they_were_written() {
        let figures = Figures { source: Source::here().unwrap(), cases: vec![1, 2] };
        let text = figures.to_lines().unwrap();
        let read = Figures::<u32>::from_lines(&text).unwrap();
        assert_eq!((read.to_lines().unwrap(), read.cases), (text, figures.cases));
        assert!(Figures::<u32>::from_lines("").is_err());
    }
}
