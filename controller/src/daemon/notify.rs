//! Tells the service manager how the daemon is (sd_notify(3)): a datagram to the socket that `NOTIFY_SOCKET` names.
//!
//! A daemon that was not started by one says nothing.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

/// It serves.
pub const READY: &str = "READY=1";
/// It was told to end.
pub const STOPPING: &str = "STOPPING=1";
const ALIVE: &str = "WATCHDOG=1";

/// Whoever started the daemon and wants to be told.
#[derive(Clone, Debug, Default)]
pub struct Manager(Option<SocketAddr>);

impl Manager {
    /// As the environment names it.
    pub fn from_environment() -> Self {
        Self(std::env::var_os("NOTIFY_SOCKET").and_then(|name| match address(&name) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(?name, %error, "cannot tell the service manager anything");
                None
            }
        }))
    }

    /// Tells it; never waits.
    pub fn tell(&self, state: &str) {
        let Some(address) = &self.0 else { return };
        let told = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.send_to_addr(state.as_bytes(), address)
        });
        if let Err(error) = told {
            tracing::warn!(state, %error, "cannot tell the service manager");
        }
    }

    /// Tells it that the daemon is alive, as often as it wants to hear that; never, if it does not.
    ///
    /// All tasks run on the daemon's main thread. So one that hangs there ends this too, and the manager starts the daemon anew.
    pub async fn beat(self) {
        let limit = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let Some(limit) = limit.filter(|limit| *limit > 0) else { return };
        // Half of it, as sd_watchdog_enabled(3) recommends.
        let mut ticks = interval(Duration::from_micros(limit) / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tell(ALIVE);
        }
    }
}

/// A path, or behind an `@` a name in the abstract namespace.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_manager_is_told_by_either_kind_of_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify").into_os_string();
        let name = format!("@livesnap-notify-{}", std::process::id());
        for name in [path.as_os_str(), OsStr::new(&name)] {
            let manager = UnixDatagram::bind_addr(&address(name).unwrap()).unwrap();
            Manager(Some(address(name).unwrap())).tell(READY);
            let mut text = [0; 64];
            let length = manager.recv(&mut text).unwrap();
            assert_eq!(&text[..length], READY.as_bytes(), "{name:?}");
        }
        // Nobody listens any more, which is no reason to fail.
        Manager(Some(address(&path).unwrap())).tell(READY);
        assert!(address(OsStr::new(&"x".repeat(200))).is_err());
    }
}
