//! A Debian kernel as `cargo xtask` unpacks it: the image to boot, and modules to take along.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cpio::Cpio;

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What QEMU's `-kernel` takes.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The kernel whose package was unpacked into `directory`.
    pub fn unpacked(directory: &Path) -> Result<Self> {
        let image = find(&directory.join("boot"), &|name| name.starts_with("vmlinuz-"))
            .with_context(|| format!("there is no kernel in {}", directory.display()))?;
        Ok(Self { image, modules: directory.join("lib/modules") })
    }

    /// Adds modules to an archive, with what they depend on: `/modules/NN-NAME.ko`, in the order in which they can
    /// be loaded.
    pub fn add_modules(&self, wanted: &[&str], archive: &mut Cpio) -> Result<()> {
        let directory = find(&self.modules, &|_| true)
            .with_context(|| format!("there are no modules in {}", self.modules.display()))?;
        let mut paths = BTreeMap::new();
        index_modules(&directory, &mut paths)?;
        let list = directory.join("modules.builtin");
        let list =
            fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        let built_in: Vec<String> =
            list.lines().filter_map(|path| name_of(Path::new(path))).collect();
        let mut modules = Vec::new();
        for name in wanted.iter().filter(|&&name| !built_in.iter().any(|other| other == name)) {
            add_module(name, &paths, &mut modules)?;
        }
        archive.directory("modules");
        for (index, (name, module)) in modules.iter().enumerate() {
            archive.file(&format!("modules/{index:02}-{name}.ko"), 0o644, module);
        }
        Ok(())
    }
}

fn index_modules(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            index_modules(&path, paths)?;
        } else if let Some(name) = name_of(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

/// The name of the module in a file, if it is one. The file may be called virtio-rng, the module is always virtio_rng.
fn name_of(file: &Path) -> Option<String> {
    let (stem, end) = file.file_name()?.to_str()?.split_once('.')?;
    matches!(end, "ko" | "ko.xz").then(|| stem.replace('-', "_"))
}

fn add_module(
    name: &str,
    paths: &BTreeMap<String, PathBuf>,
    loaded: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if loaded.iter().any(|(other, _)| other == name) {
        return Ok(());
    }
    let path = paths.get(name).with_context(|| format!("the kernel has no module {name}"))?;
    let module = read_module(path)?;
    for dependency in dependencies(&module) {
        add_module(&dependency, paths, loaded)?;
    }
    loaded.push((name.to_owned(), module));
    Ok(())
}

/// What a module says in its `.modinfo` section, `depends=a,b`: a string between zero bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    module
        .split(|&byte| byte == 0)
        .find_map(|string| string.strip_prefix(b"depends="))
        .map(|list| {
            String::from_utf8_lossy(list)
                .split(',')
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect()
        })
        .unwrap_or_default()
}

fn find(directory: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    fs::read_dir(directory)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(wanted))
}

/// The module, unpacked: Debian compresses modules from 6.12 on.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension() != Some(OsStr::new("xz")) {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("cannot run xz")?;
    ensure!(output.status.success(), "cannot unpack {}", path.display());
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_told_by_their_files() {
        let name = |file: &str| name_of(Path::new(file));
        assert_eq!(name("kernel/drivers/virtio/virtio_pci.ko").as_deref(), Some("virtio_pci"));
        assert_eq!(name("/lib/kernel/arch/x86/kvm/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(name("modules.builtin"), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(
            dependencies(b"\x7fELF\0license=GPL\0depends=virtio,virtio_ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0depends=\0name=x\0").is_empty());
    }
}
