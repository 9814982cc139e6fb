//! The configuration is read again while the proxy runs: what changes, what does not, and that nobody is hurt.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::login::{certificate, with_tls};
use crate::fixture::*;

/// Clients that read and write all the time, each in its own way.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Result<(), String>>>,
}

impl Load {
    /// `clients` of them, on a table that `set_up` has made.
    async fn on(proxy: &Proxy, clients: u32) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for id in 0..clients {
            let client = proxy.connect().await;
            let (stop, done) = (stop.clone(), done.clone());
            tasks.push(tokio::spawn(async move {
                let id = i32::try_from(id).unwrap();
                let work = Load::work(client, id, &stop, &done).await;
                work.map_err(|error| format!("{error}: {:?}", error.as_db_error()))
            }));
        }
        let (port, app, over) = (proxy.port(), proxy.app().clone(), stop.clone());
        tasks.push(tokio::spawn(async move {
            // One that comes and goes: logins must not suffer either.
            while !over.load(Ordering::SeqCst) {
                let error = |error: &dyn std::fmt::Display| format!("a client that comes: {error}");
                let client =
                    highwater::demo::cluster::connect(port, "app", &app).await.map_err(|e| error(&e))?;
                client.simple_query("SELECT count(*) FROM load").await.map_err(|e| error(&e))?;
            }
            Ok(())
        }));
        Load { stop, done, clients: tasks }
    }

    async fn set_up(cluster: &Cluster) {
        cluster.set_up("CREATE TABLE load (id int PRIMARY KEY, n int NOT NULL)").await;
        cluster.set_up("INSERT INTO load SELECT generate_series(0, 99), 0").await;
    }

    async fn work(
        mut client: tokio_postgres::Client,
        id: i32,
        stop: &AtomicBool,
        done: &AtomicU64,
    ) -> Result<(), tokio_postgres::Error> {
        let read = client.prepare("SELECT n FROM load WHERE id = $1").await?;
        let mut wrote = 0;
        while !stop.load(Ordering::SeqCst) {
            let n: i32 = client.query_one(&read, &[&id]).await?.get(0);
            assert_eq!(n, wrote, "client {id} does not read what it wrote");
            client.simple_query(&format!("UPDATE load SET n = n + 1 WHERE id = {id}")).await?;
            wrote += 1;
            client.simple_query(&format!("SELECT n FROM load WHERE id = {id}")).await?;
            let transaction = client.transaction().await?;
            transaction.execute("UPDATE load SET n = n + 1 WHERE id = $1", &[&id]).await?;
            transaction.commit().await?;
            wrote += 1;
            done.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Waits until each client has most likely been round a few times more.
    async fn goes_on(&self) {
        let before = self.done.load(Ordering::SeqCst);
        let more = 3 * (self.clients.len() as u64 - 1);
        eventually("the clients go on", || async {
            self.done.load(Ordering::SeqCst) >= before + more || self.clients.iter().any(|c| c.is_finished())
        })
        .await;
        assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
    }

    /// Ends it; panics with the first error of any client.
    async fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.await.unwrap().unwrap();
        }
    }
}

/// Some of the cluster's nodes, as they stand in the configuration: by their links, or `direct`.
fn nodes(cluster: &Cluster, which: &[usize], direct: &[usize]) -> String {
    let mut text = "nodes:\n".to_owned();
    for index in which {
        let node = &cluster.nodes()[*index];
        let port = if direct.contains(index) { node.port() } else { cluster.link(*index).port() };
        writeln!(text, "  - {{ name: {}, host: 127.0.0.1, port: {port} }}", node.name()).unwrap();
    }
    text
}

async fn statements_on(proxy: &Proxy, node: &str) -> f64 {
    proxy.metrics().await.sum("highwater_statements_total", &[("node", node)])
}

