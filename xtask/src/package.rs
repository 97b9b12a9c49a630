//! `cargo xtask deb`: the Debian package, and the proof that it installs and runs on a Debian which has nothing else.
//!
//! What is in it, and where, stands in controller/Cargo.toml. Here is made what the program itself writes: manual and
//! completions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::step::{cargo, output, program, run};
use crate::{apt, setup};

const CARGO_DEB_VERSION: &str = "3.8.0";
const PROGRAM: &str = "target/release/livesnap";
/// controller/Cargo.toml takes manual and completions from here.
const GENERATED: &str = "target/package";
const PACKAGES: &str = "target/debian";
/// The shells, and how each names a completion script of livesnap.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "livesnap"), ("zsh", "_livesnap"), ("fish", "livesnap.fish")];

/// What must work in a root with the package in it. `$1` is that root.
const CHECKS: [&str; 7] = [
    r#"chroot "$1" livesnap --version"#,
    // Whether this host is fit is not the package's matter: 0 and 1 both mean that it has looked.
    r#"chroot "$1" livesnap doctor || [ $? = 1 ]"#,
    r#"chroot "$1" dpkg --verify livesnap"#,
    // The unit starts what was installed; and the configuration is one that serves until it is told to end. systemd, which is
    // not there, would make the directory.
    r#"[ -x "$1$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1"/usr/lib/systemd/system/livesnap.service)" ]"#,
    r#"mkdir -p "$1"/var/lib/livesnap/snapshots && chroot "$1" timeout --preserve-status 10 livesnap serve --config /etc/livesnap/livesnap.toml"#,
    r#"gzip --test "$1"/usr/share/man/man1/livesnap-snapshot.1.gz"#,
    r#"chroot "$1" apt-get purge --yes --quiet livesnap && ! [ -e "$1"/usr/bin/livesnap ]"#,
];

/// Builds the package; with `--check` also installs it into a new root and tries it there.
pub fn build(arguments: &[String]) -> Result<()> {
    let is_checked = match arguments {
        [] => false,
        [word] if word == "--check" => true,
        _ => bail!("`cargo xtask deb` takes --check and nothing else"),
    };
    setup::run()?;
    install_cargo_deb()?;
    run("build", cargo(["build", "--locked", "--release", "--package", "livesnap"]))?;
    generate()?;
    if Path::new(PACKAGES).exists() {
        fs::remove_dir_all(PACKAGES).with_context(|| format!("cannot empty {PACKAGES}"))?;
    }
    run("package", cargo(["deb", "--locked", "--no-build", "--package", "livesnap"]))?;
    let package = only_package()?;
    if is_checked {
        check(&package)?;
    }
    eprintln!("the package is {}", package.display());
    Ok(())
}

fn install_cargo_deb() -> Result<()> {
    let version = output(cargo(["deb", "--version"]));
    if version.is_ok_and(|version| version.trim() == CARGO_DEB_VERSION) {
        return Ok(());
    }
    let install = ["install", "--locked", "cargo-deb", "--version", CARGO_DEB_VERSION];
    run("install cargo-deb", cargo(install))
}

/// Has the program write its manual and completions.
fn generate() -> Result<()> {
    let to = Path::new(GENERATED);
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("cannot empty {GENERATED}"))?;
    }
    let mut pages = program(PROGRAM, ["man-pages"]);
    pages.arg(to.join("man"));
    run("manual", pages)?;
    let completions = to.join("completions");
    fs::create_dir(&completions).context("cannot create the directory of completions")?;
    for (shell, name) in COMPLETIONS {
        let script = output(program(PROGRAM, ["completions", shell]))?;
        fs::write(completions.join(name), script)
            .with_context(|| format!("cannot write the completions for {shell}"))?;
    }
    Ok(())
}

fn only_package() -> Result<PathBuf> {
    let entries = fs::read_dir(PACKAGES).with_context(|| format!("cannot list {PACKAGES}"))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut packages =
        paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "deb"));
    let package = packages.next().with_context(|| format!("no package is in {PACKAGES}"))?;
    ensure!(packages.next().is_none(), "more than one package is in {PACKAGES}");
    fs::canonicalize(package).context("cannot tell where the package is")
}

/// Installs the package, with what it depends on, into the smallest Debian that can install packages, and tries it there.
fn check(package: &Path) -> Result<()> {
    if output(program("mmdebstrap", ["--version"])).is_err() {
        apt::update()?;
        apt::install(&["mmdebstrap"], None)?;
    }
    let codename = apt::codename()?;
    let sources = Path::new(GENERATED).join("root.sources");
    fs::write(&sources, apt::sources_of(&codename)?)
        .with_context(|| format!("cannot write {}", sources.display()))?;
    let install =
        "chroot \"$1\" apt-get install --yes --quiet --no-install-recommends /livesnap.deb";
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap.args(["--variant=apt", "--format=null"]);
    bootstrap.arg(format!("--customize-hook=upload '{}' /livesnap.deb", package.display()));
    for hook in [install].iter().chain(&CHECKS) {
        bootstrap.arg(format!("--customize-hook={hook}"));
    }
    bootstrap.args([&codename, "/dev/null"]).arg(&sources);
    run("the package in a new root", bootstrap)
}
