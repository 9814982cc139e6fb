//! The first packets: what is negotiated, what encryption is let through, and that the rest is read as a
//! server reads it.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use crate::fixture::*;

/// What became of a login: its refusal, or what the session says of itself.
async fn outcome(port: u16, parameters: &[(&str, &str)], password: &str) -> Vec<String> {
    let mut client = RawClient::connect(port).await;
    if let Err(told) = client.login_with(parameters, password).await {
        return "VCM".bytes().map(|field| told.field(field).unwrap()).collect();
    }
    let mut said = Vec::new();
    for name in ["work_mem", "application_name", "client_encoding", "DateStyle", "search_path", "geqo"] {
        let answer = client.ask(&query(&format!("SHOW {name}"))).await;
        said.push(format!("{name} {:?}", answer[1].columns()));
    }
    let answer = client.ask(&query("SELECT current_database(), session_user, 'ä'")).await;
    said.push(format!("{answer:?}"));
    let told = ["client_encoding", "DateStyle", "application_name", "in_hot_standby", "is_superuser"];
    said.extend(told.map(|name| format!("{name}={:?}", client.parameters.get(name))));
    said
}

#[tokio::test]
async fn startup_parameters_mean_what_they_mean_to_the_server() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let app = proxy.app().clone();
    let user = ("user", app.user.as_str());
    let database = ("database", "app");
    for parameters in [
        &[user, database][..],
        &[user],
        &[database, user, ("database", "postgres")],
        &[("user", "nobody"), user, database],
        &[user, database, ("options", "-c work_mem=7MB -c application_name=a\\ b\\\\c --geqo=off")],
        &[user, database, ("options", "-c work_mem=7MB"), ("work_mem", "9MB")],
        &[user, database, ("work_mem", "7MB"), ("work_mem", "9MB")],
        &[user, database, ("work_mem", "9MB"), ("work_mem", "7MB")],
        &[user, database, ("Work_Mem", "9MB"), ("work_mem", "7MB")],
        &[user, database, ("work_mem", "much"), ("work_mem", "7MB")],
        &[user, database, ("application_name", "one"), ("application_name", "two")],
        &[user, database, ("client_encoding", "LATIN1"), ("DateStyle", "german")],
        &[user, database, ("client_encoding", "nonsense")],
        &[user, database, ("application_name", "smörgås\tbord")],
        &[user, database, ("options", "-c nonsense=1")],
        &[user, database, ("options", "-c search_path")],
        &[user, database, ("nonsense", "1")],
        &[user, database, ("work_mem", "much")],
        &[user, database, ("port", "1")],
        &[database],
        &[("user", ""), database],
    ] {
        let direct = outcome(cluster.primary().port(), parameters, &app.password).await;
        let proxied = outcome(proxy.port(), parameters, &app.password).await;
        assert_eq!(proxied, direct, "{parameters:?}");
    }
}

#[tokio::test]
async fn a_startup_packet_that_is_too_long_gets_no_answer() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    for port in [cluster.primary().port(), proxy.port()] {
        let mut client = RawClient::connect(port).await;
        let long = "x".repeat(10_000);
        let _ = client.try_send(&startup(&[("user", "app"), ("options", &long)])).await;
        assert_eq!(client.read_to_end().await, []);
    }
}

#[tokio::test]
async fn newer_protocols_are_agreed_on_and_long_keys_cancel() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let app = proxy.app().clone();
    for (version, options, key, negotiated) in [
        (3 << 16, None, 4, None),
        (3 << 16 | 2, None, 32, None),
        // What libpq 18 greases with.
        (3 << 16 | 9999, None, 32, Some(&b"\0\x03\0\x02\0\0\0\0"[..])),
        (3 << 16, Some(("_pq_.x", "1")), 4, Some(b"\0\x03\0\0\0\0\0\x01_pq_.x\0")),
    ] {
        let mut parameters = vec![("user", app.user.as_str()), ("database", "app")];
        parameters.extend(options);
        let mut client = proxy.raw().await;
        client.login_by(&startup_of(version, &parameters), &app.password).await.unwrap();
        assert_eq!(client.key.len(), 4 + key, "{version:x}");
        assert_eq!(client.negotiated.as_ref().map(|message| message.body.as_slice()), negotiated);
        client.send(&query("SELECT pg_sleep(3600)")).await;
        let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        cluster.primary().wait_for(sleeping, "1").await.unwrap();
        // A key that is cut short is another key.
        cancel(proxy.port(), &client.key[..client.key.len() - 1]).await;
        cancel(proxy.port(), &client.key[..8 - usize::from(key == 4)]).await;
        assert_eq!(cluster.primary().query_text(sleeping).await.unwrap(), "1");
        client.cancel().await;
        let answer = client.read_ready().await;
        assert_eq!(answer.iter().find(|m| m.tag == b'E').unwrap().field(b'C').as_deref(), Some("57014"));
    }
    for version in [2 << 16, 4 << 16] {
        let mut client = proxy.raw().await;
        let told = client.login_by(&startup_of(version, &[("user", "app")]), "").await.unwrap_err();
        assert_eq!(told.field(b'C').as_deref(), Some("0A000"));
    }
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// TLS from the first byte, as `sslnegotiation=direct` has it, naming these protocols.
async fn direct_tls(port: u16, root: &std::path::Path, protocols: &[&str]) -> std::io::Result<Tls> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(root).unwrap()).unwrap();
    let provider = Arc::new(crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

/// What a startup packet is answered, by its first byte; `None`: the connection ends.
async fn first_answer(mut tls: Tls) -> Option<u8> {
    let _ = tls.write_all(&startup(&[("user", "app"), ("database", "app")])).await;
    let _ = tls.flush().await;
    let answer = tokio::time::timeout(PATIENCE, tls.read_u8()).await.expect("neither an answer nor the end");
    answer.ok()
}

#[tokio::test]
async fn direct_tls_is_let_in_with_the_name_of_the_protocol_only() {
    let (_cluster, proxy, files) = super::login::with_tls("prefer", "disable").await;
    let root = files.path().join("cert.pem");
    let tls = direct_tls(proxy.port(), &root, &["postgresql"]).await.unwrap();
    assert_eq!(first_answer(tls).await, Some(b'R'));
    let tls = direct_tls(proxy.port(), &root, &["http/1.1", "postgresql"]).await.unwrap();
    assert_eq!(first_answer(tls).await, Some(b'R'));
    // Without a name the handshake succeeds and nothing else; with another one, not even that.
    if let Ok(tls) = direct_tls(proxy.port(), &root, &[]).await {
        assert_eq!(first_answer(tls).await, None);
    }
    assert!(direct_tls(proxy.port(), &root, &["http/1.1"]).await.is_err());
}

#[tokio::test]
async fn a_cancel_request_over_tls_cancels() {
    let (cluster, proxy, files) = super::login::with_tls("prefer", "require").await;
    let mut client = proxy.raw_login().await;
    client.send(&query("BEGIN; SELECT pg_sleep(3600)")).await;
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    cluster.primary().wait_for(sleeping, "1").await.unwrap();
    let mut tls = direct_tls(proxy.port(), &files.path().join("cert.pem"), &["postgresql"]).await.unwrap();
    let length = u32::try_from(client.key.len() + 8).unwrap().to_be_bytes();
    tls.write_all(&[&length[..], &80_877_102_u32.to_be_bytes(), &client.key].concat()).await.unwrap();
    tls.flush().await.unwrap();
    let answer = client.read_ready().await;
    assert_eq!(answer.iter().find(|m| m.tag == b'E').unwrap().field(b'C').as_deref(), Some("57014"));
}
