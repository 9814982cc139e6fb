//! A failover's orders on real nodes, by a role that has what docs/sql/grants.sql gives and no more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use highwater::config::Config;
use highwater::config::live::LiveConfig;
use highwater::demo::cluster::ClusterOptions;
use highwater::failover::event::{Kick, Order, OrderResult};
use highwater::failover::orders::{Hands, Limits};
use highwater::failover::preconditions::{Needs, examine};
use highwater::failover::store::Store;
use highwater::net::NodeTls;
use highwater::node::Nodes;
use highwater::topology::{Epoch, NodeId};
use highwater::wal::{Lsn, TimelineId};

use crate::fixture::*;

const A: NodeId = NodeId(0);
const B: NodeId = NodeId(1);
const C: NodeId = NodeId(2);
const IDENTITY: &str = "highwater control test";
const FIRST: TimelineId = TimelineId(1);

/// The hands of a proxy over `cluster`, without the proxy, past the links.
struct Proxyless {
    hands: Hands,
    config: Arc<LiveConfig>,
    nodes: Arc<Nodes>,
    _store: Store,
    directory: tempfile::TempDir,
}

impl Proxyless {
    fn over(cluster: &Cluster) -> Proxyless {
        let control = &cluster.roles().control;
        let nodes: String = cluster
            .nodes()
            .iter()
            .map(|node| format!("  - {{ name: {}, host: 127.0.0.1, port: {} }}\n", node.name(), node.port()))
            .collect();
        let text = format!(
            "nodes:\n{nodes}control: {{ user: {}, password: '{}', database: postgres }}\n\
             node_tls: {{ mode: disable }}\n",
            control.user, control.password
        );
        let config = LiveConfig::new(Config::parse(&text, "test", &|_| None).unwrap());
        let nodes = Nodes::new(Arc::clone(&config), &NodeTls::new(&config.load().node_tls).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        // Loaded machines are slow; what must be fast is measured apart.
        let limits = Limits { sever: Duration::from_secs(20), ..Limits::default() };
        let hands = Hands::new(&config, &nodes, &store.upstreams(), IDENTITY, limits, None);
        Proxyless { hands, config, nodes, _store: store, directory }
    }

    async fn give(&self, node: NodeId, order: Order) -> OrderResult {
        self.hands.carry_out(node, &order).await
    }

    /// What stands in the way of a failover at `node`, in the eyes of a proxy of this identity.
    async fn findings(&self, node: NodeId, identity: &str) -> Vec<String> {
        let needs = Needs { quorum: true, manage_sync: true, slots: Some(1) };
        let deadline = Duration::from_secs(5);
        let found =
            examine(&self.config.load_full(), &self.nodes, node, needs, Some(identity), deadline).await;
        found.unwrap().into_iter().map(|finding| finding.what).collect()
    }

    async fn done(&self, node: NodeId, order: Order) {
        assert_eq!(self.give(node, order).await, OrderResult::Done);
    }

    async fn sever(&self, node: NodeId) -> Lsn {
        match self.give(node, Order::Sever).await {
            OrderResult::Severed { end, .. } => end,
            other => panic!("not severed: {other:?}"),
        }
    }

    async fn promote(&self, node: NodeId) -> (TimelineId, Lsn) {
        let wait = Duration::from_secs(30);
        match self.give(node, Order::Promote { epoch: Epoch(2), timeline: FIRST, wait }).await {
            OrderResult::Promoted { timeline, fork } => (timeline, fork),
            other => panic!("not promoted: {other:?}"),
        }
    }
}

async fn position(cluster: &Cluster, node: usize) -> Lsn {
    let text = cluster.node(node).query_text("SELECT pg_current_wal_flush_lsn()").await.unwrap();
    text.parse().unwrap()
}

async fn streams(cluster: &Cluster, node: usize) {
    let streaming = "SELECT coalesce(bool_or(status = 'streaming'), false) FROM pg_stat_wal_receiver";
    cluster.node(node).wait_for(streaming, "t").await.unwrap();
}

const TABLE: &str = "CREATE TABLE t (x int)";

#[tokio::test]
async fn a_severed_standby_has_all_that_it_received_and_follows_again_when_it_may() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(50)).await.unwrap();
    let proxy = Proxyless::over(&cluster);
    let end = proxy.sever(B).await;
    assert!(end <= position(&cluster, 0).await);
    cluster.node(0).execute("INSERT INTO t VALUES (1)").await.unwrap();
    // Again, and after a restart: the same position.
    assert_eq!(proxy.sever(B).await, end);
    cluster.node(1).restart().await.unwrap();
    assert_eq!(proxy.sever(B).await, end);
    for _ in 0..2 {
        proxy.done(B, Order::Unsever).await;
    }
    streams(&cluster, 1).await;
    cluster.wait_caught_up(0).await.unwrap();
    for (name, value) in [("recovery_min_apply_delay", "50ms"), ("wal_receiver_status_interval", "1s")] {
        assert_eq!(cluster.node(1).query_text(&format!("SHOW {name}")).await.unwrap(), value);
    }
}