async fn backends_of(proxy: &Proxy, node: &str) -> f64 {
    let metrics = proxy.metrics().await;
    let of = |state| metrics.sum("highwater_pool_backends", &[("node", node), ("state", state)]);
    of("idle") + of("active") + of("connecting")
}

/// The process's open files, and its resident memory in bytes.
fn holds(pid: u32) -> (usize, usize) {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kilobytes: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    (files, kilobytes * 1024)
}

#[tokio::test]
async fn a_hundred_reloads_under_load_cost_no_error_no_memory_and_no_descriptor() {
    let cluster = Cluster::start(1).await;
    Load::set_up(&cluster).await;
    let proxy = Proxy::start(&cluster).await;
    // Large enough that a hundred of them would be seen, were they kept.
    let users = |size: usize| {
        (0..1500).fold(String::new(), |mut all, user| {
            write!(all, "{{ name: user{user}, size: {size}, max_clients: 7 }}, ").unwrap();
            all
        })
    };
    let files = [3, 4].map(|size| {
        format!(
            "pool: {{ size: {size}, users: [ {} ], server_lifetime: {size}h }}\n\
             failover: {{ check_interval: {size}00ms, tcp_user_timeout: {size}s }}\n\
             consistency: {{ level: {}, catch_up_wait: {size}0ms }}\n\
             routing: {{ functions: {{ safe: [ f{size} ] }} }}\n\
             timeouts: {{ idle_in_transaction: {size}h }}\n\
             log: {{ level: 'info,highwater::monitor={}' }}\n",
            users(size),
            if size == 3 { "session" } else { "global" },
            if size == 3 { "info" } else { "warn" },
        )
    });
    let load = Load::on(&proxy, 6).await;
    let reload = async |times: usize| {
        for time in 0..times {
            proxy.configure(&cluster, &files[time % 2]);
            assert!(proxy.reload().await, "{}", proxy.log());
        }
    };
    // Caches and arenas fill up first.
    reload(20).await;
    load.goes_on().await;
    let (files_before, memory_before) = holds(proxy.pid());
    reload(100).await;
    load.goes_on().await;
    // A backend more or less is being opened or closed at any time.
    eventually("as many open files as before", || async { holds(proxy.pid()).0 <= files_before + 4 }).await;
    let (files_after, memory_after) = holds(proxy.pid());
    println!("open files {files_before} {files_after}, resident {memory_before} {memory_after}");
    assert!(
        memory_after < memory_before + (6 << 20),
        "resident: {memory_before} before, {memory_after} after"
    );
    load.stop().await;
}

