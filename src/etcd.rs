//! A client of etcd's, as far as coordination needs it: leases, a range of keys, transactions. It speaks the JSON gateway
//! of the v3 API (`/v3/...`, etcd 3.4 and later) over HTTP.
//!
//! Promises: each request ends within `failover.coordination.timeout`; reads are linearizable; an error of anything but
//! a read says nothing about whether it took effect. Deliberately does not: retry, watch, or know what the keys mean.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::config::coordination::{CoordinationConfig, Endpoint};
use crate::config::{NodeTlsConfig, NodeTlsMode, Secret};
use crate::net::{HttpsConnector, NodeTls, TlsError};

/// No answer is longer.
const MAX_ANSWER: usize = 16 << 20;

/// What went wrong: with whom, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdError(String);

impl fmt::Display for EtcdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for EtcdError {}

/// A lease's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseId(i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// The revision that made it.
    pub created: u64,
    /// The revision that changed it last.
    pub modified: u64,
}

/// Keys under a prefix, all at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// etcd's revision then.
    pub revision: u64,
    /// In the order of their names.
    pub entries: Vec<Entry>,
}

/// What must hold for a transaction to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was made by this revision; 0: there is none.
    Created(String, u64),
    /// The key was changed last by this revision; 0: there is none.
    Modified(String, u64),
}

/// What a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a key, that ends with the lease.
    Put(String, String, Option<LeaseId>),
    /// Removes it.
    Delete(String),
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// What was to hold did: it was done.
    pub done: bool,
    /// The keys under the prefix that was asked for, after it; its revision is the transaction's.
    pub after: Entries,
}

/// One connection to one of etcd's members, made anew when it fails.
pub struct Etcd {
    endpoints: Vec<Endpoint>,
    /// Which is asked.
    current: AtomicUsize,
    limit: Duration,
    login: Option<(String, Secret)>,
    tls: Option<HttpsConnector>,
    connection: Mutex<Connection>,
}

#[derive(Default)]
struct Connection {
    sender: Option<SendRequest<Full<Bytes>>>,
    /// What the login was answered with.
    token: Option<String>,
}

impl Etcd {
    /// Not connected yet. `Err`: the root certificates cannot be read.
    pub fn new(config: &CoordinationConfig) -> Result<Etcd, TlsError> {
        let tls = match config.endpoints.iter().any(|endpoint| endpoint.tls) {
            true => {
                let config = NodeTlsConfig { mode: NodeTlsMode::VerifyFull, ca: config.ca.clone() };
                Some(NodeTls::new(&config)?.https())
            }
            false => None,
        };
        Ok(Etcd {
            endpoints: config.endpoints.clone(),
            current: AtomicUsize::new(0),
            limit: config.timeout,
            login: config.user.clone().zip(config.password.clone()),
            tls,
            connection: Mutex::default(),
        })
    }

    /// A new lease, and how many seconds etcd gives it.
    pub async fn grant(&self, ttl: Duration) -> Result<(LeaseId, u64), EtcdError> {
        let answer = self.call("/v3/lease/grant", &json!({ "TTL": ttl.as_secs().to_string() })).await?;
        let (id, ttl) = (number(&answer, "ID"), number(&answer, "TTL"));
        match (id, ttl) {
            (Some(id), Some(ttl)) if ttl > 0 => Ok((LeaseId(id), ttl as u64)),
            _ => Err(self.unreadable()),
        }
    }

    /// Keeps a lease alive for another term, whose seconds it answers; `None`: there is no such lease any more.
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<Option<u64>, EtcdError> {
        let answer = self.call("/v3/lease/keepalive", &json!({ "ID": lease.0.to_string() })).await?;
        let Some(result) = answer.get("result") else { return Err(self.unreadable()) };
        Ok(number(result, "TTL").filter(|ttl| *ttl > 0).map(|ttl| ttl as u64))
    }

