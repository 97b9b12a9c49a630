//! Stands between livesnap and QEMU, and spoils what QEMU answers and reports.
//!
//! One thread for each direction; they end with the connection.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::livesnap;
use crate::qemu::Qemu;

/// What livesnap is to receive instead of QEMU's answer or event.
#[derive(Debug)]
pub enum Answer {
    /// These bytes.
    Other(Vec<u8>),
    /// Nothing at all.
    Nothing,
    /// The end of the connection.
    Close,
}

/// A socket that leads to a QEMU's monitor, for one client.
#[derive(Debug)]
pub struct QmpProxy {
    dir: TempDir,
    qemu: u32,
}

/// Commands that were not answered yet, by their id.
type Commands = Arc<Mutex<HashMap<String, String>>>;

impl QmpProxy {
    /// Offers the monitor of `qemu`. `spoil` turns the answer to a command, or an event, each by its name, into what
    /// livesnap receives.
    pub fn start(
        qemu: &Qemu,
        spoil: impl Fn(&str, Vec<u8>) -> Answer + Send + 'static,
    ) -> Result<Self> {
        let dir = tempfile::tempdir_in("/var/tmp").context("cannot make a directory")?;
        let proxy = Self { dir, qemu: qemu.pid() };
        let listener = UnixListener::bind(proxy.socket()).context("cannot offer a socket")?;
        let monitor = qemu.qmp_socket();
        thread::spawn(move || {
            // Its errors are the client's: it sees the connection end.
            let _ = serve(&listener, &monitor, spoil);
        });
        Ok(proxy)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// `livesnap snapshot --json` through this proxy into `out`, not started yet.
    pub fn snapshot_command(&self, out: &Path) -> Result<Command> {
        let mut command = livesnap::command(["snapshot", "--json", "--qmp"])?;
        command.arg(self.socket()).arg("--out").arg(out);
        command.args(["--pid", &self.qemu.to_string()]);
        Ok(command)
    }
}

fn serve(
    listener: &UnixListener,
    monitor: &Path,
    spoil: impl Fn(&str, Vec<u8>) -> Answer,
) -> Result<()> {
    let (client, _) = listener.accept()?;
    let qemu = UnixStream::connect(monitor)?;
    let commands = Commands::default();
    let upstream = {
        let (client, qemu) = (client.try_clone()?, qemu.try_clone()?);
        let commands = Arc::clone(&commands);
        thread::spawn(move || {
            let _ = pass_commands(&client, &qemu, &commands);
            let _ = qemu.shutdown(Shutdown::Both);
        })
    };
    let _ = pass_answers(&qemu, &client, &commands, spoil);
    let _ = client.shutdown(Shutdown::Both);
    let _ = upstream.join();
    Ok(())
}

/// Passes commands on, with the descriptors that come along.
fn pass_commands(client: &UnixStream, qemu: &UnixStream, commands: &Commands) -> Result<()> {
    let mut line = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut received = RecvAncillaryBuffer::new(&mut room);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let count = recvmsg(client, &mut into, &mut received, RecvFlags::CMSG_CLOEXEC)?.bytes;
        if count == 0 {
            return Ok(());
        }
        for &byte in &bytes[..count] {
            line.push(byte);
            if byte == b'\n' {
                note(&line, commands);
                line.clear();
            }
        }
        let fds: Vec<OwnedFd> = received
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut sent = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() {
            sent.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let first = sendmsg(qemu, &[IoSlice::new(&bytes[..count])], &mut sent, SendFlags::empty())?;
        (&mut &*qemu).write_all(&bytes[first..count])?;
    }
}

fn note(line: &[u8], commands: &Commands) {
    let Ok(command) = serde_json::from_slice::<Value>(line) else { return };
    if let (Some(id), Some(name)) = (command["id"].as_str(), command["execute"].as_str()) {
        let mut commands = commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.insert(id.to_owned(), name.to_owned());
    }
}

/// Passes on the greeting as it is, and what `spoil` makes of the rest.
fn pass_answers(
    qemu: &UnixStream,
    client: &UnixStream,
    commands: &Commands,
    spoil: impl Fn(&str, Vec<u8>) -> Answer,
) -> Result<()> {
    let mut reader = BufReader::new(qemu);
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let message: Value = serde_json::from_slice(&line)?;
        let command = message["id"]
            .as_str()
            .and_then(|id| commands.lock().unwrap_or_else(PoisonError::into_inner).remove(id));
        let answer = match command.as_deref().or(message["event"].as_str()) {
            Some(name) => spoil(name, line),
            None => Answer::Other(line),
        };
        match answer {
            Answer::Other(bytes) => (&mut &*client).write_all(&bytes)?,
            Answer::Nothing => {}
            Answer::Close => return Ok(()),
        }
    }
}
