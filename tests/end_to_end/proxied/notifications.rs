//! LISTEN and NOTIFY behave as on one server.

use std::time::Duration;

use crate::fixture::*;

/// Sender's process id, channel and payload.
fn notification(message: &Message) -> (u32, String, String) {
    assert_eq!(message.tag, b'A', "not a notification: {message:?}");
    let mut texts = message.body[4..].split(|byte| *byte == 0);
    let mut text = || String::from_utf8_lossy(texts.next().unwrap()).into_owned();
    (u32::from_be_bytes(*message.body.first_chunk().unwrap()), text(), text())
}

fn own_pid(client: &RawClient) -> u32 {
    u32::from_be_bytes(*client.key.first_chunk().unwrap())
}

async fn succeed(client: &mut RawClient, sql: &str) -> Vec<Message> {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
    answer
}

#[tokio::test]
async fn an_idle_session_hears_at_once_and_in_order() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (mut listener, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut listener, "LISTEN a; LISTEN b").await;
    let long = "x".repeat(7999);
    succeed(&mut other, &format!("NOTIFY a, '1'; NOTIFY b, '2'; NOTIFY a, '{long}'")).await;
    succeed(&mut other, "SELECT pg_notify('b', g::text) FROM generate_series(4, 9) g").await;
    let mut heard = Vec::new();
    for _ in 0..9 {
        let (pid, channel, payload) = notification(&listener.read().await.unwrap());
        assert_eq!(pid, own_pid(&other));
        heard.push((channel, if payload == long { "3".to_owned() } else { payload }));
    }
    let payloads: String = heard.iter().map(|(_, payload)| payload.as_str()).collect();
    assert_eq!(payloads, "123456789");
    assert_eq!(heard[1].0, "b");
    // Its own come before its statement is over, with the id that it was given at login.
    let answer = succeed(&mut listener, "NOTIFY a, 'mine'").await;
    assert_eq!(tags(&answer), "CAZ");
    assert_eq!(notification(&answer[1]), (own_pid(&listener), "a".to_owned(), "mine".to_owned()));
}

#[tokio::test]
async fn the_sender_is_the_session_that_sent_it_or_nobody() {
    let cluster = Cluster::start(0).await;
    cluster
        .set_up(
            "CREATE TABLE t (x text);
             CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN PERFORM pg_notify('a', NEW.x); RETURN NULL; END $$;
             CREATE TRIGGER tell AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION tell()",
        )
        .await;
    let options = ProxyOptions { overrides: "{ workers: 1, pool: { size: 3 } }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let mut listener = proxy.raw_login().await;
    succeed(&mut listener, "LISTEN a").await;
    // Each on a backend of its own.
    let (mut one, mut two) = (proxy.raw_login().await, proxy.raw_login().await);
    for client in [&mut one, &mut two] {
        succeed(client, "BEGIN").await;
    }
    let insert = [parse("", "INSERT INTO t VALUES ($1)"), bind("", &["by a trigger"]), execute(), sync()];
    for (client, payload) in [(&mut one, "plain"), (&mut two, "by a trigger")] {
        if payload == "plain" {
            succeed(client, "NOTIFY a, 'plain'").await;
        } else {
            client.ask(&insert.concat()).await;
        }
        succeed(client, "COMMIT").await;
        let heard = notification(&listener.read().await.unwrap());
        assert_eq!(heard, (own_pid(client), "a".to_owned(), payload.to_owned()));
    }
    // On the same backends by turns, without a pause: never the other's id.
    let ids = [own_pid(&one), own_pid(&two)];
    let mut known = 0;
    for round in 0..200 {
        let (client, right) = if round % 2 == 0 { (&mut one, ids[0]) } else { (&mut two, ids[1]) };
        succeed(client, &format!("NOTIFY a, '{round}'")).await;
        let (pid, _, payload) = notification(&listener.read().await.unwrap());
        assert_eq!(payload, round.to_string());
        assert!(pid == right || pid < 1 << 30, "round {round}: {pid} of {ids:?}");
        known += usize::from(pid == right);
    }
    println!("{known} of 200 senders known when two take turns on one backend");
}

#[tokio::test]
async fn who_was_done_before_somebody_listened_is_not_taken_for_the_sender() {
    let cluster = Cluster::start(0).await;
    // A backend for those who listen, and one for those who notify.
    let options = ProxyOptions { overrides: "{ workers: 1, pool: { size: 3 } }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let (mut before, mut sender) = (proxy.raw_login().await, proxy.raw_login().await);
    // While nobody listens nothing is remembered.
    let mut always = proxy.raw_login().await;
    succeed(&mut always, "LISTEN other").await;
    for round in 0..20 {
        let mut listener = proxy.raw_login().await;
        succeed(&mut before, "NOTIFY a, 'too early'").await;
        succeed(&mut listener, "LISTEN a").await;
        succeed(&mut listener, "BEGIN").await;
        succeed(&mut sender, "NOTIFY a, 'now'").await;
        let answer = succeed(&mut listener, "COMMIT").await;
        let heard = answer.iter().find(|message| message.tag == b'A').cloned();
        let heard = match heard {
            Some(heard) => heard,
            None => listener.read().await.unwrap(),
        };
        assert_eq!(notification(&heard), (own_pid(&sender), "a".into(), "now".into()), "round {round}");
        listener.try_send(&message(b'X', b"")).await.unwrap();
        listener.read_to_end().await;
    }
}

#[tokio::test]
async fn who_has_asked_for_the_id_of_its_process_finds_it_in_its_own_notifications() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    let own = |answer: &[Message]| notification(answer.iter().find(|message| message.tag == b'A').unwrap()).0;
    succeed(&mut client, "LISTEN a").await;
    assert_eq!(own(&succeed(&mut client, "NOTIFY a").await), own_pid(&client));
    let pid = succeed(&mut client, "SELECT pg_backend_pid()").await[1].columns();
    assert_eq!([Some(own(&succeed(&mut client, "NOTIFY a").await).to_string())], pid[..]);
    succeed(&mut client, "DISCARD ALL").await;
    succeed(&mut client, "LISTEN a").await;
    assert_eq!(own(&succeed(&mut client, "NOTIFY a").await), own_pid(&client));
}

#[tokio::test]
async fn what_is_heard_in_a_transaction_comes_when_it_is_over() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (mut listener, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut listener, "BEGIN").await;
    succeed(&mut listener, "LISTEN a").await;
    succeed(&mut other, "NOTIFY a, 'too early'").await;
    succeed(&mut listener, "COMMIT").await;
    succeed(&mut listener, "BEGIN").await;
    succeed(&mut other, "NOTIFY a, 'meanwhile'").await;
    assert_eq!(tags(&succeed(&mut listener, "SELECT 1").await), "TDCZ");
    let answer = succeed(&mut listener, "COMMIT").await;
    assert_eq!(tags(&answer), "CAZ");
    assert_eq!(notification(&answer[1]).2, "meanwhile");
    // Rolled back: never listened.
    let mut never = proxy.raw_login().await;
    succeed(&mut never, "BEGIN").await;
    succeed(&mut never, "LISTEN a").await;
    succeed(&mut never, "ROLLBACK").await;
    succeed(&mut other, "NOTIFY a, 'later'").await;
    assert_eq!(notification(&listener.read().await.unwrap()).2, "later");
    assert_eq!(tags(&succeed(&mut never, "SELECT 1").await), "TDCZ");
    // And UNLISTEN: nothing more, not even what the look at the backend may meet.
    succeed(&mut listener, "UNLISTEN *").await;
    succeed(&mut other, "NOTIFY a, 'too late'").await;
    assert_eq!(tags(&succeed(&mut listener, "SELECT 1").await), "TDCZ");
}

