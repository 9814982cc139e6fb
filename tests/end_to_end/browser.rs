//! A headless Chromium, spoken to over its debugging pipes (`--remote-debugging-pipe`): no driver, no port.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;

use crate::fixture::PATIENCE;

/// The browser: the one that HIGHWATER_BROWSER names, or the machine's, if it has one.
pub fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("HIGHWATER_BROWSER") {
        let named = PathBuf::from(named);
        assert!(named.exists(), "HIGHWATER_BROWSER: there is no {}", named.display());
        return Some(named);
    }
    ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

/// One page of a browser of its own; gone when dropped.
pub struct Browser {
    process: tokio::process::Child,
    to: pipe::Sender,
    from: pipe::Receiver,
    unread: Vec<u8>,
    last: u64,
    session: Option<String>,
    /// What the page has complained of: its console's errors, what its policy refused, exceptions.
    pub complaints: Vec<String>,
    _files: tempfile::TempDir,
}

impl Browser {
    /// Starts it, with one empty page.
    pub async fn start(program: &Path) -> Browser {
        let files = tempfile::tempdir().unwrap();
        let [to, from] = ["to", "from"].map(|name| files.path().join(name));
        for path in [&to, &from] {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        // Both ways, so that opening does not wait for the other side.
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(&to).unwrap();
        let receiver = pipe::OpenOptions::new().read_write(true).open_receiver(&from).unwrap();
        let process = tokio::process::Command::new("sh")
            .arg("-c")
            .arg("exec \"$0\" \"$@\" 3<\"$TO\" 4>\"$FROM\"")
            .arg(program)
            // As root it has no sandbox; it sees no page but ours.
            .args([
                "--headless=new",
                "--no-sandbox",
                "--remote-debugging-pipe",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args(["--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--mute-audio"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .arg(format!("--user-data-dir={}", files.path().join("profile").display()))
            .env("TO", &to)
            .env("FROM", &from)
            .env("HOME", files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut browser = Browser {
            process,
            to: sender,
            from: receiver,
            unread: Vec::new(),
            last: 0,
            session: None,
            complaints: Vec::new(),
            _files: files,
        };
        let page = browser.ask("Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        let attached = browser.ask("Target.attachToTarget", attach).await;
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.ask(domain, json!({})).await;
        }
        browser
    }

    /// One command of the protocol, and its result.
    pub async fn ask(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut command = json!({ "id": self.last, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).await.unwrap();
        loop {
            let message = tokio::time::timeout(PATIENCE, self.message()).await;
            let message = message.unwrap_or_else(|_| panic!("the browser does not answer {method}"));
            if message["id"] == json!(self.last) {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
        }
    }

    async fn message(&mut self) -> Value {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.unread.drain(..=end).collect();
                let message: Value = serde_json::from_slice(&message[..end]).unwrap();
                self.hear(&message);
                return message;
            }
            let mut chunk = vec![0; 64 * 1024];
            let read = self.from.read(&mut chunk).await.unwrap();
            self.unread.extend_from_slice(&chunk[..read]);
        }
    }

    fn hear(&mut self, message: &Value) {
        let what = &message["params"];
        let complaint = match message["method"].as_str() {
            Some("Log.entryAdded") if what["entry"]["level"] == "error" => &what["entry"],
            Some("Runtime.exceptionThrown") => &what["exceptionDetails"],
            Some("Runtime.consoleAPICalled") if what["type"] == "error" => &what["args"],
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }

    /// Goes to `url` and waits until it is loaded.
    pub async fn open(&mut self, url: &str) {
        let gone = self.ask("Page.navigate", json!({ "url": url })).await;
        assert!(gone["errorText"].is_null(), "{url}: {gone}");
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            // A page may have gone on loading between two looks; one that is not there yet has no body.
            let state = self.evaluate("location.href + ' ' + document.readyState").await;
            if state.as_str().is_some_and(|s| s.starts_with(url) && s.ends_with("complete")) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{url} was not loaded: {state}");
        }
    }

    /// The value of an expression in the page.
    pub async fn evaluate(&mut self, expression: &str) -> Value {
        let result =
            self.ask("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true })).await;
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// A window of this size, light or dark.
    pub async fn window(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.ask("Emulation.setDeviceMetricsOverride", size).await;
        let media = json!({ "features": [ { "name": "prefers-color-scheme", "value": scheme } ] });
        self.ask("Emulation.setEmulatedMedia", media).await;
    }

    /// The whole page as a PNG in `file`.
    pub async fn screenshot(&mut self, file: &Path) {
        let shot = self.ask("Page.captureScreenshot", json!({ "captureBeyondViewport": true })).await;
        let png = base64::engine::general_purpose::STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        assert!(png.starts_with(b"\x89PNG"));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, png).unwrap();
    }

    /// Ends it, and waits until it is gone.
    pub async fn close(mut self) {
        self.session = None;
        self.ask("Browser.close", json!({})).await;
        tokio::time::timeout(PATIENCE, self.process.wait()).await.unwrap().unwrap();
    }
}
