//! What the operator configures: where the daemon listens, which virtual machines there are, where snapshots may lie, and
//! how much is allowed. Only read at start.

use std::fs;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use axum::http::uri::Authority;
use livesnap_control::policy::BUFFER_BYTES_MIN;
use serde::Deserialize;

use super::book::{Bounds, Shutdown};
use super::budget::Budget;
use super::discovery::Pattern;
use super::name::{NAME_RULE, is_name};
use super::schedule::{Names, Schedule};

/// How often a schedule may want a snapshot.
const EVERY_MIN: Duration = Duration::from_secs(1);
const EVERY_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// The daemon's configuration; packaging/livesnap.toml explains each key.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The Unix socket of the API.
    pub socket: PathBuf,
    /// Where metrics are served over TCP, besides the socket: an address of this host alone.
    pub metrics_listen: Option<SocketAddr>,
    /// Where the daemon keeps what has to survive a reboot.
    pub state_dir: PathBuf,
    /// Where it is kept what has to be put back should livesnap be killed.
    pub runtime_dir: PathBuf,
    /// Directories below which snapshots may lie.
    pub destinations: Vec<PathBuf>,
    /// Snapshots at the same time.
    pub running_max: usize,
    /// Operations that wait for their turn.
    pub queued_max: usize,
    /// Ended operations that are remembered.
    pub remembered_max: usize,
    /// What all snapshots that run share.
    pub budget: Budget,
    /// What becomes of running snapshots when the daemon is told to end.
    pub shutdown: Shutdown,
    /// What clients may take.
    pub http: HttpLimits,
    /// Where browsers reach the daemon, if they do.
    pub tcp: Option<Tcp>,
    /// Where QMP sockets of further virtual machines are looked for.
    pub discover: Vec<Pattern>,
    /// Seconds after which virtual machines are looked for, and at, again.
    pub look_seconds: u64,
    /// The virtual machines.
    pub vm: Vec<Vm>,
    /// Which snapshots are taken without being asked for.
    pub schedule: Vec<Schedule>,
}

/// What clients may take.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpLimits {
    /// Connections at the same time; more wait.
    pub connections_max: usize,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Bytes of a request's line and headers.
    pub header_bytes_max: usize,
    /// Seconds that a request's headers, and then its body, may take to arrive.
    pub read_seconds_max: u64,
    /// Seconds that a client may ask to wait for an operation's end.
    pub wait_seconds_max: u64,
}

/// Where the daemon also listens, for browsers and for clients that cannot use its Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// Address and port.
    pub listen: SocketAddr,
    /// A file with the token that callers must send.
    pub token_file: Option<PathBuf>,
    /// Names under which it is reached, besides the address.
    #[serde(default)]
    pub names: Vec<String>,
    /// What it shows to those who come from other hosts; then it takes nothing that is not encrypted.
    pub tls: Option<Tls>,
}

