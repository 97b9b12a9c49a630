//! Set-up, tests, demo and benchmarks: see `cargo xtask help`.
fn main() {}
