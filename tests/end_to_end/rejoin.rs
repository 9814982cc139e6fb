//! `highwater rejoin` and `highwater clone`, on real data directories.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

use highwater::demo::cluster::{ClusterOptions, Identity, PrivateNode};
use highwater::demo::port::ReservedPort;

use crate::fixture::*;

const TABLE: &str = "CREATE TABLE t (x int)";

/// Runs the program as an operator would on the host of `node`; `more` nodes are in its configuration too.
async fn run(
    cluster: &Cluster,
    verb: &str,
    node: &str,
    data: &str,
    more: &[(&str, u16)],
    flags: &[&str],
) -> Output {
    let control = &cluster.roles().control;
    let known = cluster.nodes().iter().map(|node| (node.name(), node.port()));
    let nodes: String = known
        .chain(more.iter().copied())
        .map(|(name, port)| format!("  - {{ name: {name}, host: 127.0.0.1, port: {port} }}\n"))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.yaml");
    let text = format!(
        "nodes:\n{nodes}control: {{ user: {}, password: '{}', database: postgres }}\nnode_tls: {{ mode: disable }}\n",
        control.user, control.password
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
    command.arg(verb).arg("-c").arg(&config).args(["--node", node, "--data", data]).args(flags);
    command.arg("--bin").arg(cluster.program("psql").parent().unwrap());
    tokio::task::spawn_blocking(move || {
        let output = command.output().unwrap();
        drop(directory);
        output
    })
    .await
    .unwrap()
}

pub async fn rejoin(cluster: &Cluster, node: &PrivateNode, flags: &[&str]) -> Output {
    run(cluster, "rejoin", node.name(), node.data().to_str().unwrap(), &[], flags).await
}

/// The complaint of a run that must have failed, and have changed nothing.
fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

/// `a` was the primary, wrote something that nobody else has, and has stopped; `b` is the primary.
async fn old_primary(options: ClusterOptions) -> Cluster {
    let cluster = Cluster::start_with(options).await;
    cluster.set_up(TABLE).await;
    cluster.node(0).crash().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    cluster.node(1).execute("INSERT INTO t VALUES (2)").await.unwrap();
    cluster.node(0).start().await.unwrap();
    cluster.node(0).execute("INSERT INTO t VALUES (1)").await.unwrap();
    cluster.node(0).set("default_transaction_read_only", "on").await.unwrap();
    cluster.node(0).set("work_mem", "5MB").await.unwrap();
    cluster
}

async fn is_a_replica_with_its_own_settings(cluster: &Cluster) {
    cluster.node(0).wait_for("SELECT pg_is_in_recovery()", "t").await.unwrap();
    cluster.node(1).execute("INSERT INTO t VALUES (3)").await.unwrap();
    cluster.node(0).wait_for("SELECT string_agg(x::text, ' ' ORDER BY x) FROM t", "2 3").await.unwrap();
    for (name, value) in
        [("default_transaction_read_only", "off"), ("work_mem", "5MB"), ("cluster_name", "a")]
    {
        assert_eq!(cluster.node(0).query_text(&format!("SHOW {name}")).await.unwrap(), value);
    }
    let name = "SELECT application_name FROM pg_stat_replication";
    assert_eq!(cluster.node(1).query_text(name).await.unwrap(), "a");
}

#[tokio::test]
async fn an_old_primary_comes_back_as_a_replica_by_rewinding() {
    // What pg_rewind asks of the server that it reads from.
    let settings = vec![("full_page_writes".to_owned(), "on".to_owned())];
    let cluster = old_primary(ClusterOptions { replicas: 1, settings, ..ClusterOptions::default() }).await;
    let node = cluster.node(0);
    assert!(refusal(&rejoin(&cluster, node, &[]).await).contains("a server answers as a: stop it first"));
    node.stop_fast().await.unwrap();
    let looked = success(&rejoin(&cluster, node, &["--dry-run"]).await);
    assert!(looked.contains("timeline 1") && looked.contains("pg_rewind would"), "{looked}");
    assert!(!node.data().join("standby.signal").exists());
    let done = success(&rejoin(&cluster, node, &["--slot", "of_a", "--start"]).await);
    assert!(done.contains("a streams from b"), "{done}");
    assert!(!done.contains(&cluster.roles().replicator.password), "a password is shown");
    is_a_replica_with_its_own_settings(&cluster).await;
    let slot = "SELECT active FROM pg_replication_slots WHERE slot_name = 'of_a'";
    cluster.node(1).wait_for(slot, "t").await.unwrap();
    // Nothing is left beside.
    let left: Vec<_> =
        std::fs::read_dir(cluster.directory()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("rejoin")), "{left:?}");
}

