//! The sockets that are listened on, connections, and what each of them may take.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::future::BoxFuture;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::daemon::config::HttpLimits;

/// Owner and group may connect.
const SOCKET_MODE: u32 = 0o660;
/// How long answers that are under way may take when the daemon ends.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait where the operating system has no room for a connection.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon's.
    #[error("{} is served by another process: end that one, or name another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is no socket: name another one, or remove it", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The operating system.
    #[error("cannot listen on {}: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The operating system, of TCP.
    #[error("cannot listen on {address}: {source}: name another address in the configuration")]
    BindTcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// A connection before anything was said, which may take its time.
pub type Opening<Stream> = BoxFuture<'static, io::Result<Stream>>;

/// Where connections come from.
pub trait Listener {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next one.
    ///
    /// # Errors
    /// If the operating system has none for us.
    async fn accept(&self) -> io::Result<Opening<Self::Stream>>;
}

/// A Unix socket that is listened on; removed when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens on `path`; what a daemon that was killed has left there is replaced.
    ///
    /// # Errors
    /// If another process serves it, or the operating system refuses.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Bind { path: path.into(), source };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ListenError::NoSocket { path: path.into() });
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(ListenError::InUse { path: path.into() });
            }
            _ => {}
        }
        // It gets its name when its mode is right: nobody else connects in between.
        let draft = path.with_extension(format!("new-{}", std::process::id()));
        let _ = fs::remove_file(&draft);
        let listener = UnixListener::bind(&draft).map_err(failed)?;
        let named = fs::set_permissions(&draft, Permissions::from_mode(SOCKET_MODE))
            .and_then(|()| fs::rename(&draft, path));
        if let Err(source) = named {
            let _ = fs::remove_file(&draft);
            return Err(failed(source));
        }
        Ok(Self { listener, path: path.into() })
    }
}

impl Listener for Socket {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<Opening<UnixStream>> {
        let (stream, _) = self.listener.accept().await?;
        Ok(Box::pin(async { Ok(stream) }))
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<Opening<TcpStream>> {
        let (stream, _) = Self::accept(self).await?;
        // Events are small, and are waited for.
        stream.set_nodelay(true)?;
        Ok(Box::pin(async { Ok(stream) }))
    }
}

/// Listens on a TCP address.
///
/// # Errors
/// If another process does, or the operating system refuses.
pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError::BindTcp { address, source })
}

impl Drop for Socket {
    fn drop(&mut self) {
        // One that stays is replaced by the next daemon.
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves until `ended`, and then what is under way for a moment. Each listener has connections of its own: those of one
/// cannot take those of another.
pub async fn serve(
    listener: &impl Listener,
    router: Router,
    limits: &HttpLimits,
    ended: impl Future<Output = ()>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.read_seconds_max))
        .max_buf_size(limits.header_bytes_max);
    let connections = Arc::new(Semaphore::new(limits.connections_max));
    let graceful = GracefulShutdown::new();
    let accept = async || {
        let room = Arc::clone(&connections).acquire_owned().await.map_err(io::Error::other)?;
        Ok::<_, io::Error>((listener.accept().await?, room))
    };
    let mut ended = std::pin::pin!(ended);
    loop {
        let (opening, room) = tokio::select! {
            accepted = accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_INTERVAL).await;
                    continue;
                }
            },
            () = &mut ended => break,
        };
        let service = TowerToHyperService::new(router.clone());
        let (http, watcher) = (http.clone(), graceful.watcher());
        tokio::spawn(async move {
            let failed = match opening.await {
                Ok(stream) => {
                    let connection = http.serve_connection(TokioIo::new(stream), service);
                    watcher.watch(connection).await.err().map(|error| error.to_string())
                }
                Err(error) => Some(error.to_string()),
            };
            if let Some(error) = failed {
                tracing::debug!(error, "a connection has failed");
            }
            drop(room);
        });
    }
    // Whoever takes longer is cut off.
    let _ = timeout(END_LIMIT, graceful.shutdown()).await;
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[tokio::test]
    async fn only_the_socket_of_a_dead_daemon_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/livesnap.sock");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        {
            let _living = Socket::bind(&path).unwrap();
            assert_eq!(mode(), SOCKET_MODE);
            assert!(matches!(Socket::bind(&path), Err(ListenError::InUse { .. })));
            assert!(path.exists());
        }
        assert!(!path.exists(), "its owner removes it");

        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead one's stays");
        drop(Socket::bind(&path).unwrap());

        fs::write(&path, "").unwrap();
        assert!(matches!(Socket::bind(&path), Err(ListenError::NoSocket { .. })));
        assert!(path.exists());
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "nothing else is left"
        );
    }
}
