//! Proves the browser of the other tests: what a page shows and does is seen, and what is wrong with it too.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use livesnap_tests::browser::Browser;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// A page with a button that works and a script that does not; its policy lets no picture in.
const PAGE: &str = r#"<!doctype html>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'">
<button onclick="this.textContent = 'pressed'">press</button>
<script>if (location.hash) { document.body.append(new Image()); document.images[0].src = "/a.png"; lost(); }</script>"#;

#[test]
fn a_page_is_seen_and_heard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("page.html");
    std::fs::write(&path, PAGE).unwrap();
    let url = format!("file://{}", path.display());
    let mut browser = Browser::start(640, 480).unwrap();
    browser.open(&url).unwrap();
    for key in ["Tab", "Enter"] {
        browser.press(key).unwrap();
    }
    let button = "document.querySelector('button').textContent";
    browser.wait(&format!("{button} === 'pressed'"), LIMIT).unwrap();
    let is_dark = "matchMedia('(prefers-color-scheme: dark)').matches";
    for (scheme, expected) in [("dark", true), ("light", false)] {
        browser.prefer(scheme).unwrap();
        assert_eq!(browser.value(is_dark).unwrap(), json!(expected));
    }
    assert!(browser.screenshot().unwrap().starts_with(b"\x89PNG"));
    assert!(browser.value("lost()").is_err());
    assert_eq!(browser.complaints(), [""; 0]);

    browser.open("about:blank").unwrap();
    browser.open(&format!("{url}#wrong")).unwrap();
    let told = browser.complaints().join("\n");
    for word in ["lost is not defined", "Content Security Policy"] {
        assert!(told.contains(word), "{word}: {told}");
    }
}
