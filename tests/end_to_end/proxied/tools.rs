//! The programs people use: psql and pgbench, as real processes.

use crate::fixture::*;

#[tokio::test]
async fn psql_describes_a_table() {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up("CREATE TABLE shop (id int PRIMARY KEY, name text NOT NULL); CREATE INDEX ON shop (name)")
        .await;
    let proxy = Proxy::start(&cluster).await;
    for command in ["\\d shop", "\\d", "\\dt+", "\\l", "\\du", "\\df", "\\dn"] {
        let direct = cluster.run_program("psql", cluster.primary().port(), &["-X", "-c", command], "").await;
        let proxied = cluster.run_program("psql", proxy.port(), &["-X", "-c", command], "").await;
        assert_eq!(success(&proxied), success(&direct), "{command}");
    }
}

#[tokio::test]
async fn psql_copies_a_hundred_thousand_rows_both_ways() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (id int, x text)").await;
    let proxy = Proxy::start(&cluster).await;
    let rows: String = (0..100_000).map(|number| format!("{number}\trow number {number}\n")).collect();
    let into = cluster.run_program("psql", proxy.port(), &["-X", "-c", "\\copy t from stdin"], &rows).await;
    assert_eq!(success(&into), "COPY 100000\n");
    let out = cluster
        .run_program(
            "psql",
            proxy.port(),
            &["-X", "-c", "\\copy (select * from t order by id) to stdout"],
            "",
        )
        .await;
    assert!(success(&out) == rows, "what came out is not what went in");
}

#[tokio::test]
async fn ctrl_c_in_psql_cancels_the_statement() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    for statement in ["SELECT pg_sleep(3600)", "BEGIN; SELECT pg_sleep(3600); COMMIT"] {
        let mut command = cluster.program_command("psql", proxy.port());
        command.args(["-X", "-v", "ON_ERROR_STOP=1", "-c", statement]);
        command.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        let child = command.spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
        eventually("it sleeps", || async {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            let mut sleeping = false;
            for node in cluster.nodes() {
                sleeping |= node.query_text(sql).await.unwrap() != "0";
            }
            sleeping
        })
        .await;
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        // psql keeps the server's "canceling statement" to itself under -c; its exit code tells.
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("Cancel request sent"), "{stderr}");
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        for node in cluster.nodes() {
            let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            node.wait_for(asleep, "0").await.unwrap();
        }
    }
}

/// `pgbench -i` through the proxy, then a short run in each mode.
async fn pgbench(script: &str, mode: &str) -> (Cluster, Proxy, String) {
    let cluster = Cluster::start(2).await;
    let proxy = Proxy::start(&cluster).await;
    let filled = cluster.run_program("pgbench", proxy.port(), &["-i", "-q", "-s", "1"], "").await;
    success(&filled);
    cluster.wait_caught_up(0).await.unwrap();
    let mut arguments = vec!["-n", "-c", "16", "-j", "2", "-T", "5", "-M", mode];
    arguments.extend(script.split_whitespace());
    let output = cluster.run_program("pgbench", proxy.port(), &arguments, "").await;
    let told = format!("{}{}", success(&output), String::from_utf8_lossy(&output.stderr));
    assert!(told.contains("number of failed transactions: 0"), "{told}");
    assert!(!told.contains("ERROR") && !told.contains("aborted"), "{told}");
    (cluster, proxy, told)
}

async fn read_only(mode: &str) {
    let (cluster, proxy, _) = pgbench("-S", mode).await;
    assert!(proxy.stop().await.success());
    let ran = cluster.transactions().await;
    let all: i64 = ran.iter().sum();
    assert!(ran[1] + ran[2] >= all * 8 / 10, "{mode}: transactions by node {ran:?}");
}

async fn tpcb_like(mode: &str) {
    let (cluster, proxy, _) = pgbench("", mode).await;
    assert!(proxy.stop().await.success());
    let count = "SELECT count(*) FROM pgbench_history";
    let rows = cluster.primary().query_text(count).await.unwrap();
    assert_ne!(rows, "0");
    let sums =
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)";
    assert_eq!(cluster.primary().query_text(sums).await.unwrap(), "t");
}

#[tokio::test]
async fn pgbench_read_only_simple() {
    read_only("simple").await;
}

#[tokio::test]
async fn pgbench_read_only_extended() {
    read_only("extended").await;
}

#[tokio::test]
async fn pgbench_read_only_prepared() {
    read_only("prepared").await;
}

#[tokio::test]
async fn pgbench_tpcb_like_simple() {
    tpcb_like("simple").await;
}

#[tokio::test]
async fn pgbench_tpcb_like_extended() {
    tpcb_like("extended").await;
}

#[tokio::test]
async fn pgbench_tpcb_like_prepared() {
    tpcb_like("prepared").await;
}

#[tokio::test]
async fn the_demo_shows_the_main_job_and_cleans_up() {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_highwater"));
    let scratch = tempfile::tempdir().unwrap();
    // Under the real temporary directory: the servers' user must get in.
    let told = tokio::time::timeout(PATIENCE * 8, async {
        command.args(["demo", "--exit-after", "4s"]).current_dir(scratch.path());
        run(command, "").await
    })
    .await
    .unwrap();
    let text = success(&told);
    assert!(text.contains("psql "), "{text}");
    assert!(text.contains("replica") && text.contains("primary"), "{text}");
    let directory =
        text.lines().find_map(|line| line.strip_prefix("directory: ")).expect("no directory is named");
    assert!(!std::path::Path::new(directory).exists(), "{directory} is left");
}