#[tokio::test]
async fn replicas_come_and_go_under_load_without_an_error() {
    let cluster = Cluster::start(2).await;
    Load::set_up(&cluster).await;
    let first = nodes(&cluster, &[0, 1], &[]);
    let options = ProxyOptions { overrides: &first, start: Start::Ready, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    eventually("the replica is in use", || async { proxy.usable_nodes().await == 2 }).await;
    let load = Load::on(&proxy, 6).await;
    load.goes_on().await;
    let reload = async |which: &[usize], direct: &[usize]| {
        proxy.configure(&cluster, &nodes(&cluster, which, direct));
        assert!(proxy.reload().await, "{}", proxy.log());
    };
    let serves = async |node: &str| {
        let before = statements_on(&proxy, node).await;
        eventually(&format!("{node} serves reads"), || async {
            statements_on(&proxy, node).await > before + 20.0
        })
        .await;
    };
    let is_left = async |node: &str| {
        eventually(&format!("nobody is connected to {node}"), || async {
            backends_of(&proxy, node).await == 0.0
        })
        .await;
        let (_, topology) = proxy.get("/topology").await.unwrap();
        assert!(!topology.contains(&format!("\"name\": \"{node}\"")), "{topology}");
        let before = statements_on(&proxy, node).await;
        load.goes_on().await;
        assert_eq!(statements_on(&proxy, node).await, before, "{node} still serves");
    };
    for _ in 0..2 {
        reload(&[0, 1, 2], &[]).await;
        serves("c").await;
        reload(&[0, 2], &[]).await;
        is_left("b").await;
        serves("c").await;
        // A name that comes back, at another address.
        reload(&[0, 1, 2], &[1]).await;
        serves("b").await;
        reload(&[0, 1], &[1]).await;
        is_left("c").await;
        // And moves back, with the sessions on it.
        reload(&[0, 1], &[]).await;
        serves("b").await;
    }
    load.goes_on().await;
    load.stop().await;
}

#[tokio::test]
async fn a_removed_nodes_crash_concerns_nobody() {
    let cluster = Cluster::start(2).await;
    Load::set_up(&cluster).await;
    let proxy = Proxy::start(&cluster).await;
    let load = Load::on(&proxy, 4).await;
    load.goes_on().await;
    proxy.configure(&cluster, &nodes(&cluster, &[0, 1], &[]));
    assert!(proxy.reload().await);
    eventually("nobody is connected to c", || async { backends_of(&proxy, "c").await == 0.0 }).await;
    let opened = proxy.metrics().await.sum("highwater_samples_total", &[("node", "c")]);
    cluster.node(2).crash().await.unwrap();
    load.goes_on().await;
    assert_eq!(proxy.metrics().await.sum("highwater_samples_total", &[("node", "c")]), opened, "c is asked");
    load.stop().await;
}

#[tokio::test]
async fn the_primary_is_neither_removed_nor_moved_and_nothing_else_of_that_file_applies() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    for (which, direct) in [(&[1][..], &[][..]), (&[0, 1], &[0])] {
        proxy.configure(&cluster, &format!("max_clients: 1\n{}", nodes(&cluster, which, direct)));
        assert!(!proxy.reload().await);
        assert!(proxy.log().contains("node `a` is the primary and cannot be"), "{}", proxy.log());
        client.simple_query("CREATE TABLE IF NOT EXISTS t ()").await.unwrap();
        // Another client: `max_clients` is what it was.
        proxy.connect().await.simple_query("SELECT 1").await.unwrap();
    }
}

#[tokio::test]
async fn nodes_come_and_go_where_failover_has_a_record_and_the_record_is_read_again() {
    let cluster = Cluster::start(2).await;
    Load::set_up(&cluster).await;
    let state = tempfile::tempdir().unwrap();
    let file = |which: &[usize], threshold: u32| {
        format!(
            "failover: {{ mode: manual, state_dir: '{}', failure_threshold: {threshold} }}\n{}",
            state.path().display(),
            nodes(&cluster, which, &[])
        )
    };
    let first = file(&[0, 1], 3);
    let proxy = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides: &first, start: Start::Ready, ..ProxyOptions::default() },
    )
    .await;
    eventually("the replica is in use", || async { proxy.usable_nodes().await == 2 }).await;
    let load = Load::on(&proxy, 4).await;
    for (which, threshold) in [(&[0, 1, 2][..], 3), (&[0, 2], 3), (&[0, 2], 5), (&[0, 1, 2], 5), (&[0, 1], 5)]
    {
        proxy.configure(&cluster, &file(which, threshold));
        // Failover looks at the primary anew after each.
        eventually("the file is applied", || async { proxy.reload().await }).await;
        eventually("all of them serve", || async { proxy.usable_nodes().await == which.len() }).await;
        load.goes_on().await;
    }
    load.stop().await;
    proxy.restart().await;
    proxy.connect().await.simple_query("UPDATE load SET n = 0").await.unwrap();
}

