//! Which addresses count: the ranges of the guest's RAM, as the programs want them.

use livesnap_ebpf_common::RANGES_MAX;

/// Addresses in the process that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first one.
    pub start: u64,
    /// How many, in bytes.
    pub len_bytes: u64,
}

/// First address and address behind the last, for each range; the rest empty.
pub type RangeWords = [u64; 2 * RANGES_MAX];

/// Ranges for the programs: sorted, and joined where they touch. If there are still more than [`RANGES_MAX`], the
/// smallest gaps are closed: better some addresses too many, where nothing is write-protected, than one missing.
pub fn words(ranges: &[Range]) -> RangeWords {
    let mut joined = join(ranges);
    while joined.len() > RANGES_MAX {
        let gap = |index: &usize| joined[index + 1].0 - joined[*index].1;
        let Some(index) = (0..joined.len() - 1).min_by_key(gap) else { break };
        joined[index].1 = joined[index + 1].1;
        joined.remove(index + 1);
    }
    let mut words = [0; 2 * RANGES_MAX];
    for (pair, (start, end)) in words.chunks_exact_mut(2).zip(joined) {
        pair.copy_from_slice(&[start, end]);
    }
    words
}

fn join(ranges: &[Range]) -> Vec<(u64, u64)> {
    let ends =
        ranges.iter().map(|range| (range.start, range.start.saturating_add(range.len_bytes)));
    let mut sorted: Vec<(u64, u64)> = ends.filter(|(start, end)| start < end).collect();
    sorted.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, end) in sorted {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let ranges: Vec<Range> =
            ranges.iter().map(|&(start, len_bytes)| Range { start, len_bytes }).collect();
        let words = words(&ranges);
        words.chunks(2).map(|pair| (pair[0], pair[1])).filter(|pair| pair.1 != 0).collect()
    }

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(pairs(&[(20, 5), (0, 10), (10, 2), (11, 4), (30, 0)]), [(0, 15), (20, 25)]);
        assert_eq!(pairs(&[]), []);
        assert_eq!(pairs(&[(u64::MAX - 1, 100)]), [(u64::MAX - 1, u64::MAX)]);
    }

    #[test]
    fn of_too_many_ranges_none_is_lost() {
        let many: Vec<(u64, u64)> = (0..40_u64).map(|index| (index * index * 100, 10)).collect();
        let pairs = pairs(&many);
        assert_eq!(pairs.len(), RANGES_MAX);
        for (start, len) in many {
            assert!(pairs.iter().any(|pair| pair.0 <= start && start + len <= pair.1), "{start}");
        }
        assert_eq!(
            pairs.last(),
            Some(&(39 * 39 * 100, 39 * 39 * 100 + 10)),
            "the widest gap stays"
        );
    }
}
