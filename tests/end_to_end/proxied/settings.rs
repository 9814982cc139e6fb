//! A session's settings follow it to whichever backend serves next, and reach nobody else.

use std::collections::BTreeMap;

use rand::prelude::*;

use crate::fixture::*;

const ONE_BACKEND: &str = "pool: { size: 1 }";

async fn proxy_with(cluster: &Cluster, overrides: &str) -> Proxy {
    Proxy::start_with(cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await
}

/// The first column of the first row.
fn value(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'D').and_then(|row| row.columns()[0].clone())
}

/// Waits until reads of a plain table are answered by a replica.
async fn reads_reach_a_replica(cluster: &Cluster, client: &mut RawClient) {
    loop {
        client.ask(&query("SELECT x AS warm FROM t")).await;
        if cluster.ran("warm")[1..].iter().sum::<usize>() > 0 {
            return;
        }
        assert!(cluster.ran("warm")[0] < 2_000, "no read ever reached a replica");
    }
}

#[tokio::test]
async fn tenants_on_shared_backends_never_see_each_others_settings() {
    let cluster = Cluster::start_logging(1).await;
    cluster
        .set_up(
            "CREATE TABLE t (x int); INSERT INTO t VALUES (1); \
             CREATE TABLE rows (tenant text, x int); \
             INSERT INTO rows SELECT 'tenant ' || n, n FROM generate_series(0, 7) n; \
             ALTER TABLE rows ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; \
             CREATE POLICY own ON rows USING (tenant = current_setting('app.tenant', true))",
        )
        .await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(proxy.raw_login().await);
    }
    reads_reach_a_replica(&cluster, &mut clients[0]).await;
    for (number, client) in clients.iter_mut().enumerate() {
        let tenant = format!("tenant {number}");
        let answer = match number % 4 {
            0 => client.ask(&query(&format!("SET app.tenant = '{tenant}'"))).await,
            1 => client.ask(&query(&format!("SELECT set_config('app.tenant', '{tenant}', false)"))).await,
            2 => {
                let sql = "SELECT set_config($1, $2, false)";
                let unit = [parse("", sql), bind("", &["app.tenant", &tenant]), execute(), sync()];
                client.ask(&unit.concat()).await
            }
            _ => client.ask(&query(&format!("BEGIN; SET app.tenant = '{tenant}'; COMMIT"))).await,
        };
        assert!(!tags(&answer).contains('E'), "{answer:?}");
    }
    for round in 0..20 {
        for (number, client) in clients.iter_mut().enumerate() {
            let tenant = Some(format!("tenant {number}"));
            // On a replica, if it has caught up; and on the primary, under row-level security.
            let sql = "SELECT current_setting('app.tenant') AS shown FROM t";
            let shown = if round % 2 == 0 {
                client.ask(&query(sql)).await
            } else {
                client.ask(&[parse("", sql), bind("", &[]), execute(), sync()].concat()).await
            };
            assert_eq!(value(&shown), tenant, "round {round}");
            let seen = client.ask(&query("SELECT string_agg(tenant, ',') FROM rows")).await;
            assert_eq!(value(&seen), tenant, "round {round}");
            let updated = client.ask(&query("UPDATE rows SET x = x")).await;
            assert_eq!(tags(&updated), "CZ");
            assert_eq!(updated[0].body, b"UPDATE 1\0", "round {round}");
        }
    }
    let mut stranger = proxy.raw_login().await;
    let shown = stranger.ask(&query("SELECT coalesce(current_setting('app.tenant', true), '')")).await;
    assert_eq!(value(&shown).as_deref(), Some(""));
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_pins_total", &[]), 0.0);
    assert!(metrics.sum("highwater_settings_replays_total", &[]) > 100.0);
    assert_eq!(metrics.sum("highwater_injected_failures_total", &[]), 0.0);
    assert!(cluster.ran("AS shown")[1] > 0, "no read of a session with settings ran on the replica");
}

