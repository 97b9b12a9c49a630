//! Where the fields of tracepoints' records lie, as tracefs tells.
//!
//! Of most tracepoints it differs between kernels, so it is read from the running one.

use std::fs;
use std::path::Path;

use crate::tier::Cause;

/// Where tracefs is mounted: where it belongs, or below debugfs.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The record of a tracepoint.
pub struct Record {
    group: &'static str,
    name: &'static str,
    format: String,
}

impl Record {
    /// That of the running kernel.
    pub fn of(group: &'static str, name: &'static str) -> Result<Self, Cause> {
        let read = |root| {
            let path = Path::new(root).join("events").join(group).join(name).join("format");
            fs::read_to_string(path)
        };
        let format = read(ROOTS[0]).or_else(|_| read(ROOTS[1]));
        let format = format.map_err(|source| Cause::NoTracepoint { group, name, source })?;
        Ok(Self { group, name, format })
    }

    /// Where a field of at least so many bytes lies, in bytes. Numbers are little-endian: of wider ones the lower part is
    /// there.
    pub fn offset_of(&self, field: &'static str, size_bytes: u32) -> Result<u32, Cause> {
        let Self { group, name, format } = self;
        match format.lines().find_map(|line| parse(line, field)) {
            Some((offset, size)) if size >= size_bytes => Ok(offset),
            _ => Err(Cause::NoRecordField { group, name, field }),
        }
    }
}

/// Offset and size of `field`, if the line is that of it:
/// `field:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;`.
fn parse(line: &str, field: &str) -> Option<(u32, u32)> {
    let mut parts = line.trim().split(';').map(str::trim);
    let declaration = parts.next()?.strip_prefix("field:")?;
    let (_, name) = declaration.rsplit_once(' ')?;
    let name = name.split_once('[').map_or(name, |(name, _)| name);
    let mut number = |key| parts.next()?.strip_prefix(key)?.parse().ok();
    (name == field).then_some((number("offset:")?, number("size:")?))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn fields_are_found_by_name_and_are_large_enough() {
        let format = "name: block_rq_issue\nID: 2104\nformat:\n\
                      \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
                      \tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;\n\
                      \tfield:char rwbs[10];\toffset:34;\tsize:10;\tsigned:0;\n\
                      \tfield:__data_loc char[] cmd;\toffset:60;\tsize:4;\tsigned:0;\n\n\
                      print fmt: \"%d dev\", REC->dev\n";
        let record = Record { group: "block", name: "block_rq_issue", format: format.into() };
        assert_eq!(record.offset_of("dev", 4).unwrap(), 8);
        assert_eq!(record.offset_of("rwbs", 2).unwrap(), 34);
        assert_eq!(record.offset_of("cmd", 4).unwrap(), 60);
        assert!(record.offset_of("dev", 8).is_err());
        let error = record.offset_of("sector", 8).unwrap_err().to_string();
        assert!(error.contains("block/block_rq_issue") && error.contains("sector"), "{error}");
    }
}
