//! The test guest's initramfs: our static `/init`, the kernel modules it loads, and `/dev/console`.
//!
//! `cargo xtask setup` unpacks the kernel below `target/livesnap-guest/kernel`; the rest is made here, on
//! first use in a process, so that the guest under test is always the one in the source tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

/// Drivers that a test may want; what they depend on comes along.
const MODULES: [&str; 5] =
    ["virtio_pci", "virtio_blk", "virtio_balloon", "virtio_mem", "virtio_net"];

/// A kernel and an initramfs to boot.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel, as QEMU's `-kernel` takes it.
    pub kernel: PathBuf,
    /// The initramfs, as QEMU's `-initrd` takes it.
    pub initramfs: PathBuf,
}

impl GuestImage {
    /// The guest of this source tree; built once a process.
    pub fn get() -> Result<Self> {
        static IMAGE: Mutex<Option<GuestImage>> = Mutex::new(None);
        // Tests of one process run in parallel: one builds, the others wait for it. What is left behind by
        // one that panicked is none, so it is good to go on with.
        let mut image = IMAGE.lock().unwrap_or_else(PoisonError::into_inner);
        if image.is_none() {
            *image = Some(Self::build()?);
        }
        image.clone().context("the guest image has just been built")
    }

    fn build() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the tests package has no parent")?;
        let target = root.join("target/livesnap-guest");
        let unpacked = target.join("kernel");
        let kernel = find(&unpacked.join("boot"), &|name| name.starts_with("vmlinuz-"))
            .context("there is no guest kernel: run `cargo xtask setup`")?;

        let mut archive = Cpio::default();
        for directory in ["dev", "proc", "sys", "modules"] {
            archive.directory(directory);
        }
        archive.character_device("dev/console", 5, 1);
        let init = build_init(root, &target.join("build"))?;
        archive.file("init", 0o755, &read(&init)?);
        for (index, (name, module)) in modules(&unpacked.join("lib/modules"))?.iter().enumerate() {
            archive.file(&format!("modules/{index:02}-{name}.ko"), 0o644, module);
        }

        // Several test processes may do this at once: each its own file, the last rename stands.
        let initramfs = target.join("initramfs.cpio");
        let partial = target.join(format!("initramfs.{}.partial", std::process::id()));
        fs::write(&partial, archive.finish())
            .with_context(|| format!("cannot write {}", partial.display()))?;
        fs::rename(&partial, &initramfs)
            .with_context(|| format!("cannot rename {}", partial.display()))?;
        Ok(Self { kernel, initramfs })
    }
}

/// Builds the guest program, static and into its own target directory: the outer cargo holds the usual one.
fn build_init(root: &Path, target: &Path) -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root)
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "livesnap-guest",
            "--target",
            TRIPLE,
            "--target-dir",
        ])
        .arg(target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C panic=abort")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .context("cannot run cargo to build the guest")?;
    ensure!(
        output.status.success(),
        "the guest does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(target.join(TRIPLE).join("release/livesnap-guest"))
}

/// The wanted modules and what they depend on, each after what it needs.
fn modules(directory: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut paths = BTreeMap::new();
    index_modules(directory, &mut paths)?;
    let mut loaded: Vec<(String, Vec<u8>)> = Vec::new();
    for name in MODULES {
        add_module(name, &paths, &mut loaded)?;
    }
    Ok(loaded)
}

fn index_modules(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            index_modules(&path, paths)?;
        } else if path.extension() == Some(OsStr::new("ko"))
            && let Some(stem) = path.file_stem().and_then(OsStr::to_str)
        {
            // The file may be called virtio-rng, the module is always virtio_rng.
            paths.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn add_module(
    name: &str,
    paths: &BTreeMap<String, PathBuf>,
    loaded: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if loaded.iter().any(|(other, _)| other == name) {
        return Ok(());
    }
    let path = paths.get(name).with_context(|| format!("the guest kernel has no module {name}"))?;
    let module = read(path)?;
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

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writer of the "newc" cpio archive that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    const DIRECTORY: u32 = 0o040_000;
    const CHARACTER_DEVICE: u32 = 0o020_000;
    const REGULAR: u32 = 0o100_000;

    fn directory(&mut self, name: &str) {
        self.entry(name, Self::DIRECTORY | 0o755, (0, 0), &[]);
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, Self::CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, Self::REGULAR | mode, (0, 0), content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (inode, links, name_bytes) = (self.entries, 1, name.len() + 1);
        let size = content.len();
        // magic, inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_bytes:08x}{:08x}",
            0, 0, 0, 0, 0, 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Cpio::default();
        archive.directory("dev");
        archive.file("init", 0o755, b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let headers: Vec<usize> =
            (0..bytes.len()).step_by(4).filter(|&at| bytes[at..].starts_with(b"070701")).collect();
        assert_eq!(headers.len(), 3);
        // The second: header 110 bytes, "init\0" padded to 4, then the content.
        let content = headers[1] + (110_usize + 5).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 3], b"abc");
        assert_eq!(&bytes[headers[1] + 54..headers[1] + 62], b"00000003");
        assert!(bytes[headers[2]..].windows(11).any(|name| name == b"TRAILER!!!\0"));
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
