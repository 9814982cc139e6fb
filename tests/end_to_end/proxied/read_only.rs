//! What `target_session_attrs` finds on either port, and what the read-only one is.

use highwater::demo::port::ReservedPort;

use crate::fixture::*;

async fn with_both_ports(cluster: &Cluster) -> (Proxy, ReservedPort) {
    let port = ReservedPort::claim().unwrap();
    let overrides =
        format!("listen_read_only: 127.0.0.1:{}\nfailover: {{ pause_timeout: 2s }}", port.number());
    let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
    (Proxy::start_with(cluster, options).await, port)
}

/// Which of `ports` libpq takes, in this order: what the server there says of itself; or its complaint.
async fn found(cluster: &Cluster, ports: &[u16], attrs: &str) -> Result<String, String> {
    let mut command = cluster.program_command("psql", ports[0]);
    command.env("PGHOST", vec!["127.0.0.1"; ports.len()].join(","));
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    command.env("PGPORT", ports).env("PGTARGETSESSIONATTRS", attrs);
    command.args(["-XAtc", "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')"]);
    let output = run(command, "").await;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

const PRIMARY: &str = "f|off";
const STANDBY: &str = "t|on";

#[tokio::test]
async fn target_session_attrs_finds_one_primary_and_one_standby() {
    let cluster = Cluster::start(1).await;
    let (proxy, read_only) = with_both_ports(&cluster).await;
    let (rw, ro) = (proxy.port(), read_only.number());
    // The port for all: as one server that takes writes.
    for (attrs, expected) in [
        ("any", Some(PRIMARY)),
        ("read-write", Some(PRIMARY)),
        ("primary", Some(PRIMARY)),
        ("prefer-standby", Some(PRIMARY)),
        ("read-only", None),
        ("standby", None),
    ] {
        assert_eq!(found(&cluster, &[rw], attrs).await.ok().as_deref(), expected, "{attrs} on the main port");
    }
    // Both: libpq takes the one that fits, whichever is named first.
    for (attrs, expected) in [
        ("read-write", PRIMARY),
        ("primary", PRIMARY),
        ("read-only", STANDBY),
        ("standby", STANDBY),
        ("prefer-standby", STANDBY),
    ] {
        for ports in [[rw, ro], [ro, rw]] {
            assert_eq!(found(&cluster, &ports, attrs).await.as_deref(), Ok(expected), "{attrs} {ports:?}");
        }
    }
    assert_eq!(found(&cluster, &[ro, rw], "any").await.as_deref(), Ok(STANDBY));
    // Without a replica there is none to prefer.
    cluster.node(1).stop_fast().await.unwrap();
    eventually("the replica is seen to be gone", || async { proxy.usable_nodes().await == 1 }).await;
    assert_eq!(found(&cluster, &[ro, rw], "prefer-standby").await.as_deref(), Ok(PRIMARY));
    assert!(found(&cluster, &[ro, rw], "standby").await.is_err());
    let refused = RawClient::connect(ro).await.login("app", proxy.app()).await.unwrap_err();
    assert_eq!(refused.field(b'C').as_deref(), Some("57P03"));
}

#[tokio::test]
async fn the_read_only_port_is_a_standby_to_its_sessions() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let (proxy, read_only) = with_both_ports(&cluster).await;
    let mut client = RawClient::connect(read_only.number()).await;
    client.login("app", proxy.app()).await.unwrap();
    for name in ["in_hot_standby", "default_transaction_read_only"] {
        assert_eq!(client.parameters.get(name).map(String::as_str), Some("on"), "{name}");
    }
    let code = |answer: &[Message]| {
        answer.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
    };
    for write in [
        "INSERT INTO t VALUES (1) /* marked */",
        "CREATE TEMP TABLE mine (x int) /* marked */",
        "BEGIN READ WRITE /* marked */",
        "LISTEN marked",
    ] {
        let answer = client.ask(&query(write)).await;
        assert!(matches!(code(&answer).as_deref(), Some("25006" | "0A000")), "{write}: {answer:?}");
    }
    // The session's own way to a primary's default changes nothing about where it is.
    client.ask(&query("SET default_transaction_read_only = off")).await;
    assert_eq!(
        code(&client.ask(&query("INSERT INTO t VALUES (2) /* marked */")).await).as_deref(),
        Some("25006")
    );
    // A transaction, a prepared statement, a setting: all on the replica.
    for (unit, expected) in [
        (query("BEGIN"), "CZ"),
        (query("SELECT count(*) FROM t /* marked */"), "TDCZ"),
        (query("COMMIT"), "CZ"),
        (
            [parse("s", "SELECT pg_is_in_recovery() /* marked */"), bind("s", &[]), execute(), sync()]
                .concat(),
            "12DCZ",
        ),
        ([bind("s", &[]), execute(), sync()].concat(), "2DCZ"),
    ] {
        assert_eq!(tags(&client.ask(&unit).await), expected);
    }
    let ran = cluster.ran("marked");
    assert_eq!(ran[0], 0, "the primary ran something: {ran:?}");
    assert!(ran[1] >= 7, "{ran:?}");
}

#[tokio::test]
async fn the_read_only_port_never_goes_back_in_time_and_waits_for_what_was_written_before() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let (proxy, read_only) = with_both_ports(&cluster).await;
    let writer = proxy.connect().await;
    for round in 1..=50_i64 {
        writer.simple_query("INSERT INTO t VALUES (1)").await.unwrap();
        // A session that begins after a write sees it.
        let mut reader = RawClient::connect(read_only.number()).await;
        reader.login("app", proxy.app()).await.unwrap();
        let answer = reader.ask(&query("SELECT count(*) FROM t")).await;
        assert_eq!(answer[1].columns(), [Some(round.to_string())], "{answer:?}");
    }
}

#[tokio::test]
async fn a_promoted_replica_takes_no_writes_from_sessions_of_the_read_only_port() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let (proxy, read_only) = with_both_ports(&cluster).await;
    let mut client = RawClient::connect(read_only.number()).await;
    client.login("app", proxy.app()).await.unwrap();
    client.ask(&query("SET work_mem = '7MB'")).await;
    assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
    cluster.link(0).cut();
    cluster.node(1).promote().await.unwrap();
    // Whatever it is told, and whether it goes on: nothing of it is written.
    let mut told = Vec::new();
    for _ in 0..3 {
        if client.try_send(&query("INSERT INTO t VALUES (1)")).await.is_err() {
            break;
        }
        let answer = client.read_ready().await;
        assert!(answer.iter().any(|m| m.tag == b'E') || answer.is_empty(), "{answer:?}");
        told.extend(answer);
        if told.last().is_none_or(|m| m.tag != b'Z') {
            break;
        }
    }
    assert!(!told.is_empty());
    assert_eq!(cluster.node(1).query_text("SELECT count(*) FROM t").await.unwrap_or_default(), "0");
}
