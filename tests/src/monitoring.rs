//! Prometheus and Alertmanager as Debian has them, on loopback, with the files of `dashboards/`; and somebody who is told.
//!
//! Their times are shortened: what takes 5 s or a minute in production takes one here, and what is told for an hour half a
//! minute. Nothing else of the files is altered but addresses.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::daemon::{Answer, call_at};
use crate::poll_until;

/// A server that says nothing for so long hangs.
const LIMIT: Duration = Duration::from_secs(30);
/// Where the packages are unpacked.
const PACKAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/livesnap-monitoring");
/// Debian's Alertmanager reads a template below /usr/share. The bind mount is seen by this process only, which ends as the
/// program.
const IN_PLACE: &str = "mount --bind \"$1/usr/share\" /usr/share; shift; exec \"$@\"";
/// Where the files lie.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashboards");

/// One of the unpacked programs.
pub fn program(name: &str) -> PathBuf {
    Path::new(PACKAGES).join("usr/bin").join(name)
}

/// A process that is killed when dropped.
#[derive(Debug)]
struct Server(Child);

impl Server {
    /// Starts one of the unpacked programs, which find their packages' files where these would have been installed.
    fn start(dir: &Path, program: &str, arguments: &[String]) -> Result<Self> {
        let log =
            File::create(dir.join(format!("{program}.log"))).context("cannot create a log")?;
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-ec", IN_PLACE, "sh", PACKAGES])
            .arg(self::program(program))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot run unshare")?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A Prometheus with livesnap's rules, and its Alertmanager.
#[derive(Debug)]
pub struct Monitoring {
    _prometheus: Server,
    _alertmanager: Server,
    port: u16,
    alertmanager: SocketAddr,
}

impl Monitoring {
    /// Starts both in `dir`: scraping `target`, telling `receiver`.
    pub fn start(dir: &Path, target: SocketAddr, receiver: SocketAddr) -> Result<Self> {
        let (port, alertmanager_port) = (free_port()?, free_port()?);
        let alertmanager_address = SocketAddr::from((Ipv4Addr::LOCALHOST, alertmanager_port));
        copy(
            dir,
            "alertmanager/alertmanager.yml",
            &[
                ("127.0.0.1:9099", &receiver.to_string()),
                ("group_wait: 5s", "group_wait: 1s"),
                ("group_interval: 10s", "group_interval: 1s"),
                // Whoever is paged is so again and again, so that a page that stays away shows.
                ("repeat_interval: 1h", "repeat_interval: 1s"),
            ],
        )?;
        let addresses = [
            ("127.0.0.1:9464", target.to_string()),
            ("127.0.0.1:9093", alertmanager_address.to_string()),
            ("_interval: 5s", "_interval: 1s".to_owned()),
        ];
        let addresses = addresses.each_ref().map(|(from, to)| (*from, to.as_str()));
        copy(dir, "prometheus/prometheus.yml", &addresses)?;
        copy(dir, "prometheus/recordings.yml", &[])?;
        let times = [
            (" for: 1m", " for: 3s"),
            (" for: 2m", " for: 3s"),
            (" for: 5m", " for: 3s"),
            ("keep_firing_for: 5m", "keep_firing_for: 1s"),
            ("livesnap_verify_failures_total[1h]", "livesnap_verify_failures_total[30s]"),
        ];
        copy(dir, "prometheus/alerts.yml", &times)?;

        let path = |name: &str| dir.join(name).display().to_string();
        let alertmanager = Server::start(
            dir,
            "prometheus-alertmanager",
            &[
                format!("--config.file={}", path("alertmanager.yml")),
                format!("--storage.path={}", path("alertmanager")),
                format!("--web.listen-address={alertmanager_address}"),
                // Alone: it opens no port for others of its kind.
                "--cluster.listen-address=".to_owned(),
            ],
        )?;
        let prometheus = Server::start(
            dir,
            "prometheus",
            &[
                format!("--config.file={}", path("prometheus.yml")),
                format!("--storage.tsdb.path={}", path("prometheus")),
                format!("--web.listen-address=127.0.0.1:{port}"),
            ],
        )?;
        let monitoring = Self {
            _prometheus: prometheus,
            _alertmanager: alertmanager,
            port,
            alertmanager: alertmanager_address,
        };
        let log = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        poll_until("Alertmanager is ready", LIMIT, || {
            Ok(get(alertmanager_address, "/-/ready").ok().filter(|answer| answer.status == 200))
        })
        .with_context(|| log("prometheus-alertmanager.log"))?;
        poll_until("Prometheus has scraped livesnap", LIMIT, || {
            let up = monitoring.query("up{job=\"livesnap\"} == 1");
            Ok(up.ok().filter(|found| !found.is_empty()))
        })
        .with_context(|| log("prometheus.log"))?;
        Ok(monitoring)
    }

    /// What a query finds now.
    pub fn query(&self, expr: &str) -> Result<Vec<Value>> {
        self.ask("query", &[("query", expr)])
    }

    /// What a query finds from `start` to now, every second.
    pub fn range(&self, expr: &str, start: f64) -> Result<Vec<Value>> {
        let (start, end) = (start.to_string(), now().to_string());
        self.ask("query_range", &[("query", expr), ("start", &start), ("end", &end), ("step", "1")])
    }

    fn ask(&self, what: &str, parameters: &[(&str, &str)]) -> Result<Vec<Value>> {
        self.data(what, parameters)?["result"].as_array().cloned().context("no result")
    }

    fn data(&self, what: &str, parameters: &[(&str, &str)]) -> Result<Value> {
        let encoded: Vec<String> = parameters
            .iter()
            .map(|(name, value)| format!("{}={}", percent_encoded(name), percent_encoded(value)))
            .collect();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let answer = get(address, &format!("/api/v1/{what}?{}", encoded.join("&")))?.body;
        ensure!(answer["status"] == "success", "{parameters:?}: {answer}");
        Ok(answer["data"].clone())
    }

    /// Alertmanager's own words on each alert with these labels: all of its labels, and what inhibits it.
    pub fn alerts(&self, labels: &[(&str, &str)]) -> Result<Vec<Value>> {
        let filter = |(name, value): &(&str, &str)| {
            format!("filter={}", percent_encoded(&format!("{name}={value:?}")))
        };
        let filters: Vec<String> = labels.iter().map(filter).collect();
        let answer = get(self.alertmanager, &format!("/api/v2/alerts?{}", filters.join("&")))?.body;
        answer.as_array().cloned().with_context(|| format!("no alerts: {answer}"))
    }

    /// What a variable of a dashboard offers: the values of `label` in these series.
    pub fn label_values(&self, label: &str, series: &str) -> Result<Vec<Value>> {
        self.data(&format!("label/{label}/values"), &[("match[]", series)])?
            .as_array()
            .cloned()
            .context("no values")
    }
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// One who is told of alerts: a web server that takes what Alertmanager sends.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    messages: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Receiver {
    /// Listens; until the process ends.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
        let address = listener.local_addr().context("no address")?;
        let messages = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&messages);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A message that cannot be read is one that is missing, and the test fails for that.
                if let Ok(message) = take(stream) {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(message);
                }
            }
        });
        Ok(Self { address, messages })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every alert that it was told of so far, with the path it was sent to.
    #[must_use]
    pub fn alerts(&self) -> Vec<(String, Value)> {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let alerts = messages.iter().flat_map(|(path, message)| {
            let alerts = message["alerts"].as_array().cloned().unwrap_or_default();
            alerts.into_iter().map(move |alert| (path.clone(), alert))
        });
        alerts.collect()
    }
}

