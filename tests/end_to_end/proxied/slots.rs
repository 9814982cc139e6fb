//! With `failover.slots.manage` whoever is promoted has the WAL that a standby lacks which was away.

use highwater::demo::cluster::ClusterOptions;

use super::failover::{TABLE, is_in, primary, started};
use crate::fixture::*;

const MANAGE: &str = "slots: { manage: true, warn_above: 32MiB }, check_interval: 100ms, allow_minority: true, min_failover_interval: 0s";

const SLOTS: &str =
    "SELECT coalesce(string_agg(slot_name, ' ' ORDER BY slot_name), '') FROM pg_replication_slots";

/// So many segments of WAL, each with a row in it.
async fn segments(cluster: &Cluster, node: usize, count: usize) {
    for _ in 0..count {
        cluster.node(node).execute("INSERT INTO t SELECT count(*) FROM t").await.unwrap();
        cluster.node(node).execute("SELECT pg_switch_wal()").await.unwrap();
    }
}

async fn text(cluster: &Cluster, node: usize, question: &str) -> String {
    cluster.node(node).query_text(question).await.unwrap()
}

/// A checkpoint of the primary, and then one of the standby, which takes away what no slot holds.
async fn checkpoints(cluster: &Cluster, primary: usize, standby: usize) {
    cluster.node(primary).execute("CHECKPOINT").await.unwrap();
    let end = text(cluster, primary, "SELECT pg_current_wal_lsn()").await;
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
    cluster.node(standby).wait_for(&replayed, "t").await.unwrap();
    cluster.node(standby).execute("CHECKPOINT").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_was_away_finds_what_it_lacks_on_the_new_primary() {
    let settings = [("wal_keep_size", "0"), ("min_wal_size", "32MB"), ("max_wal_size", "64MB")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let options = ClusterOptions { replicas: 2, settings, ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, MANAGE).await;
    for (node, slots) in [(0, "hw_b hw_c"), (1, "hw_c"), (2, "hw_b")] {
        cluster.node(node).wait_for(SLOTS, slots).await.unwrap();
    }
    // While all are well none stands still, on the primary or on a standby.
    let begun = text(&cluster, 0, "SELECT pg_current_wal_lsn()").await;
    segments(&cluster, 0, 6).await;
    let moved = format!("SELECT bool_and(restart_lsn > '{begun}') FROM pg_replication_slots");
    for node in 0..3 {
        cluster.node(node).wait_for(&moved, "t").await.unwrap();
    }

    // One is away while much is written: its slots hold that, everywhere.
    cluster.node(2).stop_fast().await.unwrap();
    let away = text(&cluster, 0, "SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    segments(&cluster, 0, 12).await;
    checkpoints(&cluster, 0, 1).await;
    let kept = format!("SELECT count(*) FROM pg_ls_waldir() WHERE right(name, 16) = right('{away}', 16)");
    assert_eq!(text(&cluster, 1, &kept).await, "1", "a standby has thrown away what another one lacks");
    eventually("it is told that slots hold much", || async {
        proxy.metrics().await.sum("highwater_slot_wal_bytes", &[]) > 100e6
            && proxy.log().contains("a replication slot holds much WAL")
    })
    .await;
    cluster.node(0).crash().await.unwrap();
    eventually("b takes over", || async {
        is_in(&proxy, "healthy").await && primary(&proxy).await.as_deref() == Some("b")
    })
    .await;
    cluster.node(2).start().await.unwrap();
    eventually("c follows", || async { is_in(&proxy, "healthy").await && proxy.usable_nodes().await == 2 })
        .await;
    let rows = text(&cluster, 1, "SELECT count(*) FROM t").await;
    cluster.node(2).wait_for("SELECT count(*) FROM t", &rows).await.unwrap();
    assert_eq!(text(&cluster, 2, "SHOW primary_slot_name").await, "hw_c");
    let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'hw_c'";
    cluster.node(1).wait_for(active, "t").await.unwrap();
    // Nothing else had held that WAL.
    cluster.node(1).execute("CHECKPOINT").await.unwrap();
    cluster.node(1).wait_for(&kept, "0").await.unwrap();

    // What is left on a standby for nobody is dropped, but for what is not ours.
    for slot in ["hw_gone", "mine"] {
        let create = format!("SELECT pg_create_physical_replication_slot('{slot}', true)");
        cluster.node(2).execute(&create).await.unwrap();
    }
    // The new primary's too; the old one's is made once it follows again.
    cluster.node(2).wait_for(SLOTS, "mine").await.unwrap();
    cluster.node(0).rebuild_from(cluster.node(1)).await.unwrap();
    for (node, slots) in [(0, "hw_c"), (1, "hw_a hw_c"), (2, "hw_a mine")] {
        cluster.node(node).wait_for(SLOTS, slots).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_to_make_slots_a_proxy_says_so_and_promotes_nobody_by_itself() {
    let cluster = Cluster::start(1).await;
    let directory = tempfile::tempdir().unwrap();
    let admin = cluster.node(0).admin().await.unwrap();
    let take = "ALTER ROLE highwater NOREPLICATION; \
                REVOKE ALTER SYSTEM ON PARAMETER primary_slot_name FROM highwater";
    admin.batch_execute(take).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = started(&cluster, &directory, MANAGE).await;
    // On both nodes: only once all were asked it goes by that.
    let missing = [
        "it lacks: ALTER ROLE highwater REPLICATION",
        "GRANT ALTER SYSTEM ON PARAMETER primary_slot_name TO highwater",
    ];
    eventually("it names what is missing", || async {
        let log = proxy.log();
        missing.iter().all(|what| log.matches(what).count() >= 2)
    })
    .await;
    cluster.node(0).crash().await.unwrap();
    eventually("it waits for an operator", || async {
        proxy.metrics().await.sum("highwater_failover_blocked", &[("reason", "unprepared")]) == 1.0
    })
    .await;
}
