//! TLS for those who come from other hosts: certificate and key, which may be replaced while the daemon runs, and the
//! handshake.
//!
//! The files are looked at for every connection and read again when they are others. Replaced one after the other they do
//! not fit together for a moment; then the pair that was read last still holds.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::listen::{Listener, Opening};
use super::secret::{SecretError, read_secret};
use crate::daemon::config;

/// Bytes of a key's file that are read: keys take some thousand.
const KEY_BYTES_MAX: usize = 1 << 20;
/// What is spoken inside.
const PROTOCOL: &[u8] = b"http/1.1";

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate's file.
    #[error("cannot read the certificate {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key's file.
    #[error(transparent)]
    Key(#[from] SecretError),
    /// What is in a file.
    #[error("{} holds no usable {what}: {source}: give it in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// They do not fit together, or are of a kind that is not known.
    #[error("cannot use the certificate {} with the key {}: {source}", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// By what a replaced file is noticed: device, inode, length, and when it was changed.
type Stamp = (u64, u64, u64, i64, i64);

/// Certificate and key as they were read last.
struct Pair {
    stamps: Option<[Stamp; 2]>,
    config: Arc<ServerConfig>,
}

/// Certificate and key as they are on disk.
pub struct Credentials {
    files: config::Tls,
    pair: Mutex<Pair>,
}

impl Credentials {
    /// Reads them.
    ///
    /// # Errors
    /// If a file cannot be read, the key may be read by others, or the two do not fit together.
    pub fn load(files: &config::Tls) -> Result<Self, TlsError> {
        let stamps = stamps(files);
        let config = read(files)?;
        Ok(Self { files: files.clone(), pair: Mutex::new(Pair { stamps, config }) })
    }

    /// What holds now; reads again what has changed.
    fn now(&self) -> Arc<ServerConfig> {
        let stamps = stamps(&self.files);
        let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        if pair.stamps != stamps {
            match read(&self.files) {
                Ok(config) => {
                    tracing::info!(cert = %self.files.cert.display(), "the certificate was replaced");
                    pair.config = config;
                }
                Err(error) => tracing::warn!(%error, "the certificate stays as it was"),
            }
            pair.stamps = stamps;
        }
        Arc::clone(&pair.config)
    }
}

/// Nothing if a file is missing.
fn stamps(files: &config::Tls) -> Option<[Stamp; 2]> {
    let stamp = |path: &Path| {
        let found = fs::metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
    };
    Some([stamp(&files.cert)?, stamp(&files.key)?])
}

fn read(files: &config::Tls) -> Result<Arc<ServerConfig>, TlsError> {
    let config::Tls { cert, key } = files;
    let chain = fs::read(cert).map_err(|source| TlsError::Read { path: cert.clone(), source })?;
    let pem = |path: &PathBuf, what| {
        let path = path.clone();
        move |source| TlsError::Pem { path, what, source }
    };
    let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(pem(cert, "certificate"))?;
    let secret = read_secret("key", key, KEY_BYTES_MAX)?;
    let secret = PrivateKeyDer::from_pem_slice(&secret).map_err(pem(key, "key"))?;
    let fit = |source| TlsError::Pair { cert: cert.clone(), key: key.clone(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(fit)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(fit)?;
    config.alpn_protocols = vec![PROTOCOL.into()];
    Ok(Arc::new(config))
}

/// A TCP listener whose connections begin with a handshake.
pub struct TlsListener {
    listener: TcpListener,
    credentials: Arc<Credentials>,
    limit: Duration,
}

impl TlsListener {
    /// Shows `credentials` to those who come; their handshake may take as long as `limit`.
    pub fn new(listener: TcpListener, credentials: Credentials, limit: Duration) -> Self {
        Self { listener, credentials: Arc::new(credentials), limit }
    }
}

impl Listener for TlsListener {
    type Stream = TlsStream<TcpStream>;

    async fn accept(&self) -> io::Result<Opening<Self::Stream>> {
        let opening = Listener::accept(&self.listener).await?;
        let (credentials, limit) = (Arc::clone(&self.credentials), self.limit);
        Ok(Box::pin(async move {
            let stream = opening.await?;
            // It looks at files.
            let config = spawn_blocking(move || credentials.now()).await?;
            timeout(limit, TlsAcceptor::from(config).accept(stream)).await?
        }))
    }
}