#[tokio::test]
async fn another_old_primary_that_is_fenced_is_not_taken_for_the_primary() {
    let settings = vec![("full_page_writes".to_owned(), "on".to_owned())];
    let cluster = old_primary(ClusterOptions { replicas: 2, settings, ..ClusterOptions::default() }).await;
    // It was the primary for a while, too.
    let second = cluster.node(2);
    second.promote().await.unwrap();
    let node = cluster.node(0);
    node.stop_fast().await.unwrap();
    let output = rejoin(&cluster, node, &[]).await;
    assert!(refusal(&output).contains("several nodes accept writes: b, c"), "{output:?}");
    second.set("default_transaction_read_only", "on").await.unwrap();
    cluster.node(1).stop_fast().await.unwrap();
    let output = rejoin(&cluster, node, &[]).await;
    assert!(refusal(&output).contains("none accepts writes: c is no replica, but read-only"), "{output:?}");
    cluster.node(1).start().await.unwrap();
    let done = success(&rejoin(&cluster, node, &["--start"]).await);
    assert!(done.contains("c is no replica, but read-only") && done.contains("a streams from b"), "{done}");
    is_a_replica_with_its_own_settings(&cluster).await;
}

#[tokio::test]
async fn an_old_primary_that_cannot_be_rewound_is_copied_anew_and_its_data_kept_aside() {
    let settings = vec![("wal_log_hints".to_owned(), "off".to_owned())];
    let cluster = old_primary(ClusterOptions { replicas: 1, settings, ..ClusterOptions::default() }).await;
    let node = cluster.node(0);
    // With checksums it could be rewound: it loses them.
    node.stop_fast().await.unwrap();
    let metadata = std::fs::metadata(node.data()).unwrap();
    let mut disable = Command::new(cluster.program("pg_checksums"));
    disable.arg("--disable").arg("-D").arg(node.data()).current_dir("/");
    if nix::unistd::Uid::effective().is_root() {
        disable.uid(metadata.uid()).gid(metadata.gid());
    }
    assert!(disable.output().unwrap().status.success());
    let done = success(&rejoin(&cluster, node, &["--start"]).await);
    assert!(done.contains("moving") && done.contains("a streams from b"), "{done}");
    is_a_replica_with_its_own_settings(&cluster).await;
    assert!(cluster.directory().join("a.before-rejoin/PG_VERSION").exists());
}

#[tokio::test]
async fn a_rejoin_is_refused_where_the_target_is_not_what_it_should_be() {
    let cluster = Cluster::start(1).await;
    let stranger = Cluster::start_with(ClusterOptions {
        replicas: 0,
        identity: Identity::Own,
        ..ClusterOptions::default()
    })
    .await;
    cluster.node(1).stop_fast().await.unwrap();
    let strange = stranger.node(0).data().to_str().unwrap();
    let output = run(&cluster, "rejoin", "b", strange, &[], &[]).await;
    assert!(refusal(&output).contains("belongs to another cluster"), "{output:?}");
    let output = run(&cluster, "rejoin", "z", strange, &[], &[]).await;
    assert!(refusal(&output).contains("no node `z`"), "{output:?}");
    let mine = cluster.node(1).data().to_str().unwrap();
    let output = run(&cluster, "clone", "b", mine, &[], &[]).await;
    assert!(refusal(&output).contains("is not empty"), "{output:?}");
    cluster.node(0).stop_fast().await.unwrap();
    let output = run(&cluster, "rejoin", "b", mine, &[], &[]).await;
    assert!(refusal(&output).contains("no node that answers is a primary"), "{output:?}");
}

#[tokio::test]
async fn a_new_replica_is_made_from_a_consistent_copy() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    cluster.node(0).execute("INSERT INTO t VALUES (1)").await.unwrap();
    let port = ReservedPort::claim().unwrap();
    let data = cluster.directory().join("new");
    let more = [("new", port.number())];
    let output = run(&cluster, "clone", "new", data.to_str().unwrap(), &more, &["--start"]).await;
    assert!(success(&output).contains("new streams from a"), "{output:?}");
    let replica =
        highwater::demo::cluster::connect(port.number(), "app", &cluster.roles().app).await.unwrap();
    let row = replica.query_one("SELECT x, pg_is_in_recovery() FROM t", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, bool>(1)), (1, true));
    let named = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'new'";
    cluster.node(0).wait_for(named, "1").await.unwrap();
}
