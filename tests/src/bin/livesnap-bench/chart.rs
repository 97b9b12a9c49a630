//! Downtime and total time over the size of the guest, as an SVG.
//!
//! Logarithmic upwards, for the tools are far apart; a tool is a colour, a kind of RAM is a dash.

use std::fmt::Write as _;

use crate::measure::{Run, Tool};
use crate::report::{median, size};
use crate::{Case, Kind};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 400.0;
/// A panel's drawing area.
const PANEL_WIDTH: f64 = 380.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 320.0;
const LEFTS: [f64; 2] = [70.0, 550.0];

const TOOLS: [(Tool, &str, &str); 2] =
    [(Tool::Livesnap, "livesnap", "#0b7285"), (Tool::Qemu, "QEMU background-snapshot", "#c92a2a")];

/// What a panel shows.
struct Panel {
    title: &'static str,
    left: f64,
    figure: fn(&Run) -> f64,
}

/// Draws the cases that are not paced.
pub fn draw(cases: &[Case]) -> String {
    let cases: Vec<&Case> = cases.iter().filter(|case| !case.paced).collect();
    let panels = [
        Panel { title: "Downtime, ms (median)", left: LEFTS[0], figure: |run| run.downtime_ms },
        Panel {
            title: "Total time until durable, s (median)",
            left: LEFTS[1],
            figure: |run| run.total_s,
        },
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <title>Downtime and total time of livesnap and QEMU's background-snapshot over guest memory</title>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    for panel in panels {
        panel.draw(&mut svg, &cases);
    }
    legend(&mut svg);
    svg + "</svg>\n"
}

impl Panel {
    fn draw(&self, svg: &mut String, cases: &[&Case]) {
        let mut sizes: Vec<u32> = cases.iter().map(|case| case.populated_mib).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let values = cases
            .iter()
            .flat_map(|case| TOOLS.map(|(tool, ..)| median(case, tool, self.figure).log10()));
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
        let y = |value: f64| BOTTOM - (value.log10() - low) / (high - low) * (BOTTOM - TOP);
        let x = |mib: u32| {
            let index = sizes.iter().position(|&size| size == mib).unwrap_or(0);
            self.left + PANEL_WIDTH * (count(index) + 0.5) / count(sizes.len().max(1))
        };

        text(
            svg,
            (self.left, TOP - 20.0),
            "start",
            &format!("<tspan font-weight=\"bold\">{}</tspan>", self.title),
        );
        let mut decade = low;
        while decade <= high {
            let (value, right) = (10_f64.powf(decade), self.left + PANEL_WIDTH);
            let y = y(value);
            let _ =
                writeln!(svg, "<path d=\"M{:.1} {y:.1}H{right:.1}\" stroke=\"#ddd\"/>", self.left);
            text(svg, (self.left - 8.0, y + 4.0), "end", &value.to_string());
            decade += 1.0;
        }
        for &mib in &sizes {
            text(svg, (x(mib), BOTTOM + 20.0), "middle", &size(mib));
        }
        for (tool, _, colour) in TOOLS {
            for kind in Kind::ALL {
                let mut points = Vec::new();
                for case in cases.iter().filter(|case| case.kind == kind) {
                    let (x, y) = (x(case.populated_mib), y(median(case, tool, self.figure)));
                    points.push(format!("{x:.1},{y:.1}"));
                    let _ = writeln!(
                        svg,
                        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"
                    );
                }
                let _ = writeln!(
                    svg,
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{}\"/>",
                    points.join(" "),
                    dashes(kind)
                );
            }
        }
    }
}

fn legend(svg: &mut String) {
    let mut x = LEFTS[0];
    for (_, name, colour) in TOOLS {
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"362\" width=\"14\" height=\"14\" fill=\"{colour}\"/>"
        );
        text(svg, (x + 20.0, 374.0), "start", name);
        x += 40.0 + 8.0 * count(name.len());
    }
    for kind in Kind::ALL {
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} 369h36\" stroke=\"#333\" stroke-width=\"2\" stroke-dasharray=\"{}\"/>",
            dashes(kind)
        );
        text(svg, (x + 42.0, 374.0), "start", kind.words());
        x += 62.0 + 8.0 * count(kind.words().len());
    }
}

fn dashes(kind: Kind) -> &'static str {
    match kind {
        Kind::Anonymous => "none",
        Kind::SmallPages => "2 4",
        Kind::Memfd => "9 5",
    }
}

/// Text that holds nothing which XML would take for its own, but for the `tspan` of a title.
fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, content: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222\">{content}</text>"
    );
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}