#[tokio::test]
async fn nodes_find_no_place_beyond_the_limit_and_the_limit_takes_a_restart() {
    let cluster = Cluster::start(2).await;
    let two = |limit| format!("limits: {{ nodes: {limit} }}\n{}", nodes(&cluster, &[0, 1], &[]));
    let options = ProxyOptions { overrides: &two(2), start: Start::Ready, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    for limit in [2, 3] {
        proxy.configure(
            &cluster,
            &format!("limits: {{ nodes: {limit} }}\n{}", nodes(&cluster, &[0, 1, 2], &[])),
        );
        assert!(!proxy.reload().await);
    }
    assert!(proxy.log().contains("no place is left for node `c`"), "{}", proxy.log());
    proxy.configure(&cluster, &two(3));
    assert!(proxy.reload().await);
    assert!(proxy.log().contains("limits.nodes"), "{}", proxy.log());
}

#[tokio::test]
async fn a_file_with_mistakes_changes_nothing_and_each_is_said_with_its_place() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let good = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    proxy.write_config(&format!("max_clients: 1\n{good}pool: {{ size: none }}\nnonsense: 1\n"));
    assert!(!proxy.reload().await);
    let lines = good.lines().count();
    let log = proxy.log();
    assert!(
        log.contains(&format!("config.yaml:{}:15: pool.size: expected a whole number", lines + 2)),
        "{log}"
    );
    assert!(log.contains(&format!("config.yaml:{}:1: nonsense: unknown key", lines + 3)), "{log}");
    proxy.write_config("nodes: [");
    assert!(!proxy.reload().await);
    std::fs::remove_file(proxy.directory().join("config.yaml")).unwrap();
    assert!(!proxy.reload().await);
    let missing = "client_tls: { mode: require, cert: /nonexistent/c, key: /nonexistent/k }\n";
    proxy.write_config(&format!("max_clients: 1\n{missing}{good}"));
    assert!(!proxy.reload().await);
    assert!(proxy.log().contains("client_tls: "), "{}", proxy.log());
    client.simple_query("SELECT 1").await.unwrap();
    proxy.connect().await.simple_query("SELECT 1").await.unwrap();
    proxy.write_config(&good);
    assert!(proxy.reload().await);
    assert!(proxy.log().contains("configuration reloaded: nothing has changed"), "{}", proxy.log());
}

#[tokio::test]
async fn what_takes_a_restart_says_so_and_stays_as_it_was() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    proxy.configure(
        &cluster,
        "workers: 3\nlisten: 127.0.0.1:1\nhttp: 127.0.0.1:2\nlog: { format: json }\nmax_clients: 2",
    );
    assert!(proxy.reload().await);
    let log = proxy.log();
    assert!(
        log.contains("configuration reloaded: live: max_clients; restart: listen, http, workers, log.format"),
        "{log}"
    );
    client.simple_query("SELECT 1").await.unwrap();
    let _second = proxy.connect().await;
    let third = proxy.connect_as("app", proxy.app()).await.err().unwrap();
    assert_eq!(third.code().unwrap().code(), "53300");
}

/// The node's process id, by way of a statement that does not pin.
async fn shown(client: &tokio_postgres::Client, what: &str) -> String {
    let messages = client.simple_query(what).await.unwrap();
    let row = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    });
    row.unwrap()
}

#[tokio::test]
async fn sessions_go_by_the_new_rules_from_their_next_statement_on() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t AS SELECT 1 AS x").await;
    let proxy = Proxy::start(&cluster).await;
    let (follows, keeps) = (proxy.connect().await, proxy.connect().await);
    keeps.simple_query("SET highwater.consistency = 'eventual'").await.unwrap();
    assert_eq!(shown(&follows, "SHOW highwater.consistency").await, "session");
    let reads = async |node: &str| {
        proxy.metrics().await.sum("highwater_statements_total", &[("node", node), ("class", "read")])
    };
    proxy.configure(
        &cluster,
        "consistency: { level: read_your_writes, rules: [ { user: app, on_stale: error } ] }",
    );
    assert!(proxy.reload().await);
    assert_eq!(shown(&follows, "SHOW highwater.consistency").await, "read_your_writes");
    assert_eq!(shown(&follows, "SHOW highwater.on_stale").await, "error");
    // What a session has said itself goes before.
    assert_eq!(shown(&keeps, "SHOW highwater.consistency").await, "eventual");
    follows.simple_query("RESET highwater.consistency").await.unwrap();
    assert_eq!(shown(&follows, "SHOW highwater.consistency").await, "read_your_writes");
    eventually("reads run on the replica", || async {
        let before = reads("b").await;
        shown(&follows, "SELECT x FROM t").await;
        reads("b").await > before
    })
    .await;
    proxy.configure(&cluster, "routing: { rules: [ { database: app, split: false } ] }");
    assert!(proxy.reload().await);
    let (primary, replica) = (reads("a").await, reads("b").await);
    for _ in 0..10 {
        shown(&follows, "SELECT x FROM t").await;
    }
    assert_eq!((reads("a").await, reads("b").await), (primary + 10.0, replica));
}