#[tokio::test]
async fn whatever_holds_up_replay_a_severed_standby_acknowledges_nothing_and_keeps_what_it_has() {
    for obstacle in ["paused", "delayed", "reader"] {
        let cluster = Cluster::start(1).await;
        cluster.set_up(TABLE).await;
        let (primary, standby) = (cluster.node(0), cluster.node(1));
        standby.set("max_standby_streaming_delay", "-1").await.unwrap();
        let mut reader = standby.connect("app", &cluster.roles().app).await.unwrap();
        let reading = reader.transaction().await.unwrap();
        match obstacle {
            "paused" => standby.pause_replay().await.unwrap(),
            "delayed" => standby.set_apply_delay(Duration::from_secs(3600)).await.unwrap(),
            _ => drop(reading.query("SELECT * FROM t", &[]).await.unwrap()),
        }
        // A lock that the reader's stands in the way of; behind it, what must not be lost.
        primary
            .execute("ALTER TABLE t ADD y int; INSERT INTO t SELECT 1 FROM generate_series(1, 1000)")
            .await
            .unwrap();
        let written = position(&cluster, 0).await;
        let received = format!("SELECT pg_last_wal_receive_lsn() >= '{written}'");
        standby.wait_for(&received, "t").await.unwrap();
        assert_eq!(
            standby.query_text("SELECT count(*) FROM pg_attribute WHERE attname = 'y'").await.unwrap(),
            "0"
        );

        let proxy = Proxyless::over(&cluster);
        let end = proxy.sever(B).await;
        assert!(end >= written, "{obstacle}: severed at {end}, had received {written}");
        primary.wait_for("SELECT count(*) FROM pg_stat_replication", "0").await.unwrap();
        drop(reading);
        let (timeline, _) = proxy.promote(B).await;
        assert_eq!(timeline, TimelineId(2));
        assert_eq!(standby.query_text("SELECT count(*) FROM t").await.unwrap(), "1000", "{obstacle}");
    }
}

#[tokio::test]
async fn a_standby_that_restarted_with_unread_log_is_read_to_its_end() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    let (primary, standby) = (cluster.node(0), cluster.node(1));
    standby.set_apply_delay(Duration::from_secs(3600)).await.unwrap();
    primary.execute("INSERT INTO t SELECT 1 FROM generate_series(1, 1000)").await.unwrap();
    let written = position(&cluster, 0).await;
    standby.wait_for(&format!("SELECT pg_last_wal_receive_lsn() >= '{written}'"), "t").await.unwrap();
    primary.crash().await.unwrap();
    standby.restart().await.unwrap();
    assert_eq!(standby.query_text("SELECT pg_last_wal_receive_lsn()").await.unwrap(), "");
    let proxy = Proxyless::over(&cluster);
    let severed = proxy.give(B, Order::Sever).await;
    let OrderResult::Severed { end, timeline } = severed else { panic!("not severed: {severed:?}") };
    assert!(end >= written, "{end} is not the end: {written} had been received");
    // No walreceiver has run since the restart, to tell it.
    assert_eq!(timeline, Some(FIRST));
    proxy.promote(B).await;
    assert_eq!(standby.query_text("SELECT count(*) FROM t").await.unwrap(), "1000");
}

