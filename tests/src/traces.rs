//! What a snapshot may leave behind: in a VM, and beside its disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::qemu::Qemu;

/// Where something may be left. Before and after a snapshot that came to nothing these are the same.
#[derive(Debug, PartialEq)]
pub struct Traces {
    /// Beside the disk's image.
    files: Vec<PathBuf>,
    /// QEMU's block nodes, the guest's disk first.
    nodes: Vec<Value>,
    /// QEMU's jobs.
    jobs: Value,
    /// The cgroups of virtual CPUs, by thread.
    cgroups: BTreeMap<i64, String>,
}

impl Traces {
    /// Those of `qemu`, whose disk lies in `directory`.
    pub fn of(qemu: &mut Qemu, directory: &Path) -> Result<Self> {
        let entries = fs::read_dir(directory).context("cannot list the disk's directory")?;
        let mut files = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()
            .context("cannot list the disk's directory")?;
        files.sort();
        let blocks = qemu.qmp("query-block", json!({}))?;
        let nodes = qemu.qmp("query-named-block-nodes", json!({}))?;
        let nodes = nodes.as_array().context("query-named-block-nodes tells no nodes")?;
        let nodes = [&blocks[0]["inserted"]].into_iter().chain(nodes);
        let cgroup = |thread| {
            let path = format!("/proc/{thread}/cgroup");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            Ok((thread, text))
        };
        Ok(Self {
            files,
            nodes: nodes.map(|node| node["node-name"].clone()).collect(),
            jobs: qemu.qmp("query-jobs", json!({}))?,
            cgroups: qemu.vcpu_threads()?.into_iter().map(cgroup).collect::<Result<_>>()?,
        })
    }
}