#[tokio::test]
async fn a_transaction_keeps_what_it_began_with() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    client.simple_query("BEGIN").await.unwrap();
    client.simple_query("CREATE TABLE t ()").await.unwrap();
    proxy.configure(&cluster, "consistency: { level: strong }\npool: { size: 1, mode: session }");
    assert!(proxy.reload().await);
    assert_eq!(shown(&client, "SHOW highwater.consistency").await, "session");
    client.simple_query("COMMIT").await.unwrap();
    assert_eq!(shown(&client, "SHOW highwater.consistency").await, "strong");
}

#[tokio::test]
async fn who_waits_is_ended_by_a_timeout_that_a_reload_has_set() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut idle = proxy.raw_login().await;
    idle.ask(&query("SELECT 1")).await;
    proxy.configure(&cluster, "timeouts: { idle_session: 200ms }");
    assert!(proxy.reload().await);
    let said = idle.read_to_end().await;
    assert_eq!(said[0].field(b'C').as_deref(), Some("57P05"), "{said:?}");
    proxy.configure(&cluster, "timeouts: { idle_session: 1h }");
    assert!(proxy.reload().await);
    let mut idle = proxy.raw_login().await;
    assert!(idle.silent_for(Duration::from_millis(600)).await);
}

#[tokio::test]
async fn a_pool_that_has_become_too_large_shrinks_and_one_too_small_grows() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let client = proxy.connect().await;
        client.simple_query("BEGIN; SELECT 1").await.unwrap();
        clients.push(client);
    }
    assert!(backends_of(&proxy, "a").await >= 4.0);
    proxy.configure(&cluster, "pool: { users: [ { name: app, size: 1 } ], query_wait_timeout: 500ms }");
    assert!(proxy.reload().await);
    // What runs is not disturbed.
    for client in &clients {
        client.simple_query("SELECT 1; COMMIT").await.unwrap();
    }
    eventually("one backend is left", || async { backends_of(&proxy, "a").await <= 1.0 }).await;
    clients[0].simple_query("BEGIN; SELECT 1").await.unwrap();
    let refused = clients[1].simple_query("BEGIN; SELECT 1").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "53300");
    // Who waits gets the place that a reload makes.
    proxy.configure(&cluster, "pool: { size: 2, query_wait_timeout: 30s }");
    assert!(proxy.reload().await);
    clients[1].simple_query("BEGIN; SELECT 1").await.unwrap();
    for client in &clients[..2] {
        client.simple_query("COMMIT").await.unwrap();
    }
}

#[tokio::test]
async fn limits_of_users_count_those_who_came_before_there_was_one() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let first = proxy.connect().await;
    proxy.configure(&cluster, "pool: { users: [ { name: other }, { name: app, max_clients: 1 } ] }");
    assert!(proxy.reload().await);
    let refused = proxy.connect_as("app", proxy.app()).await.err().unwrap();
    assert_eq!(refused.as_db_error().unwrap().message(), "too many connections for role \"app\"");
    drop(first);
    eventually("the place is free", || async { proxy.connect_as("app", proxy.app()).await.is_ok() }).await;
}

