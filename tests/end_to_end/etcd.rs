//! A real etcd of a test's own, that can be killed and started again; and our client of it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use highwater::config::Config;
use highwater::config::coordination::CoordinationConfig;
use highwater::demo::port::ReservedPort;
use highwater::etcd::{Change, Compare};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fixture::{eventually, watch_over};

pub struct Etcd {
    clients: ReservedPort,
    peers: ReservedPort,
    directory: tempfile::TempDir,
    /// A certificate and its key, for https.
    tls: Option<(PathBuf, PathBuf)>,
    /// The process, and what kills it should we be killed.
    process: Mutex<(Child, Child)>,
}

/// Where the program is: `make test` has unpacked it where the machine has none.
fn program() -> PathBuf {
    let unpacked = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target/etcd/usr/bin/etcd"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|directory| directory.join("etcd"));
    let found = installed.chain([unpacked]).find(|program| program.exists());
    found.expect("there is no etcd: run .ci/setup, which `make test` does")
}

impl Etcd {
    pub async fn start() -> Etcd {
        Etcd::start_with(None).await
    }

    async fn start_with(tls: Option<(PathBuf, PathBuf)>) -> Etcd {
        let (clients, peers) = (ReservedPort::claim().unwrap(), ReservedPort::claim().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let process = Mutex::new(run(&directory, clients.number(), peers.number(), tls.as_ref()));
        let etcd = Etcd { clients, peers, directory, tls, process };
        etcd.wait_ready().await;
        etcd
    }

    /// Where it answers.
    pub fn port(&self) -> u16 {
        self.clients.number()
    }

    /// As a power cut would.
    pub fn kill(&self) {
        let mut process = self.process.lock().unwrap();
        process.0.kill().unwrap();
        process.0.wait().unwrap();
    }

    /// After [`kill`](Self::kill), with what it had on disk.
    pub async fn start_again(&self) {
        {
            let mut process = self.process.lock().unwrap();
            process.1.kill().unwrap();
            process.1.wait().unwrap();
            let (clients, peers) = (self.clients.number(), self.peers.number());
            *process = run(&self.directory, clients, peers, self.tls.as_ref());
        }
        self.wait_ready().await;
    }

    async fn wait_ready(&self) {
        match self.tls {
            None => {
                eventually("etcd answers", || async { self.is_healthy().await.unwrap_or(false) }).await;
            }
            Some(_) => {
                eventually("etcd listens", || async {
                    tokio::net::TcpStream::connect(("127.0.0.1", self.port())).await.is_ok()
                })
                .await;
            }
        }
    }

    /// One request to the gateway, as an operator would make it.
    async fn post(&self, path: &str, body: &str) {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port())).await.unwrap();
        let request =
            format!("POST {path} HTTP/1.0\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{path}: {answer}");
    }

    async fn is_healthy(&self) -> std::io::Result<bool> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port())).await?;
        stream.write_all(b"GET /health HTTP/1.0\r\nHost: x\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer.contains(r#""health":"true""#))
    }
}

