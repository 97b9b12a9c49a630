//! The guest of the demo: a process of its own, with threads that write its memory.
//!
//! Runs as the hidden command `livesnap demo-guest`. Its standard input is a socket on which it answers one line for
//! each line that it is sent; when that is hung up, the guest ends.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use snapshot_core::Reason;
use snapshot_core::address::PAGE_BYTES;
use snapshot_core::workload::Workload;

use crate::Failure;

/// What the guest is asked.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Hold the writers.
    Pause,
    /// Let them go on.
    Resume,
    /// Say how far they are.
    Look,
}

/// What it answers, also once unasked when its memory is ready.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Address of its memory.
    pub hva: u64,
    /// The writers' counters.
    pub counters: Vec<u64>,
}

/// The guest's size.
#[derive(clap::Args)]
pub struct Args {
    /// Threads
    #[arg(long)]
    pub writers: usize,
    /// Pages of each
    #[arg(long)]
    pub pages_per_writer: usize,
}

impl Args {
    /// All its memory, in bytes.
    pub fn ram_bytes(&self) -> u64 {
        (self.writers * self.pages_per_writer) as u64 * PAGE_BYTES
    }
}

/// Writes memory until the demo hangs up.
pub fn run(args: &Args) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new(Reason::Internal, format!("demo guest: {error}"));
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let workload = Workload::new(args.writers, args.pages_per_writer);
    std::thread::scope(|scope| {
        for writer in 0..args.writers {
            let workload = &workload;
            scope.spawn(move || workload.run(writer));
        }
        let served = serve(&workload, UnixStream::from(socket));
        workload.end();
        served.map_err(failed)
    })
}

fn serve(workload: &Workload, mut socket: UnixStream) -> io::Result<()> {
    let hva = workload.ram_block().hva.0;
    let answer = |socket: &mut UnixStream| {
        let line = serde_json::to_string(&Answer { hva, counters: workload.counters() })?;
        writeln!(socket, "{line}")
    };
    answer(&mut socket)?;
    for line in BufReader::new(socket.try_clone()?).lines() {
        match serde_json::from_str(&line?)? {
            Request::Pause => workload.pause(),
            Request::Resume => workload.resume(),
            Request::Look => {}
        }
        answer(&mut socket)?;
    }
    Ok(())
}
