//! Medians, tables and targets, as Markdown.

use std::fmt::Write as _;

use crate::figures::Figures;
use crate::measure::{Run, Tool};
use crate::{Case, Kind, PACED_RATE};

/// Median of what `figure` tells of each run by `tool`; NaN if there is none.
pub fn median(case: &Case, tool: Tool, figure: impl Fn(&Run) -> f64) -> f64 {
    middle(case.runs.iter().filter(|run| run.tool == tool).map(figure).collect())
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// A run in one line, while it goes on.
pub fn line(run: &Run) -> String {
    let mut text = format!(
        "{:?}: downtime {:.1} ms, total {:.2} s, guest kept {:.0} % and lost {:.2} s, gap {:.1} ms (before: {:.1}), {} MiB huge",
        run.tool,
        run.downtime_ms,
        run.total_s,
        run.rate_kept() * 100.0,
        run.lost_s,
        run.gap_ms,
        run.gap_before_ms,
        run.huge_mib
    );
    let parts = [
        ("pause", "/downtime/pause_ns"),
        ("state", "/downtime/device_state_ns"),
        ("protect", "/downtime/protect_ns"),
        ("resume", "/downtime/resume_ns"),
        ("arming", "/arming_ns"),
        ("copying", "/copying_ns"),
        ("committing", "/committing_ns"),
        ("service p99", "/service/p99_ns"),
    ];
    for (name, pointer) in parts {
        if let Some(ms) = run.reported(pointer) {
            // Writing to a string does not fail.
            let _ = write!(text, ", {name} {ms:.2}");
        }
    }
    text
}

/// All tables.
pub fn tables(figures: &Figures<Case>) -> String {
    let Figures { source, cases } = figures;
    let full: Vec<&Case> = cases.iter().filter(|case| !case.paced).collect();
    let paced: Vec<&Case> = cases.iter().filter(|case| case.paced).collect();
    let loads = cases.iter().flat_map(|case| &case.runs).map(|run| run.load_average);
    let (least, most) = loads
        .fold((f64::INFINITY, 0.0_f64), |(least, most), load| (least.min(load), most.max(load)));
    format!(
        "{source}. Load average of the host before each snapshot: {least:.1} to {most:.1}, of which the guest makes 1 to 2.\n\n### Downtime and total time\n\n{}\n### Where livesnap's time goes\n\n{}\n\
         ### What the guest notices\n\n{}\n### Targets\n\n{}",
        times(&full),
        parts(&full),
        guest_view(&full, &paced),
        targets(&full)
    )
}

fn times(cases: &[&Case]) -> String {
    let mut text = "\
| written RAM | made of | snapshots each | downtime, ms | QEMU's | times less | total, s | QEMU's | times less |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"
    .to_owned();
    for case in cases {
        let both = |figure: fn(&Run) -> f64| {
            [Tool::Livesnap, Tool::Qemu].map(|tool| median(case, tool, figure))
        };
        let [down, their_down] = both(|run| run.downtime_ms);
        let [total, their_total] = both(|run| run.total_s);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {down:.1} | {their_down:.1} | {:.1} | {total:.2} | {their_total:.2} | {:.1} |",
            size(case.populated_mib),
            case.kind.words(),
            case.runs.iter().filter(|run| run.tool == Tool::Livesnap).count(),
            their_down / down,
            their_total / total
        );
    }
    text
}

fn parts(cases: &[&Case]) -> String {
    let mut text = "\
| written RAM | made of | around the pause, ms: stop | device state | protect | resume | the rest, s: arming | copying | committing |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"
    .to_owned();
    for case in cases {
        let own = |pointer: &str| {
            median(case, Tool::Livesnap, |run| run.reported(pointer).unwrap_or(f64::NAN))
        };
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.2} | {:.1} | {:.2} | {:.2} | {:.2} |",
            size(case.populated_mib),
            case.kind.words(),
            own("/downtime/pause_ns"),
            own("/downtime/device_state_ns"),
            own("/downtime/protect_ns"),
            own("/downtime/resume_ns"),
            own("/arming_ns") / 1e3,
            own("/copying_ns") / 1e3,
            own("/committing_ns") / 1e3
        );
    }
    text
}

