//! Debian's package manager: which source to take backports from, and installing.
//!
//! No host is named here: the machine's own source of its Debian release is copied.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::step::{output, program, run};

const SOURCES: &str = "/etc/apt";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/livesnap-backports.sources";

/// Where the machine gets its packages from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uris: String,
    signed_by: Option<String>,
}

/// Installs packages, from `suite` where one is given. Fails rather than remove others for them.
pub fn install(packages: &[&str], suite: Option<&str>) -> Result<()> {
    let mut command = as_root("apt-get")?;
    command.args(["install", "--yes", "--quiet", "--no-install-recommends", "--no-remove"]);
    if let Some(suite) = suite {
        command.args(["--target-release", suite]);
    }
    command.args(packages).env("DEBIAN_FRONTEND", "noninteractive");
    run(&format!("apt-get install {}", packages.join(" ")), command)
}

/// Fetches the package lists.
pub fn update() -> Result<()> {
    let mut command = as_root("apt-get")?;
    command.args(["update", "--quiet"]);
    run("apt-get update", command)
}

/// Whether apt knows a package.
pub fn is_known(package: &str) -> bool {
    output(program("apt-cache", ["show", "--no-all-versions", package]))
        .is_ok_and(|text| !text.is_empty())
}

/// Name of this Debian release, such as "bookworm".
pub fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME: is this Debian?")
}

/// Adds the backports of `codename` unless the machine has them.
pub fn add_backports(codename: &str) -> Result<()> {
    let suite = format!("{codename}-backports");
    let files = source_files(Path::new(SOURCES))?;
    if files.iter().any(|(name, text)| find_source(name, text, &suite).is_some()) {
        return Ok(());
    }
    let source = source_of(&files, codename)?;
    eprintln!("adding {suite} to apt in {BACKPORTS_FILE}, from {}", source.uris);
    write_as_root(BACKPORTS_FILE, &stanza(&source, &suite))
}

/// Where this machine gets the release `codename` from, as the text of a file of sources.
pub fn sources_of(codename: &str) -> Result<String> {
    let files = source_files(Path::new(SOURCES))?;
    Ok(stanza(&source_of(&files, codename)?, codename))
}

fn source_of(files: &[(String, String)], codename: &str) -> Result<Source> {
    files.iter().find_map(|(name, text)| find_source(name, text, codename)).with_context(|| {
        format!("no file below {SOURCES} is a source of {codename}: add one by hand")
    })
}

fn stanza(source: &Source, suite: &str) -> String {
    let mut stanza =
        format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n", source.uris);
    if let Some(key) = &source.signed_by {
        stanza.push_str(&format!("Signed-By: {key}\n"));
    }
    stanza
}

fn source_files(directory: &Path) -> Result<Vec<(String, String)>> {
    let mut paths = vec![directory.join("sources.list")];
    if let Ok(entries) = fs::read_dir(directory.join("sources.list.d")) {
        for entry in entries {
            paths.push(entry.context("cannot list the apt sources")?.path());
        }
    }
    paths.sort();
    let readable = paths.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        (name.ends_with(".list") || name.ends_with(".sources"))
            .then_some((name, fs::read_to_string(path).ok()?))
    });
    Ok(readable.collect())
}

/// The source of `suite` in a file of either form (sources.list(5)).
fn find_source(name: &str, text: &str, suite: &str) -> Option<Source> {
    if name.ends_with(".sources") {
        text.split("\n\n").find_map(|stanza| from_stanza(stanza, suite))
    } else {
        text.lines().find_map(|line| from_line(line, suite))
    }
}

/// The deb822 form. A key that is written out over several lines is kept as it is.
fn from_stanza(stanza: &str, suite: &str) -> Option<Source> {
    let field = |key: &str| {
        let mut lines = stanza.lines().filter(|line| !line.starts_with('#')).skip_while(|line| {
            !line.split_once(':').is_some_and(|(name, _)| name.eq_ignore_ascii_case(key))
        });
        let mut value = lines.next()?.split_once(':')?.1.trim().to_owned();
        for continued in lines.take_while(|line| line.starts_with([' ', '\t'])) {
            value.push('\n');
            value.push_str(continued);
        }
        Some(value)
    };
    let is_disabled = field("Enabled")
        .is_some_and(|value| matches!(value.as_str(), "no" | "false" | "off" | "0"));
    let lists = |key: &str, wanted: &str| {
        field(key).is_some_and(|value| value.split_whitespace().any(|word| word == wanted))
    };
    (!is_disabled && lists("Types", "deb") && lists("Suites", suite) && lists("Components", "main"))
        .then(|| Some(Source { uris: field("URIs")?, signed_by: field("Signed-By") }))?
}

/// The one-line form: `deb [options] uri suite components`.
fn from_line(line: &str, suite: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, line_suite) = (words.next()?, words.next()?);
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    (line_suite == suite && words.any(|component| component == "main"))
        .then(|| Source { uris: uri.to_owned(), signed_by: signed_by.map(str::to_owned) })
}

/// A command that will run as root: as it is if we are, by sudo else.
fn as_root(name: &str) -> Result<Command> {
    if output(program("id", ["-u"]))?.trim() == "0" {
        return Ok(Command::new(name));
    }
    ensure!(
        output(program("sudo", ["--version"])).is_ok(),
        "installing needs root, and there is no sudo: run `cargo xtask setup` as root"
    );
    Ok(program("sudo", [name]))
}

fn write_as_root(path: &str, content: &str) -> Result<()> {
    use std::io::Write as _;
    use std::process::Stdio;

    let mut tee = as_root("tee")?;
    let mut child = tee
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run tee")?;
    child
        .stdin
        .take()
        .context("tee has no input")?
        .write_all(content.as_bytes())
        .with_context(|| format!("cannot write {path}"))?;
    if !child.wait().context("cannot wait for tee")?.success() {
        bail!("cannot write {path}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    const DEB822: &str = "\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/key.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
";

    #[test]
    fn the_release_itself_is_found_not_its_security_suite() {
        let source = find_source("debian.sources", DEB822, "bookworm").unwrap();
        assert_eq!(source.uris, "http://mirror.example/debian");
        assert_eq!(find_source("debian.sources", DEB822, "bookworm-backports"), None);
        assert_eq!(
            stanza(&source, "bookworm-backports"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/key.gpg\n"
        );
    }

    #[test]
    fn a_disabled_stanza_does_not_count() {
        let text = DEB822.replace("Components: main", "Components: main\nEnabled: no");
        assert_eq!(find_source("debian.sources", &text, "bookworm"), None);
    }

    #[test]
    fn a_key_in_the_file_is_kept_whole() {
        let text = "Types: deb\nURIs: http://m/d\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let source = find_source("x.sources", text, "bookworm").unwrap();
        assert_eq!(source.signed_by.as_deref(), Some("\n -----BEGIN\n .\n abc"));
    }

    #[test]
    fn one_line_sources_are_read() {
        let text = "# deb http://no bookworm main\ndeb-src http://no bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://yes bookworm main contrib\n";
        let source = find_source("sources.list", text, "bookworm").unwrap();
        assert_eq!(source, Source { uris: "http://yes".into(), signed_by: Some("/k.gpg".into()) });
        let plain =
            find_source("sources.list", "deb http://yes bookworm main", "bookworm").unwrap();
        assert_eq!(plain.signed_by, None);
    }
}