/// Certificate and key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificate, and those that lead to a known one.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Tcp {
    /// An address of this host alone, where nobody is asked who he is.
    pub const fn plain(listen: SocketAddr) -> Self {
        Self { listen, token_file: None, names: Vec::new(), tls: None }
    }
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Its QMP socket.
    pub qmp: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/run/livesnap/livesnap.sock".into(),
            metrics_listen: None,
            state_dir: "/var/lib/livesnap".into(),
            runtime_dir: "/run/livesnap".into(),
            destinations: vec!["/var/lib/livesnap/snapshots".into()],
            running_max: 1,
            queued_max: 16,
            remembered_max: 1000,
            budget: Budget::default(),
            shutdown: Shutdown::Abort,
            http: HttpLimits::default(),
            tcp: None,
            discover: Vec::new(),
            look_seconds: 30,
            vm: Vec::new(),
            schedule: Vec::new(),
        }
    }
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            body_bytes_max: 64 << 10,
            header_bytes_max: 16 << 10,
            read_seconds_max: 10,
            wait_seconds_max: 300,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its text.
    #[error("the configuration {} is not understood: {}", path.display(), source.to_string().trim_end())]
    Text {
        /// Which file.
        path: PathBuf,
        /// Where, and why.
        source: Box<toml::de::Error>,
    },
    /// A name that could be mistaken for something else in a path or a label.
    #[error("{name:?} cannot be the name of a virtual machine or a schedule: use {NAME_RULE}")]
    Name {
        /// The name.
        name: String,
    },
    /// Two of a name.
    #[error(
        "two virtual machines, or two schedules, are named {name}: give each a name of its own"
    )]
    Twice {
        /// The name.
        name: String,
    },
    /// A relative path.
    #[error("{} is not an absolute path without '..': write it out", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// Whoever reaches the host could take snapshots.
    #[error(
        "tcp.listen is {address}, which other hosts reach: give tcp.tls and tcp.token_file, or name a loopback address such as 127.0.0.1:9465"
    )]
    Unprotected {
        /// The address.
        address: SocketAddr,
    },
    /// Whoever reaches the host could read of its virtual machines.
    #[error(
        "metrics_listen is {address}, which other hosts reach: name a loopback address such as 127.0.0.1:9464, or have Prometheus ask tcp.listen with TLS and the token"
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// No host is called so.
    #[error(
        "{name:?} in tcp.names cannot be the name of a host: give one as it stands in a URL, without a port"
    )]
    HostName {
        /// The name.
        name: String,
    },
    /// A schedule that could not be kept.
    #[error("schedule {name}: {problem}")]
    Schedule {
        /// The schedule.
        name: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Nothing could ever be done.
    #[error("{key} is {value}, so nothing could ever be done: allow at least {least}")]
    TooLittle {
        /// The limit.
        key: &'static str,
        /// Its value.
        value: u64,
        /// Its least value.
        least: u64,
    },
}

impl Config {
    /// Reads a file, or takes the defaults.
    ///
    /// # Errors
    /// If it cannot be read, or says what makes no sense.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let read = |source| ConfigError::Read { path: path.into(), source };
        let text = fs::read_to_string(path).map_err(read)?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Text { path: path.into(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        // Each must be able to have a buffer that can be forecast.
        let buffers_min = BUFFER_BYTES_MIN.saturating_mul(self.running_max as u64);
        let buffers = self.budget.buffer_bytes.unwrap_or(buffers_min);
        for (key, value, least) in [
            ("budget.buffer_bytes", buffers, buffers_min),
            ("running_max", self.running_max as u64, 1),
            ("queued_max", self.queued_max as u64, 1),
            ("look_seconds", self.look_seconds, 1),
            ("http.connections_max", self.http.connections_max as u64, 1),
            ("http.body_bytes_max", self.http.body_bytes_max as u64, 1 << 10),
            // The least that the HTTP library takes.
            ("http.header_bytes_max", self.http.header_bytes_max as u64, 8 << 10),
        ] {
            if value < least {
                return Err(ConfigError::TooLittle { key, value, least });
            }
        }
        for (number, vm) in self.vm.iter().enumerate() {
            if !is_name(&vm.name) {
                return Err(ConfigError::Name { name: vm.name.clone() });
            }
            if self.vm[..number].iter().any(|other| other.name == vm.name) {
                return Err(ConfigError::Twice { name: vm.name.clone() });
            }
        }
        self.check_schedules()?;
        if let Some(address) = self.metrics_listen.filter(|address| !address.ip().is_loopback()) {
            return Err(ConfigError::NotLoopback { address });
        }
        if let Some(tcp) = &self.tcp {
            let is_protected = tcp.tls.is_some() && tcp.token_file.is_some();
            if !tcp.listen.ip().is_loopback() && !is_protected {
                return Err(ConfigError::Unprotected { address: tcp.listen });
            }
            if let Some(name) = tcp.names.iter().find(|name| !is_host(name)) {
                return Err(ConfigError::HostName { name: name.clone() });
            }
        }
        let own = [&self.socket, &self.state_dir, &self.runtime_dir];
        let sockets = self.vm.iter().map(|vm| &vm.qmp);
        let token = self.tcp.iter().filter_map(|tcp| tcp.token_file.as_ref());
        let tls = self.tcp.iter().filter_map(|tcp| tcp.tls.as_ref());
        let tls = tls.flat_map(|tls| [&tls.cert, &tls.key]);
        let mut paths = self.destinations.iter().chain(own).chain(sockets).chain(token).chain(tls);
        match paths.find(|path| !is_plain(path)) {
            Some(path) => Err(ConfigError::Path { path: path.clone() }),
            None => Ok(()),
        }
    }

    fn check_schedules(&self) -> Result<(), ConfigError> {
        for (number, schedule) in self.schedule.iter().enumerate() {
            let name = &schedule.name;
            if !is_name(name) {
                return Err(ConfigError::Name { name: name.clone() });
            }
            if self.schedule[..number].iter().any(|other| other.name == *name) {
                return Err(ConfigError::Twice { name: name.clone() });
            }
            let failed = |problem| Err(ConfigError::Schedule { name: name.clone(), problem });
            if !(EVERY_MIN..=EVERY_MAX).contains(&schedule.every) {
                return failed("every is not between a second and a year: give such a time".into());
            }
            if schedule.jitter.is_some_and(|jitter| jitter > schedule.every) {
                return failed("jitter is longer than every: give a shorter time".into());
            }
            if let Err(error) = schedule.policy.check() {
                return failed(error.to_string());
            }
            // What is found may have any name.
            let is_nobody = |names: &&Names| !self.vm.iter().any(|vm| names.has(&vm.name));
            if schedule.vms.is_empty() {
                return failed("vms names no virtual machine: name one".into());
            }
            if self.discover.is_empty()
                && let Some(names) = schedule.vms.iter().find(is_nobody)
            {
                return failed(format!(
                    "there is no virtual machine {names}: configure one, or discover"
                ));
            }
        }
        Ok(())
    }

    /// How much is allowed at once.
    pub const fn bounds(&self) -> Bounds {
        let &Self { running_max, queued_max, remembered_max, budget, .. } = self;
        Bounds { running_max, queued_max, remembered_max, budget }
    }
}

/// Whether a path is absolute and says where it leads.
fn is_plain(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|part| matches!(part, Component::ParentDir))
}

