//! A session prefers the backend it used last; whoever else gets that one finds nothing of it there.

use crate::fixture::{
    Cluster, Message, Proxy, ProxyOptions, RawClient, bind, describe, eventually, execute, parse, query,
    sync, tags,
};

/// Functions that nobody can understand: what they do is put together when they run.
const HIDDEN: &str = "
    CREATE FUNCTION hide(value text) RETURNS void LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE format('SELECT set_' || 'config(''app.hidden'', %L, false)', value); END $$;
    CREATE FUNCTION hidden() RETURNS text LANGUAGE plpgsql AS
        $$ DECLARE found text; BEGIN EXECUTE 'SELECT current_' || 'setting(''app.hidden'', true)' INTO found;
           RETURN coalesce(found, ''); END $$;
    CREATE FUNCTION run(sql text) RETURNS text LANGUAGE plpgsql AS
        $$ DECLARE found text; BEGIN EXECUTE sql INTO found; RETURN found; END $$;";

async fn start(size: usize) -> (Cluster, Proxy) {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1); CREATE SEQUENCE numbers;").await;
    cluster.set_up(HIDDEN).await;
    // One worker: the backends of another are a second choice.
    let overrides = format!("{{ workers: 1, pool: {{ size: {size} }} }}");
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    eventually("the catalog facts are there", || async {
        let mut client = proxy.raw_login().await;
        client.ask(&[parse("p", "SELECT 1"), bind("p", &[]), execute(), sync()].concat()).await;
        let left = client.ask(&query("SELECT count(*) FROM pg_prepared_statement()")).await;
        left[1].columns() != [Some("0".to_owned())]
    })
    .await;
    (cluster, proxy)
}

fn rows(messages: &[Message]) -> Vec<Vec<Option<String>>> {
    messages.iter().filter(|message| message.tag == b'D').map(Message::columns).collect()
}

async fn value(client: &mut RawClient, sql: &str) -> Option<String> {
    let answer = client.ask(&query(sql)).await;
    assert_eq!(tags(&answer), "TDCZ", "{sql}: {answer:?}");
    rows(&answer).remove(0).remove(0)
}

async fn done(client: &mut RawClient, sql: &str) {
    let answer = client.ask(&query(sql)).await;
    assert!(answer.iter().all(|message| message.tag != b'E'), "{sql}: {answer:?}");
}

/// As many sessions, each of which has used a backend of its own.
async fn apart(proxy: &Proxy, sessions: usize) -> Vec<RawClient> {
    let mut clients = Vec::new();
    for _ in 0..sessions {
        let mut client = proxy.raw_login().await;
        done(&mut client, "BEGIN").await;
        clients.push(client);
    }
    for client in &mut clients {
        done(client, "COMMIT").await;
    }
    clients
}

#[tokio::test]
async fn what_code_has_left_hidden_its_session_finds_again_and_nobody_else() {
    let (_cluster, proxy) = start(4).await;
    let mut clients = apart(&proxy, 4).await;
    for (number, client) in clients.iter_mut().enumerate() {
        done(client, &format!("SELECT hide('{number}')")).await;
    }
    for round in 0..50 {
        for step in 0..4 {
            let number = (round * 3 + step * (1 + round % 2 * 2)) % 4;
            let found = value(&mut clients[number], "SELECT hidden()").await;
            assert_eq!(found, Some(number.to_string()), "session {number} in round {round}");
        }
    }
    // A session that comes anew, with all four backends idle and used.
    let mut fifth = proxy.raw_login().await;
    assert_eq!(value(&mut fifth, "SELECT hidden()").await.as_deref(), Some(""));
    // And one that has asked to be as new.
    done(&mut clients[2], "DISCARD ALL").await;
    assert_eq!(value(&mut clients[2], "SELECT hidden()").await.as_deref(), Some(""));
}

#[tokio::test]
async fn a_hidden_setting_is_never_seen_through_a_backend_that_many_share() {
    let (_cluster, proxy) = start(1).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(proxy.raw_login().await);
    }
    for round in 0..20 {
        done(&mut clients[round % 3], "SELECT hide('secret')").await;
        let other = &mut clients[(round + 1) % 3];
        assert_eq!(value(other, "SELECT current_setting('app.hidden', true)").await.unwrap_or_default(), "");
        assert_eq!(value(other, "SELECT hidden()").await.as_deref(), Some(""));
    }
}

