//! The fixture's own parts do what the tests believe of them.

use std::time::Duration;

use crate::fixture::*;

#[tokio::test]
async fn a_link_passes_bytes_until_it_is_silenced_or_cut_and_again_when_healed() {
    let cluster = Cluster::start(0).await;
    let login = &cluster.roles().app;
    let mut client = RawClient::connect(cluster.link(0).port()).await;
    client.login("app", login).await.unwrap();

    cluster.link(0).silence();
    client.send(&query("SELECT 1")).await;
    assert!(client.silent_for(Duration::from_millis(200)).await);
    cluster.link(0).heal();
    assert_eq!(tags(&client.read_ready().await), "TDCZ");

    cluster.link(0).cut();
    assert!(client.read_to_end().await.is_empty());
    eventually("connections are refused", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", cluster.link(0).port())).await.is_err()
    })
    .await;

    cluster.link(0).heal();
    eventually("connections are accepted", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", cluster.link(0).port())).await.is_ok()
    })
    .await;
    let mut client = RawClient::connect(cluster.link(0).port()).await;
    client.login("app", login).await.unwrap();
    assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
}

/// While a process is made it shares all sockets of the one that makes it, the closed ones too.
#[tokio::test]
async fn a_link_is_healed_while_other_tests_start_processes() {
    use std::os::unix::process::CommandExt;
    let cluster = Cluster::start(0).await;
    let link = cluster.link(0);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let starters: Vec<_> = (0..4)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // With an id it is forked, as servers are.
                    let uid = nix::unistd::getuid().as_raw();
                    std::process::Command::new("true").uid(uid).status().unwrap();
                }
            })
        })
        .collect();
    for _ in 0..200 {
        link.cut();
        eventually("connections are refused", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", link.port())).await.is_err()
        })
        .await;
        link.heal();
        eventually("connections are accepted", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", link.port())).await.is_ok()
        })
        .await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    starters.into_iter().for_each(|starter| starter.join().unwrap());
}

#[tokio::test]
async fn the_raw_client_speaks_the_protocol() {
    let cluster = Cluster::start_logging(0).await;
    let app = cluster.roles().app.clone();
    let port = cluster.primary().port();
    let mut client = RawClient::connect(port).await;
    client.login("app", &app).await.unwrap();
    assert_eq!(client.parameters["server_encoding"], "UTF8");

    let answer =
        client.ask(&[parse("", "SELECT $1::text, NULL"), bind("", &["x"]), execute(), sync()].concat()).await;
    assert_eq!(tags(&answer), "12DCZ");
    assert_eq!(answer[2].columns(), [Some("x".to_owned()), None]);
    assert_eq!(cluster.ran("$1::text"), [1]);

    client.send(&query("SELECT pg_sleep(60)")).await;
    // A cancel that comes before the statement does hits nothing.
    cluster
        .primary()
        .wait_for(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%sleep(60)'",
            "1",
        )
        .await
        .unwrap();
    client.cancel().await;
    let answer = client.read_ready().await;
    let error = answer.iter().find(|message| message.tag == b'E').unwrap();
    assert_eq!(error.field(b'C').as_deref(), Some("57014"));

    let mut wrong = app.clone();
    wrong.password = "wrong".into();
    let refused = RawClient::connect(port).await.login("app", &wrong).await.unwrap_err();
    assert_eq!(refused.field(b'C').as_deref(), Some("28P01"));
}

#[test]
fn metrics_are_read_with_their_labels() {
    let text = "# HELP a b\na{x=\"1\",y=\"q, r\"} 3\na{x=\"2\"} 4\nb 0.5\n";
    let metrics = Metrics::parse(text);
    assert_eq!(metrics.sum("a", &[]), 7.0);
    assert_eq!(metrics.sum("a", &[("x", "1")]), 3.0);
    assert_eq!(metrics.sum("a", &[("y", "q, r")]), 3.0);
    assert_eq!(metrics.sum("b", &[]), 0.5);
    assert_eq!(metrics.sum("c", &[]), 0.0);
}