#[tokio::test]
async fn settings_follow_a_session_to_replicas() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let mut client = proxy.raw_login().await;
    reads_reach_a_replica(&cluster, &mut client).await;
    // (what is set, what a read shows)
    let cases = [
        ("SET TIME ZONE 'Asia/Tokyo'", "timestamptz '2020-01-01 00:00:00+00'", "2020-01-01 09:00:00+09"),
        ("SET datestyle = 'German'", "date '2020-02-01'", "01.02.2020"),
        (
            "SET datestyle = 'ISO, DMY'; SET datestyle = 'German'",
            "'02.01.2020'::text::date::text",
            "02.01.2020",
        ),
        ("SET app.x = 'it''s é\\n'", "current_setting('app.x')", "it's é\\n"),
        ("SET app.x = U&'\\0061'", "current_setting('app.x')", "a"),
        ("SET extra_float_digits = -5", "1.23456789012345::float8", "1.23456789"),
        (
            "SELECT set_config('app.x', 'computed ' || x, false) FROM t",
            "current_setting('app.x')",
            "computed 1",
        ),
        ("SET bytea_output = 'escape'", "'\\x61'::bytea", "a"),
        (
            "BEGIN; SET app.x = 'a'; SAVEPOINT s; SET app.x = 'b'; ROLLBACK TO s; COMMIT",
            "current_setting('app.x')",
            "a",
        ),
    ];
    for (number, (set, show, expected)) in cases.into_iter().enumerate() {
        let answer = client.ask(&query(set)).await;
        assert!(!tags(&answer).contains('E'), "{set}: {answer:?}");
        let marker = format!("shown{number}.");
        for _ in 0..20 {
            let shown = client.ask(&query(&format!("SELECT {show} /* {marker} */ FROM t"))).await;
            assert_eq!(value(&shown).as_deref(), Some(expected), "{set}");
        }
        assert!(cluster.ran(&marker)[1] > 0, "{set}: never on the replica");
        client.ask(&query("RESET ALL")).await;
    }
    assert_eq!(proxy.metrics().await.sum("highwater_pins_total", &[]), 0.0);
}

#[tokio::test]
async fn what_was_rolled_back_is_not_given_to_other_backends() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let mut client = proxy.raw_login().await;
    let mut other = proxy.raw_login().await;
    for (text, expected) in [
        ("BEGIN; SET work_mem = '9MB'; ROLLBACK", "4MB"),
        ("SET work_mem = '9MB'; SELECT 1/0", "4MB"),
        ("BEGIN; SET LOCAL work_mem = '9MB'; COMMIT", "4MB"),
        ("SET work_mem = '8MB'; COMMIT; SET work_mem = '9MB'; SELECT 1/0", "8MB"),
        ("BEGIN; SET work_mem = '7MB'; COMMIT", "7MB"),
        ("BEGIN; SET work_mem = '6MB'; ROLLBACK; SET work_mem = '5MB'", "5MB"),
        ("SET work_mem = '9MB'; BEGIN; ROLLBACK", "5MB"),
        ("SET work_mem TO DEFAULT", "4MB"),
    ] {
        client.ask(&query(text)).await;
        // The backend changes hands.
        assert_eq!(value(&other.ask(&query("SHOW work_mem")).await).as_deref(), Some("4MB"), "{text}");
        assert_eq!(value(&client.ask(&query("SHOW work_mem")).await).as_deref(), Some(expected), "{text}");
    }
}

