//! While the primary is being changed: who waits, who may go on, who is told what. The proxy runs in this process, so
//! that the gate can be set as failover sets it.

use std::time::Duration;

use highwater::config::Config;
use highwater::demo::cluster::Login;
use highwater::gate::Posture;
use highwater::metrics::{ClassCacheFigures, Scrape};
use highwater::server::{self, ServerHandle};
use highwater::topology::NodeId;

use crate::fixture::*;

const PRIMARY: NodeId = NodeId(0);

/// A proxy whose gate is at hand.
struct Gated {
    server: Option<ServerHandle>,
    app: Login,
}

impl Gated {
    async fn start(cluster: &Cluster, overrides: &str) -> Gated {
        let options = ProxyOptions { overrides, ..ProxyOptions::default() };
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.yaml");
        std::fs::write(&file, config_text(cluster, 0, 0, &options)).unwrap();
        let config = Config::load(&file).unwrap();
        let server = tokio::task::spawn_blocking(|| server::start(config)).await.unwrap().unwrap();
        let replicas = cluster.nodes().len() - 1;
        eventually("all nodes serve", || async {
            let topology = server.topology.load_full();
            topology.primary.is_some() && topology.serving_replicas().count() == replicas
        })
        .await;
        Gated { server: Some(server), app: cluster.roles().app.clone() }
    }

    fn server(&self) -> &ServerHandle {
        self.server.as_ref().unwrap()
    }

    async fn login(&self) -> RawClient {
        let mut client = RawClient::connect(self.server().address.port()).await;
        client.login("app", &self.app).await.unwrap();
        client
    }

    async fn waiting(&self, sessions: usize) {
        eventually("they wait", || async { self.server().gate.waiting() == sessions }).await;
    }

    /// Whether a metric has such a label, and so has counted something.
    fn has_counted(&self, label: &str) -> bool {
        let scrape = Scrape {
            topology: &self.server().topology.load_full(),
            pools: &[],
            class_cache: ClassCacheFigures::default(),
            samples: &[],
            clock_offsets: &[],
            topology_changes: 0,
            sample_ages: &[],
            failover: highwater::metrics::FailoverFigures::default(),
        };
        self.server()
            .metrics
            .render(&scrape)
            .lines()
            .any(|line| line.contains(label) && !line.ends_with(" 0"))
    }

    /// Closes, leaves the primary, and waits until nothing of it is left.
    async fn leave_primary(&self) {
        let gate = &self.server().gate;
        gate.set(Posture::Closed);
        gate.close_sockets(PRIMARY);
        tokio::time::timeout(Duration::from_secs(5), gate.sockets_closed(PRIMARY))
            .await
            .unwrap_or_else(|_| panic!("{} connections are left", gate.sockets_left(PRIMARY)));
    }