#[tokio::test]
async fn a_frozen_node_makes_an_order_unknown_in_time_and_possible_again_when_it_thaws() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxyless::over(&cluster);
    proxy.done(B, Order::Unsever).await;
    cluster.node(1).freeze().unwrap();
    let began = Instant::now();
    let result = proxy.give(B, Order::Sever).await;
    assert!(matches!(result, OrderResult::Unknown(_)), "{result:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    cluster.node(1).thaw().unwrap();
    proxy.sever(B).await;
    proxy.done(B, Order::Unsever).await;
    streams(&cluster, 1).await;
}

#[tokio::test]
async fn who_takes_a_node_over_has_ended_the_session_that_had_it() {
    let cluster = Cluster::start(1).await;
    let (first, second) = (Proxyless::over(&cluster), Proxyless::over(&cluster));
    let holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted";
    first.done(B, Order::Unsever).await;
    let before = cluster.node(1).query_text(holder).await.unwrap();
    second.done(B, Order::Unsever).await;
    let after = cluster.node(1).query_text(holder).await.unwrap();
    assert!(!before.is_empty() && !after.is_empty() && before != after, "{before:?}, then {after:?}");
    let lives = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {before}");
    assert_eq!(cluster.node(1).query_text(&lives).await.unwrap(), "0");
}

#[tokio::test]
async fn a_kick_tells_whether_a_standby_reaches_its_primary() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let proxy = Proxyless::over(&cluster);
    let kick = Order::Kick { wait: Duration::from_secs(5) };
    for _ in 0..2 {
        assert_eq!(proxy.give(B, kick.clone()).await, OrderResult::Kicked(Kick::Streams));
    }
    cluster.node(2).pause_replay().await.unwrap();
    // Replay is paused where there is something to replay.
    cluster.node(0).execute("INSERT INTO t VALUES (1)").await.unwrap();
    cluster
        .node(2)
        .wait_for("SELECT pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()", "t")
        .await
        .unwrap();
    assert_eq!(proxy.give(C, kick.clone()).await, OrderResult::Kicked(Kick::SameProcess));
    cluster.node(0).crash().await.unwrap();
    let kick = Order::Kick { wait: Duration::from_secs(1) };
    assert_eq!(proxy.give(B, kick.clone()).await, OrderResult::Kicked(Kick::Gone));
    let result = proxy.give(A, kick).await;
    assert!(matches!(result, OrderResult::Unknown(_)), "{result:?}");
}

#[tokio::test]
async fn after_a_promotion_the_others_follow_and_one_that_is_ahead_is_refused() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let proxy = Proxyless::over(&cluster);
    let end = proxy.sever(B).await;
    // Only c gets this.
    cluster.node(0).execute("INSERT INTO t VALUES (1)").await.unwrap();
    cluster.node(2).wait_for("SELECT count(*) FROM t", "1").await.unwrap();
    cluster.node(0).crash().await.unwrap();
    let (timeline, fork) = proxy.promote(B).await;
    assert_eq!((timeline, fork), (TimelineId(2), end));
    assert_eq!(proxy.promote(B).await, (timeline, fork), "a second time");
    let repoint = Order::Repoint { to: B, timeline, fork };
    match proxy.give(C, repoint).await {
        OrderResult::Diverged { at } => assert!(at > fork, "{at} is not beyond {fork}"),
        other => panic!("not refused: {other:?}"),
    }
    let row = Order::EpochRow { epoch: Epoch(2), timeline, fork };
    proxy.done(B, row.clone()).await;
    proxy.done(B, row).await;
    let admin = cluster.node(1).admin().await.unwrap();
    let rows = admin.query("SELECT epoch, tli, fork_lsn::text FROM highwater.epoch", &[]).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, String>(2), fork.to_string());
    let result = proxy.give(B, Order::Sever).await;
    assert!(matches!(result, OrderResult::Failed(_)), "a primary was severed: {result:?}");
}

