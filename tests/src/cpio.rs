//! Archives that the kernel unpacks as its first file system.

/// Writer of the "newc" cpio archive that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    const DIRECTORY: u32 = 0o040_000;
    const CHARACTER_DEVICE: u32 = 0o020_000;
    const REGULAR: u32 = 0o100_000;

    /// A directory that everybody may enter.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, Self::DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// A device node for root alone.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, Self::CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// A regular file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, Self::REGULAR | mode, (0, 0), content);
    }

    /// The archive, complete.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (inode, links, name_bytes) = (self.entries, 1, name.len() + 1);
        let size = content.len();
        // magic, inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_bytes:08x}{:08x}",
            0, 0, 0, 0, 0, 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Cpio::default();
        archive.directory("dev");
        archive.file("init", 0o755, b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let headers: Vec<usize> =
            (0..bytes.len()).step_by(4).filter(|&at| bytes[at..].starts_with(b"070701")).collect();
        assert_eq!(headers.len(), 3);
        // The second: header 110 bytes, "init\0" padded to 4, then the content.
        let content = headers[1] + (110_usize + 5).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 3], b"abc");
        assert_eq!(&bytes[headers[1] + 54..headers[1] + 62], b"00000003");
        assert!(bytes[headers[2]..].windows(11).any(|name| name == b"TRAILER!!!\0"));
    }
}