#[tokio::test]
async fn what_a_transaction_has_set_is_taken_back_for_the_next_session() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    for transaction in [
        &["BEGIN", "SET work_mem = '2MB'", "COMMIT"][..],
        &["BEGIN; SET work_mem = '2MB'; COMMIT"],
        &["BEGIN", "SET work_mem = '2MB'", "COMMIT AND CHAIN", "SELECT 1", "ROLLBACK"],
        &["BEGIN; SET work_mem = '2MB'; COMMIT; BEGIN", "SET work_mem = '3MB'", "ROLLBACK"],
        &["BEGIN", "SELECT set_config('work_mem', '2MB', false)", "COMMIT"],
    ] {
        let (mut client, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
        for sql in transaction {
            let answer = client.ask(&query(sql)).await;
            assert!(!tags(&answer).contains('E'), "{answer:?}");
        }
        let show = query("SHOW work_mem");
        assert_eq!(value(&other.ask(&show).await).as_deref(), Some("4MB"), "{transaction:?}");
        assert_eq!(value(&client.ask(&show).await).as_deref(), Some("2MB"), "{transaction:?}");
    }
}

#[tokio::test]
async fn literals_are_read_under_the_settings_of_who_wrote_them() {
    let cluster = Cluster::start(1).await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let cases = [
        (
            "TimeZone",
            ["UTC", "Asia/Tokyo"],
            "SELECT extract(epoch from timestamptz '2020-01-01 10:00')::text",
        ),
        ("DateStyle", ["ISO, MDY", "ISO, DMY"], "SELECT to_char(date '01/02/2020', 'YYYY-MM-DD')"),
        ("IntervalStyle", ["postgres", "iso_8601"], "SELECT (interval '1 day')::text"),
        ("client_encoding", ["UTF8", "LATIN1"], "SELECT length('é')::text"),
        ("search_path", ["pg_catalog", "public"], "SELECT current_schema()::text"),
    ];
    for (name, settings, sql) in cases {
        let mut answers = Vec::new();
        for port in [cluster.primary().port(), proxy.port()] {
            let mut clients = Vec::new();
            for setting in settings {
                let mut client = RawClient::connect(port).await;
                client.login("app", &cluster.roles().app).await.unwrap();
                client.ask(&query(&format!("SET {name} = '{setting}'"))).await;
                client.ask(&[parse("s", sql), sync()].concat()).await;
                clients.push(client);
            }
            let mut seen = Vec::new();
            for _ in 0..3 {
                for client in &mut clients {
                    seen.push(value(&client.ask(&[bind("s", &[]), execute(), sync()].concat()).await));
                }
            }
            answers.push(seen);
        }
        assert_eq!(answers[0], answers[1], "{name}");
        assert_ne!(answers[0][0], answers[0][1], "{name} makes no difference");
    }
}

/// With its ParameterStatus messages sorted by name: since PostgreSQL 16 a server reports several that change at once in
/// the order of a hash table.
fn in_any_order(mut answer: Vec<Message>) -> Vec<Message> {
    let reports = |message: &Message| message.tag == b'S';
    if let Some(first) = answer.iter().position(reports) {
        let end = answer.iter().rposition(reports).map_or(first, |last| last + 1);
        answer[first..end].sort_by(|a, b| (a.tag, &a.body).cmp(&(b.tag, &b.body)));
    }
    answer
}

