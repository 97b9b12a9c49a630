//! The snapshots side by side, as Markdown.

use std::fmt::Write as _;

use super::BUFFER;
use super::cell::Cell;
use crate::figures::Figures;

const HEAD: &str = "\
| guest | MB/s | control | outcome | peak buffer, MiB | CPU time denied, s: commanded | by `cpu.stat` | stall p99, ms | in stalls, s | faults that waited for room | writes kept, % |
| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

/// The table.
pub fn table(figures: &Figures<Cell>) -> String {
    let Figures { source, cases } = figures;
    let loads = cases.iter().map(|cell| cell.load_average);
    let (least, most) = loads
        .fold((f64::INFINITY, 0.0_f64), |(least, most), load| (least.min(load), most.max(load)));
    let rows: String = cases.iter().map(row).collect();
    format!(
        "{source}; `--buffer {BUFFER} --force`, all else by default. Load average of the host before each \
         snapshot: {least:.1} to {most:.1}, of which the guest makes 1.\n\n{HEAD}{rows}"
    )
}

/// A snapshot as a row.
pub fn row(cell: &Cell) -> String {
    let mut text = format!(
        "| {} | {} | {} | {} |",
        cell.writer.words(),
        cell.limit_mb_s,
        if cell.is_controlled { "on" } else { "off" },
        outcome(cell)
    );
    let stalls = |pointer: &str| cell.number(&format!("/probes/stalls/copy/{pointer}"));
    let in_stalls_s =
        stalls("mean_ns").zip(stalls("count")).map(|(mean, count)| mean * count / 1e9);
    let denied = |seconds: f64| cell.is_controlled.then_some(seconds);
    let columns = [
        (cell.buffer_peak_bytes.map(mib), 0),
        (denied(cell.commanded_s), 2),
        (denied(cell.withheld_s), 2),
        (stalls("p99_ns").map(|ns| ns / 1e6), 2),
        (in_stalls_s, 2),
        (cell.number("/report/buffer_waits"), 0),
        (Some(cell.rate_kept() * 100.0), 0),
    ];
    for (value, digits) in columns {
        // Writing to a string does not fail.
        let _ = match value {
            Some(value) => write!(text, " {value:.digits$} |"),
            None => write!(text, " – |"),
        };
    }
    text + "\n"
}

fn outcome(cell: &Cell) -> String {
    if let Some(reason) = &cell.given_up {
        return format!("given up after {:.2} s: `{reason}`", cell.total_s);
    }
    let mut text = format!("done in {:.2} s", cell.total_s);
    if cell.cpu_ratio_min < 1.0 {
        // Writing to a string does not fail.
        let _ = write!(text, ", throttled to {:.0} %", cell.cpu_ratio_min * 100.0);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a buffer is far below 2^53 bytes")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
