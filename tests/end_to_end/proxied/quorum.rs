//! Strong reads that ask a quorum of replicas instead of the primary.

use crate::fixture::*;

/// Strong reads by b and c; statements wait so long for the primary.
pub(super) fn quorum(pause_timeout: &str) -> String {
    format!(
        "failover: {{ check_interval: 100ms, check_timeout: 10s, pause_timeout: {pause_timeout} }}
consistency:
  level: strong
  max_lag: 1h
  quorum_reads: {{ replicas: [ b, c ], applied_by: 1 }}
  primary_read_wait: 10s"
    )
}

async fn value(client: &mut RawClient) -> Result<String, String> {
    let answer = client.ask(&query("SELECT x FROM t")).await;
    match answer.iter().find(|message| message.tag == b'E') {
        Some(error) => Err(error.field(b'C').unwrap()),
        None => Ok(answer[1].columns()[0].clone().unwrap()),
    }
}

#[tokio::test]
async fn a_strong_read_shows_what_was_acknowledged_when_the_primary_is_gone() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (0)").await;
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &quorum("3s"), ..ProxyOptions::default() })
            .await;
    cluster.primary().set("synchronous_commit", "remote_apply").await.unwrap();
    cluster.primary().set("synchronous_standby_names", "ANY 1 (b, c)").await.unwrap();
    let (mut writer, mut reader) = (proxy.raw_login().await, proxy.raw_login().await);
    let mut plain = proxy.raw_login().await;
    plain.ask(&query("SET highwater.quorum_read = off")).await;
    for client in [&mut writer, &mut reader, &mut plain] {
        assert_eq!(value(client).await, Ok("0".to_owned()));
    }
    // A read is known as one once the catalog facts are there, and they come from the primary.
    let deadline = std::time::Instant::now() + PATIENCE;
    while proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) == 0.0 {
        assert!(std::time::Instant::now() < deadline, "no read ran on a replica");
        assert_eq!(value(&mut reader).await, Ok("0".to_owned()));
    }
    // One of the two has it, whichever that is; the other stands still.
    cluster.node(2).pause_replay().await.unwrap();
    for x in 1..=3 {
        let answer = writer.ask(&query(&format!("UPDATE t SET x = {x}"))).await;
        assert_eq!(tags(&answer), "CZ", "{answer:?}");
    }
    // What the one that stands still has shown last can be placed by nobody but the primary: see docs/CONSISTENCY.md.
    for client in [&mut writer, &mut reader] {
        assert_eq!(value(client).await, Ok("3".to_owned()));
    }
    cluster.primary().crash().await.unwrap();
    eventually("it is gone", || async {
        proxy.metrics().await.sum("highwater_node_up", &[("node", "a")]) == 0.0
    })
    .await;
    // Who has written, who has only read, and who comes now.
    let mut new = proxy.raw_login().await;
    for client in [&mut writer, &mut reader, &mut new] {
        assert_eq!(value(client).await, Ok("3".to_owned()), "{}", proxy.log());
    }
    // Without the quorum's word there is nobody who can say.
    assert_eq!(value(&mut plain).await, Err("57P03".to_owned()));
    // And with one replica of two there is no quorum.
    cluster.node(2).crash().await.unwrap();
    eventually("it is gone, too", || async {
        proxy.metrics().await.sum("highwater_node_up", &[("node", "c")]) == 0.0
    })
    .await;
    assert_eq!(value(&mut reader).await, Err("57P03".to_owned()));
}
