//! What a kernel refuses is told in words, and the next tier taken.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod privilege;

use livesnap_ebpf::{Cause, Options, ProbeError, Probes, Refusal, Tier};
use privilege::is_root;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

const EPERM: i32 = 1;

fn attach(options: &Options) -> Result<Probes, ProbeError> {
    Probes::attach(std::process::id(), &[], options)
}

fn tiers(refusals: &[Refusal]) -> Vec<Tier> {
    refusals.iter().map(|refusal| refusal.tier).collect()
}

/// Runs `work` on a thread that has only these capabilities.
fn with_capabilities<T: Send>(set: CapabilitySet, work: impl FnOnce() -> T + Send) -> T {
    let run = || {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: set, permitted: set, inheritable: none };
        set_capabilities(None, sets).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

#[test]
fn without_type_information_raw_tracepoints_are_taken() {
    if !is_root("attaching probes") {
        return;
    }
    let options = Options { btf: Some("/nonexistent/vmlinux".into()), ..Options::default() };
    let probes = attach(&options).unwrap();
    assert_eq!(probes.tier(), Tier::RawTp);
    assert_eq!(tiers(probes.refusals()), [Tier::Fentry, Tier::TpBtf, Tier::Kprobe]);
    for refusal in probes.refusals() {
        assert!(matches!(refusal.cause, Cause::NoBtf { .. }), "{refusal}");
        assert!(refusal.to_string().contains("/nonexistent/vmlinux"), "{refusal}");
    }
}

#[test]
fn type_information_that_is_none_is_refused() {
    if !is_root("attaching probes") {
        return;
    }
    let options = Options { btf: Some("/proc/self/exe".into()), ..Options::default() };
    let probes = attach(&options).unwrap();
    assert_eq!(probes.tier(), Tier::RawTp);
    assert!(matches!(probes.refusals()[0].cause, Cause::BadBtf { .. }), "{:?}", probes.refusals());
}

#[test]
fn without_privilege_every_tier_is_refused_by_name() {
    if !is_root("giving up privileges") {
        return;
    }
    let attached = with_capabilities(CapabilitySet::empty(), || attach(&Options::default()));
    let Err(ProbeError::Refused { refusals }) = attached else { panic!("it was let") };
    assert_eq!(tiers(&refusals), Tier::ALL);
    for refusal in refusals {
        assert_eq!(refusal.cause.errno(), Some(EPERM), "{refusal}");
        assert!(refusal.to_string().contains("CAP_BPF and CAP_PERFMON"), "{refusal}");
    }
}

#[test]
fn two_capabilities_suffice() {
    if !is_root("giving up privileges") {
        return;
    }
    let expected = attach(&Options::default()).unwrap().tier();
    let set = CapabilitySet::BPF | CapabilitySet::PERFMON;
    let tier = with_capabilities(set, || attach(&Options::default()).map(|probes| probes.tier()));
    assert_eq!(tier.unwrap(), expected);
}

#[test]
fn a_single_tier_that_is_refused_is_not_replaced() {
    if !is_root("attaching probes") {
        return;
    }
    let btf = Some("/nonexistent/vmlinux".into());
    let Err(ProbeError::Refused { refusals }) =
        attach(&Options { tier: Some(Tier::TpBtf), btf, ..Options::default() })
    else {
        panic!("it was replaced")
    };
    assert_eq!(tiers(&refusals), [Tier::TpBtf]);
}