#[tokio::test]
async fn sessions_that_have_backends_of_their_own_may_ask_for_what_they_drew() {
    let (_cluster, proxy) = start(4).await;
    let mut clients = apart(&proxy, 4).await;
    let mut drawn = Vec::new();
    for client in &mut clients {
        drawn.push(value(client, "SELECT nextval('numbers')").await);
    }
    for (client, drawn) in clients.iter_mut().zip(drawn).rev() {
        assert_eq!(value(client, "SELECT currval('numbers')").await, drawn);
    }
}

#[tokio::test]
async fn nobody_waits_for_a_backend_that_another_session_prefers() {
    let (_cluster, proxy) = start(2).await;
    let mut clients = apart(&proxy, 2).await;
    done(&mut clients[0], "SELECT hide('0')").await;
    done(&mut clients[1], "SELECT hide('1')").await;
    // Both backends are left to their sessions, which do nothing more: they are anybody's all the same.
    let mut others = apart(&proxy, 2).await;
    for other in &mut others {
        assert_eq!(value(other, "SELECT hidden()").await.as_deref(), Some(""));
    }
    // And while one is in use, its session takes what there is.
    done(&mut others[0], "BEGIN").await;
    done(&mut others[0], "SELECT hide('others')").await;
    for _ in 0..10 {
        for client in &mut clients {
            assert_ne!(value(client, "SELECT hidden()").await.as_deref(), Some("others"));
        }
    }
    done(&mut others[0], "COMMIT").await;
}

/// A session that has prepared `s` by SQL and `p` by the protocol, on a backend that another one holds by now.
async fn prepared_elsewhere(proxy: &Proxy) -> (RawClient, Vec<RawClient>) {
    let mut client = proxy.raw_login().await;
    done(&mut client, "PREPARE s (int) AS SELECT x + $1 AS sum FROM t").await;
    assert_eq!(tags(&client.ask(&[parse("p", "SELECT 5 AS five"), sync()].concat()).await), "1Z");
    let mut holders = Vec::new();
    let mut other = proxy.raw_login().await;
    done(&mut other, "BEGIN").await;
    holders.push(other);
    (client, holders)
}

#[tokio::test]
async fn an_execute_is_described_by_what_it_names_on_any_backend() {
    let (_cluster, proxy) = start(3).await;
    for text in ["EXECUTE s (1)", "EXECUTE p"] {
        let (mut client, _holders) = prepared_elsewhere(&proxy).await;
        // As psql's \gdesc does it.
        assert_eq!(tags(&client.ask(&[parse("", text), sync()].concat()).await), "1Z", "{text}");
        let answer = client.ask(&[describe(b'S', ""), sync()].concat()).await;
        assert_eq!(tags(&answer), "tTZ", "{text}: {answer:?}");
        let name: &[u8] = if text.ends_with('p') { b"five\0" } else { b"sum\0" };
        assert!(answer[1].body[2..].starts_with(name), "{text}: {answer:?}");
    }
}