#[tokio::test]
async fn listed_users_come_and_go_and_who_is_in_stays_in() {
    let cluster = Cluster::start(0).await;
    let (app, other) = (&cluster.roles().app, &cluster.roles().superuser);
    let listed = |login: &highwater::demo::cluster::Login| {
        format!(
            "auth: {{ source: list, users: [ {{ name: {}, password: '{}' }} ] }}",
            login.user, login.password
        )
    };
    let overrides = listed(app);
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    assert!(proxy.connect_as("app", other).await.is_err());
    proxy.configure(&cluster, &listed(other));
    assert!(proxy.reload().await);
    proxy.connect_as("app", other).await.unwrap().simple_query("SELECT 1").await.unwrap();
    let refused = proxy.connect_as("app", app).await.err().unwrap();
    assert_eq!(refused.code().unwrap().code(), "28P01");
    client.simple_query("SELECT 1").await.unwrap();
    proxy.configure(&cluster, "auth: { source: query }");
    assert!(proxy.reload().await);
    proxy.connect().await.simple_query("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn certificates_are_read_again_even_where_the_file_names_the_same() {
    let (cluster, proxy, files) = with_tls("require", "disable").await;
    let verified = async |root: &std::path::Path| {
        let mut command = cluster.program_command("psql", proxy.port());
        command.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", root).args(["-XAtc", "SELECT 1"]);
        run(command, "").await.status.success()
    };
    assert!(verified(&files.path().join("cert.pem")).await);
    let (cert, key) = certificate();
    let next = files.path().join("next.pem");
    std::fs::write(&next, &cert).unwrap();
    assert!(!verified(&next).await);
    std::fs::write(files.path().join("cert.pem"), &cert).unwrap();
    std::fs::write(files.path().join("key.pem"), &key).unwrap();
    assert!(proxy.reload().await, "{}", proxy.log());
    assert!(verified(&next).await);
}

#[tokio::test]
async fn functions_that_are_called_safe_or_not_are_judged_anew() {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up(
            "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN EXECUTE ''SELECT 1''; RETURN 1; END'",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let on_replica = async || {
        let reads = async || {
            proxy.metrics().await.sum("highwater_statements_total", &[("node", "b"), ("reason", "read")])
        };
        let before = reads().await;
        client.simple_query("SELECT f()").await.unwrap();
        reads().await > before
    };
    assert!(!on_replica().await);
    proxy.configure(&cluster, "routing: { functions: { safe: [ f ] } }");
    assert!(proxy.reload().await);
    eventually("it runs on the replica", || async { on_replica().await }).await;
    proxy.configure(&cluster, "routing: { functions: { primary: [ f ] } }");
    assert!(proxy.reload().await);
    // At once: until the facts have been read again, nothing is a read.
    for _ in 0..10 {
        assert!(!on_replica().await);
    }
}

#[tokio::test]
async fn a_level_of_log_lines_is_changed_while_it_runs() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let debug = || proxy.log().lines().filter(|line| line.contains(" DEBUG highwater::")).count();
    assert_eq!(debug(), 0);
    proxy.configure(&cluster, "log: { level: 'warn,highwater::listener=debug,highwater::server=info' }");
    assert!(proxy.reload().await);
    // Nonsense in place of a startup packet is said at that level alone.
    let mut stranger = proxy.raw().await;
    stranger.send(b"GET / HTTP/1.1\r\n\r\n").await;
    stranger.read_to_end().await;
    eventually("a line of that level", || async { debug() > 0 }).await;
    proxy.configure(&cluster, "log: { level: error }");
    assert!(proxy.reload().await);
    let lines = proxy.log().lines().count();
    let mut stranger = proxy.raw().await;
    stranger.send(b"GET / HTTP/1.1\r\n\r\n").await;
    stranger.read_to_end().await;
    assert_eq!(proxy.log().lines().count(), lines);
}
