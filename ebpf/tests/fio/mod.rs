//! Requests whose number, size and latency are known: fio's, on a loop device of its own.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// A block device that nobody else uses.
pub struct Loop {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

/// How a loop device gets at its file.
#[derive(Clone, Copy)]
pub enum Backing {
    /// Past the page cache: requests take as long as a real disk's.
    Disk,
    /// In the page cache: requests take no longer than a thread of the kernel needs for them.
    PageCache,
}

impl Loop {
    /// One on a file of 64 MiB.
    pub fn new(backing: Backing) -> Self {
        let mut file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        // Written, not sparse: all requests take the same way.
        file.write_all(&vec![1; 64 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(match backing {
                Backing::Disk => "--direct-io=on",
                Backing::PageCache => "--direct-io=off",
            })
            .arg(file.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = String::from_utf8(output.stdout).unwrap().trim().into();
        Self { path, _file: file }
    }

    /// Its device file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// fio, started but not let go yet: its process id is known before its first request.
pub struct Fio(Child);

/// What fio tells of one direction.
#[derive(Debug)]
pub struct Told {
    pub requests: u64,
    pub bytes: u64,
    /// Mean of fio's `clat`: from the end of submitting, which is after the issue, until fio is awake again and has
    /// reaped it, some microseconds after the completion.
    pub clat_ns: f64,
}

impl Fio {
    /// `workload` as fio's arguments, past the page cache. Where processors are short it goes before all others, so
    /// that what it tells is the time of its requests and not that until it is its turn.
    pub fn new(device: &Loop, workload: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "read -r go && exec chrt --fifo 1 fio \"$@\"",
                "sh",
                "--name=requests",
                "--direct=1",
            ])
            // Threads, not processes: all of one id.
            .args(["--thread", "--output-format=json"])
            .arg(format!("--filename={}", device.path().display()))
            .args(workload)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Lets it go.
    pub fn start(&mut self) {
        self.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    }

    /// Waits for its end; what it read and wrote.
    pub fn finish(self) -> (Told, Told) {
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.success(), "fio ended with {}", output.status);
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        let told = |direction: &str| {
            let of = &value["jobs"][0][direction];
            Told {
                requests: of["total_ios"].as_u64().unwrap(),
                bytes: of["io_bytes"].as_u64().unwrap(),
                clat_ns: of["clat_ns"]["mean"].as_f64().unwrap(),
            }
        };
        (told("read"), told("write"))
    }
}