fn guest_view(full: &[&Case], paced: &[&Case]) -> String {
    let mut text = "\
| written RAM | made of | writes kept, % | QEMU's | work lost, s | QEMU's | faults | handler p50, us | p99, us | longest, ms |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"
    .to_owned();
    for case in full {
        let own = |pointer: &str| {
            median(case, Tool::Livesnap, |run| run.reported(pointer).unwrap_or(f64::NAN))
        };
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} | {:.0} | {:.2} | {:.2} | {:.0} | {:.0} | {:.0} | {:.1} |",
            size(case.populated_mib),
            case.kind.words(),
            median(case, Tool::Livesnap, Run::rate_kept) * 100.0,
            median(case, Tool::Qemu, Run::rate_kept) * 100.0,
            median(case, Tool::Livesnap, |run| run.lost_s),
            median(case, Tool::Qemu, |run| run.lost_s),
            own("/faults"),
            own("/service/p50_ns") * 1e3,
            own("/service/p99_ns") * 1e3,
            own("/service/max_ns")
        );
    }
    if paced.is_empty() {
        return text;
    }
    let _ = write!(
        text,
        "
A worker that writes {PACED_RATE} pages a second, so that it is not its own CPU time that it waits for:

| written RAM | made of | longest gap without a snapshot, ms | livesnap's | QEMU's |
| ---: | --- | ---: | ---: | ---: |
"
    );
    for case in paced {
        let before = case.runs.iter().map(|run| run.gap_before_ms).collect();
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.1} |",
            size(case.populated_mib),
            case.kind.words(),
            middle(before),
            median(case, Tool::Livesnap, |run| run.gap_ms),
            median(case, Tool::Qemu, |run| run.gap_ms)
        );
    }
    text
}

/// What was aimed at, and whether it was reached; of each kind of RAM that was measured so far.
fn targets(cases: &[&Case]) -> String {
    let mut text = String::new();
    let mut row = |kind: Kind, what: &str, value: f64, is_reached: bool| {
        let verdict = if is_reached { "reached" } else { "missed" };
        let _ = writeln!(text, "- {}: {what}: {value:.2} — {verdict}", kind.words());
    };
    for kind in Kind::ALL {
        let of_size =
            |mib: u32| cases.iter().find(|case| case.kind == kind && case.populated_mib == mib);
        let ours = |case: &Case| median(case, Tool::Livesnap, |run| run.downtime_ms);
        if let (Some(small), Some(large)) = (of_size(512), of_size(8_192)) {
            let ratio = ours(large) / ours(small);
            row(kind, "downtime at 8 GiB over that at 512 MiB, at most 1.5", ratio, ratio <= 1.5);
        }
        if let Some(case) = of_size(4_096) {
            let down = ours(case);
            row(kind, "downtime at 4 GiB in ms, at most 3", down, down <= 3.0);
            let ratio = down / median(case, Tool::Qemu, |run| run.downtime_ms);
            row(kind, "downtime at 4 GiB over QEMU's, at most 0.1", ratio, ratio <= 0.1);
            let [total, theirs] =
                [Tool::Livesnap, Tool::Qemu].map(|tool| median(case, tool, |run| run.total_s));
            let ratio = total / theirs;
            row(kind, "total at 4 GiB over QEMU's, at most 0.33", ratio, ratio <= 1.0 / 3.0);
        }
    }
    text
}

/// MiB as people say it.
pub fn size(mib: u32) -> String {
    if mib.is_multiple_of(1_024) { format!("{} GiB", mib / 1_024) } else { format!("{mib} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_is_between_two() {
        assert_eq!((middle(vec![3.0, 1.0, 2.0]), middle(vec![4.0, 1.0])), (2.0, 2.5));
        assert!(middle(Vec::new()).is_nan());
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!((size(512), size(8_192)), ("512 MiB".to_owned(), "8 GiB".to_owned()));
    }
}
