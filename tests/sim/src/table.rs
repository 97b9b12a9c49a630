//! The table that a series of seeds comes to, and the targets.

use std::fmt::{self, Display};

use crate::judge::Judged;
use crate::plant::Outcome;

/// Reversals of the throttle in a minute that are not too many.
const REVERSALS_PER_MINUTE_MAX: f64 = 20.0;

/// A line: what, how much, and whether that is enough.
#[derive(Clone, Debug)]
pub struct Row {
    /// What is measured.
    pub what: &'static str,
    /// How much it is.
    pub value: String,
    /// The target in words; empty if there is none.
    pub target: &'static str,
    /// Whether it was reached.
    pub is_met: bool,
}

/// Runs shorter than this say nothing of reversals in a minute, in seconds.
const RUN_S_MIN: f64 = 10.0;

/// What a series of seeds came to.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// Counts.
    #[must_use]
    pub fn of(judged: &[Judged]) -> Self {
        let mut rows = Vec::new();
        let mut add = |what, value, target, is_met| rows.push(Row { what, value, target, is_met });
        let count =
            |holds: &dyn Fn(&Judged) -> bool| judged.iter().filter(|case| holds(case)).count();
        let feasible = count(&|case| case.best().is_some());
        let infeasible = judged.len() - feasible;
        let needy: Vec<&Judged> =
            judged.iter().filter(|case| case.best().is_some() && case.needs_throttle()).collect();
        let aborts = count(&|case| case.controlled.aborted.is_some());
        add("scenarios", judged.len().to_string(), "", true);
        add("  feasible", feasible.to_string(), "", true);
        add("    of these in need of a throttle", needy.len().to_string(), "", true);
        add("  infeasible", infeasible.to_string(), "", true);
        add("given up", aborts.to_string(), "", true);

        let kept: Vec<&&Judged> =
            needy.iter().filter(|case| case.controlled.aborted.is_none()).collect();
        let shares = |of: &dyn Fn(&Judged) -> &Outcome| {
            let mut shares: Vec<f64> = kept
                .iter()
                .filter_map(|case| Some((of(case).cpu_ratio / case.best()?.cpu_ratio).min(1.0)))
                .collect();
            shares.sort_by(f64::total_cmp);
            shares
        };
        let ours = shares(&|case| &case.controlled);
        let text = |shares: &[f64]| {
            let at = |share| percent(quantile(shares, share));
            format!("mean {}, median {}, p5 {}", percent(mean(shares)), at(0.5), at(0.05))
        };
        let what = "CPU left, share of the oracle's";
        add(what, text(&ours), "mean >= 90 %", mean(&ours) >= 0.9);
        add("  with plain waiting", text(&shares(&|case| &case.waiting)), "", true);
        add("  with auto-converge", text(&shares(&|case| &case.converge)), "", true);
        let lost = |of: &dyn Fn(&Judged) -> &Outcome| {
            let lost: Vec<f64> = kept.iter().map(|case| of(case).lost_ratio).collect();
            mean(&lost)
        };
        let (ours, waiting) = (lost(&|case| &case.controlled), lost(&|case| &case.waiting));
        let text = |ratio: f64| format!("mean {:.2} %", ratio * 100.0);
        let what = "writers' time lost to a full buffer";
        add(what, text(ours), "< 1/10 of waiting's", ours < waiting / 10.0);
        add("  with plain waiting", text(waiting), "", true);
        let quiet: Vec<f64> = judged
            .iter()
            .filter(|case| case.best().is_some() && !case.needs_throttle())
            .map(|case| case.controlled.cpu_ratio / case.waiting.cpu_ratio)
            .collect();
        let value = format!("mean {}", percent(mean(&quiet)));
        add("CPU left where none need be taken", value, "mean >= 99 %", mean(&quiet) >= 0.99);

        let overruns = count(&|case| case.controlled.overrun > 0.0);
        add("buffer overruns", overruns.to_string(), "0", overruns == 0);
        let mut rate = |what, number: usize, of: usize, target, most: f64| {
            let ratio = number_of(number) / number_of(of).max(1.0);
            add(what, format!("{number} = {}", percent(ratio)), target, ratio < most);
        };
        rate("false aborts", count(&Judged::is_false_abort), feasible, "< 1 % of feasible", 0.01);
        let missed = count(&Judged::is_missed_abort);
        rate("missed aborts", missed, infeasible, "< 1 % of infeasible", 0.01);
        let broken = count(&Judged::is_broken);
        rate("limits broken that could be kept", broken, feasible, "< 1 % of feasible", 0.01);
        let broken = |of: &dyn Fn(&Judged) -> &Outcome| {
            count(&|case| case.best().is_some() && of(case).broken_at_s.is_some())
        };
        let whatever = f64::INFINITY;
        rate("  by plain waiting", broken(&|case| &case.waiting), feasible, "", whatever);
        rate("  by auto-converge", broken(&|case| &case.converge), feasible, "", whatever);

        let mut delays: Vec<f64> = judged.iter().filter_map(Judged::abort_delay_s).collect();
        delays.sort_by(f64::total_cmp);
        let at = |share| quantile(&delays, share);
        let value = format!("median {:.2} s, p90 {:.2} s", at(0.5), at(0.9));
        add("abort after it could be known", value, "median <= 2 s", at(0.5) <= 2.0);

        let worse =
            count(&|case| case.controlled.aborted.is_none() && case.stalls_more_than_waiting());
        add("stall p99 above plain waiting's", worse.to_string(), "0", worse == 0);
        let a_minute = |count: &dyn Fn(&Judged) -> u32| {
            let long = judged.iter().filter(|case| case.controlled.copying_s > RUN_S_MIN);
            let mut rates: Vec<f64> = long
                .map(|case| f64::from(count(case)) * 60.0 / case.controlled.copying_s)
                .collect();
            rates.sort_by(f64::total_cmp);
            let p99 = quantile(&rates, 0.99);
            (format!("mean {:.1}, p99 {p99:.1}", mean(&rates)), p99)
        };
        let (value, _) = a_minute(&|case| case.controlled.reversals);
        add("reversals of the throttle a minute", value, "", true);
        let (value, p99) = a_minute(&Judged::reversals_without_cause);
        let is_calm = p99 <= REVERSALS_PER_MINUTE_MAX;
        add("  beyond two for each event", value, "p99 <= 20", is_calm);
        Self { rows }
    }

    /// Targets that were not reached.
    #[must_use]
    pub fn missed(&self) -> Vec<&Row> {
        self.rows.iter().filter(|row| !row.is_met).collect()
    }
}

impl Display for Table {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "| {:<36} | {:<42} | {:<20} |    |", "", "measured", "target")?;
        writeln!(to, "| {:-<36} | {:-<42} | {:-<20} | -- |", "", "", "")?;
        for Row { what, value, target, is_met } in &self.rows {
            let mark = match (target.is_empty(), is_met) {
                (true, _) => "",
                (false, true) => "ok",
                (false, false) => "NO",
            };
            writeln!(to, "| {what:<36} | {value:<42} | {target:<20} | {mark:<2} |")?;
        }
        Ok(())
    }
}

fn number_of(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / number_of(of.len()).max(1.0)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let index = (number_of(sorted.len()) * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

fn percent(ratio: f64) -> String {
    format!("{:.1} %", ratio * 100.0)
}