#[tokio::test]
async fn what_keeps_the_backend_for_another_reason_finds_the_prepared_statements_there_too() {
    let (_cluster, proxy) = start(12).await;
    for text in [
        "CREATE TEMP TABLE a AS EXECUTE s (1)",
        "CREATE TEMP TABLE a AS EXECUTE p",
        "CREATE TEMP TABLE a (x text); EXECUTE p",
        "SELECT pg_backend_pid(), 'x'; EXECUTE s (2)",
    ] {
        let (mut client, _holders) = prepared_elsewhere(&proxy).await;
        done(&mut client, text).await;
        if !text.contains(';') {
            let (mut client, _holders) = prepared_elsewhere(&proxy).await;
            let answer = client.ask(&[parse("", text), bind("", &[]), execute(), sync()].concat()).await;
            assert_eq!(tags(&answer), "12CZ", "{text}: {answer:?}");
        }
    }
    // What one says of the other by a name alone is no reason to look for it.
    let (mut client, _holders) = prepared_elsewhere(&proxy).await;
    let before = proxy.metrics().await.sum("highwater_pins_total", &[("reason", "sql_prepare")]);
    done(&mut client, "CREATE TEMP TABLE a AS SELECT 'execute' AS \"execute\"").await;
    let after = proxy.metrics().await.sum("highwater_pins_total", &[("reason", "sql_prepare")]);
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_session_is_shown_its_own_prepared_statements_wherever_it_is() {
    let (_cluster, proxy) = start(3).await;
    let mut sharer = proxy.raw_login().await;
    sharer.ask(&[parse("x", "SELECT 'shared'"), bind("x", &[]), execute(), sync()].concat()).await;
    let (mut client, _holders) = prepared_elsewhere(&proxy).await;
    let sql = "SELECT name, statement, from_sql FROM pg_prepared_statements ORDER BY name";
    let own = [
        vec!["p", "SELECT 5 AS five", "f"],
        vec!["s", "PREPARE s (int) AS SELECT x + $1 AS sum FROM t", "t"],
    ]
    .map(|row| row.into_iter().map(|text| Some(text.to_owned())).collect::<Vec<_>>());
    assert_eq!(rows(&client.ask(&query(sql)).await), own);
    let unit = [parse("", sql), bind("", &[]), execute(), sync()].concat();
    assert_eq!(rows(&client.ask(&unit).await), own);
    // A statement that shows them and has a name is shown, too.
    let unit = [parse("z", sql), bind("z", &[]), execute(), sync()].concat();
    let mut shown = own.to_vec();
    shown.push(["z", sql, "f"].map(|text| Some(text.to_owned())).to_vec());
    assert_eq!(rows(&client.ask(&unit).await), shown);
    assert_eq!(tags(&client.ask(&[bind("p", &[]), execute(), sync()].concat()).await), "2DCZ");
    // Another session has none of them; nor is this one kept on its backend for that.
    let mut other = proxy.raw_login().await;
    assert_eq!(rows(&other.ask(&query(sql)).await), Vec::<Vec<_>>::new());
    assert_eq!(proxy.metrics().await.sum("highwater_pins_total", &[("reason", "sql_prepare")]), 0.0);
}

#[tokio::test]
async fn code_may_execute_what_its_session_has_prepared_by_sql() {
    let (cluster, proxy) = start(6).await;
    let (mut client, _holders) = prepared_elsewhere(&proxy).await;
    assert_eq!(value(&mut client, "SELECT run('EXECUTE s (1)')").await.as_deref(), Some("2"));
    let (mut client, _more) = prepared_elsewhere(&proxy).await;
    done(&mut client, "BEGIN").await;
    assert_eq!(value(&mut client, "SELECT run('EXECUTE s (2)')").await.as_deref(), Some("3"));
    done(&mut client, "COMMIT").await;
    // One that is out of date is in nobody's way.
    let (mut client, _most) = prepared_elsewhere(&proxy).await;
    cluster.set_up("ALTER TABLE t RENAME TO gone").await;
    assert_eq!(value(&mut client, "SELECT run('SELECT 7')").await.as_deref(), Some("7"));
    let answer = client.ask(&query("SELECT run('EXECUTE s (2)')")).await;
    assert!(answer.iter().any(|message| message.tag == b'E'), "{answer:?}");
    cluster.set_up("ALTER TABLE gone RENAME TO t").await;
}

/// What a statement executes may be an EXECUTE itself: in a transaction, too, the backend is given both.
#[tokio::test]
async fn an_execute_of_an_execute_finds_what_that_names_inside_a_transaction() {
    let (_cluster, proxy) = start(3).await;
    let mut client = proxy.raw_login().await;
    assert_eq!(tags(&client.ask(&[parse("read", "SELECT 8"), sync()].concat()).await), "1Z");
    // The unit fails, and with it what would have kept the backend.
    let unit = [parse("nested", "EXECUTE read"), bind("none", &[]), sync()].concat();
    assert_eq!(tags(&client.ask(&unit).await), "1EZ");
    for begin in ["BEGIN", "BEGIN; SELECT 1"] {
        done(&mut client, begin).await;
        let answer = client.ask(&query("EXECUTE nested")).await;
        assert_eq!(rows(&answer), [[Some("8".to_owned())]], "{answer:?}");
        done(&mut client, "ROLLBACK").await;
    }
}
