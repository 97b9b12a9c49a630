//! What a snapshot looks like on disk.