fn run(
    directory: &tempfile::TempDir,
    clients: u16,
    peers: u16,
    tls: Option<&(PathBuf, PathBuf)>,
) -> (Child, Child) {
    let log = std::fs::File::options().create(true).append(true).open(directory.path().join("log")).unwrap();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let (clients, peers) = (format!("{scheme}://127.0.0.1:{clients}"), format!("http://127.0.0.1:{peers}"));
    let mut command = Command::new(program());
    if let Some((certificate, key)) = tls {
        command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
    }
    let process = command
        .args(["--name", "e", "--log-level", "error", "--logger", "zap"])
        .arg("--data-dir")
        .arg(directory.path().join("data"))
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("e={peers}")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let watcher = watch_over(&process, directory.path());
    (process, watcher)
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let process = self.process.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for child in [&mut process.0, &mut process.1] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn config(scheme: &str, etcd: &Etcd, more: &str) -> CoordinationConfig {
    let endpoint = format!("{scheme}://127.0.0.1:{}", etcd.port());
    let text = format!(
        "control: {{ user: u }}\nnodes: [ {{ name: a, host: h }} ]\nfailover:\n  coordination: {{ kind: etcd, \
         endpoints: [ '{endpoint}' ], prefix: /x, name: p{more} }}"
    );
    Config::parse(&text, "f.yaml", &|_| None).unwrap().failover.coordination.unwrap()
}

fn put(key: &str, value: &str) -> Change {
    Change::Put(key.to_owned(), value.to_owned(), None)
}

#[tokio::test]
async fn what_is_written_on_a_condition_is_written_if_it_holds_and_ends_with_its_lease() {
    let etcd = Etcd::start().await;
    let client = highwater::etcd::Etcd::new(&config("http", &etcd, "")).unwrap();
    let free = [Compare::Created("/x/leader".to_owned(), 0)];
    let (lease, ttl) = client.grant(Duration::from_secs(2)).await.unwrap();
    assert_eq!(ttl, 2);
    let change = [Change::Put("/x/leader".to_owned(), "p".to_owned(), Some(lease))];
    let first = client.transaction(&free, &change, "/x/").await.unwrap();
    assert!(first.done && first.after.entries[0].created == first.after.revision, "{first:?}");
    let second = client.transaction(&free, &[put("/x/leader", "q")], "/x/").await.unwrap();
    assert!(!second.done && second.after.entries == first.after.entries, "{second:?}");
    let leads = Compare::Created("/x/leader".to_owned(), first.after.revision);
    let new = Compare::Modified("/x/record".to_owned(), 0);
    let written =
        client.transaction(&[leads.clone(), new], &[put("/x/record", "1")], "/x/record").await.unwrap();
    assert_eq!(written.after.entries[0].modified, written.after.revision);
    let stale = Compare::Modified("/x/record".to_owned(), written.after.revision - 1);
    let late =
        client.transaction(&[leads.clone(), stale], &[put("/x/record", "0")], "/x/record").await.unwrap();
    assert_eq!((late.done, late.after.entries[0].value.as_str()), (false, "1"));
    assert_eq!(client.keep_alive(lease).await.unwrap(), Some(2));
    // Nobody says that it lives, and its key is gone.
    eventually("the lease ends", || async { client.range("/x/leader").await.unwrap().entries.is_empty() })
        .await;
    assert_eq!(client.keep_alive(lease).await.unwrap(), None);
    let gone = client.transaction(&[leads], &[put("/x/record", "2")], "/x/record").await.unwrap();
    assert_eq!((gone.done, gone.after.entries[0].value.as_str()), (false, "1"));
    etcd.kill();
    assert!(client.range("/x/").await.is_err());
    etcd.start_again().await;
    eventually("it is asked again", || async { client.range("/x/").await.is_ok() }).await;
    assert_eq!(client.range("/x/").await.unwrap().entries.len(), 1);
}

#[tokio::test]
async fn a_user_logs_in_and_nobody_else_is_told_anything() {
    let etcd = Etcd::start().await;
    etcd.post("/v3/auth/user/add", r#"{"name":"root","password":"pw"}"#).await;
    etcd.post("/v3/auth/role/add", r#"{"name":"root"}"#).await;
    etcd.post("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#).await;
    etcd.post("/v3/auth/enable", "{}").await;
    let client = |more| highwater::etcd::Etcd::new(&config("http", &etcd, more)).unwrap();
    let root = client(", user: root, password: pw");
    root.transaction(&[], &[put("/x/record", "1")], "/x/").await.unwrap();
    assert_eq!(root.range("/x/").await.unwrap().entries.len(), 1);
    for other in ["", ", user: root, password: no"] {
        let error = client(other).range("/x/").await.unwrap_err().to_string();
        assert!(error.starts_with("etcd at 127.0.0.1:") && !error.contains("password: no"), "{error}");
    }
    // The token of before counts no more.
    etcd.kill();
    etcd.start_again().await;
    eventually("it logs in again", || async { root.range("/x/").await.is_ok() }).await;
}

#[tokio::test]
async fn https_is_spoken_to_whom_the_certificate_is_of() {
    let directory = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let etcd = Etcd::start_with(Some((certificate.clone(), key))).await;
    let trusting = format!(", ca: '{}'", certificate.display());
    let client = |scheme, more: &str| highwater::etcd::Etcd::new(&config(scheme, &etcd, more)).unwrap();
    let trusts = client("https", &trusting);
    eventually("it answers", || async { trusts.range("/x/").await.is_ok() }).await;
    trusts.transaction(&[], &[put("/x/record", "1")], "/x/").await.unwrap();
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(&certificate, other.cert.pem()).unwrap();
    assert!(client("https", &trusting).range("/x/").await.is_err(), "any certificate will do");
    assert!(client("http", "").range("/x/").await.is_err());
}