/// I6: said to have failed, another standby would be promoted beside it.
#[tokio::test]
async fn a_promotion_that_has_begun_is_never_said_to_have_failed() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    let proxy = Proxyless::over(&cluster);
    let end = proxy.sever(B).await;
    // What is kept in the state_dir of a severed standby cannot be written any more.
    let in_the_way = proxy.directory.path().join("upstreams.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let order = Order::Promote { epoch: Epoch(2), timeline: FIRST, wait: Duration::from_secs(30) };
    for _ in 0..2 {
        let result = proxy.give(B, order.clone()).await;
        assert!(matches!(result, OrderResult::Unknown(_)), "{result:?}");
        assert_eq!(cluster.node(1).query_text("SELECT pg_is_in_recovery()").await.unwrap(), "f");
    }
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(proxy.promote(B).await, (TimelineId(2), end));
}

#[tokio::test]
async fn where_the_new_timeline_began_is_known_without_the_right_to_read_its_history() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    let control = &cluster.roles().control.user;
    let revoke = format!(
        "REVOKE EXECUTE ON FUNCTION pg_catalog.pg_read_file(text, bigint, bigint, boolean) FROM {control}"
    );
    cluster.node(0).admin().await.unwrap().batch_execute(&revoke).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = Proxyless::over(&cluster);
    let end = proxy.sever(B).await;
    assert_eq!(proxy.promote(B).await, (TimelineId(2), end));
}

#[tokio::test]
async fn a_standby_follows_the_new_primary_also_when_its_slot_is_missing_there() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    cluster.node(0).execute("SELECT pg_create_physical_replication_slot('of_c', true)").await.unwrap();
    cluster.node(2).set("primary_slot_name", "of_c").await.unwrap();
    streams(&cluster, 2).await;
    let proxy = Proxyless::over(&cluster);
    proxy.sever(B).await;
    proxy.sever(C).await;
    cluster.node(0).crash().await.unwrap();
    let (timeline, fork) = proxy.promote(B).await;
    for _ in 0..2 {
        proxy.done(C, Order::Repoint { to: B, timeline, fork }).await;
    }
    cluster.node(1).execute("INSERT INTO t VALUES (1)").await.unwrap();
    cluster.node(2).wait_for("SELECT count(*) FROM t", "1").await.unwrap();
    let used = "SELECT active FROM pg_replication_slots WHERE slot_name = 'of_c'";
    cluster.node(1).wait_for(used, "t").await.unwrap();
}

#[tokio::test]
async fn a_fenced_primary_has_no_writers_and_its_end_covers_asynchronous_commits() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    let proxy = Proxyless::over(&cluster);
    let app = cluster.node(0).connect("app", &cluster.roles().app).await.unwrap();
    app.batch_execute("SET synchronous_commit = off").await.unwrap();
    let mut acknowledged = 0;
    let writing = async {
        while app.batch_execute("INSERT INTO t VALUES (1)").await.is_ok() {
            acknowledged += 1;
        }
    };
    let (result, ()) = tokio::join!(proxy.give(A, Order::Fence), writing);
    let OrderResult::Fenced { end } = result else { panic!("not fenced: {result:?}") };
    assert!(acknowledged > 0);
    let reached = proxy.give(B, Order::Barrier { lsn: end, wait: Duration::from_secs(20) }).await;
    assert!(matches!(reached, OrderResult::Reached(at) if at >= end), "{reached:?}");
    let there: i64 = cluster.node(1).query_text("SELECT count(*) FROM t").await.unwrap().parse().unwrap();
    assert!(there >= acknowledged, "{there} of {acknowledged} acknowledged rows are below the end");
    let refused = cluster.node(0).execute("INSERT INTO t VALUES (2)").await.unwrap_err();
    assert!(refused.to_string().contains("25006"), "{refused}");
    proxy.done(A, Order::Unfence).await;
    // A fresh session has what the postmaster has.
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "off").await.unwrap();
    cluster.node(0).execute("INSERT INTO t VALUES (2)").await.unwrap();
}

