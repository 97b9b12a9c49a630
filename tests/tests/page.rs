//! The daemon over TCP, where browsers come from: who is let in, and what people see and do on its page.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use livesnap_tests::browser::Browser;
use livesnap_tests::daemon::Daemon;
use livesnap_tests::is_root_or_skip;
use livesnap_tests::qemu::{Load, Qemu};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);
const TCP: &str = "[tcp]\nlisten = \"127.0.0.1:0\"";
const TOKEN: &str = "0123456789abcdef";

/// Writes a token, and returns what the configuration says of it.
fn token(dir: &Path, mode: u32) -> String {
    let path = dir.join("token");
    fs::write(&path, format!("{TOKEN}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    format!("{TCP}\ntoken_file = {path:?}")
}

#[test]
fn only_who_may_is_let_in() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[], TCP).unwrap();
    let own = format!("Host: {}", daemon.tcp().unwrap());
    let abort = "POST /snapshot/07/abort HTTP/1.1";
    let stranger = "Origin: http://stranger.example";
    let call = |head: &[&str]| {
        let answer = daemon.call_tcp(&head.join("\r\n")).unwrap();
        let told = answer.body["reason"].as_str().map(str::to_owned);
        (answer.status, told.unwrap_or_default())
    };
    let told = |status, reason: &str| (status, reason.to_owned());
    assert_eq!(call(&["GET /vms HTTP/1.1", &own]), told(200, ""));
    assert_eq!(call(&["GET /vms HTTP/1.1", "Host: rebound.example"]), told(421, "unknown_host"));
    assert_eq!(call(&[abort, &own, stranger]), told(403, "foreign_origin"));
    assert_eq!(call(&[abort, &own, "Sec-Fetch-Site: cross-site"]), told(403, "foreign_origin"));
    let own_origin = own.replace("Host: ", "Origin: http://");
    assert_eq!(call(&[abort, &own, &own_origin]), told(404, "unknown_operation"));
    let page = daemon.call_tcp(&format!("GET / HTTP/1.1\r\n{own}")).unwrap();
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
    drop(daemon);

    Daemon::configure(dir.path(), &[], &token(dir.path(), 0o600)).unwrap();
    let daemon = Daemon::start(dir.path()).unwrap();
    let vms = "GET /vms HTTP/1.1\r\nHost: localhost";
    let refused = daemon.call_tcp(vms).unwrap();
    assert_eq!((refused.status, &refused.body["reason"]), (401, &json!("unauthorized")));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    let with = |token: &str| {
        daemon.call_tcp(&format!("{vms}\r\nAuthorization: Bearer {token}")).unwrap().status
    };
    assert_eq!((with("fedcba9876543210"), with(TOKEN)), (401, 200));
    // Who may write to the Unix socket needs none.
    assert_eq!(daemon.get("/vms").unwrap().status, 200);
    assert!(!daemon.log().contains(TOKEN), "{}", daemon.log());
    drop(daemon);

    for (tcp, word) in [
        ("[tcp]\nlisten = \"0.0.0.0:0\"", "loopback"),
        (&token(dir.path(), 0o644), "0644"),
        ("[tcp]\nlisten = \"127.0.0.1:0\"\ntoken_file = \"/nobody/is/there\"", "/nobody/is/there"),
    ] {
        Daemon::configure(dir.path(), &[], tcp).unwrap();
        let ended = Daemon::command(dir.path()).unwrap().status().unwrap();
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        let last = log.lines().last().unwrap();
        assert!(ended.code() == Some(3) && last.contains(word), "{tcp}: {ended} {last}");
    }
}

/// The text of the field of the one snapshot that runs.
fn field(browser: &mut Browser, name: &str) -> String {
    let text = browser.value(&format!("document.querySelector('[data-field={name}]').textContent"));
    text.unwrap().as_str().unwrap().to_owned()
}

/// Presses Tab until what has the focus fulfils a condition.
fn tab_to(browser: &mut Browser, condition: &str) {
    for _ in 0..50 {
        browser.press("Tab").unwrap();
        let found = browser.value(&format!("(at => {condition})(document.activeElement)")).unwrap();
        if found == Value::Bool(true) {
            return;
        }
    }
    panic!("the keyboard does not lead to {condition}");
}

/// Whether the row of a table that begins so says so.
fn says(table: &str, word: &str) -> String {
    format!(
        "[...document.getElementById('{table}').rows].some(row => row.innerText.includes({word:?}))"
    )
}

#[test]
fn the_page_asks_for_the_token() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let vm = "[[vm]]\nname = \"vm1\"\nqmp = \"/nobody/is/there\"";
    let config = format!("{}\n{vm}", token(dir.path(), 0o600));
    let daemon = Daemon::serve(dir.path(), &[], &config).unwrap();
    let mut browser = Browser::start(1088, 800).unwrap();
    browser.open(&format!("http://{}/", daemon.tcp().unwrap())).unwrap();
    browser.wait("!document.getElementById('token-form').hidden", LIMIT).unwrap();
    for token in ["wrong", TOKEN] {
        browser.value("document.getElementById('token').focus()").unwrap();
        browser.write(token).unwrap();
        browser.press("Enter").unwrap();
    }
    browser.wait(&says("vms", "vm1"), LIMIT).unwrap();
    browser.wait("document.getElementById('token-form').hidden", LIMIT).unwrap();
    let address = browser.value("location.href").unwrap();
    assert!(!address.as_str().unwrap().contains(TOKEN), "{address}");
}

