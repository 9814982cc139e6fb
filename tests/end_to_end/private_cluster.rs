//! The private cluster itself: what every other test leans on.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use highwater::demo::cluster::{ClusterOptions, Identity, PrivateCluster};

async fn start(replicas: usize) -> PrivateCluster {
    let options = ClusterOptions { replicas, ..ClusterOptions::default() };
    PrivateCluster::start(&options, &mut |_| {}).await.unwrap()
}

/// Ids of processes that work below `directory`.
fn processes_in(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        if std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory)) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

#[tokio::test]
async fn a_cluster_streams_and_its_replicas_refuse_writes() {
    let cluster = start(2).await;
    cluster.primary().execute("CREATE TABLE t AS SELECT 7 AS x").await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    for node in &cluster.nodes()[1..] {
        assert_eq!(node.query_text("SELECT x FROM t").await.unwrap(), "7");
        assert!(node.execute("INSERT INTO t VALUES (8)").await.unwrap_err().to_string().contains("25006"));
        assert_eq!(node.query_text("SHOW cluster_name").await.unwrap(), node.name());
    }
    assert_eq!(cluster.primary().query_text("SHOW data_checksums").await.unwrap(), "on");
}

#[tokio::test]
async fn every_role_logs_in_by_scram_and_by_nothing_less() {
    let cluster = start(0).await;
    let node = cluster.primary();
    for login in [&cluster.roles().control, &cluster.roles().app, &cluster.roles().superuser] {
        let client = node.connect("app", login).await.unwrap();
        let user: String = client.query_one("SELECT current_user::text", &[]).await.unwrap().get(0);
        assert_eq!(user, login.user);
        let mut wrong = login.clone();
        wrong.password.push('x');
        assert!(node.connect("app", &wrong).await.unwrap_err().to_string().contains("28P01"));
    }
    let unlike_scram = "SELECT count(*) FROM pg_authid WHERE rolpassword NOT LIKE 'SCRAM-SHA-256$%'";
    assert_eq!(node.query_text(unlike_scram).await.unwrap(), "0");
}

#[tokio::test]
async fn the_control_role_may_read_what_the_proxy_asks_for_and_is_no_superuser() {
    let cluster = start(1).await;
    for node in cluster.nodes() {
        let client = node.connect("postgres", &cluster.roles().control).await.unwrap();
        for sql in [
            "SELECT rolpassword FROM pg_authid",
            "SELECT * FROM pg_stat_wal_receiver",
            "SELECT * FROM pg_control_checkpoint()",
            "SELECT * FROM pg_control_system()",
            "SELECT query FROM pg_stat_activity",
            "SELECT name FROM pg_ls_waldir()",
            "SELECT pg_read_file('pg_wal/00000002.history', 0, 1048576, true)",
        ] {
            client.simple_query(sql).await.unwrap();
        }
        let row = client.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user", &[]).await;
        assert!(!row.unwrap().get::<_, bool>(0));
    }
}

#[tokio::test]
async fn a_crashed_node_is_gone_at_once_and_comes_back_on_its_port() {
    let cluster = start(1).await;
    let replica = cluster.node(1);
    let client = replica.admin().await.unwrap();
    replica.crash().await.unwrap();
    assert!(processes_in(replica.data()).is_empty());
    assert!(client.simple_query("SELECT 1").await.is_err());
    let refused = std::net::TcpStream::connect(("127.0.0.1", replica.port())).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    cluster.primary().execute("CREATE TABLE meanwhile ()").await.unwrap();
    replica.start().await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    assert_eq!(replica.query_text("SELECT to_regclass('meanwhile')").await.unwrap(), "meanwhile");
}

#[tokio::test]
async fn a_frozen_node_accepts_and_does_not_answer_until_it_thaws() {
    let cluster = start(1).await;
    let replica = cluster.node(1);
    let client = replica.admin().await.unwrap();
    replica.freeze().unwrap();
    std::net::TcpStream::connect(("127.0.0.1", replica.port())).unwrap();
    let question = client.simple_query("SELECT 1");
    tokio::pin!(question);
    let early = tokio::time::timeout(Duration::from_millis(200), &mut question).await;
    assert!(early.is_err(), "a frozen server answered");
    replica.thaw().unwrap();
    question.await.unwrap();
}

#[tokio::test]
async fn paused_replay_and_apply_delay_hold_commits_back() {
    let cluster = start(1).await;
    let (primary, replica) = (cluster.primary(), cluster.node(1));
    replica.pause_replay().await.unwrap();
    primary.execute("CREATE TABLE held ()").await.unwrap();
    let received = "SELECT pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()";
    replica.wait_for(received, "t").await.unwrap();
    assert_eq!(replica.query_text("SELECT to_regclass('held') IS NULL").await.unwrap(), "t");
    replica.resume_replay().await.unwrap();
    replica.wait_for("SELECT to_regclass('held') IS NULL", "f").await.unwrap();

    replica.set_apply_delay(Duration::from_secs(3600)).await.unwrap();
    primary.execute("CREATE TABLE delayed ()").await.unwrap();
    replica.wait_for(received, "t").await.unwrap();
    assert_eq!(replica.query_text("SELECT to_regclass('delayed') IS NULL").await.unwrap(), "t");
    replica.set_apply_delay(Duration::ZERO).await.unwrap();
    replica.wait_for("SELECT to_regclass('delayed') IS NULL", "f").await.unwrap();
}