/// Reads one request, answers it, and returns its path and its body.
fn take(stream: TcpStream) -> Result<(String, Value)> {
    stream.set_read_timeout(Some(LIMIT)).context("cannot limit the time to read")?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).context("no request")?;
    let path = line.split(' ').nth(1).context("no path")?.to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).context("no header")?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().context("no length")?;
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).context("no body")?;
    reader.into_inner().write_all(b"HTTP/1.0 200 OK\r\n\r\n").context("cannot answer")?;
    Ok((path, serde_json::from_slice(&body).context("the body is no JSON")?))
}

/// The answer to a request for what is at `path`, in the older version of HTTP, whose answers are one piece.
fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    call_at(address, &format!("GET {path} HTTP/1.0\r\nHost: localhost"))
}

/// Copies a file of `dashboards/` to `dir`; each of `changes` must be in it.
fn copy(dir: &Path, name: &str, changes: &[(&str, &str)]) -> Result<()> {
    let path = Path::new(FILES).join(name);
    let mut text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for (from, to) in changes {
        ensure!(text.contains(from), "{} has no {from}", path.display());
        text = text.replace(from, to);
    }
    let to = dir.join(path.file_name().context("no name")?);
    fs::write(&to, text).with_context(|| format!("cannot write {}", to.display()))
}

/// A port that nobody listens on.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?;
    Ok(listener.local_addr().context("no address")?.port())
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}
