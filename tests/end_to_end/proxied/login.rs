//! Who gets in, and what the others are told: PostgreSQL's own codes and words.

use highwater::demo::cluster::{ClusterOptions, Login};

use crate::fixture::*;

/// Severity, SQLSTATE and message of a refused login.
fn said(refused: &Message) -> (String, String, String) {
    (refused.field(b'V').unwrap(), refused.field(b'C').unwrap(), refused.field(b'M').unwrap())
}

async fn refusal(port: u16, database: &str, user: &str, password: &str) -> (String, String, String) {
    let login = Login { user: user.into(), password: password.into() };
    let mut client = RawClient::connect(port).await;
    let refused = client.login(database, &login).await.expect_err("let in");
    assert!(client.read_to_end().await.is_empty(), "the connection goes on after a refusal");
    said(&refused)
}

#[tokio::test]
async fn a_refused_login_reads_as_on_the_server_itself() {
    let cluster = Cluster::start(1).await;
    for sql in [
        "CREATE ROLE no_login PASSWORD 'x'",
        "CREATE ROLE expired LOGIN PASSWORD 'x' VALID UNTIL '2001-01-01'",
        "CREATE ROLE no_password LOGIN",
        "CREATE ROLE outsider LOGIN PASSWORD 'x'",
        "CREATE DATABASE closed",
        "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
    ] {
        cluster.primary().execute(sql).await.unwrap();
    }
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    let app = &cluster.roles().app;
    for (case, database, user, password) in [
        ("wrong password", "app", "app", "wrong"),
        ("empty password", "app", "app", ""),
        ("unknown user", "app", "nobody_here", "x"),
        ("unknown database", "nowhere", "app", app.password.as_str()),
        ("may not log in", "app", "no_login", "x"),
        ("password expired", "app", "expired", "x"),
        ("no password set", "app", "no_password", "x"),
        ("may not connect", "closed", "outsider", "x"),
    ] {
        let direct = refusal(cluster.primary().port(), database, user, password).await;
        let proxied = refusal(proxy.port(), database, user, password).await;
        assert_eq!(proxied, direct, "{case}");
    }
}

#[tokio::test]
async fn the_log_says_why_a_password_that_may_be_right_was_refused_and_the_client_hears_nothing_of_it() {
    let cluster = Cluster::start(0).await;
    for sql in [
        "CREATE ROLE expired LOGIN PASSWORD 'x' VALID UNTIL '2001-01-01'",
        "CREATE ROLE no_password LOGIN",
        "SET password_encryption = 'md5'; CREATE ROLE old_style LOGIN PASSWORD 'x'",
    ] {
        cluster.primary().execute(sql).await.unwrap();
    }
    let proxy = Proxy::start(&cluster).await;
    for (user, why) in [
        ("expired", "the password has expired"),
        ("no_password", "the role has no password"),
        ("old_style", "the password is not stored as a SCRAM verifier"),
        ("nobody", "there is no such role"),
    ] {
        let words = format!("password authentication failed for user \"{user}\"");
        assert_eq!(refusal(proxy.port(), "app", user, "x").await.2, words);
        let said = |line: &str| line.contains(&words) && line.contains(why);
        eventually(why, || async { proxy.log().lines().any(said) }).await;
    }
    // Where it is only wrong, nothing more is said.
    refusal(proxy.port(), "app", "app", "wrong").await;
    let said = |line: &str| line.ends_with("password authentication failed for user \"app\"");
    eventually("it is told", || async { proxy.log().lines().any(said) }).await;
}

