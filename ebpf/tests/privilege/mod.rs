//! What the tests need root for.

/// Whether the test may go on: says so and fails where REQUIRE_PRIVILEGED=1 if we are not root.
pub fn is_root(what: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert_ne!(std::env::var("REQUIRE_PRIVILEGED").as_deref(), Ok("1"), "{what} needs root");
    eprintln!("SKIPPED: {what} needs root");
    false
}
