//! Two proxies over one cluster, that agree by a real etcd.

use std::time::Instant;

use highwater::config::Config;
use highwater::demo::port::ReservedPort;
use nix::sys::signal::Signal;

use super::console::{cell, console};
use super::failover::{QUORUM, TABLE, Writers, covered, is_in, only_primary, primary};
use crate::etcd::Etcd;
use crate::fixture::*;

/// One of the proxies, which reaches etcd at `port`.
async fn one_with(cluster: &Cluster, name: &str, port: u16, more: &str, failpoint: &str) -> Proxy {
    one_to(cluster, "", name, port, more, failpoint).await
}

/// One which goes to these nodes; empty: to those of the cluster.
async fn one_to(cluster: &Cluster, nodes: &str, name: &str, port: u16, more: &str, failpoint: &str) -> Proxy {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    let several = format!(
        "kind: etcd, endpoints: [ 'http://127.0.0.1:{port}' ], prefix: /highwater/test, name: {name}, ttl: 4s"
    );
    let overrides = format!(
        "{nodes}\nfailover: {{ mode: auto, startup_grace: 1s, sever_timeout: 20s, coordination: {{ {several} }}{more} }}"
    );
    let options = ProxyOptions { overrides: &overrides, failpoint, ..ProxyOptions::default() };
    Proxy::start_with(cluster, options).await
}

async fn one(cluster: &Cluster, name: &str, etcd: &Etcd, more: &str) -> Proxy {
    one_with(cluster, name, etcd.port(), more, "").await
}

async fn dcs(proxy: &Proxy, what: &str) -> f64 {
    proxy.metrics().await.sum(&format!("highwater_dcs_{what}"), &[])
}

async fn leads(proxy: &Proxy) -> bool {
    dcs(proxy, "leader").await == 1.0
}

/// The first leads, the second follows it; the leader has adopted the primary.
async fn pair(cluster: &Cluster, etcd: &Etcd, more: &str) -> (Proxy, Proxy) {
    let first = one(cluster, "p1", etcd, more).await;
    eventually("p1 leads", || leads(&first)).await;
    let second = one(cluster, "p2", etcd, more).await;
    settled(&first, &second).await;
    (first, second)
}

async fn settled(first: &Proxy, second: &Proxy) {
    eventually("the leader is well, and the other follows it", || async {
        is_in(first, "healthy").await
            && is_in(second, "following").await
            && dcs(first, "proxies").await == 2.0
            && dcs(second, "lease").await == 1.0
            && dcs(second, "up").await == 1.0
    })
    .await;
}

async fn timeline(cluster: &Cluster, node: usize) -> String {
    let sql = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int";
    cluster.node(node).query_text(sql).await.unwrap()
}

fn name_of(index: usize) -> String {
    ["a", "b", "c"][index].to_owned()
}

/// Waits until a client of `proxy` can write.
async fn writes_again(proxy: &Proxy, x: i64) {
    eventually("it is written again", || async {
        let mut client = proxy.raw_login().await;
        write(&mut client, x).await == "CZ"
    })
    .await;
}

