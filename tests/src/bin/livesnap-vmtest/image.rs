//! The initramfs: init, the test programs and what they need, each at the very path that it has here, because
//! programs know each other by the paths that they were built with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use livesnap_tests::initramfs::with_init;
use livesnap_tests::kernel::Kernel;

use crate::programs::Programs;

/// For the disk, for disks that are files, and for VMs within the VM: the processor that QEMU emulates is of AMD's kind.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "loop", "kvm_amd"];
/// What tests start besides the product.
const TOOLS: [&str; 6] = [
    "/usr/bin/env",
    "/bin/true",
    // For requests to disks.
    "/bin/sh",
    "/usr/bin/chrt",
    "/usr/bin/fio",
    "/usr/sbin/losetup",
];

/// The archive, with the tests whose names contain one of `filters`, if there are any.
pub fn build(kernel: &Kernel, programs: &Programs, filters: &[String]) -> Result<Vec<u8>> {
    let mut files = BTreeSet::from(TOOLS.map(PathBuf::from));
    files.insert(programs.product.clone());
    files.extend(programs.tests.iter().map(|test| test.program.clone()));
    let libraries: Vec<_> =
        files.iter().map(|program| libraries(program)).collect::<Result<_>>()?;
    files.extend(libraries.into_iter().flatten());

    let mut archive = with_init("livesnap-vmtest-init")?;
    kernel.add_modules(&MODULES, &mut archive)?;
    let directories: BTreeSet<&Path> =
        files.iter().flat_map(|file| file.ancestors().skip(1)).collect();
    // In their order a directory comes before what is in it.
    for directory in directories.into_iter().filter(|path| path.parent().is_some()) {
        archive.directory(relative(directory)?);
    }
    for file in &files {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(relative(file)?, 0o755, &content);
    }

    let mut list = String::new();
    for test in &programs.tests {
        let program = test.program.to_str().context("a path is no text")?;
        let words = [test.name, program].into_iter().chain(test.arguments.iter().copied());
        let words = words.chain(filters.iter().map(String::as_str));
        list += &(words.collect::<Vec<_>>().join("\t") + "\n");
    }
    archive.file("tests", 0o644, list.as_bytes());
    Ok(archive.finish())
}

/// The shared libraries that a program is loaded with, and the loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    ensure!(output.status.success(), "ldd cannot read {}", program.display());
    Ok(paths_in(&String::from_utf8_lossy(&output.stdout)))
}

/// The absolute paths in what ldd prints, `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
fn paths_in(ldd: &str) -> Vec<PathBuf> {
    let words = ldd.lines().flat_map(str::split_whitespace);
    words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn relative(path: &Path) -> Result<&str> {
    let path = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
    Ok(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_read_from_ldd() {
        let ldd = "\tlinux-vdso.so.1 (0x00007fa291d32000)\n\
                   \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007fa29153e000)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007fa291d34000)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(paths_in(ldd), expected.map(PathBuf::from));
    }
}
