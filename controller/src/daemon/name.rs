//! Names that can stand everywhere: of virtual machines, and of the directories that snapshots lie in.

/// What a name may be made of, for errors.
pub const NAME_RULE: &str =
    "up to 64 letters, digits, '.', '_' and '-', not beginning with '.' or '-'";

/// Whether a name can stand in a path, a label and a log.
pub fn is_name(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(is_good) && !name.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_harmless() {
        for name in ["vm1", "a", "web-3.example_org", &"x".repeat(64)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "..", "-v", ".a", "a/b", "a b", "a\n", "ä", "a\0", &"x".repeat(65)] {
            assert!(!is_name(name), "{name:?}");
        }
    }
}
