//! The `livesnap` command line.
fn main() {}
