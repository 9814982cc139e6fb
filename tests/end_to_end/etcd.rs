//! A real etcd of a test's own, that can be killed and started again.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use highwater::demo::port::ReservedPort;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fixture::eventually;

pub struct Etcd {
    clients: ReservedPort,
    peers: ReservedPort,
    directory: tempfile::TempDir,
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
        let (clients, peers) = (ReservedPort::claim().unwrap(), ReservedPort::claim().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let process = Mutex::new(run(&directory, clients.number(), peers.number()));
        let etcd = Etcd { clients, peers, directory, process };
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
            *process = run(&self.directory, self.clients.number(), self.peers.number());
        }
        self.wait_ready().await;
    }

    async fn wait_ready(&self) {
        eventually("etcd answers", || async { self.is_healthy().await.unwrap_or(false) }).await;
    }

    async fn is_healthy(&self) -> std::io::Result<bool> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port())).await?;
        stream.write_all(b"GET /health HTTP/1.0\r\nHost: x\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer.contains(r#""health":"true""#))
    }
}

fn run(directory: &tempfile::TempDir, clients: u16, peers: u16) -> (Child, Child) {
    let log = std::fs::File::options().create(true).append(true).open(directory.path().join("log")).unwrap();
    let (clients, peers) = (format!("http://127.0.0.1:{clients}"), format!("http://127.0.0.1:{peers}"));
    let process = Command::new(program())
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
    let watcher = Command::new("/bin/sh")
        .args(["-c", "trap '' INT TERM HUP; read -r _; kill -KILL $1; rm -rf \"$2\"", "watcher"])
        .arg(process.id().to_string())
        .arg(directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
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
