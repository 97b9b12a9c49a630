//! Where the members of the kernel's structures lie, from its type information (BTF).
//!
//! Programs in Rust cannot have the loader relocate such accesses, so they take offsets from us. aya reads BTF
//! too, but keeps members to itself. The format is that of Documentation/bpf/btf.rst:
//!
//! ```text
//! header │ type │ type │ ... │ strings
//!          └─ name, kind and length, size or type; then what the kind has: members, parameters ...
//! ```

const MAGIC: u16 = 0xeb9f;
const TYPE_BYTES: usize = 12;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Structures within structures that are followed; the kernel's are not that deep.
const DEPTH_MAX: u32 = 8;

/// BTF in a file's bytes, with the place of each type.
pub struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// By type id, from 1 on.
    offsets: Vec<usize>,
}

impl<'a> Types<'a> {
    /// Finds the types. Nothing if that is no BTF, or has kinds that we do not know.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        if bytes.get(..2)? != MAGIC.to_le_bytes() {
            return None;
        }
        let header_len = index(word(bytes, 4)?);
        let section = |at: usize| {
            let start = header_len.checked_add(index(word(bytes, at)?))?;
            bytes.get(start..start.checked_add(index(word(bytes, at + 4)?))?)
        };
        let (types, strings) = (section(8)?, section(16)?);
        let mut offsets = Vec::new();
        let mut offset = 0;
        while offset < types.len() {
            offsets.push(offset);
            offset += TYPE_BYTES + extra_bytes(word(types, offset + 4)?)?;
        }
        Some(Self { types, strings, offsets })
    }

    /// Offset of `member` in `struct structure`, in bytes; members of unnamed structures within it are its own.
    pub fn offset_of(&self, structure: &str, member: &str) -> Option<u32> {
        let is_it = |at: &&usize| {
            self.kind(**at) == Some(KIND_STRUCT) && self.name(**at) == Some(structure.as_bytes())
        };
        self.offset_within(*self.offsets.iter().find(is_it)?, member, DEPTH_MAX)
    }

    /// How many parameters the function has that the pointer type `name` points to.
    pub fn parameters_of(&self, name: &str) -> Option<usize> {
        let is_it = |at: &&usize| {
            self.kind(**at) == Some(KIND_TYPEDEF) && self.name(**at) == Some(name.as_bytes())
        };
        let pointer = self.target(*self.offsets.iter().find(is_it)?, KIND_PTR)?;
        let function = self.target(pointer, KIND_FUNC_PROTO)?;
        Some(index(word(self.types, function + 4)? & 0xffff))
    }

    /// The type that the one at `at` refers to, if it is of that kind.
    fn target(&self, at: usize, kind: u32) -> Option<usize> {
        let target = *self.offsets.get(index(word(self.types, at + 8)?).checked_sub(1)?)?;
        (self.kind(target)? == kind).then_some(target)
    }

    fn offset_within(&self, at: usize, member: &str, depth: u32) -> Option<u32> {
        let info = word(self.types, at + 4)?;
        (0..index(info & 0xffff)).find_map(|number| {
            let at = at + TYPE_BYTES + 12 * number;
            let bits = word(self.types, at + 8)?;
            // With bit fields in the structure the upper byte is a width.
            let bits = if info >> 31 == 1 { bits & 0x00ff_ffff } else { bits };
            match self.name(at)? {
                b"" if depth > 0 => {
                    let inner = self.unqualified(word(self.types, at + 4)?)?;
                    Some(bits / 8 + self.offset_within(inner, member, depth - 1)?)
                }
                name => (name == member.as_bytes()).then_some(bits / 8),
            }
        })
    }

    /// The structure or union of that id, behind `const` and `volatile`.
    fn unqualified(&self, mut id: u32) -> Option<usize> {
        for _ in 0..DEPTH_MAX {
            let at = *self.offsets.get(index(id).checked_sub(1)?)?;
            match self.kind(at)? {
                KIND_STRUCT | KIND_UNION => return Some(at),
                KIND_CONST | KIND_VOLATILE => id = word(self.types, at + 8)?,
                _ => return None,
            }
        }
        None
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some(kind_of(word(self.types, at + 4)?))
    }

    fn name(&self, at: usize) -> Option<&'a [u8]> {
        let rest = self.strings.get(index(word(self.types, at)?)..)?;
        rest.split(|byte| *byte == 0).next()
    }
}

const fn kind_of(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// What follows a type, in bytes.
fn extra_bytes(info: u32) -> Option<usize> {
    let entries = index(info & 0xffff);
    match kind_of(info) {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => Some(4),
        KIND_ARRAY => Some(12),
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => Some(12 * entries),
        KIND_ENUM | KIND_FUNC_PROTO => Some(8 * entries),
        kind => (kind < KIND_ENUM64).then_some(0),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

const fn index(number: u32) -> usize {
    number as usize
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    /// `struct outer { int a; const struct { int b; int c; }; }`
    fn example() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0c\0";
        let types = [
            1,
            KIND_INT << 24,
            4,
            32, // 1
            0,
            KIND_STRUCT << 24 | 2,
            8,
            13,
            1,
            0,
            15,
            1,
            32, // 2
            0,
            KIND_CONST << 24,
            2, // 3
            5,
            KIND_STRUCT << 24 | 2,
            12,
            11,
            1,
            0,
            0,
            3,
            32, // 4
        ];
        let len = u32::try_from(4 * types.len()).unwrap();
        let header = [24, 0, len, len, u32::try_from(strings.len()).unwrap()];
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend([1, 0]);
        bytes.extend(header.iter().chain(&types).flat_map(|word| word.to_le_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found_also_in_unnamed_structures() {
        let bytes = example();
        let types = Types::parse(&bytes).unwrap();
        assert_eq!(types.offset_of("outer", "a"), Some(0));
        assert_eq!(types.offset_of("outer", "c"), Some(8));
        assert_eq!(types.offset_of("outer", "d"), None);
        assert_eq!(types.offset_of("other", "a"), None);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let bytes = example();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut altered = bytes.clone();
                altered[at] = value;
                let _ = Types::parse(&altered).and_then(|types| types.offset_of("outer", "c"));
            }
            assert!(Types::parse(&bytes[..at]).is_none(), "{at}");
        }
    }

    #[test]
    fn the_running_kernel_tells_of_its_faults() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            eprintln!("SKIPPED: this kernel has no BTF");
            return;
        };
        let types = Types::parse(&bytes).unwrap();
        let address = types.offset_of("vm_fault", "address").unwrap();
        let flags = types.offset_of("vm_fault", "flags").unwrap();
        assert!(0 < address && address < flags && flags < 128, "{address} {flags}");
    }
}