#[tokio::test]
async fn synchronous_standby_names_are_set_on_a_standby_before_it_is_promoted() {
    let cluster = Cluster::start(2).await;
    let proxy = Proxyless::over(&cluster);
    proxy.done(B, Order::SetSync { members: vec![C], num: 1 }).await;
    assert_eq!(cluster.node(1).query_text("SHOW synchronous_standby_names").await.unwrap(), "ANY 1 (\"c\")");
    proxy.done(B, Order::SetSync { members: vec![], num: 0 }).await;
    assert_eq!(cluster.node(1).query_text("SHOW synchronous_standby_names").await.unwrap(), "");
}

#[tokio::test]
async fn the_documented_grants_are_enough_and_each_missing_one_is_named() {
    // Else there is a warning about it.
    let settings = vec![("max_slot_wal_keep_size".to_owned(), "1GB".to_owned())];
    let options = ClusterOptions { replicas: 1, settings, ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    let proxy = Proxyless::over(&cluster);
    for node in [A, B] {
        assert_eq!(proxy.findings(node, IDENTITY).await, Vec::<String>::new());
    }
    let grants: Vec<&str> = include_str!("../../docs/sql/grants.sql")
        .lines()
        .filter(|line| {
            line.starts_with("GRANT ") && !line.contains("SCHEMA") && !line.contains("highwater.epoch")
        })
        // For the auth query and for pg_rewind.
        .filter(|line| {
            !["pg_authid", "pg_ls_dir", "pg_stat_file", "pg_read_binary"].iter().any(|f| line.contains(f))
        })
        .collect();
    assert!(grants.len() >= 12, "{grants:?}");
    let admin = cluster.node(0).admin().await.unwrap();
    for grant in grants {
        let revoke = grant.replacen("GRANT", "REVOKE", 1).replace(" TO ", " FROM ");
        admin.batch_execute(&revoke).await.unwrap();
        let expected = format!("it lacks: {}", grant.trim_end_matches(';'));
        assert!(proxy.findings(A, IDENTITY).await.contains(&expected), "{expected:?} is not said");
        admin.batch_execute(grant).await.unwrap();
    }
    admin.batch_execute("ALTER ROLE highwater NOREPLICATION").await.unwrap();
    let expected = "it lacks: ALTER ROLE highwater REPLICATION (failover.slots.manage)".to_owned();
    assert_eq!(proxy.findings(A, IDENTITY).await, [expected]);
}

#[tokio::test]
async fn settings_that_a_failover_would_stumble_over_are_named() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxyless::over(&cluster);
    proxy.done(B, Order::Unsever).await;
    let says =
        |found: Vec<String>, what: &str| assert!(found.iter().any(|f| f.contains(what)), "{what}: {found:?}");
    says(proxy.findings(B, "another proxy").await, "held by `highwater control test`");
    cluster.node(0).set("synchronous_standby_names", "ANY 1 (b, x, *)").await.unwrap();
    // A new session is told the names at once: nothing commits in it.
    let found = proxy.findings(A, IDENTITY).await;
    says(found.clone(), "`x`, which is no node");
    says(found.clone(), "has `*`");
    says(found, "max_slot_wal_keep_size is -1");
    cluster.node(1).set("primary_conninfo", "host=127.0.0.1 application_name=walreceiver").await.unwrap();
    says(proxy.findings(B, IDENTITY).await, "it streams as `walreceiver`, not as `b`");
}