    /// Ends a lease and what hangs on it.
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), EtcdError> {
        self.call("/v3/lease/revoke", &json!({ "ID": lease.0.to_string() })).await.map(drop)
    }

    /// The keys under `prefix`.
    pub async fn range(&self, prefix: &str) -> Result<Entries, EtcdError> {
        let answer = self.call("/v3/kv/range", &range_of(prefix)).await?;
        let revision = revision(&answer).ok_or_else(|| self.unreadable())?;
        Ok(Entries { revision, entries: self.entries(&answer)? })
    }

    /// Does `changes`, in order, if all of `holds` does, in one step; in either case the keys under `prefix` are
    /// read behind it.
    pub async fn transaction(
        &self,
        holds: &[Compare],
        changes: &[Change],
        prefix: &str,
    ) -> Result<Done, EtcdError> {
        let compare: Vec<Value> = holds.iter().map(comparison).collect();
        let range = json!({ "request_range": range_of(prefix) });
        let then: Vec<Value> = changes.iter().map(change).chain([range.clone()]).collect();
        let body = json!({ "compare": compare, "success": then, "failure": [range] });
        let answer = self.call("/v3/kv/txn", &body).await?;
        let revision = revision(&answer).ok_or_else(|| self.unreadable())?;
        let last = answer.get("responses").and_then(Value::as_array).and_then(|list| list.last());
        let range = last.and_then(|last| last.get("response_range")).ok_or_else(|| self.unreadable())?;
        let done = answer.get("succeeded").and_then(Value::as_bool).unwrap_or(false);
        Ok(Done { done, after: Entries { revision, entries: self.entries(range)? } })
    }

    fn entries(&self, range: &Value) -> Result<Vec<Entry>, EtcdError> {
        let Some(list) = range.get("kvs").and_then(Value::as_array) else { return Ok(Vec::new()) };
        list.iter().map(|kv| entry(kv).ok_or_else(|| self.unreadable())).collect()
    }

    fn unreadable(&self) -> EtcdError {
        self.error("its answer cannot be read")
    }

    fn error(&self, what: impl fmt::Display) -> EtcdError {
        let Endpoint { host, port, .. } = self.endpoint();
        EtcdError(format!("etcd at {host}:{port}: {what}"))
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoints[self.current.load(Ordering::Relaxed) % self.endpoints.len()]
    }

    /// One request and its answer. After a failure the connection is another one, to the next member.
    async fn call(&self, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let mut connection = self.connection.lock().await;
        let asked = timeout(self.limit, self.ask(&mut connection, path, body)).await;
        let result = asked.unwrap_or_else(|_| Err(self.error("no answer in time")));
        if result.is_err() {
            *connection = Connection::default();
            self.current.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    async fn ask(&self, connection: &mut Connection, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let open = connection.sender.as_ref().is_some_and(|sender| !sender.is_closed());
        if !open {
            *connection = Connection { sender: Some(self.connect().await?), token: None };
            if let Some((user, password)) = &self.login {
                let login = json!({ "name": user, "password": password.0 });
                let answer = self.send(connection, "/v3/auth/authenticate", &login).await?;
                let token = answer.get("token").and_then(Value::as_str).ok_or_else(|| self.unreadable())?;
                connection.token = Some(token.to_owned());
            }
        }
        self.send(connection, path, body).await
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, EtcdError> {
        let Endpoint { host, port, tls } = self.endpoint();
        let failed = |error: &dyn fmt::Display| self.error(error);
        let tcp = TcpStream::connect((host.as_str(), *port)).await.map_err(|error| failed(&error))?;
        tcp.set_nodelay(true).map_err(|error| failed(&error))?;
        let handshake = hyper::client::conn::http1::Builder::new();
        match self.tls.as_ref().filter(|_| *tls) {
            None => {
                let made = handshake.handshake(TokioIo::new(tcp)).await;
                let (sender, connection) = made.map_err(|error| failed(&error))?;
                tokio::spawn(connection);
                Ok(sender)
            }
            Some(connector) => {
                let tls = connector.connect(host, tcp).await.map_err(|error| failed(&error))?;
                let made = handshake.handshake(TokioIo::new(tls)).await;
                let (sender, connection) = made.map_err(|error| failed(&error))?;
                tokio::spawn(connection);
                Ok(sender)
            }
        }
    }

    async fn send(&self, connection: &mut Connection, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let failed = |error: &dyn fmt::Display| self.error(error);
        let Endpoint { host, port, .. } = self.endpoint();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(HOST, format!("{host}:{port}"))
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = &connection.token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).map_err(|e| failed(&e))?;
        let sender = connection.sender.as_mut().ok_or_else(|| self.error("no connection"))?;
        sender.ready().await.map_err(|error| failed(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| failed(&error))?.to_bytes();
        if status != StatusCode::OK {
            let said: Option<Value> = serde_json::from_slice(&body).ok();
            let said = said.as_ref().and_then(|said| said.get("message").or(said.get("error")));
            return Err(self.error(said.and_then(Value::as_str).unwrap_or(status.as_str())));
        }
        // A stream's one message ends with a line.
        serde_json::from_slice(&body).map_err(|_| self.unreadable())
    }
}

fn encoded(text: &str) -> String {
    BASE64.encode(text)
}

fn decoded(value: Option<&Value>) -> Option<String> {
    // What is empty is left out.
    let Some(text) = value.and_then(Value::as_str) else { return Some(String::new()) };
    String::from_utf8(BASE64.decode(text).ok()?).ok()
}

/// Numbers of 64 bits come as text; zero is left out.
fn number(value: &Value, key: &str) -> Option<i64> {
    match value.get(key) {
        None => Some(0),
        Some(Value::String(text)) => text.parse().ok(),
        Some(other) => other.as_i64(),
    }
}

fn positive(value: &Value, key: &str) -> Option<u64> {
    u64::try_from(number(value, key)?).ok()
}

fn revision(answer: &Value) -> Option<u64> {
    positive(answer.get("header")?, "revision")
}

/// All keys that begin with `prefix`: up to the next text of that length.
fn range_of(prefix: &str) -> Value {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    json!({ "key": encoded(prefix), "range_end": BASE64.encode(end) })
}

fn entry(kv: &Value) -> Option<Entry> {
    Some(Entry {
        key: decoded(kv.get("key"))?,
        value: decoded(kv.get("value"))?,
        created: positive(kv, "create_revision")?,
        modified: positive(kv, "mod_revision")?,
    })
}

fn comparison(compare: &Compare) -> Value {
    match compare {
        Compare::Created(key, at) => json!({
            "key": encoded(key), "target": "CREATE", "result": "EQUAL", "create_revision": at.to_string()
        }),
        Compare::Modified(key, at) => json!({
            "key": encoded(key), "target": "MOD", "result": "EQUAL", "mod_revision": at.to_string()
        }),
    }
}

fn change(change: &Change) -> Value {
    match change {
        Change::Put(key, value, lease) => {
            let lease = lease.map_or(0, |lease| lease.0).to_string();
            json!({ "request_put": { "key": encoded(key), "value": encoded(value), "lease": lease } })
        }
        Change::Delete(key) => json!({ "request_delete_range": { "key": encoded(key) } }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_gateway_leaves_out_is_zero_or_empty() {
        let kv = json!({ "key": encoded("/x/record"), "create_revision": "7", "mod_revision": "9" });
        let found = entry(&kv).unwrap();
        assert_eq!(
            found,
            Entry { key: "/x/record".to_owned(), value: String::new(), created: 7, modified: 9 }
        );
        assert_eq!(number(&json!({}), "TTL"), Some(0));
        assert_eq!(number(&json!({ "TTL": "5" }), "TTL"), Some(5));
        assert_eq!(revision(&json!({ "header": { "revision": "12" } })), Some(12));
        assert_eq!(revision(&json!({})), None);
    }

    #[test]
    fn a_prefix_ends_where_the_next_one_begins() {
        assert_eq!(range_of("/x/")["range_end"], json!(encoded("/x0")));
    }
}