#[tokio::test]
async fn a_changed_password_counts_at_once() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut app = cluster.roles().app.clone();
    let before = proxy.connect_as("app", &app).await.unwrap();
    before.simple_query("SELECT 1").await.unwrap();
    cluster.primary().execute("ALTER ROLE app PASSWORD 'another'").await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let old = refusal(proxy.port(), "app", "app", &app.password).await;
    assert_eq!(old.1, "28P01");
    app.password = "another".into();
    let after = proxy.connect_as("app", &app).await.unwrap();
    after.simple_query("SELECT 1").await.unwrap();
    // A session that is in stays in.
    before.simple_query("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn one_client_too_many_is_told_so_and_the_place_is_free_again_after_a_leave() {
    let cluster = Cluster::start(0).await;
    let options = ProxyOptions { overrides: "max_clients: 3", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let mut inside = Vec::new();
    for _ in 0..3 {
        inside.push(proxy.raw_login().await);
    }
    let app = &cluster.roles().app;
    let refused = refusal(proxy.port(), "app", &app.user, &app.password).await;
    assert_eq!(refused, ("FATAL".into(), "53300".into(), "sorry, too many clients already".into()));
    let mut leaver = inside.pop().unwrap();
    leaver.send(&message(b'X', b"")).await;
    leaver.read_to_end().await;
    eventually("a place is free", || async {
        RawClient::connect(proxy.port()).await.login("app", app).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn listed_users_log_in_without_asking_the_server() {
    let cluster = Cluster::start(0).await;
    let app = &cluster.roles().app;
    let overrides = format!(
        "auth: {{ source: list, users: [ {{ name: {}, password: '{}' }} ] }}",
        app.user, app.password
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    proxy.connect().await.simple_query("SELECT 1").await.unwrap();
    assert_eq!(refusal(proxy.port(), "app", "postgres", "x").await.1, "28P01");
}

/// A certificate for 127.0.0.1 and localhost that nobody has signed: certificate and key, PEM.
pub fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// A cluster whose nodes have TLS, a proxy with `mode` towards clients and `node_mode` towards nodes.
pub async fn with_tls(mode: &str, node_mode: &str) -> (Cluster, Proxy, tempfile::TempDir) {
    let (cert, key) = certificate();
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("cert.pem"), &cert).unwrap();
    std::fs::write(files.path().join("key.pem"), &key).unwrap();
    let cluster = Cluster::start_with(ClusterOptions {
        replicas: 1,
        settings: vec![("ssl".into(), "on".into())],
        files: vec![("server.crt".into(), cert), ("server.key".into(), key)],
        ..ClusterOptions::default()
    })
    .await;
    let path = files.path().display();
    let overrides = format!(
        "client_tls: {{ mode: {mode}, cert: '{path}/cert.pem', key: '{path}/key.pem' }}\n\
         node_tls: {{ mode: {node_mode}, ca: '{path}/cert.pem' }}"
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy, files)
}

/// Whether psql gets in with this sslmode; the error's text if not.
async fn psql_with(
    cluster: &Cluster,
    proxy: &Proxy,
    sslmode: &str,
    root: &std::path::Path,
) -> Result<String, String> {
    let mut command = cluster.program_command("psql", proxy.port());
    command.env("PGSSLMODE", sslmode).env("PGSSLROOTCERT", root);
    command.args([
        "-XAt",
        "-c",
        "\\conninfo",
        "-c",
        "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    ]);
    let output = run(command, "").await;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[tokio::test]
async fn tls_reaches_from_the_client_to_the_node() {
    let (cluster, proxy, files) = with_tls("prefer", "verify-full").await;
    let root = files.path().join("cert.pem");
    for sslmode in ["require", "verify-full"] {
        let shown = psql_with(&cluster, &proxy, sslmode, &root).await.unwrap();
        assert!(shown.contains("SSL connection (protocol: TLSv1.3"), "{shown}");
        assert!(shown.lines().last().unwrap() == "t", "the way to the node is not encrypted: {shown}");
    }
    // SCRAM with channel binding, which is possible over TLS only.
    let mut command = cluster.program_command("psql", proxy.port());
    command.env("PGSSLMODE", "require").env("PGCHANNELBINDING", "require").args(["-XAtc", "SELECT 1"]);
    assert_eq!(success(&run(command, "").await), "1\n");
    let plain = psql_with(&cluster, &proxy, "disable", &root).await.unwrap();
    assert!(!plain.contains("SSL connection"), "{plain}");
}

#[tokio::test]
async fn where_tls_is_required_a_plain_client_is_refused() {
    let (cluster, proxy, files) = with_tls("require", "require").await;
    let root = files.path().join("cert.pem");
    assert!(psql_with(&cluster, &proxy, "require", &root).await.is_ok());
    let app = &cluster.roles().app;
    assert_eq!(refusal(proxy.port(), "app", &app.user, &app.password).await.1, "28000");
}

#[tokio::test]
async fn bytes_behind_an_ssl_request_are_not_taken_for_encrypted_ones() {
    let (_cluster, proxy, _files) = with_tls("prefer", "disable").await;
    let mut client = proxy.raw().await;
    let request = [8_u32.to_be_bytes(), 80_877_103_u32.to_be_bytes()].concat();
    client.send(&[request, startup(&[("user", "app")])].concat()).await;
    // Whatever the answer: nothing of the plain text may start a session.
    let mut seen = Vec::new();
    while let Some(byte) = client.read_byte().await {
        seen.push(byte);
        assert!(seen.len() < 4096);
    }
    assert!(!seen.windows(5).any(|bytes| bytes == b"SCRAM"), "{}", seen.escape_ascii());
}

#[tokio::test]
async fn without_tls_an_ssl_or_gss_request_is_answered_no_and_the_client_goes_on() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw().await;
    for code in [80_877_104_u32, 80_877_103] {
        client.send(&[8_u32.to_be_bytes(), code.to_be_bytes()].concat()).await;
        assert_eq!(client.read_byte().await, Some(b'N'));
    }
    client.login("app", &cluster.roles().app).await.unwrap();
}

#[tokio::test]
async fn who_speaks_before_an_encryption_request_is_answered_is_refused_whatever_the_answer_is() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    for (code, request) in [(80_877_104_u32, "GSSAPI encryption"), (80_877_103, "SSL")] {
        let mut client = proxy.raw().await;
        let mut packets = [8_u32.to_be_bytes(), code.to_be_bytes()].concat();
        packets.extend(startup(&[("user", "app"), ("database", "app")]));
        client.send(&packets).await;
        assert_eq!(client.read_byte().await, Some(b'N'));
        let told = client.read().await.unwrap();
        assert_eq!(told.field(b'C').as_deref(), Some("08P01"));
        let message = format!("received unencrypted data after {request} request");
        assert_eq!(told.field(b'M'), Some(message));
        assert!(client.read().await.is_none());
    }
}

#[tokio::test]
async fn logins_while_the_primary_crashes_wait_for_it_and_succeed() {
    let cluster = Cluster::start(0).await;
    let overrides = "{ failover: { pause_timeout: 60s }, auth: { login_timeout: 80s } }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    for round in 0..4 {
        // Each with a setting that no login has had: the server is asked what it has to say to them.
        let logins = (0..25).map(|number| {
            let (port, app) = (proxy.port(), proxy.app());
            let option = format!("-c geqo_threshold={}", 100 + round * 25 + number);
            async move {
                let mut client = RawClient::connect(port).await;
                let parameters = [("user", &*app.user), ("database", "app"), ("options", &*option)];
                client.login_with(&parameters, &app.password).await
            }
        });
        let crash = async {
            for _ in 0..2 {
                cluster.primary().crash_backend().await.unwrap();
            }
        };
        let (logins, ()) = tokio::join!(futures_util::future::join_all(logins), crash);
        if let Some(refused) = logins.into_iter().find_map(Result::err) {
            panic!("{:?} {:?}", refused.field(b'C'), refused.field(b'M'));
        }
    }
}

#[tokio::test]
async fn a_login_waits_for_a_node_no_longer_than_it_may() {
    let cluster = Cluster::start(0).await;
    let overrides = "failover: { pause_timeout: 1s }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let app = proxy.app();
    cluster.link(0).cut();
    let told = refusal(proxy.port(), "app", &app.user, &app.password).await;
    assert_eq!((&*told.0, &*told.1), ("FATAL", "57P03"), "{told:?}");
    let mut waits = RawClient::connect(proxy.port()).await;
    let (login, ()) = tokio::join!(waits.login("app", app), async {
        // The login is on its way, and there is nobody to ask.
        tokio::task::yield_now().await;
        cluster.link(0).heal();
    });
    login.unwrap();
}