#[tokio::test]
async fn a_promoted_replica_takes_over_and_the_old_primary_can_be_rebuilt_behind_it() {
    let cluster = start(2).await;
    cluster.primary().crash().await.unwrap();
    let promoted = cluster.node(1);
    promoted.promote().await.unwrap();
    cluster.node(2).follow(promoted).await.unwrap();
    promoted.execute("CREATE TABLE after_failover ()").await.unwrap();
    cluster.primary().rebuild_from(promoted).await.unwrap();
    cluster.wait_caught_up(1).await.unwrap();
    for node in [cluster.primary(), cluster.node(2)] {
        assert_eq!(node.query_text("SELECT to_regclass('after_failover')").await.unwrap(), "after_failover");
        assert_eq!(node.query_text("SHOW cluster_name").await.unwrap(), node.name());
    }
}

#[tokio::test]
async fn a_killed_backend_restarts_the_server_in_place() {
    let cluster = start(0).await;
    let node = cluster.primary();
    let started = node.query_text("SELECT pg_postmaster_start_time()").await.unwrap();
    let witness = node.admin().await.unwrap();
    node.crash_backend().await.unwrap();
    assert!(witness.simple_query("SELECT 1").await.is_err());
    assert_eq!(node.query_text("SELECT pg_postmaster_start_time()").await.unwrap(), started);
}

#[tokio::test]
async fn a_cluster_of_its_own_identity_is_a_stranger() {
    let (one, other) = tokio::join!(start(0), async {
        let options = ClusterOptions { replicas: 0, identity: Identity::Own, ..ClusterOptions::default() };
        PrivateCluster::start(&options, &mut |_| {}).await.unwrap()
    });
    let identifier = "SELECT system_identifier FROM pg_control_system()";
    let one = one.primary().query_text(identifier).await.unwrap();
    assert_ne!(one, other.primary().query_text(identifier).await.unwrap());
}

#[tokio::test]
async fn stopping_leaves_no_process_no_file_and_no_shared_memory() {
    let cluster = start(1).await;
    let directory = cluster.directory().to_owned();
    let segments: Vec<String> = cluster.nodes().iter().map(|node| segment(node.data())).collect();
    // The worst a test leaves behind: one node frozen, one killed without clean-up.
    cluster.primary().freeze().unwrap();
    cluster.node(1).crash().await.unwrap();
    cluster.stop();
    assert!(!directory.exists());
    assert_eq!(processes_in(&directory), Vec::<String>::new());
    for segment in segments {
        assert!(!shared_memory().contains(&segment), "segment {segment} is left");
    }
}

/// The System V segment in use by the server in `data`.
fn segment(data: &Path) -> String {
    let file = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
    file.lines().nth(6).unwrap().split_whitespace().last().unwrap().to_owned()
}

/// The ids of all System V segments of the machine.
fn shared_memory() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    table.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
}

/// Not a test by itself: what [`a_killed_owner_leaves_nothing_behind`] runs in a process of its own.
#[tokio::test]
#[ignore = "run by another test, in a process that is killed"]
async fn helper_start_and_wait_to_be_killed() {
    let cluster = start(1).await;
    // Past the test harness, which holds back what is printed.
    let told = std::env::var_os("HIGHWATER_TEST_TELL").unwrap();
    let half = format!("{}.part", told.to_string_lossy());
    std::fs::write(&half, cluster.directory().to_str().unwrap()).unwrap();
    std::fs::rename(half, told).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_owner_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let told = scratch.path().join("directory");
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "private_cluster::helper_start_and_wait_to_be_killed"])
        .env("HIGHWATER_TEST_TELL", &told)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !told.exists() {
        assert!(owner.try_wait().unwrap().is_none(), "the owner ended before its cluster stood");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let directory = std::path::PathBuf::from(std::fs::read_to_string(&told).unwrap());
    assert!(!processes_in(&directory).is_empty());
    owner.kill().unwrap();
    owner.wait().unwrap();
    tokio::time::timeout(Duration::from_secs(30), async {
        while directory.exists() || !processes_in(&directory).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("servers or files outlived their owner");
}

#[test]
fn a_demo_whose_proxy_does_not_start_says_why_and_leaves_nothing() {
    let (tell, told) = std::sync::mpsc::channel();
    let refuse = move |config: &Path| -> Result<(), String> {
        tell.send((config.to_owned(), std::fs::read_to_string(config).unwrap())).unwrap();
        Err("not today".into())
    };
    let error = highwater::demo::run(&highwater::demo::DemoOptions::default(), refuse).unwrap_err();
    assert!(error.to_string().contains("not today"));
    let (config, text) = told.recv().unwrap();
    let directory = config.parent().unwrap();
    assert!(!directory.exists() && processes_in(directory).is_empty());
    let nodes = serde_yaml::from_str::<serde_yaml::Value>(&text).unwrap();
    assert_eq!(nodes["nodes"].as_sequence().unwrap().len(), 3);
}