#[tokio::test]
async fn reset_batches_are_answered_as_by_the_server_and_reach_none() {
    let cluster = Cluster::start_logging(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    let login = [("user", "app"), ("database", "app"), ("application_name", "mine")];
    direct.login_with(&login, &cluster.roles().app.password).await.unwrap();
    let mut proxied = proxy.raw().await;
    proxied.login_with(&login, &cluster.roles().app.password).await.unwrap();
    for batch in [
        "DISCARD ALL",
        "RESET ALL",
        "reset all;",
        "DEALLOCATE ALL",
        "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;",
        "RESET application_name",
    ] {
        for set in
            ["SELECT 1", "SET TimeZone = 'Asia/Tokyo'; SET application_name = 'other'; SET app.x = '1'"]
        {
            assert_eq!(proxied.ask(&query(set)).await, direct.ask(&query(set)).await, "{set}");
            // The log has a line of it.
            let marker = batch.lines().next().unwrap();
            let before = cluster.ran(marker)[0];
            let expected = in_any_order(direct.ask(&query(batch)).await);
            assert_eq!(cluster.ran(marker)[0], before + 1);
            assert_eq!(in_any_order(proxied.ask(&query(batch)).await), expected, "{batch}");
            assert_eq!(cluster.ran(marker)[0], before + 1, "{batch}");
            for show in [
                "SHOW timezone",
                "SHOW application_name",
                "SELECT coalesce(current_setting('app.x', true), '')",
            ] {
                assert_eq!(
                    value(&proxied.ask(&query(show)).await),
                    value(&direct.ask(&query(show)).await),
                    "{batch}: {show}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_setting_that_cannot_be_given_again_fails_the_statement_and_nothing_of_it_runs() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1); GRANT ALL ON t TO public").await;
    cluster.primary().execute("CREATE ROLE passing; GRANT passing TO app").await.unwrap();
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let mut client = proxy.raw_login().await;
    let mut other = proxy.raw_login().await;
    assert_eq!(tags(&client.ask(&query("SET ROLE passing")).await), "CZ");
    assert_eq!(
        value(&other.ask(&query("SELECT current_user FROM t FOR UPDATE")).await).as_deref(),
        Some("app")
    );
    cluster.primary().execute("REVOKE passing FROM app").await.unwrap();
    for unit in [
        query("INSERT INTO t VALUES (2)"),
        query("ROLLBACK; INSERT INTO t VALUES (3)"),
        [parse("", "INSERT INTO t VALUES (4)"), bind("", &[]), execute(), sync()].concat(),
        [
            parse("", "ROLLBACK"),
            bind("", &[]),
            execute(),
            parse("", "INSERT INTO t VALUES (5)"),
            bind("", &[]),
            execute(),
            sync(),
        ]
        .concat(),
        query("SELECT count(*) FROM t"),
    ] {
        let answer = client.ask(&unit).await;
        assert_eq!(tags(&answer), "EZ", "{answer:?}");
        assert_eq!(answer[0].field(b'C').as_deref(), Some("42501"), "{answer:?}");
        assert_eq!(answer[0].field(b'M').as_deref(), Some("permission denied to set role \"passing\""));
        assert_eq!(answer[1].body, b"I");
    }
    assert_eq!(value(&other.ask(&query("SELECT count(*) FROM t FOR UPDATE OF t")).await), None);
    assert_eq!(value(&other.ask(&query("SELECT max(x) FROM t")).await).as_deref(), Some("1"));
    // The way out.
    let reset = client.ask(&query("RESET ROLE")).await;
    assert_eq!(tags(&reset), "CZ", "{reset:?}");
    assert_eq!(tags(&client.ask(&query("INSERT INTO t VALUES (6)")).await), "CZ");
    assert!(proxy.metrics().await.sum("highwater_injected_failures_total", &[]) >= 5.0);
}

#[tokio::test]
async fn settings_that_replicas_do_not_take_keep_reads_on_the_primary() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    reads_reach_a_replica(&cluster, &mut client).await;
    for set in [
        "SET default_transaction_isolation = 'serializable'",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET default_transaction_read_only = off",
    ] {
        assert_eq!(tags(&client.ask(&query(set)).await), "CZ", "{set}");
        let before = cluster.ran("kept");
        for _ in 0..5 {
            assert_eq!(tags(&client.ask(&query("SELECT x AS kept FROM t")).await), "TDCZ", "{set}");
        }
        assert_eq!(cluster.ran("kept"), [before[0] + 5, before[1]], "{set}");
        client.ask(&query("DISCARD ALL")).await;
    }
}

#[tokio::test]
async fn options_at_startup_hold_for_their_session_alone() {
    let cluster = Cluster::start(1).await;
    let proxy = proxy_with(&cluster, ONE_BACKEND).await;
    let password = &cluster.roles().app.password;
    let mut set = proxy.raw().await;
    let login = [("user", "app"), ("database", "app"), ("options", "-c work_mem=9MB -c app.x=y")];
    set.login_with(&login, password).await.unwrap();
    let mut plain = proxy.raw_login().await;
    for _ in 0..5 {
        assert_eq!(value(&set.ask(&query("SHOW work_mem")).await).as_deref(), Some("9MB"));
        assert_eq!(value(&set.ask(&query("SELECT current_setting('app.x')")).await).as_deref(), Some("y"));
        assert_eq!(value(&plain.ask(&query("SHOW work_mem")).await).as_deref(), Some("4MB"));
    }
    set.ask(&query("SET work_mem = '10MB'")).await;
    set.ask(&query("RESET ALL")).await;
    assert_eq!(value(&set.ask(&query("SHOW work_mem")).await).as_deref(), Some("9MB"));
}

/// What a client of the random test may say. `{v}` stands for a value.
const STEPS: &[&str] = &[
    "SET app.a = '{v}'",
    "SET app.b = 'it''s {v}'",
    "SET LOCAL app.a = '{v}'",
    "SELECT set_config('app.a', '{v}', false)",
    "SELECT set_config('app.b', '{v}', true)",
    "SELECT set_config('app.a', '{v}', x = 1) FROM t",
    "SET work_mem = '{v}MB'",
    "SET LOCAL work_mem TO '{v}MB'",
    "RESET work_mem",
    "SET statement_timeout TO {v}000",
    "SET TIME ZONE {v}",
    "SET TimeZone = 'Asia/Tokyo'",
    "SET DateStyle = 'German'",
    "SET DateStyle = 'DMY'",
    "SET search_path TO public, \"Two Words\", pg_catalog",
    "SET search_path = 'a, b'",
    "SET application_name = 'name {v}'",
    "SET ROLE pg_monitor",
    "RESET ROLE",
    "SET ROLE NONE",
    "RESET app.a",
    "SET app.b TO DEFAULT",
    "RESET ALL",
    "DISCARD ALL",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT s",
    "ROLLBACK TO s",
    "RELEASE s",
    "SELECT 1/0",
    "SET no_such_setting = 1",
    "SET work_mem = 'nonsense'",
    "SET app.a = '{v}'; SET work_mem = '{v}MB'; SELECT 1/0",
    "SET app.a = '{v}'; COMMIT; SET app.b = '{v}'",
    "BEGIN; SET app.a = '{v}'; ROLLBACK; SET app.b = '{v}'",
    "INSERT INTO t VALUES ({v})",
    "SELECT x FROM t WHERE x = 1",
    "DO 'BEGIN NULL; END'",
];

/// What shows the settings: outside a transaction each goes where it likes.
const SHOWS: &[&str] = &[
    "SELECT coalesce(current_setting('app.a', true), '') FROM t WHERE x = 1",
    "SELECT coalesce(current_setting('app.b', true), '')",
    "SHOW work_mem",
    "SHOW timezone",
    "SHOW datestyle",
    "SHOW search_path",
    "SHOW statement_timeout",
    "SELECT current_user",
    "SHOW application_name",
];

#[tokio::test]
async fn random_settings_of_several_sessions_are_as_on_one_server() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    cluster.primary().execute("GRANT pg_monitor TO app; GRANT ALL ON ALL TABLES IN SCHEMA public TO public; GRANT USAGE ON SCHEMA public TO public").await.unwrap();
    let proxy = proxy_with(&cluster, "pool: { size: 2 }").await;
    let seed: u64 =
        std::env::var("HIGHWATER_SEED").ok().map_or_else(rand::random, |seed| seed.parse().unwrap());
    println!("HIGHWATER_SEED={seed}");
    let mut chance = rand::rngs::StdRng::seed_from_u64(seed);
    // Each client of the proxy, and its twin on the server.
    let mut pairs = Vec::new();
    for _ in 0..4 {
        let mut direct = RawClient::connect(cluster.primary().port()).await;
        direct.login("app", &cluster.roles().app).await.unwrap();
        pairs.push((proxy.raw_login().await, direct, BTreeMap::new(), BTreeMap::new(), Vec::new()));
    }
    let mut in_transaction: Option<usize> = None;
    for _ in 0..400 {
        // One transaction at a time: two would wait for each other's backend.
        let at = in_transaction.unwrap_or_else(|| chance.random_range(0..pairs.len()));
        let step = STEPS.choose(&mut chance).unwrap().replace("{v}", &chance.random_range(1..9).to_string());
        let (proxied, direct, told, told_direct, history) = &mut pairs[at];
        history.push(step.clone());
        let extended = chance.random_bool(0.3) && !step.contains(';');
        let bytes = if extended {
            [parse("", &step), bind("", &[]), execute(), sync()].concat()
        } else {
            query(&step)
        };
        let mut got = proxied.ask(&bytes).await;
        let mut expected = direct.ask(&bytes).await;
        let status = expected.last().unwrap().body.clone();
        in_transaction = (status != b"I").then_some(at);
        note_parameters(&mut got, told);
        note_parameters(&mut expected, told_direct);
        assert_eq!(got, expected, "seed {seed}, session {at}: {history:#?}");
        if status == b"E" {
            continue;
        }
        for show in SHOWS {
            let (mut got, mut expected) = (proxied.ask(&query(show)).await, direct.ask(&query(show)).await);
            note_parameters(&mut got, told);
            note_parameters(&mut expected, told_direct);
            assert_eq!(got, expected, "seed {seed}, session {at}, {show}: {history:#?}");
        }
        assert_eq!(told, told_direct, "seed {seed}, session {at}: {history:#?}");
    }
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_pins_total", &[("reason", "setting")]), 0.0);
}

/// Takes the ParameterStatus messages out.
fn note_parameters(messages: &mut Vec<Message>, told: &mut BTreeMap<String, String>) {
    messages.retain(|message| {
        if message.tag == b'S' {
            let mut texts = message.body.split(|byte| *byte == 0);
            let mut text = || String::from_utf8_lossy(texts.next().unwrap()).into_owned();
            told.insert(text(), text());
        }
        message.tag != b'S'
    });
}

#[tokio::test]
async fn a_new_login_finds_what_alter_role_has_set_however_warm_the_pool() {
    let cluster = Cluster::start(1).await;
    cluster.primary().execute("ALTER ROLE app CREATEROLE").await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    for zone in ["Asia/Tokyo", "Europe/Paris"] {
        // By a session of ours: at once.
        let answer = client.ask(&query(&format!("ALTER ROLE app SET TimeZone = '{zone}'"))).await;
        // (A live session is given the new defaults too, and told so.)
        assert_eq!(tags(&answer).replace('S', ""), "CZ", "{answer:?}");
        let mut next = proxy.raw_login().await;
        assert_eq!(next.parameters["TimeZone"], zone);
        assert_eq!(value(&next.ask(&query("SHOW TimeZone")).await).as_deref(), Some(zone));
    }
    let unit = [parse("", "ALTER ROLE app SET work_mem = '5MB'"), bind("", &[]), execute(), sync()];
    assert_eq!(tags(&client.ask(&unit.concat()).await).replace('S', ""), "12CZ");
    let mut next = proxy.raw_login().await;
    assert_eq!(value(&next.ask(&query("SHOW work_mem")).await).as_deref(), Some("5MB"));
    // Past the proxy: within moments.
    cluster
        .primary()
        .execute("ALTER DATABASE app SET work_mem = '6MB'; ALTER ROLE app RESET ALL")
        .await
        .unwrap();
    eventually("a login finds the database's setting", || async {
        let mut next = proxy.raw_login().await;
        value(&next.ask(&query("SHOW work_mem")).await).as_deref() == Some("6MB")
            && next.parameters["TimeZone"] != "Europe/Paris"
    })
    .await;
    assert!(
        proxy.metrics().await.sum("highwater_backends_closed_total", &[("reason", "login_settings")]) > 0.0
    );
}

#[tokio::test]
async fn what_a_function_sets_stays_with_its_session() {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up(
            "CREATE FUNCTION as_tenant(text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN \
               PERFORM set_config('app.tenant', $1, false); END $$; \
             CREATE FUNCTION by_way_of(text) RETURNS void LANGUAGE sql AS 'SELECT as_tenant($1)'; \
             CREATE FUNCTION harmless() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        )
        .await;
    let proxy = proxy_with(&cluster, "pool: { size: 4 }").await;
    let mut other = proxy.raw_login().await;
    let pins = async || proxy.metrics().await.sum("highwater_pins_total", &[("reason", "setting")]);
    eventually("the functions are known", || async {
        let mut client = proxy.raw_login().await;
        client.ask(&query("SELECT as_tenant('nobody')")).await;
        pins().await > 0.0
    })
    .await;
    let before = pins().await;
    other.ask(&query("SELECT harmless()")).await;
    assert_eq!(pins().await, before);
    for set in [
        "SELECT as_tenant('mine')",
        "SELECT by_way_of('mine')",
        "DO $$ BEGIN PERFORM as_tenant('mine'); END $$",
        "DO $$ BEGIN SET app.tenant = 'mine'; END $$",
    ] {
        let mut client = proxy.raw_login().await;
        assert!(!tags(&client.ask(&query(set)).await).contains('E'), "{set}");
        for _ in 0..3 {
            let show = query("SELECT coalesce(current_setting('app.tenant', true), '')");
            assert_eq!(value(&client.ask(&show).await).as_deref(), Some("mine"), "{set}");
            assert_eq!(value(&other.ask(&show).await).as_deref(), Some(""), "{set}");
        }
    }
}

#[tokio::test]
async fn what_a_trigger_sets_stays_with_its_session() {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up(
            "CREATE TABLE plain (x int); \
             CREATE TABLE parent (id int PRIMARY KEY); \
             CREATE TABLE child (id int REFERENCES parent ON DELETE CASCADE); \
             CREATE TABLE parted (x int) PARTITION BY LIST (x); \
             CREATE TABLE part PARTITION OF parted DEFAULT; \
             CREATE TABLE local (x int); \
             CREATE VIEW over_child AS SELECT id FROM child; \
             INSERT INTO parent SELECT generate_series(1, 100); \
             CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               PERFORM set_config('app.seen', 'mine', false); RETURN coalesce(NEW, OLD); END $$; \
             CREATE FUNCTION remember_for_now() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               PERFORM set_config('app.seen', 'mine', true); RETURN NEW; END $$; \
             CREATE TRIGGER remember BEFORE INSERT OR UPDATE OR DELETE ON child FOR EACH ROW EXECUTE FUNCTION remember(); \
             CREATE TRIGGER remember BEFORE INSERT ON part FOR EACH ROW EXECUTE FUNCTION remember(); \
             CREATE TRIGGER remember BEFORE INSERT ON local FOR EACH ROW EXECUTE FUNCTION remember_for_now()",
        )
        .await;
    let proxy = proxy_with(&cluster, "pool: { size: 2 }").await;
    let pins = async || proxy.metrics().await.sum("highwater_pins_total", &[("reason", "setting")]);
    eventually("the triggers are known", || async {
        let mut client = proxy.raw_login().await;
        client.ask(&query("INSERT INTO child VALUES (1)")).await;
        pins().await > 0.0
    })
    .await;
    let show = query("SELECT coalesce(current_setting('app.seen', true), '')");
    let mut other = proxy.raw_login().await;
    for change in [
        "INSERT INTO child VALUES (2)",
        "UPDATE child SET id = 3 WHERE id = 2",
        "DELETE FROM child WHERE id = 3",
        "INSERT INTO over_child VALUES (4)",
        "DELETE FROM parent WHERE id = 4",
        "INSERT INTO parted VALUES (5)",
        "WITH x AS (INSERT INTO child VALUES (6) RETURNING 1) SELECT * FROM x",
    ] {
        let mut client = proxy.raw_login().await;
        assert!(!tags(&client.ask(&query(change)).await).contains('E'), "{change}");
        for _ in 0..3 {
            assert_eq!(value(&client.ask(&show).await).as_deref(), Some("mine"), "{change}");
            assert_eq!(value(&other.ask(&show).await).as_deref(), Some(""), "{change}");
        }
    }
    // What lasts no longer than its transaction, and what fires nothing, keeps nobody.
    let before = pins().await;
    let mut client = proxy.raw_login().await;
    for change in
        ["INSERT INTO local VALUES (1)", "INSERT INTO plain VALUES (1)", "SELECT * FROM child FOR UPDATE"]
    {
        assert!(!tags(&client.ask(&query(change)).await).contains('E'), "{change}");
        assert_eq!(value(&client.ask(&show).await).as_deref(), Some(""), "{change}");
    }
    assert_eq!(pins().await, before);
}

/// By ways on which the text does not show what is set, and the server says nothing of it either.
#[tokio::test]
async fn a_session_keeps_what_it_sets_by_an_execute_in_something_else() {
    let cluster = Cluster::start(1).await;
    let proxy = proxy_with(&cluster, "pool: { size: 2 }").await;
    let extended = |sql: &str| [parse("", sql), bind("", &[]), execute(), sync()].concat();
    let mut others = [proxy.raw_login().await, proxy.raw_login().await];
    for (number, (prepared, unit)) in [
        ("SELECT set_config('app.x', 'mine', false)", query("EXPLAIN ANALYZE EXECUTE p")),
        ("SELECT set_config('app.x', 'mine', false)", query("CREATE TEMP TABLE made AS EXECUTE p")),
        ("SELECT set_config('app.x', 'mine', false)", query("SELECT 1; EXECUTE p")),
        ("SELECT set_config('app.x', 'mine', false)", extended("EXECUTE p")),
        ("SET app.x = 'mine'", extended("EXECUTE p")),
        ("SET app.x = 'mine'", query("SELECT 1; EXECUTE p")),
        ("SET app.x = 'mine'", [parse("q", "EXECUTE p"), query("SELECT 1; EXECUTE q")].concat()),
        ("SET app.x = 'mine'", extended("/* well */ EXECUTE p;")),
    ]
    .into_iter()
    .enumerate()
    {
        for by_sql in [false, true] {
            if by_sql && prepared.starts_with("SET") {
                // SQL's PREPARE takes no such thing.
                continue;
            }
            let mut client = proxy.raw_login().await;
            let made = if by_sql {
                client.ask(&query(&format!("PREPARE p AS {prepared}"))).await
            } else {
                client.ask(&[parse("p", prepared), sync()].concat()).await
            };
            assert!(!tags(&made).contains('E'), "{number} {made:?}");
            client.ask(&query("BEGIN")).await;
            let ran = client.ask(&unit).await;
            assert!(!tags(&ran).contains('E'), "{number} {ran:?}");
            client.ask(&query("COMMIT")).await;
            // Whatever else kept the session on its backend goes.
            client.ask(&query("DROP TABLE IF EXISTS made")).await;
            client.ask(&query("DEALLOCATE p")).await;
            for round in 0..4 {
                for other in &mut others {
                    other.ask(&query("BEGIN")).await;
                    let theirs =
                        other.ask(&query("SELECT coalesce(current_setting('app.x', true), '')")).await;
                    assert_eq!(value(&theirs).as_deref(), Some(""), "{number} {round}");
                    other.ask(&query("COMMIT")).await;
                }
                let shown = client.ask(&query("SELECT current_setting('app.x', true)")).await;
                assert_eq!(value(&shown).as_deref(), Some("mine"), "{number} {by_sql} {round}");
            }
            client.ask(&query("DISCARD ALL")).await;
            let shown = client.ask(&query("SELECT coalesce(current_setting('app.x', true), '')")).await;
            assert_eq!(value(&shown).as_deref(), Some(""), "{number}");
        }
    }
}