    async fn stop(mut self) {
        let server = self.server.take();
        tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
    }
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

async fn succeed(client: &mut RawClient, sql: &str) -> Vec<Message> {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_wait_in_the_order_in_which_they_came_while_reads_go_on() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (id serial, x int)").await;
    // However loaded the machine is, a read is not to give up waiting for its replica.
    let patient = "{ workers: 1, pool: { size: 1 }, consistency: { catch_up_wait: 30s } }";
    let proxy = Gated::start(&cluster, patient).await;
    let gate = &proxy.server().gate;
    let mut reader = proxy.login().await;
    while !proxy.has_counted("class=\"read\"") {
        succeed(&mut reader, "SELECT x FROM t").await;
    }
    for (round, posture) in [Posture::Paused, Posture::Draining, Posture::Closed].into_iter().enumerate() {
        let mut writers = Vec::new();
        for _ in 0..8 {
            writers.push(proxy.login().await);
        }
        gate.set(posture);
        for (number, writer) in writers.iter_mut().enumerate() {
            writer.send(&query(&format!("INSERT INTO t (x) VALUES ({round} * 10 + {number})"))).await;
            proxy.waiting(number + 1).await;
        }
        succeed(&mut reader, "SELECT x FROM t").await;
        let count = format!("SELECT count(*) FROM t WHERE x / 10 = {round}");
        assert_eq!(cluster.primary().query_text(&count).await.unwrap(), "0", "{posture:?}");
        gate.set(Posture::Open);
        for writer in &mut writers {
            assert_eq!(tags(&writer.read_ready().await), "CZ");
        }
        let order =
            format!("SELECT string_agg((x % 10)::text, '' ORDER BY id) FROM t WHERE x / 10 = {round}");
        assert_eq!(cluster.primary().query_text(&order).await.unwrap(), "01234567", "{posture:?}");
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_too_long_or_finds_the_line_full_is_told_so_and_a_cancel_ends_the_wait() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Gated::start(&cluster, "failover: { max_paused: 2, pause_timeout: 700ms }").await;
    let (mut one, mut two, mut three) = (proxy.login().await, proxy.login().await, proxy.login().await);
    proxy.server().gate.set(Posture::Paused);
    one.send(&query("INSERT INTO t VALUES (1)")).await;
    two.send(&query("INSERT INTO t VALUES (2)")).await;
    proxy.waiting(2).await;
    let answer = three.ask(&query("INSERT INTO t VALUES (3)")).await;
    assert_eq!((tags(&answer).as_str(), code(&answer).as_deref()), ("EZ", Some("53300")), "{answer:?}");
    two.cancel().await;
    assert_eq!(code(&two.read_ready().await).as_deref(), Some("57014"));
    let answer = one.read_ready().await;
    assert_eq!(code(&answer).as_deref(), Some("57P03"), "{answer:?}");
    assert_eq!(answer[0].field(b'M').as_deref(), Some("the primary cannot be reached"));
    proxy.waiting(0).await;
    proxy.server().gate.set(Posture::Open);
    for client in [&mut one, &mut two, &mut three] {
        succeed(client, "INSERT INTO t VALUES (4)").await;
    }
    assert_eq!(cluster.primary().query_text("SELECT sum(x) FROM t").await.unwrap(), "12");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_primary_is_left_when_the_last_transaction_is_over_and_pins_do_not_hold_it_up() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Gated::start(&cluster, "").await;
    let gate = proxy.server().gate.clone();
    let (mut busy, mut pinned, mut listens) = (proxy.login().await, proxy.login().await, proxy.login().await);
    let (mut plain, mut late) = (proxy.login().await, proxy.login().await);
    succeed(&mut pinned, "CREATE TEMP TABLE mine (x int)").await;
    succeed(&mut listens, "LISTEN a").await;
    succeed(&mut plain, "SET TimeZone TO 'Asia/Tokyo'").await;
    succeed(&mut plain, "INSERT INTO t VALUES (0)").await;
    succeed(&mut busy, "BEGIN").await;
    succeed(&mut busy, "INSERT INTO t VALUES (1)").await;
    gate.set(Posture::Draining);
    late.send(&query("INSERT INTO t VALUES (2)")).await;
    proxy.waiting(1).await;
    assert_eq!(gate.on_primary(), 1);
    // It goes on to its end.
    succeed(&mut busy, "INSERT INTO t VALUES (1)").await;
    succeed(&mut busy, "COMMIT").await;
    tokio::time::timeout(Duration::from_secs(5), gate.drained()).await.expect("it is drained");
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t WHERE x < 2").await.unwrap(), "3");
    proxy.leave_primary().await;
    // Whose state is gone is told so; whose can be had elsewhere is not.
    let words = pinned.read_to_end().await;
    assert_eq!(code(&words).as_deref(), Some("57P01"), "{words:?}");
    let silence = Duration::from_millis(100);
    assert!(
        plain.silent_for(silence).await
            && listens.silent_for(silence).await
            && busy.silent_for(silence).await
    );
    gate.set(Posture::Open);
    assert_eq!(tags(&late.read_ready().await), "CZ");
    let warning = listens.read().await.unwrap();
    assert_eq!((warning.tag, warning.field(b'C').as_deref()), (b'N', Some("HW003")));
    succeed(&mut late, "NOTIFY a, 'it listens again'").await;
    assert_eq!(listens.read().await.unwrap().tag, b'A');
    let shown = succeed(&mut plain, "SHOW TimeZone").await;
    assert_eq!(shown[1].columns()[0].as_deref(), Some("Asia/Tokyo"));
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_primary_that_is_left_is_passed_on_and_each_is_told_what_became_of_it() {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up(
            "CREATE TABLE t (x int); CREATE TABLE slow (x int);
             CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        .await;
    let proxy = Gated::start(&cluster, "").await;
    let gate = proxy.server().gate.clone();
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(proxy.login().await);
    }
    let [write, commit, extended, inside, open, idle] = &mut clients[..] else { unreachable!() };
    write.send(&query("INSERT INTO t SELECT 1 FROM pg_sleep(3600)")).await;
    for client in [&mut *commit, &mut *extended, &mut *inside, &mut *open] {
        succeed(client, "BEGIN").await;
    }
    succeed(commit, "INSERT INTO slow VALUES (1)").await;
    commit.send(&query("COMMIT")).await;
    succeed(extended, "INSERT INTO slow VALUES (1)").await;
    extended.send(&[parse("", "COMMIT"), bind("", &[]), execute(), sync()].concat()).await;
    inside.send(&query("INSERT INTO t SELECT 1 FROM pg_sleep(3600)")).await;
    succeed(open, "SAVEPOINT a").await;
    succeed(open, "INSERT INTO t VALUES (1)").await;
    succeed(idle, "INSERT INTO t VALUES (0)").await;
    let active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'active'";
    cluster.primary().wait_for(active, "4").await.unwrap();
    assert_eq!(gate.on_primary(), 5);
    proxy.leave_primary().await;
    for client in [&mut *write, &mut *commit, &mut *extended] {
        let answer = client.read_ready().await;
        assert_eq!((tags(&answer).as_str(), code(&answer).as_deref()), ("EZ", Some("08007")), "{answer:?}");
        assert_eq!(answer[1].body, b"I");
    }
    for client in [&mut *inside, &mut *open] {
        let words = client.read_to_end().await;
        assert_eq!((tags(&words).as_str(), code(&words).as_deref()), ("E", Some("57P01")), "{words:?}");
    }
    assert_eq!(gate.on_primary(), 0);
    assert!(idle.silent_for(Duration::from_millis(100)).await);
    // Nobody goes there, new sessions included; reads go on.
    let mut new = proxy.login().await;
    for client in [&mut new, &mut *idle] {
        client.send(&query("INSERT INTO t VALUES (5)")).await;
    }
    proxy.waiting(2).await;
    assert_eq!(gate.sockets_left(PRIMARY), 0);
    gate.set(Posture::Open);
    assert_eq!(tags(&new.read_ready().await), "CZ");
    assert_eq!(tags(&idle.read_ready().await), "CZ");
    for client in [write, commit, extended] {
        succeed(client, "INSERT INTO t VALUES (6)").await;
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_on_a_primary_that_is_left_runs_elsewhere() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (7)").await;
    let proxy = Gated::start(&cluster, "").await;
    let mut client = proxy.login().await;
    while !proxy.has_counted("class=\"read\"") {
        // Until the catalog facts are there, nothing is known to be a read.
        succeed(&mut client, "SELECT x FROM t").await;
    }
    client.send(&query("SELECT x FROM t, (SELECT pg_sleep(0.5)) AS s")).await;
    let active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'active'";
    cluster.primary().wait_for(active, "1").await.unwrap();
    proxy.leave_primary().await;
    proxy.waiting(1).await;
    assert_eq!(proxy.server().gate.on_primary(), 0, "it waits outside");
    proxy.server().gate.set(Posture::Open);
    let answer = client.read_ready().await;
    assert_eq!(tags(&answer), "TDCZ", "{answer:?}");
    assert_eq!(answer[1].columns()[0].as_deref(), Some("7"));
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_backend_of_which_nothing_can_be_shown_does_not_hold_up_who_leaves_the_primary() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Gated::start(&cluster, "").await;
    let (mut one, mut two) = (proxy.login().await, proxy.login().await);
    succeed(&mut one, "BEGIN").await;
    succeed(&mut one, "INSERT INTO t VALUES (1)").await;
    // Nobody can say where the primary is any more, though sessions reach it: no sample vouches for a new backend.
    let control = &cluster.roles().control.user;
    cluster.set_up_as_superuser(&format!("ALTER ROLE {control} NOLOGIN")).await;
    let sessions = format!("FROM pg_stat_activity WHERE usename = '{control}'");
    cluster
        .primary()
        .query_text(&format!("SELECT count(pg_terminate_backend(pid)) {sessions}"))
        .await
        .unwrap();
    cluster.primary().wait_for(&format!("SELECT count(*) {sessions}"), "0").await.unwrap();
    two.send(&query("INSERT INTO t VALUES (2)")).await;
    let backends = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    cluster.primary().wait_for(backends, "2").await.unwrap();
    proxy.leave_primary().await;
    cluster.set_up_as_superuser(&format!("ALTER ROLE {control} LOGIN")).await;
    proxy.server().gate.set(Posture::Open);
    // It had not been sent, and is now.
    assert_eq!(tags(&two.read_ready().await), "CZ");
    proxy.stop().await;
}
