//! A headless Chromium and one page in it: tests see what people see.
//!
//! It is spoken to in the Chrome DevTools Protocol (chromedevtools.github.io/devtools-protocol) through two pipes:
//! messages of JSON, each ended by a zero byte. So there is no port that another process could connect to.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::poll_until;

const CHROMIUM: &str = "chromium-headless-shell";
/// The browser reads from descriptor 3 and writes to 4, which our pipes become. It says nothing on others.
const WITH_PIPES: &str = "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
/// A browser that does not answer for so long hangs; it shares the host with VMs.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A browser with one page; ended when dropped.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    requests: u64,
    session: Option<String>,
    is_loaded: bool,
    complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts it with an empty page of so many pixels.
    pub fn start(width: u32, height: u32) -> Result<Self> {
        let profile = tempfile::tempdir().context("cannot make a directory for the browser")?;
        let mut command = Command::new("sh");
        command.args(["-c", WITH_PIPES, "sh", CHROMIUM, "--remote-debugging-pipe"]);
        // Its sandbox cannot be set up as root, as which tests run. It sees our own page only.
        command.args([
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]);
        command.arg(format!("--window-size={width},{height}"));
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        // Its own group, so that all of its processes can be ended.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("cannot run sh")?;
        let to = child.stdin.take().context("the browser has no input")?;
        let output = child.stdout.take().context("the browser has no output")?;
        let (sender, from) = channel();
        // Ends with the browser, which has the other end of the pipe.
        std::thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { return };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            child,
            to,
            from,
            requests: 0,
            session: None,
            is_loaded: false,
            complaints: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// Goes to an address, and waits until all of it is there.
    pub fn open(&mut self, url: &str) -> Result<()> {
        self.is_loaded = false;
        let went = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(went.get("errorText").is_none(), "cannot open {url}: {}", went["errorText"]);
        while !self.is_loaded {
            let event = self.receive().with_context(|| format!("{url} is not loaded"))?;
            self.note(&event);
        }
        Ok(())
    }

    /// The value of an expression of JavaScript.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let parameters = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", parameters)?;
        let exception = answer.get("exceptionDetails");
        ensure!(exception.is_none(), "{expression} failed: {exception:?}");
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str, limit: Duration) -> Result<()> {
        let waited = poll_until(expression, limit, || {
            Ok((self.value(expression)? == Value::Bool(true)).then_some(()))
        });
        if waited.is_err() {
            let shown = self.value("document.body.innerText").unwrap_or_default();
            eprintln!("the page shows: {shown}\nand complains: {:?}", self.complaints);
        }
        waited
    }

    /// Presses and releases a key, by its name in `KeyboardEvent.key`.
    pub fn press(&mut self, key: &str) -> Result<()> {
        let (code, text) = match key {
            "Tab" => (9, None),
            "Enter" => (13, Some("\r")),
            "Escape" => (27, None),
            _ => bail!("the tests know no key {key}"),
        };
        let mut event = json!({"type": "keyDown", "key": key, "windowsVirtualKeyCode": code});
        if let Some(text) = text {
            event["text"] = text.into();
        }
        self.call("Input.dispatchKeyEvent", event)?;
        let up = json!({"type": "keyUp", "key": key, "windowsVirtualKeyCode": code});
        self.call("Input.dispatchKeyEvent", up)?;
        Ok(())
    }

    /// Types text.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// Gives the window another size, in pixels.
    pub fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let size =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size).map(drop)
    }

    /// Makes the page believe that its user prefers "light" or "dark".
    pub fn prefer(&mut self, scheme: &str) -> Result<()> {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features})).map(drop)
    }

    /// What the page looks like, all of it, as PNG.
    pub fn screenshot(&mut self) -> Result<Vec<u8>> {
        let size = self.call("Page.getLayoutMetrics", json!({}))?["cssContentSize"].take();
        let clip =
            json!({"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1});
        let parameters = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let shot = self.call("Page.captureScreenshot", parameters)?;
        let data = shot["data"].as_str().context("the browser sent no screenshot")?;
        BASE64_STANDARD.decode(data).context("the screenshot is not base64")
    }

    /// What the page complained of so far: errors, exceptions, and what its policy forbade.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Calls a method and returns its result.
    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.requests += 1;
        let mut request = json!({"id": self.requests, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        let mut bytes = request.to_string().into_bytes();
        bytes.push(0);
        self.to
            .write_all(&bytes)
            .with_context(|| format!("cannot send {method}: does {CHROMIUM} run here?"))?;
        loop {
            let mut message = self.receive().with_context(|| format!("no answer to {method}"))?;
            if message["id"] != self.requests {
                self.note(&message);
            } else if let Some(error) = message.get("error") {
                bail!("{method} failed: {error}");
            } else {
                return Ok(message["result"].take());
            }
        }
    }

    /// The browser's next message.
    fn receive(&self) -> Result<Value> {
        let message = self.from.recv_timeout(ANSWER_LIMIT);
        message.with_context(|| format!("the browser says nothing: does {CHROMIUM} run here?"))
    }

    /// Keeps of an event whether it tells of something wrong, or that the page is there.
    fn note(&mut self, event: &Value) {
        let parameters = &event["params"];
        let complaint = match event["method"].as_str() {
            Some("Page.loadEventFired") => {
                self.is_loaded = true;
                return;
            }
            Some("Runtime.exceptionThrown") => &parameters["exceptionDetails"],
            Some("Log.entryAdded") if parameters["entry"]["level"] == "error" => {
                &parameters["entry"]
            }
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        use rustix::process::{Pid, Signal, kill_process_group};

        // Fails only if all have ended already, which is what is wanted.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}