#[test]
fn a_snapshot_is_seen_and_ended_by_keyboard_alone() {
    if !is_root_or_skip("a snapshot of another process").unwrap() {
        return;
    }
    let mut qemu = Qemu::builder().load(Load { ring_mib: 64, ..Load::default() }).start().unwrap();
    qemu.wait_ready(BOOT).unwrap();
    qemu.wait_heartbeat(BOOT, |beat| beat.laps >= 1).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let daemon = Daemon::serve(dir.path(), &[("vm1", &qemu)], TCP).unwrap();
    let mut browser = Browser::start(1088, 1000).unwrap();
    browser.open(&format!("http://{}/", daemon.tcp().unwrap())).unwrap();
    browser.wait(&says("vms", "vm1"), LIMIT).unwrap();
    browser.wait(&says("vms", "running"), LIMIT).unwrap();
    let first = json!({"vm": "vm1", "policy": {"on_infeasible": "wait"}});
    let first = daemon.post("/snapshot", &[("Prefer", "wait=60")], &first).unwrap();
    assert_eq!(first.body["state"], "completed", "{first:?}");
    browser.wait(&says("ended", "completed"), LIMIT).unwrap();
    browser.wait("document.querySelector('article') === null", LIMIT).unwrap();

    // One that takes minutes.
    let policy = json!({
        "on_infeasible": "wait", "buffer_bytes": 64 << 20, "max_bandwidth_bytes_per_second": 1 << 20,
    });
    let taken_up = daemon.post("/snapshot", &[], &json!({"vm": "vm1", "policy": policy})).unwrap();
    assert_eq!(taken_up.status, 202, "{taken_up:?}");
    let path = taken_up.header("location").unwrap();
    let current = "document.querySelector('.phases [aria-current]')?.textContent === 'copying'";
    browser.wait(current, LIMIT).unwrap();
    browser.wait(&says("vms", "copying"), LIMIT).unwrap();
    let points = "document.querySelector('polyline.touch')?.points.length >= 20";
    browser.wait(points, LIMIT).unwrap();
    let saved = "parseInt(document.querySelector('[data-field=percent]').textContent) >= 1";
    browser.wait(saved, LIMIT).unwrap();
    assert_eq!(field(&mut browser, "vm"), "vm1");
    assert_eq!(field(&mut browser, "buffer-limit"), "64 MiB");
    for name in
        ["buffer-used", "touch-rate", "drain-rate", "stall-p99", "action", "cpu", "forecast-end"]
    {
        let text = format!("document.querySelector('[data-field={name}]').textContent");
        browser.wait(&format!("{text} !== '–'"), LIMIT).unwrap();
    }
    let shown = "document.querySelector('[data-field=buffer]').value";
    assert!(browser.value(shown).unwrap().as_f64().unwrap() > 0.0);

    let ground = "getComputedStyle(document.body).backgroundColor";
    let mut grounds = Vec::new();
    for scheme in ["dark", "light"] {
        browser.prefer(scheme).unwrap();
        grounds.push(browser.value(ground).unwrap());
    }
    keep_picture("live-page.png", &browser.screenshot().unwrap());
    assert_ne!(grounds[0], grounds[1]);

    // No, and then yes.
    for (value, is_aborted) in [("keep", false), ("abort", true)] {
        tab_to(&mut browser, "at.dataset.field === 'abort'");
        browser.press("Enter").unwrap();
        browser.wait("document.getElementById('abort-dialog').open", LIMIT).unwrap();
        tab_to(&mut browser, &format!("at.value === '{value}'"));
        browser.press("Enter").unwrap();
        browser.wait("!document.getElementById('abort-dialog').open", LIMIT).unwrap();
        if !is_aborted {
            assert_eq!(daemon.get(path).unwrap().body["state"], "copying");
        }
    }
    let aborted = daemon.wait_state(path, "aborted").unwrap();
    assert_eq!(aborted["error"]["reason"], "cancelled", "{aborted:#}");
    browser.wait(&says("ended", "aborted"), LIMIT).unwrap();
    browser.wait("document.querySelector('article') === null", LIMIT).unwrap();
    qemu.wait_unprotected(LIMIT).unwrap();
    assert_eq!(qemu.wait_laps(1, BOOT).unwrap().inconsistent, 0);
    assert_eq!(browser.complaints(), [""; 0]);
}

/// Puts a picture into the documentation if that is to be written anew.
fn keep_picture(name: &str, picture: &[u8]) {
    if std::env::var_os("REWRITE_DOCS").is_some() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        fs::write(docs.join(name), picture).unwrap();
    }
}