/// Whether a name may stand as the host in a URL: that of a host, or an address, of version 6 in brackets.
fn is_host(name: &str) -> bool {
    Authority::try_from(name).is_ok_and(|authority| authority.host() == name)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    const EXAMPLE: &str = include_str!("../../../packaging/livesnap.toml");

    #[test]
    fn the_example_says_the_defaults() {
        let config: Config = toml::from_str(EXAMPLE).unwrap();
        config.check().unwrap();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn the_example_has_every_key() {
        // Each key that is misspelt is told with all that there are.
        let keys_of = |table: &str| {
            let wrong = format!("{table}\nno-such-key = 1");
            let error = toml::from_str::<Config>(&wrong).unwrap_err().to_string();
            let (_, known) =
                error.split_once("expected one of").or(error.split_once("expected")).unwrap();
            known.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
        };
        for table in ["", "[http]", "[tcp]", "[budget]", "[[vm]]", "[[schedule]]"] {
            let keys = keys_of(table);
            assert!(keys.len() >= 2, "{table}: {keys:?}");
            for key in keys {
                let stands = EXAMPLE.lines().any(|line| {
                    // What is off by default is a remark.
                    let line = line.strip_prefix("# ").unwrap_or(line);
                    line.strip_prefix(&key).is_some_and(|rest| rest.starts_with(" = "))
                        || line == format!("[{key}]")
                        || line == format!("[[{key}]]")
                });
                assert!(stands, "{key} of {table:?}");
            }
        }
    }

    #[test]
    fn a_schedule_is_read() {
        let text =
            "discover = ['/run/*/qmp.sock']\n[[schedule]]\nname = 'daily'\nvms = ['vm1', 'web-*']
            every = '1d'\nkeep = 7\nverify = true\njitter = '2h 30m'\n[schedule.policy]\nmin_cpu_ratio = 0.5";
        let config: Config = toml::from_str(text).unwrap();
        config.check().unwrap();
        let [schedule] = &config.schedule[..] else { panic!("{config:?}") };
        assert_eq!(schedule.every, Duration::from_secs(24 * 3600));
        assert_eq!(schedule.jitter, Some(Duration::from_secs(9000)));
        assert_eq!((schedule.kept(), schedule.verify), (Some(("daily".into(), 7)), true));
        assert_eq!(schedule.policy.min_cpu_ratio, Some(0.5));
        assert!(schedule.is_for("web-2") && !schedule.is_for("db"));
    }

    #[test]
    fn a_schedule_that_could_not_be_kept_is_refused() {
        let schedule = |name: &str, every: &str, vms: &str, more: &str| {
            format!("[[schedule]]\nname = '{name}'\nvms = [{vms}]\nevery = '{every}'\n{more}\n")
        };
        let twice = schedule("a", "1h", "'*'", "").repeat(2);
        for (text, word) in [
            (schedule("../a", "1h", "'*'", ""), "name"),
            (schedule("a", "0s", "'*'", ""), "a second"),
            (schedule("a", "1000y", "'*'", ""), "a year"),
            (schedule("a", "1h", "'*'", "jitter = '2h'"), "jitter"),
            (schedule("a", "soon", "'*'", ""), "number"),
            (schedule("a", "1h", "'*'", "keep = 0"), "keep"),
            (schedule("a", "1h", "'*'", "policy.min_cpu_ratio = 2.0"), "min_cpu_ratio"),
            (schedule("a", "1h", "'*'", "policy.no_such_key = 2.0"), "no_such_key"),
            (schedule("a", "1h", "", ""), "vms"),
            (schedule("a", "1h", "'vm*1*'", ""), "single"),
            (schedule("a", "1h", "'*', 'vm2'", ""), "no virtual machine vm2"),
            (schedule("a", "1h", "'web-*'", ""), "no virtual machine web-*"),
            (twice, "two"),
        ] {
            let text = format!("[[vm]]\nname = 'vm1'\nqmp = '/a'\n{text}");
            let config = toml::from_str::<Config>(&text).map_err(|error| error.to_string());
            let error = config.and_then(|config| config.check().map_err(|error| error.to_string()));
            let error = error.unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, word) in [
            ("running_max = 0", "running_max"),
            ("http.header_bytes_max = 100", "header_bytes_max"),
            ("running_max = 2\nbudget.buffer_bytes = 70000000", "budget.buffer_bytes"),
            ("budget.bandwidth_bytes_per_second = 0", "nonzero"),
            ("sockets = '/a'", "unknown field"),
            ("discover = ['/run/qmp']", "one '*'"),
            ("shutdown = 'now'", "unknown variant"),
            ("socket = 'here'", "absolute"),
            ("tcp.listen = '9464'", "socket address"),
            ("tcp.listen = '0.0.0.0:9464'", "tcp.tls and tcp.token_file"),
            ("tcp.listen = '[::]:9464'\ntcp.token_file = '/a'", "tcp.tls"),
            (
                "tcp.listen = '192.0.2.1:9464'\ntcp.tls = { cert = '/a', key = '/b' }",
                "tcp.token_file",
            ),
            ("tcp.listen = '[::1]:9464'\ntcp.tls = { cert = '/a' }", "key"),
            ("tcp.listen = '[::1]:9464'\ntcp.tls = { cert = '/a', key = 'b' }", "absolute"),
            ("tcp.listen = '[::1]:9464'\ntcp.names = ['a b']", "host"),
            ("tcp.listen = '[::1]:9464'\ntcp.names = ['a:80']", "without a port"),
            ("tcp.listen = '[::1]:9464'\ntcp.names = ['']", "host"),
            ("tcp.token_file = '/a'", "listen"),
            ("tcp.listen = '[::1]:9464'\ntcp.token_file = 'a'", "absolute"),
            ("metrics_listen = '0.0.0.0:9464'", "loopback"),
            ("metrics_listen = '[2001:db8::1]:9464'", "loopback"),
            ("metrics_listen = 'localhost:9464'", "socket address"),
            ("destinations = ['/backup/../etc']", "absolute"),
            ("[[vm]]\nname = '../a'\nqmp = '/a'", "name"),
            ("[[vm]]\nname = 'a'\nqmp = '/a'\n[[vm]]\nname = 'a'\nqmp = '/b'", "two"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("config.toml");
            fs::write(&path, text).unwrap();
            let error = Config::load(Some(&path)).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
