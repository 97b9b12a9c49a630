//! What all snapshots of the host share: memory for their copy buffers, and the disk. Pure.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::policy::Policy;

/// What all snapshots that run may take together. What is left out has no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// Bytes of their copy buffers.
    pub buffer_bytes: Option<u64>,
    /// Bytes that they write a second.
    pub bandwidth_bytes_per_second: Option<NonZeroU64>,
}

/// What one snapshot has of the host's budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Grant {
    /// Bound of its copy buffer in bytes; nothing if the host's memory has no budget.
    pub buffer_bytes: Option<u64>,
    /// Most bytes that it writes a second; nothing if the host's disk has no budget.
    #[schema(value_type = Option<u64>)]
    pub max_bandwidth_bytes_per_second: Option<NonZeroU64>,
}

impl Grant {
    /// The limits of a snapshot that has no more than this.
    pub fn applied_to(&self, policy: &Policy) -> Policy {
        let bandwidth = self.max_bandwidth_bytes_per_second.map(NonZeroU64::get);
        Policy {
            buffer_bytes: self.buffer_bytes.or(policy.buffer_bytes),
            max_bandwidth_bytes_per_second: bandwidth.or(policy.max_bandwidth_bytes_per_second),
            ..policy.clone()
        }
    }
}

/// Divides `total` evenly, except that nobody gets more than it wishes: what one leaves, the others share (max-min fairness).
/// Each gets at least 1.
pub fn divide(total: NonZeroU64, wishes: &[Option<u64>]) -> Vec<NonZeroU64> {
    let mut modest_first: Vec<_> = (0..wishes.len()).collect();
    modest_first.sort_by_key(|index| wishes[*index].unwrap_or(u64::MAX));
    let mut shares = vec![NonZeroU64::MIN; wishes.len()];
    let mut left = total.get();
    for (served, index) in modest_first.into_iter().enumerate() {
        let even = left / (wishes.len() - served) as u64;
        let share = wishes[index].map_or(even, |wish| wish.min(even));
        shares[index] = NonZeroU64::new(share).unwrap_or(NonZeroU64::MIN);
        left -= share;
    }
    shares
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn nobody_gets_more_than_it_wishes_and_nothing_is_left_that_somebody_does() {
        let shares = |total, wishes: &[Option<u64>]| {
            let shares = divide(NonZeroU64::new(total).unwrap(), wishes);
            shares.into_iter().map(NonZeroU64::get).collect::<Vec<_>>()
        };
        assert_eq!(shares(100, &[]), [0; 0]);
        assert_eq!(shares(100, &[None]), [100]);
        assert_eq!(shares(100, &[Some(7)]), [7]);
        assert_eq!(shares(100, &[None, None]), [50, 50]);
        assert_eq!(shares(100, &[None, Some(10), Some(80)]), [45, 10, 45]);
        assert_eq!(shares(100, &[Some(20), Some(20), None, None]), [20, 20, 30, 30]);
        assert_eq!(shares(u64::MAX, &[Some(u64::MAX), None]), [u64::MAX / 2, u64::MAX / 2 + 1]);
        assert_eq!(shares(1, &[None, None]), [1, 1], "nothing would never end");
    }

    #[test]
    fn a_grant_takes_the_place_of_what_was_asked_for() {
        let asked = Policy { buffer_bytes: Some(7), no_disks: true, ..Policy::default() };
        assert_eq!(Grant::default().applied_to(&asked), asked);
        let grant =
            Grant { buffer_bytes: Some(5), max_bandwidth_bytes_per_second: NonZeroU64::new(3) };
        let granted = grant.applied_to(&asked);
        assert_eq!(
            (granted.buffer_bytes, granted.max_bandwidth_bytes_per_second),
            (Some(5), Some(3))
        );
        assert!(granted.no_disks);
    }
}
