//! I/O priority of the calling thread (linux/ioprio.h).

use std::io;

const WHO_PROCESS: libc::c_int = 1;
const CLASS_IDLE: libc::c_int = 3;
const CLASS_SHIFT: u32 = 13;

/// Disks serve this thread, and those it will start, when nobody else wants anything of them.
pub fn set_idle() -> io::Result<()> {
    let this: libc::c_int = 0;
    // SAFETY: three numbers, no pointers.
    let result = unsafe {
        libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, this, CLASS_IDLE << CLASS_SHIFT)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn it_is_the_threads_own() {
        let class = || {
            // SAFETY: two numbers, no pointers.
            let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
            priority >> CLASS_SHIFT
        };
        let idle = std::thread::spawn(move || {
            set_idle().unwrap();
            class()
        });
        assert_eq!(idle.join().unwrap(), libc::c_long::from(CLASS_IDLE));
        assert_ne!(class(), libc::c_long::from(CLASS_IDLE));
    }
}
