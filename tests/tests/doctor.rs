//! `livesnap doctor` on this host and on real QEMUs.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use livesnap_tests::qemu::Qemu;
use livesnap_tests::{is_root_or_skip, livesnap};
use serde_json::Value;

/// Exit code and findings.
fn doctor(arguments: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = livesnap::command(["doctor", "--json"]).unwrap().args(arguments).output().unwrap();
    let told = livesnap::json(&output).unwrap();
    (output.status.code(), told["findings"].as_array().unwrap().clone())
}

fn about<'a>(findings: &'a [Value], subject: &str) -> Vec<&'a Value> {
    findings.iter().filter(|finding| finding["subject"] == subject).collect()
}

#[test]
fn a_fit_host_and_a_fit_vm() {
    if !is_root_or_skip("the doctor's look at QEMU").unwrap() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let out = dir.path().join("not/yet");
    let mut qemu = Qemu::builder().vcpus(2).start().unwrap();
    let socket = qemu.qmp_socket();
    let (code, findings) =
        doctor(&["--qmp", socket.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{findings:#?}");
    let [vm] = about(&findings, "VM")[..] else { panic!("{findings:#?}") };
    let text = vm["found"].as_str().unwrap();
    assert!(text.contains(&format!("process {}, 2 CPUs", qemu.pid())), "{text}");
    let [space] = about(&findings, "space")[..] else { panic!("{findings:#?}") };
    assert!(space["found"].as_str().unwrap().ends_with(dir.path().to_str().unwrap()), "{space}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it only looks");
    assert_eq!(qemu.status().unwrap(), "running");
}

#[test]
fn every_refusal_of_a_vm_comes_with_its_remedy() {
    if !is_root_or_skip("the doctor's look at QEMU").unwrap() {
        return;
    }
    let qemu = Qemu::builder()
        .arguments(["-device", "virtio-balloon-pci,free-page-reporting=on"])
        .start()
        .unwrap();
    let (code, findings) = doctor(&["--qmp", qemu.qmp_socket().to_str().unwrap()]);
    assert_eq!(code, Some(1), "{findings:#?}");
    let refusals: Vec<_> =
        findings.iter().filter(|finding| finding["verdict"] == "unfit").collect();
    let reasons: Vec<_> = refusals.iter().map(|refusal| &refusal["reason"]).collect();
    assert!(reasons.contains(&&Value::from("balloon")), "{findings:#?}");
    assert!(refusals.iter().all(|refusal| refusal["remedy"].is_string()), "{findings:#?}");
}

#[test]
fn a_socket_that_nobody_serves_is_unfit() {
    let (code, findings) = doctor(&["--qmp", "/nonexistent/qmp.sock"]);
    assert_eq!(code, Some(1));
    let [vm] = about(&findings, "VM")[..] else { panic!("{findings:#?}") };
    assert_eq!(vm["reason"], "vmm_unreachable");
    assert!(vm["found"].as_str().unwrap().contains("/nonexistent/qmp.sock"), "{vm}");
}
