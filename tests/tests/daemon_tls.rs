//! The daemon's TCP listener with TLS, and OpenSSL as its client: an implementation that shares nothing with the daemon's.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use livesnap_tests::daemon::Daemon;
use livesnap_tests::poll_until;

const LIMIT: Duration = Duration::from_secs(60);
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Makes a certificate for `name` and its key, `cert.pem` and `key.pem` in `dir`, and puts both in the place of earlier ones.
fn certify(dir: &Path, name: &str) {
    let [cert, key] = ["cert", "key"].map(|name| dir.join(format!("{name}.new")));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    openssl.args(["-nodes", "-days", "2", "-subj", "/CN=livesnap test", "-addext"]);
    openssl
        .arg(format!("subjectAltName=DNS:{name}"))
        .arg("-out")
        .arg(&cert)
        .arg("-keyout")
        .arg(&key);
    let made = openssl.output().unwrap();
    assert!(made.status.success(), "{made:?}");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    fs::rename(cert, dir.join("cert.pem")).unwrap();
    fs::rename(key, dir.join("key.pem")).unwrap();
}

/// What a client gets that trusts `cert.pem` in `dir` for `name`, or why not.
fn ask(
    daemon: &Daemon,
    dir: &Path,
    name: &str,
    head: &str,
    more: &[&str],
) -> Result<String, String> {
    let mut client = Command::new("openssl");
    client.args(["s_client", "-quiet", "-verify_return_error", "-verify_hostname", name]);
    client.args(["-servername", name, "-connect"]).arg(daemon.tcp().unwrap().to_string());
    client.arg("-CAfile").arg(dir.join("cert.pem")).args(more);
    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = client.spawn().unwrap();
    // It may have ended before it was told anything.
    let _ = write!(child.stdin.as_mut().unwrap(), "{head}\r\nConnection: close\r\n\r\n");
    let output = child.wait_with_output().unwrap();
    let [out, err] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    if out.starts_with("HTTP/1.1 ") { Ok(out) } else { Err(err) }
}

fn status(answer: Result<String, String>) -> String {
    answer.unwrap()["HTTP/1.1 ".len()..].chars().take(3).collect()
}

#[test]
fn other_hosts_are_let_in_by_tls_and_token_alone() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let dir = dir.path();
    certify(dir, "host.example");
    fs::write(dir.join("token"), TOKEN).unwrap();
    fs::set_permissions(dir.join("token"), Permissions::from_mode(0o600)).unwrap();
    let [cert, key, token] = ["cert.pem", "key.pem", "token"].map(|name| dir.join(name));
    let tls = format!("tls = {{ cert = {cert:?}, key = {key:?} }}");
    let token = format!("token_file = {token:?}");
    // All addresses, of which the client uses loopback.
    let start = |more: &str| {
        let tcp = format!("[tcp]\nlisten = \"0.0.0.0:0\"\nnames = [\"host.example\"]\n{more}");
        Daemon::serve(dir, &[], &format!("http.read_seconds_max = 2\n{tcp}\n"))
    };
    for without in [&token, &tls, &String::new()] {
        let refused = start(without).unwrap_err().to_string();
        assert!(refused.contains("tcp.tls and tcp.token_file"), "{refused}");
    }
    fs::set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    let refused = start(&format!("{tls}\n{token}")).unwrap_err().to_string();
    assert!(refused.contains("can be read by others"), "{refused}");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(dir.join("log")).unwrap();

    let daemon = start(&format!("{tls}\n{token}")).unwrap();
    let get = |host: &str, token: &str| {
        format!("GET /vms HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}")
    };
    let right = get("host.example:9465", TOKEN);
    let by_name = |head: &str, more: &[&str]| ask(&daemon, dir, "host.example", head, more);
    assert!(by_name(&right, &[]).unwrap().contains("\"vms\":[]"));
    assert_eq!(status(by_name(&get("host.example", "wrong"), &[])), "401");
    assert_eq!(status(by_name("GET /vms HTTP/1.1\r\nHost: host.example", &[])), "401");
    assert_eq!(status(by_name(&get("rebound.example", TOKEN), &[])), "421");
    assert_eq!(status(by_name(&right, &["-tls1_2"])), "200");
    by_name(&right, &["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"]).unwrap_err();
    let other = ask(&daemon, dir, "other.example", &right, &[]).unwrap_err();
    assert!(other.contains("hostname mismatch"), "{other}");

    // Who is not encrypted is hung up on, and so is who says nothing; neither is answered.
    let address = ("127.0.0.1", daemon.tcp().unwrap().port());
    for said in [&b"GET /vms HTTP/1.1\r\nHost: host.example\r\n\r\n"[..], b""] {
        let mut plain = TcpStream::connect(address).unwrap();
        plain.set_read_timeout(Some(LIMIT)).unwrap();
        plain.write_all(said).unwrap();
        let mut answer = Vec::new();
        plain.read_to_end(&mut answer).unwrap();
        assert!(!answer.starts_with(b"HTTP"), "{}", answer.escape_ascii());
    }

    // Files that do not fit together change nothing; a new pair holds from the next connection on.
    let first = fs::read(&cert).unwrap();
    fs::copy(&cert, dir.join("first.pem")).unwrap();
    fs::write(&cert, "no certificate").unwrap();
    let trusting = ["-CAfile", dir.join("first.pem").to_str().unwrap()].map(str::to_owned);
    let trusting = trusting.each_ref().map(String::as_str);
    assert_eq!(status(by_name(&right, &trusting)), "200");
    certify(dir, "new.example");
    assert_ne!(fs::read(&cert).unwrap(), first);
    assert_eq!(status(ask(&daemon, dir, "new.example", &right, &[])), "200");
    by_name(&right, &trusting).unwrap_err();
    poll_until("the replacement is logged", LIMIT, || {
        Ok(daemon.log().contains("was replaced").then_some(()))
    })
    .unwrap();
    assert!(!daemon.log().contains(TOKEN), "it would stand in logs");
    assert_eq!(daemon.get("/healthz").unwrap().status, 200);
}
