//! The samplers' own connections: whatever happens to them, sessions go on reading what they wrote on replicas.

use highwater::demo::cluster::PrivateNode;

use super::login::with_tls;
use crate::fixture::*;

/// The process of the backend by which the proxy samples `node`; empty: there is none.
async fn sampler(node: &PrivateNode) -> String {
    let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'highwater' \
               AND query LIKE 'SELECT CASE WHEN pg_is_in_recovery() THEN ARRAY%'";
    node.query_text(sql).await.unwrap_or_default()
}

/// Waits until `node` is sampled, by another backend than `before`; which one.
async fn another_sampler(node: &PrivateNode, before: &str) -> String {
    eventually("the node is sampled by a new connection", || async {
        let now = sampler(node).await;
        !now.is_empty() && now != before
    })
    .await;
    sampler(node).await
}

async fn terminate(node: &PrivateNode, pid: &str) {
    node.execute(&format!("SELECT pg_terminate_backend({pid})")).await.unwrap();
}

/// A session that writes and reads it.
struct Writer {
    client: tokio_postgres::Client,
    written: i64,
}

impl Writer {
    async fn on(cluster: &Cluster, proxy: &Proxy) -> Writer {
        cluster.set_up("CREATE TABLE written (n bigint); INSERT INTO written VALUES (0)").await;
        Writer { client: proxy.connect().await, written: 0 }
    }

    /// Goes on until a read of what was written has run on a replica, which takes samples of both nodes.
    async fn goes_on(&mut self, proxy: &Proxy) {
        let on_replicas = || async {
            let metrics = proxy.metrics().await;
            metrics.sum("highwater_statements_total", &[("class", "read"), ("reason", "read")])
        };
        let before = on_replicas().await;
        let deadline = std::time::Instant::now() + PATIENCE;
        while on_replicas().await == before {
            assert!(std::time::Instant::now() < deadline, "no replica serves what was written");
            self.client.execute("UPDATE written SET n = n + 1", &[]).await.unwrap();
            self.written += 1;
            let read: i64 = self.client.query_one("SELECT n FROM written", &[]).await.unwrap().get(0);
            assert_eq!(read, self.written);
        }
    }
}

#[tokio::test]
async fn samples_go_on_however_their_connection_ends() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut writer = Writer::on(&cluster, &proxy).await;
    writer.goes_on(&proxy).await;
    for index in [0, 1, 0, 1] {
        let node = cluster.node(index);
        let before = another_sampler(node, "").await;
        terminate(node, &before).await;
        another_sampler(node, &before).await;
        writer.goes_on(&proxy).await;
    }
    // Its process killed, the server restarted in order, and the network silent for longer than an answer may take.
    let replica = cluster.node(1);
    let before = another_sampler(replica, "").await;
    replica.crash_backend().await.unwrap();
    let before = another_sampler(replica, &before).await;
    writer.goes_on(&proxy).await;
    replica.restart().await.unwrap();
    let before = another_sampler(replica, &before).await;
    writer.goes_on(&proxy).await;
    cluster.link(1).silence();
    eventually("the replica is not asked for reads any more", || async { proxy.usable_nodes().await == 1 })
        .await;
    cluster.link(1).heal();
    another_sampler(replica, &before).await;
    writer.goes_on(&proxy).await;
}

#[tokio::test]
async fn what_a_server_says_unasked_does_not_end_the_connection_that_samples() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut writer = Writer::on(&cluster, &proxy).await;
    writer.goes_on(&proxy).await;
    let (primary, replica) = (cluster.node(0), cluster.node(1));
    let before = [another_sampler(primary, "").await, another_sampler(replica, "").await];
    for zone in ["Asia/Tokyo", "UTC", "Europe/Rome"] {
        // Told to every session as ParameterStatus: in the middle of an answer, or while nothing was asked.
        for node in [primary, replica] {
            node.set("TimeZone", zone).await.unwrap();
        }
        writer.goes_on(&proxy).await;
    }
    assert_eq!([sampler(primary).await, sampler(replica).await], before);
}

#[tokio::test]
async fn samplers_log_in_by_whatever_password_method_a_node_asks_for() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut writer = Writer::on(&cluster, &proxy).await;
    let control = &cluster.roles().control;
    let rest = std::fs::read_to_string(cluster.node(0).data().join("pg_hba.conf")).unwrap();
    let methods = [
        ("password", "scram-sha-256"),
        ("md5", "md5"),
        ("trust", "scram-sha-256"),
        ("scram-sha-256", "scram-sha-256"),
    ];
    for (round, (method, encryption)) in methods.into_iter().enumerate() {
        for node in cluster.nodes() {
            let line = format!("host all {} 127.0.0.1/32 {method}\n", control.user);
            std::fs::write(node.data().join("pg_hba.conf"), line + &rest).unwrap();
            // The file is read with the settings.
            node.set("checkpoint_warning", &(40 + round).to_string()).await.unwrap();
        }
        let sql = format!(
            "SET password_encryption = '{encryption}'; ALTER ROLE {} PASSWORD '{}'",
            control.user, control.password
        );
        cluster.primary().execute(&sql).await.unwrap();
        cluster.wait_caught_up(0).await.unwrap();
        for node in cluster.nodes() {
            let before = another_sampler(node, "").await;
            terminate(node, &before).await;
            another_sampler(node, &before).await;
        }
        writer.goes_on(&proxy).await;
    }
}

#[tokio::test]
async fn after_a_change_of_the_control_users_password_samples_go_on_with_the_new_one() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut writer = Writer::on(&cluster, &proxy).await;
    writer.goes_on(&proxy).await;
    let (user, replica) = (&cluster.roles().control.user, cluster.node(1));
    let before = another_sampler(replica, "").await;
    cluster.primary().execute(&format!("ALTER ROLE {user} PASSWORD 'another'")).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    // What stands goes on; a new connection is refused until the proxy is told.
    writer.goes_on(&proxy).await;
    terminate(replica, &before).await;
    eventually("the old password is refused", || async {
        replica.log().contains(&format!("password authentication failed for user \"{user}\""))
    })
    .await;
    assert_eq!(sampler(replica).await, "");
    proxy.configure(&cluster, "control: { password: another }");
    assert!(proxy.reload().await);
    another_sampler(replica, &before).await;
    writer.goes_on(&proxy).await;
}

#[tokio::test]
async fn samplers_encrypt_as_configured() {
    for (mode, encrypted) in
        [("disable", "f"), ("allow", "t"), ("prefer", "t"), ("require", "t"), ("verify-full", "t")]
    {
        let (cluster, proxy, _files) = with_tls("prefer", mode).await;
        let mut writer = Writer::on(&cluster, &proxy).await;
        writer.goes_on(&proxy).await;
        for node in cluster.nodes() {
            let pid = another_sampler(node, "").await;
            let is =
                node.query_text(&format!("SELECT ssl FROM pg_stat_ssl WHERE pid = {pid}")).await.unwrap();
            assert_eq!(is, encrypted, "{mode}");
            terminate(node, &pid).await;
            another_sampler(node, &pid).await;
        }
        writer.goes_on(&proxy).await;
    }
}
