//! The engine on this process's own memory, on the real kernel: the embedder's example, and its control.
#![cfg(feature = "controls")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[path = "../examples/own_memory.rs"]
mod own_memory;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use own_memory::{check, take, take_observed};
use snapshot_core::{
    Abort, BUFFER_BYTES_MIN, Cancel, Cause, Controls, Options, Phase, Progress, Reason,
};

/// Whether userfaultfd may be used here. Says so loudly if not, and fails where it must be available.
fn privileged() -> bool {
    match snapshot_core::userfaultfd() {
        Ok(_) => true,
        Err(error) => {
            assert!(
                std::env::var_os("REQUIRE_PRIVILEGED").is_none_or(|value| value != "1"),
                "userfaultfd is required here: {error}"
            );
            eprintln!("SKIPPED: no userfaultfd ({error}); run as root");
            false
        }
    }
}

fn with(controls: Controls) -> Options {
    Options { controls, ..Options::default() }
}

#[test]
fn a_snapshot_under_writers_is_of_one_instant() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let snapshot = dir.path().join(format!("{round}"));
        let report = take(&snapshot, &Options::default()).unwrap();
        check(&snapshot).unwrap();
        assert!(report.faults > 0, "{report:?}");
        let saved = report.captured.by_fault_bytes + report.captured.by_sweep_bytes;
        assert_eq!(saved, report.ram_bytes);
        assert_eq!(report.service.count, report.faults, "{report:?}");
        let touches = &report.first_touches;
        assert_eq!(touches.iter().map(|touch| touch.faults).sum::<u64>(), report.faults);
        let bytes: u64 = touches.iter().map(|touch| touch.bytes).sum();
        assert_eq!(bytes, report.captured.by_fault_bytes, "{report:?}");
        assert!(touches.iter().all(|touch| touch.thread > 0 && touch.wait_ns > 0), "{report:?}");
    }
}

#[test]
fn without_protection_it_is_not() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("mixed");
    let controls = Controls { without_protection: true, ..Controls::default() };
    take(&snapshot, &with(controls)).unwrap();
    assert!(check(&snapshot).is_err(), "the check must notice a snapshot of several instants");
}

#[test]
fn several_contexts_and_a_small_buffer_change_nothing() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("sharded");
    let buffer_bytes = 24 << 20;
    let options = Options { contexts: Some(4), buffer_bytes, ..Options::default() };
    let report = take(&snapshot, &options).unwrap();
    check(&snapshot).unwrap();
    assert_eq!(report.contexts, 4);
    assert!(report.buffer_peak_bytes <= buffer_bytes, "{report:?}");
}

#[test]
fn the_buffers_bound_moves_while_a_session_runs_and_holds() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("resized");
    let options = Options { buffer_bytes: 24 << 20, contexts: Some(1), ..Options::default() };
    let mut limits = Vec::new();
    let mut observe = |progress: &Progress| {
        match progress.phase {
            Phase::Arming => options.buffer_limit.set_bytes(48 << 20),
            Phase::Copying => options.buffer_limit.set_bytes(20 << 20),
            Phase::Draining => options.buffer_limit.set_bytes(1),
            _ => {}
        }
        assert!(progress.buffer_used_bytes <= progress.buffer_limit_bytes, "{progress:?}");
        limits.push(progress.buffer_limit_bytes);
    };
    let report = take_observed(&snapshot, &options, &Cancel::default(), &mut observe).unwrap();
    check(&snapshot).unwrap();
    for limit in [24 << 20, 48 << 20] {
        assert!(limits.contains(&limit), "never {limit}: {limits:?}");
    }
    assert_eq!(report.buffer_limit_bytes, BUFFER_BYTES_MIN, "never less than works");
    assert!(report.buffer_peak_bytes <= 48 << 20, "{report:?}");
}

#[test]
fn progress_accounts_for_every_byte() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut last = Progress::default();
    let mut observe = |progress: &Progress| {
        assert_eq!(progress.saved_bytes + progress.remaining_bytes, progress.total_bytes);
        assert!(progress.fault_bytes <= progress.saved_bytes, "{progress:?}");
        if progress.phase == Phase::Committing {
            last = progress.clone();
        }
    };
    let options = Options::default();
    let snapshot = dir.path().join("accounted");
    let report = take_observed(&snapshot, &options, &Cancel::default(), &mut observe).unwrap();
    assert_eq!(last.remaining_bytes, 0);
    assert_eq!(last.fault_bytes, report.captured.by_fault_bytes);
    assert_eq!(last.drained_bytes, last.total_bytes - report.captured.hole_bytes);
    assert_eq!(last.written_bytes, report.stored_bytes);
}

#[test]
fn another_party_gives_a_session_up_with_its_own_reason() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("given-up");
    let cancel = Cancel::default();
    let abort = |text: &str| Abort { reason: Reason::BufferForecast, text: text.into() };
    let mut observe = |progress: &Progress| {
        if progress.phase == Phase::Copying {
            cancel.abort(abort("the first reason counts"));
            cancel.abort(abort("a later one does not"));
        }
    };
    let error = take_observed(&snapshot, &Options::default(), &cancel, &mut observe).unwrap_err();
    assert_eq!((error.phase, error.reason()), (Phase::Copying, Reason::BufferForecast));
    assert_eq!(error.to_string(), "the first reason counts");
    assert!(!snapshot.exists(), "nothing is left of it");

    let cancel = Cancel::default();
    cancel.cancel();
    cancel.abort(abort("the operator was first"));
    let error = take_observed(&snapshot, &Options::default(), &cancel, &mut |_| {}).unwrap_err();
    assert!(matches!(error.cause, Cause::Cancelled), "{error}");
}

#[test]
fn a_kernel_that_passes_over_holes_has_them_populated() {
    if !privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("populated");
    let controls = Controls { without_wp_unpopulated: true, ..Controls::default() };
    take(&snapshot, &with(controls)).unwrap();
    check(&snapshot).unwrap();
}

#[test]
fn threads_that_nobody_waits_for_give_way() {
    if !privileged() {
        return;
    }
    // All that is seen: a thread has its name a moment before it has its priority.
    let mut seen = BTreeSet::new();
    let dir = tempfile::tempdir().unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let tasks = procfs::process::Process::myself().unwrap().tasks().unwrap();
                let stats = tasks.filter_map(|task| task.ok()?.stat().ok());
                seen.extend(stats.map(|stat| (stat.comm, stat.nice)));
            }
        });
        for round in 0..3 {
            take(&dir.path().join(format!("{round}")), &Options::default()).unwrap();
        }
        ended.store(true, Ordering::Relaxed);
    });
    let mine = procfs::process::Process::myself().unwrap().stat().unwrap().nice;
    for (thread, nice) in [("fault", -15), ("sweep", mine + 10), ("writer", mine + 10)] {
        assert!(seen.contains(&(thread.into(), nice)), "{thread} is not at {nice}: {seen:?}");
    }
}