async fn write(client: &mut RawClient, x: i64) -> String {
    tags(&client.ask(&query(&format!("INSERT INTO t VALUES ({x})"))).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_primary_is_replaced_once_and_no_client_of_either_proxy_loses_a_row() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, QUORUM).await;
    covered(&first, &cluster).await;
    let here = Writers::start(first.port(), &cluster, 4).await;
    // Numbers of their own.
    let there = Writers::start_from(second.port(), &cluster, 4, 1_000_000_000).await;
    here.more(200).await;
    there.more(200).await;
    let killed = Instant::now();
    cluster.node(0).crash().await.unwrap();
    here.more(200).await;
    there.more(200).await;
    let new = only_primary(&cluster).await;
    assert_eq!(timeline(&cluster, new).await, "2", "promoted more than once");
    for proxy in [&first, &second] {
        assert_eq!(primary(proxy).await, Some(name_of(new)));
    }
    for written in [here.finish().await, there.finish().await] {
        println!("first write after {:?}", written.first_after(killed));
        assert_eq!(written.lost(&cluster, new).await, 0);
    }
    assert!(leads(&first).await && !leads(&second).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_stopped_before_it_promotes_is_replaced_and_promotes_nobody_when_it_goes_on() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let first = one_with(&cluster, "p1", etcd.port(), QUORUM, "stop:promote_recorded").await;
    eventually("p1 leads", || leads(&first)).await;
    let second = one(&cluster, "p2", &etcd, QUORUM).await;
    settled(&first, &second).await;
    covered(&first, &cluster).await;
    let mut old = first.raw_login().await;
    assert_eq!(write(&mut old, 1).await, "CZ");
    let writers = Writers::start_from(second.port(), &cluster, 4, 1_000_000_000).await;
    writers.more(100).await;
    cluster.node(0).crash().await.unwrap();
    // The first has recorded whom it promotes, and been stopped there; the second takes over.
    writers.more(100).await;
    assert!(first.is_stopped(), "the first was not stopped where it should be");
    let new = only_primary(&cluster).await;
    assert_eq!(timeline(&cluster, new).await, "2");
    assert!(leads(&second).await);
    first.signal(Signal::SIGCONT);
    eventually("the first follows", || async {
        !leads(&first).await
            && is_in(&first, "following").await
            && dcs(&first, "lease").await == 1.0
            && primary(&first).await == Some(name_of(new))
    })
    .await;
    let mut client = first.raw_login().await;
    assert_eq!(write(&mut client, 2).await, "CZ");
    writers.more(100).await;
    assert_eq!(only_primary(&cluster).await, new);
    assert_eq!(timeline(&cluster, new).await, "2", "promoted more than once");
    assert_eq!(writers.finish().await.lost(&cluster, new).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_does_not_answer_is_waited_out_before_another_primary_takes_writes() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    let mut old = second.raw_login().await;
    assert_eq!(write(&mut old, 1).await, "CZ");
    second.signal(Signal::SIGSTOP);
    cluster.node(0).crash().await.unwrap();
    eventually("a standby takes writes", || async {
        for node in [1, 2] {
            if cluster.node(node).query_text("SELECT pg_is_in_recovery()").await.unwrap() == "f" {
                return true;
            }
        }
        false
    })
    .await;
    // Until its lease was over it could have passed on what the old primary had said.
    assert_eq!(dcs(&first, "proxies").await, 1.0, "{}", first.log());
    second.signal(Signal::SIGCONT);
    eventually("the second follows", || async { primary(&second).await == primary(&first).await }).await;
    writes_again(&second, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thawed_proxy_passes_on_nothing_that_the_primary_said_meanwhile() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    let mut client = first.raw_login().await;
    assert_eq!(write(&mut client, 1).await, "CZ");
    let superuser = &cluster.roles().superuser;
    let holder = cluster.node(0).connect("app", superuser).await.unwrap();
    holder.batch_execute("BEGIN; LOCK t IN SHARE MODE").await.unwrap();
    client.send(&query("INSERT INTO t VALUES (2)")).await;
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 't'::regclass";
    let looks = cluster.node(0).connect("app", superuser).await.unwrap();
    eventually("the statement waits", || async {
        looks.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    first.signal(Signal::SIGSTOP);
    eventually("the second leads", || leads(&second)).await;
    holder.batch_execute("COMMIT").await.unwrap();
    eventually("it is committed", || async {
        looks.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    first.signal(Signal::SIGCONT);
    // It lies before the first, which may not use the primary any more.
    let answer = client.read_ready().await;
    assert!(!answer.iter().any(|message| message.tag == b'C'), "{answer:?}");
    assert_eq!(answer[0].field(b'C').as_deref(), Some("08007"), "{answer:?}");
    eventually("it is heard of again", || async { dcs(&first, "lease").await == 1.0 }).await;
    let mut client = first.raw_login().await;
    assert_eq!(write(&mut client, 3).await, "CZ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_nobody_is_promoted_and_writes_stop_until_it_is_back() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "pause_timeout: 500ms").await;
    let mut clients = [first.raw_login().await, second.raw_login().await];
    for (x, client) in (0..).zip(&mut clients) {
        assert_eq!(write(client, x).await, "CZ");
    }
    const READ: &str = "SELECT count(*) FROM t";
    let readers = [first.connect().await, second.connect().await];
    for (reader, proxy) in readers.iter().zip([&first, &second]) {
        reader.batch_execute("SET highwater.consistency = 'eventual'").await.unwrap();
        // A read is known as one once the catalog facts are there.
        eventually("a read runs on a replica", || async {
            reader.simple_query(READ).await.unwrap();
            proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) > 0.0
        })
        .await;
    }
    etcd.kill();
    for proxy in [&first, &second] {
        eventually("its lease is over", || async { dcs(proxy, "lease").await == 0.0 }).await;
        assert_eq!(dcs(proxy, "up").await, 0.0);
    }
    for client in &mut clients {
        let answer = client.ask(&query("INSERT INTO t VALUES (100)")).await;
        let error = answer.iter().find(|message| message.tag == b'E').expect("it was written");
        assert_eq!(error.field(b'C').as_deref(), Some("57P03"));
        assert!(error.field(b'M').unwrap().contains("etcd"), "{error:?}");
    }
    // Reads go on where they need not see the primary.
    for reader in &readers {
        assert_eq!(reader.simple_query(READ).await.unwrap().len(), 3);
    }
    cluster.node(0).crash().await.unwrap();
    eventually("both know", || async {
        let up = async |proxy: &Proxy| proxy.metrics().await.sum("highwater_node_up", &[("node", "a")]);
        up(&first).await + up(&second).await == 0.0
    })
    .await;
    for node in [1, 2] {
        assert_eq!(cluster.node(node).query_text("SELECT pg_is_in_recovery()").await.unwrap(), "t");
    }
    etcd.start_again().await;
    for (x, proxy) in (10..).zip([&first, &second]) {
        writes_again(proxy, x).await;
    }
    let new = only_running_primary(&cluster, [1, 2]).await;
    assert_eq!(timeline(&cluster, new).await, "2");
}

async fn only_running_primary(cluster: &Cluster, among: [usize; 2]) -> usize {
    let mut found = Vec::new();
    for node in among {
        if cluster.node(node).query_text("SELECT pg_is_in_recovery()").await.unwrap() == "f" {
            found.push(node);
        }
    }
    assert_eq!(found.len(), 1, "primaries: {found:?}");
    found[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_from_etcd_stops_writes_and_another_one_leads() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let link = Link::to(etcd.port()).await;
    let first = one_with(&cluster, "p1", link.port(), "pause_timeout: 500ms", "").await;
    eventually("p1 leads", || leads(&first)).await;
    let second = one(&cluster, "p2", &etcd, "pause_timeout: 500ms").await;
    settled(&first, &second).await;
    let (mut here, mut there) = (first.raw_login().await, second.raw_login().await);
    assert_eq!((write(&mut here, 1).await, write(&mut there, 2).await), ("CZ".into(), "CZ".into()));
    link.silence();
    eventually("the second leads", || leads(&second)).await;
    assert_eq!(dcs(&first, "lease").await, 0.0, "it may use the primary while another one leads");
    assert_eq!(write(&mut here, 3).await, "EZ");
    assert_eq!(write(&mut there, 4).await, "CZ");
    // It is not waited for, and what it has open does not stand in the way.
    let orders = console(&cluster, &second).await;
    could_switch_over(&orders).await;
    orders.batch_execute("SWITCHOVER TO b TIMEOUT '20s'").await.unwrap();
    assert_eq!(write(&mut there, 5).await, "CZ");
    assert_eq!(write(&mut here, 6).await, "EZ");
    link.heal();
    eventually("the first follows", || async {
        dcs(&first, "lease").await == 1.0 && primary(&first).await.as_deref() == Some("b")
    })
    .await;
    writes_again(&first, 7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whom_no_node_answers_leaves_the_lead_to_one_whom_they_answer() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (mut links, mut nodes) = (Vec::new(), Vec::new());
    for at in 0..3 {
        let link = Link::to(cluster.node(at).port()).await;
        nodes.push(format!("{{ name: {}, host: 127.0.0.1, port: {} }}", name_of(at), link.port()));
        links.push(link);
    }
    let nodes = format!("nodes: [ {} ]", nodes.join(", "));
    let first = one_to(&cluster, &nodes, "p1", etcd.port(), "", "").await;
    eventually("p1 leads", || leads(&first)).await;
    let second = one(&cluster, "p2", &etcd, "").await;
    settled(&first, &second).await;
    links.iter().for_each(Link::silence);
    eventually("the second leads", || leads(&second)).await;
    assert!(first.log().contains("no node answers this proxy, and others are answered"), "{}", first.log());
    // As long as that lasts, and there is another to lead.
    eventually("it goes on as before", || is_in(&second, "healthy")).await;
    writes_again(&second, 1).await;
    cluster.node(0).crash().await.unwrap();
    writes_again(&second, 2).await;
    assert_eq!(dcs(&first, "leader").await, 0.0);
    links.iter().for_each(Link::heal);
    eventually("the first follows", || async {
        dcs(&first, "lease").await == 1.0 && primary(&first).await == primary(&second).await
    })
    .await;
    writes_again(&first, 3).await;
    let new = only_running_primary(&cluster, [1, 2]).await;
    assert_eq!(timeline(&cluster, new).await, "2");
    // Who is alone leads even so.
    second.stop().await;
    links.iter().for_each(Link::silence);
    eventually("the first leads", || leads(&first)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_is_the_leaders_and_costs_no_client_of_either_proxy_an_error() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    let orders = console(&cluster, &second).await;
    let error = orders.batch_execute("SWITCHOVER TO b").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "55000");
    assert!(error.message().contains("p1") && error.hint().unwrap().contains("p1"), "{error:?}");
    assert_eq!(cell(&orders, "failover", ("item", "leader"), "value").await.as_deref(), Some("p1"));
    assert_eq!(cell(&orders, "failover", ("item", "leads"), "value").await.as_deref(), Some("no"));
    let here = Writers::start(first.port(), &cluster, 4).await;
    let there = Writers::start_from(second.port(), &cluster, 4, 1_000_000_000).await;
    here.more(100).await;
    there.more(100).await;
    let orders = console(&cluster, &first).await;
    could_switch_over(&orders).await;
    orders.batch_execute("SWITCHOVER TO b TIMEOUT '20s'").await.unwrap();
    here.more(100).await;
    there.more(100).await;
    for proxy in [&first, &second] {
        assert_eq!(primary(proxy).await.as_deref(), Some("b"));
    }
    for written in [here.finish().await, there.finish().await] {
        assert_eq!(written.lost(&cluster, 1).await, 0);
        assert!(written.errors.is_empty(), "{:?}", written.errors);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_ends_or_is_killed_is_followed_by_the_other_and_comes_back_as_a_follower() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    let proxies = [first, second];
    proxies[0].restart().await;
    // Either may have been the first to ask.
    let leader = leader_of(&proxies).await;
    settled(&proxies[leader], &proxies[1 - leader]).await;
    let mut client = proxies[1].raw_login().await;
    assert_eq!(write(&mut client, 1).await, "CZ");
    // Killed, it has not said so: the others wait out its lease, its own clients do not.
    proxies[leader].signal(Signal::SIGKILL);
    proxies[leader].revive().await;
    let mut client = proxies[leader].raw_login().await;
    assert_eq!(write(&mut client, 2).await, "CZ");
    let leader = leader_of(&proxies).await;
    settled(&proxies[leader], &proxies[1 - leader]).await;
    // What one has recorded another goes on from.
    let orders = console(&cluster, &proxies[leader]).await;
    could_switch_over(&orders).await;
    orders.batch_execute("SWITCHOVER TO b TIMEOUT '20s'").await.unwrap();
    proxies[leader].restart().await;
    let leader = leader_of(&proxies).await;
    settled(&proxies[leader], &proxies[1 - leader]).await;
    for proxy in &proxies {
        let orders = console(&cluster, proxy).await;
        assert_eq!(cell(&orders, "history", ("old_primary", "a"), "new_primary").await.as_deref(), Some("b"));
        assert_eq!(primary(proxy).await.as_deref(), Some("b"));
        let mut client = proxy.raw_login().await;
        assert_eq!(tags(&client.ask(&query("UPDATE t SET x = x + 10")).await), "CZ");
    }
}

/// Who has just begun to lead asks the nodes first.
async fn could_switch_over(orders: &tokio_postgres::Client) {
    eventually("a switchover to b could be done", || async {
        orders.batch_execute("SWITCHOVER TO b DRY RUN").await.is_ok()
    })
    .await;
}

async fn leader_of(proxies: &[Proxy; 2]) -> usize {
    eventually("one of them leads", || async { leads(&proxies[0]).await || leads(&proxies[1]).await }).await;
    usize::from(leads(&proxies[1]).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_promoted_by_hand_is_followed_by_both_once_the_leader_has_found_it() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    cluster.node(1).promote().await.unwrap();
    for proxy in [&second, &first] {
        eventually("it is followed", || async { primary(proxy).await.as_deref() == Some("b") }).await;
        let mut client = proxy.raw_login().await;
        let answer = client.ask(&query("INSERT INTO t SELECT count(*) FROM t")).await;
        assert_eq!(tags(&answer), "CZ", "{answer:?}");
    }
    let looks = cluster.node(1).connect("app", &cluster.roles().superuser).await.unwrap();
    assert_eq!(looks.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_whatever_becomes_of_proxies_and_etcd() {
    let (cluster, etcd) = (Cluster::start(2).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, QUORUM).await;
    covered(&first, &cluster).await;
    let proxies = [first, second];
    let writers = [
        Writers::start(proxies[0].port(), &cluster, 3).await,
        Writers::start_from(proxies[1].port(), &cluster, 3, 1_000_000_000).await,
    ];
    let both_write = async || {
        for writers in &writers {
            writers.more(50).await;
        }
    };
    both_write().await;
    // The leader is stopped until the other leads, then killed, then asked for a switchover; etcd goes and comes.
    for round in 0..2 {
        let leader = leader_of(&proxies).await;
        proxies[leader].signal(Signal::SIGSTOP);
        eventually("the other leads", || leads(&proxies[1 - leader])).await;
        writers[1 - leader].more(50).await;
        proxies[leader].signal(Signal::SIGCONT);
        settled(&proxies[1 - leader], &proxies[leader]).await;
        both_write().await;
        let leader = 1 - leader;
        proxies[leader].signal(Signal::SIGKILL);
        proxies[leader].revive().await;
        both_write().await;
        let leader = leader_of(&proxies).await;
        settled(&proxies[leader], &proxies[1 - leader]).await;
        etcd.kill();
        if round == 0 {
            eventually("writes have stopped", || async { dcs(&proxies[0], "lease").await == 0.0 }).await;
        }
        etcd.start_again().await;
        both_write().await;
        let leader = leader_of(&proxies).await;
        settled(&proxies[leader], &proxies[1 - leader]).await;
    }
    let leader = leader_of(&proxies).await;
    covered(&proxies[leader], &cluster).await;
    // The other one is stopped as the primary goes.
    proxies[1 - leader].signal(Signal::SIGSTOP);
    cluster.node(0).crash().await.unwrap();
    writers[leader].more(50).await;
    proxies[1 - leader].signal(Signal::SIGCONT);
    both_write().await;
    let new = only_primary(&cluster).await;
    assert_eq!(timeline(&cluster, new).await, "2");
    for writers in writers {
        let written = writers.finish().await;
        assert_eq!(written.lost(&cluster, new).await, 0, "{:?}", written.errors);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_cannot_read_the_record_keeps_from_the_primary_and_holds_nobody_up() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    cluster.set_up(TABLE).await;
    let (first, second) = pair(&cluster, &etcd, "").await;
    let node = |name: &str, at: usize| {
        format!("{{ name: {name}, host: 127.0.0.1, port: {} }}", cluster.link(at).port())
    };
    // It calls the nodes something else.
    let several = format!(
        "kind: etcd, endpoints: [ 'http://127.0.0.1:{}' ], prefix: /highwater/test, name: p3, ttl: 4s",
        etcd.port()
    );
    let overrides = format!(
        "nodes: [ {}, {} ]\nfailover: {{ mode: auto, pause_timeout: 500ms, coordination: {{ {several} }} }}",
        node("x", 0),
        node("y", 1)
    );
    let options = ProxyOptions { overrides: &overrides, start: Start::Listening, ..ProxyOptions::default() };
    let stranger = Proxy::start_with(&cluster, options).await;
    eventually("it is there", || async { dcs(&first, "proxies").await == 3.0 }).await;
    eventually("it says so", || async { stranger.log().contains("the record in etcd cannot be used") }).await;
    assert_eq!(dcs(&stranger, "lease").await, 0.0);
    let mut client = stranger.raw_login().await;
    assert_eq!(write(&mut client, 1).await, "EZ");
    // It is heard of, and has nothing open.
    let orders = console(&cluster, &first).await;
    could_switch_over(&orders).await;
    orders.batch_execute("SWITCHOVER TO b TIMEOUT '20s'").await.unwrap();
    // Alone, it does not lead.
    first.stop().await;
    second.stop().await;
    eventually("it is alone", || async { dcs(&stranger, "proxies").await == 1.0 }).await;
    eventually("it has tried", || async { stranger.log().contains("coordination: this proxy leads") }).await;
    eventually("it has given up", || async { dcs(&stranger, "leader").await == 0.0 }).await;
    assert_eq!(write(&mut client, 2).await, "EZ");
    assert_eq!(stranger.log().matches("coordination: this proxy leads").count(), 1);
}

#[tokio::test]
async fn check_names_each_member_of_etcd_that_does_not_answer() {
    let (cluster, etcd) = (Cluster::start(1).await, Etcd::start().await);
    let nobody = ReservedPort::claim().unwrap();
    let (here, gone) = (etcd.port(), nobody.number());
    let endpoints = format!("'http://127.0.0.1:{here}', 'http://127.0.0.1:{gone}'");
    let several = format!("kind: etcd, endpoints: [ {endpoints} ], prefix: /highwater/test, name: p");
    let overrides = format!("failover: {{ mode: manual, coordination: {{ {several} }} }}");
    let text =
        config_text(&cluster, 1, 2, &ProxyOptions { overrides: &overrides, ..ProxyOptions::default() });
    let config = Config::parse(&text, "f.yaml", &|_| None).unwrap();
    let report = highwater::check::check(&config, &mut |_| {}).await;
    let etcds: Vec<&String> = report.problems.iter().filter(|problem| problem.starts_with("etcd ")).collect();
    assert!(etcds.len() == 1 && etcds[0].contains(&format!("127.0.0.1:{gone}")), "{report}");
}