#[tokio::test]
async fn nothing_is_lost_while_the_backend_is_looked_at() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let (mut listener, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut listener, "LISTEN a").await;
    let named = [parse("named", "SELECT 1"), bind("named", &[]), execute(), sync()].concat();
    assert_eq!(tags(&listener.ask(&named).await), "12DCZ");
    let notifier = tokio::spawn(async move {
        for number in 0..300 {
            succeed(&mut other, &format!("NOTIFY a, '{number}'")).await;
        }
    });
    // Each of these is followed by a look, which then asks for the names, too; or by one at what it has set.
    let mut heard = Vec::new();
    let mut rounds = 0;
    while heard.len() < 300 {
        rounds += 1;
        assert!(rounds < 500, "{heard:?}");
        for sql in [
            "SELECT pg_advisory_lock(1)",
            "SELECT pg_advisory_unlock(1)",
            "LISTEN b",
            "UNLISTEN b",
            "BEGIN; SAVEPOINT s; SET work_mem = '5MB'; ROLLBACK TO s; COMMIT",
        ] {
            let answer = succeed(&mut listener, sql).await;
            heard.extend(answer.iter().filter(|message| message.tag == b'A').map(|m| notification(m).2));
        }
    }
    notifier.await.unwrap();
    let expected: Vec<String> = (0..300).map(|number| number.to_string()).collect();
    assert_eq!(heard, expected);
}

#[tokio::test]
async fn who_is_told_of_a_commit_sees_it() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    // A read that leaned on the replica by mistake would miss the row for long.
    cluster.node(1).set_apply_delay(Duration::from_millis(300)).await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    let (mut listener, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut listener, "LISTEN a").await;
    for round in 1..=20 {
        succeed(&mut other, "BEGIN; INSERT INTO t VALUES (1); NOTIFY a; COMMIT").await;
        notification(&listener.read().await.unwrap());
        // While it listens, and once nothing ties it to the primary.
        if round % 2 == 0 {
            succeed(&mut listener, "UNLISTEN *").await;
        }
        let answer = succeed(&mut listener, "SELECT count(*) FROM t").await;
        assert_eq!(answer[1].columns()[0].as_deref(), Some(round.to_string().as_str()));
        if round % 2 == 0 {
            succeed(&mut listener, "LISTEN a").await;
        }
    }
}

#[tokio::test]
async fn a_listener_that_does_not_read_holds_nobody_up_and_loses_nothing() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let (mut listener, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut listener, "LISTEN a").await;
    let before = resident(&proxy);
    for thousand in 0..10 {
        let sql = format!(
            "SELECT count(pg_notify('a', lpad(g::text, 7000, '.'))) FROM generate_series({}, {}) g",
            thousand * 1000,
            thousand * 1000 + 999
        );
        succeed(&mut other, &sql).await;
    }
    // 70 MB are waiting: in the server's queue and in sockets, not here.
    let grown = resident(&proxy).saturating_sub(before);
    assert!(grown < 16 << 20, "the proxy has grown by {grown} bytes");
    for number in 0..10_000 {
        let (_, _, payload) = notification(&listener.read().await.unwrap());
        assert_eq!(payload.trim_start_matches('.'), number.to_string());
    }
    succeed(&mut listener, "UNLISTEN *").await;
}

/// Bytes of memory that the proxy has to itself.
fn resident(proxy: &Proxy) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes * 1024
}
