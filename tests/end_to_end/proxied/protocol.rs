//! Message for message, the proxy answers as one server: random sequences against both, and the
//! states of the protocol that are easily got wrong.

use std::time::Duration;

use highwater::demo::cluster::Login;

use crate::fixture::*;

/// A small generator of numbers: the same on every machine, from a seed that a failure prints.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % n
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// No column of a table in the results: RowDescription would name it by an OID of its database.
const STATEMENTS: [&str; 34] = [
    "SELECT 1",
    "SELECT 'x'",
    "SELECT x + 0 FROM t ORDER BY 1 LIMIT 3",
    "SELECT count(*) FROM t",
    "SELECT g FROM generate_series(1, 3) g",
    "SELECT $1::int",
    "SELECT 1/0",
    "SELEC",
    "SELECT * FROM missing",
    "",
    "INSERT INTO t VALUES (1)",
    "INSERT INTO t VALUES (1) RETURNING x + 1",
    "UPDATE t SET x = x + 1",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT s",
    "ROLLBACK TO s",
    "RELEASE s",
    "COMMIT AND CHAIN",
    "BEGIN READ ONLY",
    "SHOW transaction_read_only",
    "SET LOCAL work_mem = '6MB'",
    "SHOW work_mem",
    "FETCH 1 FROM c",
    "CLOSE c",
    "DO $$ BEGIN RAISE WARNING 'w'; END $$",
    "SET work_mem = '5MB'",
    "SET application_name = 'renamed'",
    "DEALLOCATE ALL",
    "DISCARD ALL",
    "PREPARE b AS SELECT 8, 'b'",
    "EXECUTE b",
    "DEALLOCATE b",
];

const QUERIES: [&str; 21] = [
    "PREPARE b (int, text) AS SELECT $1, $2",
    "EXECUTE c",
    "SELECT 1; SELECT 2",
    "INSERT INTO t VALUES (2); SELECT 1/0",
    "BEGIN; INSERT INTO t VALUES (3)",
    "PREPARE a AS SELECT 7",
    "EXECUTE a",
    "DEALLOCATE a",
    "DECLARE c CURSOR FOR SELECT 1",
    "CREATE TEMP TABLE own (x int) ON COMMIT DROP",
    "CREATE TEMP TABLE kept (x int)",
    "SELECT count(*) FROM kept",
    "DECLARE h CURSOR WITH HOLD FOR SELECT 1",
    "FETCH 1 FROM h",
    "CLOSE h",
    "BEGIN READ ONLY; SELECT 1",
    "COMMIT; SELECT 1",
    "SELECT 1; COMMIT; SELECT 1/0",
    "PREPARE b AS INSERT INTO t VALUES (9)",
    "EXECUTE b; EXECUTE a",
    "SELECT 1; SET work_mem = '7MB'; SELECT 1/0",
];

/// Met less often than `STATEMENTS`.
const RARER_STATEMENTS: [&str; 69] = [
    "SET TRANSACTION READ ONLY",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "RESET work_mem",
    "RESET ALL",
    "SET work_mem TO DEFAULT",
    "SELECT set_config('work_mem', '9MB', true)",
    "SELECT set_config('work_mem', '10MB', false)",
    "SELECT current_setting('work_mem')",
    "SET LOCAL application_name = 'local'",
    "SHOW application_name",
    "SET DateStyle = 'ISO, DMY'",
    "SHOW DateStyle",
    "SET client_min_messages = error",
    "SET search_path = pg_temp, public",
    "SET standard_conforming_strings = off",
    "SELECT 'a\\'",
    "SET ROLE NONE",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET missing = 1",
    "SET work_mem = 'much'",
    "MOVE 1 IN c",
    "FETCH ALL FROM c",
    "DECLARE c CURSOR FOR SELECT g FROM generate_series(1, 3) g",
    "FETCH 1 FROM p",
    "CLOSE p",
    "CLOSE ALL",
    "ROLLBACK AND CHAIN",
    "ABORT",
    "END",
    "START TRANSACTION",
    "BEGIN ISOLATION LEVEL REPEATABLE READ",
    "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY",
    "SAVEPOINT r",
    "ROLLBACK TO SAVEPOINT r",
    "SELECT x + 0 FROM t ORDER BY 1 LIMIT 1 FOR UPDATE",
    "SELECT count(*) FROM (SELECT x FROM t LIMIT 1 FOR SHARE) s",
    "LOCK TABLE t IN SHARE MODE",
    "DELETE FROM t WHERE x > 20",
    "EXPLAIN (COSTS OFF) SELECT 1",
    "CREATE TEMP TABLE made ON COMMIT DROP AS SELECT 1 AS x",
    "SELECT count(*) FROM made",
    "DROP TABLE IF EXISTS made",
    "DISCARD TEMP",
    "DISCARD PLANS",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_unlock(7)",
    "SELECT pg_advisory_unlock_all()",
    "SELECT pg_advisory_xact_lock(8)",
    "UNLISTEN *",
    "NOTIFY n",
    "CALL commits()",
    "CALL commits_and_fails()",
    "SELECT sets()",
    "DO $$ BEGIN SET work_mem = '12MB'; END $$",
    "COPY (SELECT 1) TO STDOUT",
    "SELECT $1::text, $2::int",
    "ALTER TABLE t ADD COLUMN IF NOT EXISTS y int",
    "ALTER TABLE t DROP COLUMN IF EXISTS y",
    "SELECT count(y) FROM t",
    "UPDATE t SET y = x",
    "CREATE TABLE IF NOT EXISTS more (x int)",
    "DROP TABLE IF EXISTS more",
    "SELECT count(*) FROM more",
    "INSERT INTO more VALUES (1)",
    "TRUNCATE more",
    "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (3) RETURNING 2'",
    "DROP FUNCTION IF EXISTS f",
    "SELECT f()",
];

/// Met less often than `QUERIES`.
const RARER_QUERIES: [&str; 29] = [
    "ROLLBACK; BEGIN",
    "BEGIN; SAVEPOINT s",
    "SET work_mem = '9MB'; ROLLBACK",
    "BEGIN; SET work_mem = '9MB'; COMMIT; SHOW work_mem",
    "BEGIN; SET work_mem = '9MB'; ROLLBACK; SHOW work_mem",
    "BEGIN; SET LOCAL work_mem = '9MB'; SAVEPOINT s; SET work_mem = '8MB'; ROLLBACK TO s; COMMIT",
    "SELECT 1/0; SET work_mem = '9MB'",
    "PREPARE a AS SELECT 1; EXECUTE a",
    "PREPARE a AS SELECT 1; SELECT 1/0",
    "DISCARD ALL; SELECT 1",
    "DEALLOCATE ALL; EXECUTE b",
    "SELECT 1; BEGIN; SELECT 2; COMMIT; SELECT 1/0",
    "COMMIT AND CHAIN; SELECT 1",
    "SAVEPOINT s; SELECT 1/0",
    "ROLLBACK TO s; SELECT 1",
    "; ;",
    "-- nothing",
    "SELECT 1; ; SELECT 2",
    "SELECT 'a'; SELECT 'b",
    "CALL commits(); SELECT 1",
    "COPY (SELECT 1) TO STDOUT; COPY (SELECT 2) TO STDOUT",
    "BEGIN; DECLARE c CURSOR FOR SELECT 1; FETCH c",
    "BEGIN READ ONLY; INSERT INTO t VALUES (4)",
    "INSERT INTO t VALUES (5); ROLLBACK; SELECT 1",
    "CREATE TEMP TABLE kept (x int); INSERT INTO kept VALUES (1)",
    "INSERT INTO kept VALUES (1); SELECT 1/0",
    "PREPARE b AS SELECT count(*) FROM kept",
    "PREPARE b AS UPDATE t SET x = 1 WHERE false",
    "DEALLOCATE PREPARE b",
];

fn any_statement(dice: &mut Dice) -> &'static str {
    if dice.below(3) == 0 { dice.of(&RARER_STATEMENTS) } else { dice.of(&STATEMENTS) }
}

fn any_query(dice: &mut Dice) -> &'static str {
    if dice.below(2) == 0 { dice.of(&RARER_QUERIES) } else { dice.of(&QUERIES) }
}

/// A Bind of values, formats and result formats of all kinds, most of which do not fit the statement.
fn any_values(dice: &mut Dice, portal: &str, statement: &str) -> Vec<u8> {
    let mut body = [portal.as_bytes(), b"\0", statement.as_bytes(), b"\0"].concat();
    body.extend_from_slice(dice.of(&[
        &[0, 0][..],
        &[0, 0],
        &[0, 1, 0, 1],
        &[0, 2, 0, 0, 0, 1],
        &[0, 1, 0, 9],
    ]));
    let values = dice.below(3);
    body.extend_from_slice(&u16::try_from(values).unwrap().to_be_bytes());
    for _ in 0..values {
        let value: Option<&[u8]> =
            dice.of(&[None, Some(b"7"), Some(b"\0\0\0\x07"), Some(b"word"), Some(b"")]);
        let length = value.map_or(u32::MAX, |value| u32::try_from(value.len()).unwrap());
        body.extend_from_slice(&length.to_be_bytes());
        body.extend_from_slice(value.unwrap_or_default());
    }
    body.extend_from_slice(dice.of(&[&[0, 0][..], &[0, 1, 0, 1], &[0, 1, 0, 0], &[0, 2, 0, 0, 0, 1]]));
    message(b'B', &body)
}

/// A Parse that says something of the parameters' types: none of it, an integer, a text, or no type there is.
fn typed_parse(dice: &mut Dice, name: &str, sql: &str) -> Vec<u8> {
    let types: &[u32] = dice.of(&[&[0][..], &[23], &[25], &[25, 23], &[4_000_000_000]]);
    let mut body = [name.as_bytes(), b"\0", sql.as_bytes(), b"\0"].concat();
    body.extend_from_slice(&u16::try_from(types.len()).unwrap().to_be_bytes());
    types.iter().for_each(|oid| body.extend_from_slice(&oid.to_be_bytes()));
    message(b'P', &body)
}

/// FunctionCall of `int4pl`, `int4div` by nothing, or no function there is.
fn function_call(dice: &mut Dice) -> Vec<u8> {
    let function: u32 = dice.of(&[177, 154, 4_000_000_000]);
    let mut body = function.to_be_bytes().to_vec();
    body.extend_from_slice(b"\0\0\0\x02\0\0\0\x013\0\0\0\x010\0\0");
    message(b'F', &body)
}

pub(super) fn named_bind(portal: &str, statement: &str) -> Vec<u8> {
    message(b'B', &[portal.as_bytes(), b"\0", statement.as_bytes(), b"\0\0\0\0\0\0\0"].concat())
}

fn execute_at_most(portal: &str, rows: u32) -> Vec<u8> {
    message(b'E', &[portal.as_bytes(), b"\0", &rows.to_be_bytes()].concat())
}

pub(super) fn close(what: u8, name: &str) -> Vec<u8> {
    message(b'C', &[&[what], name.as_bytes(), b"\0"].concat())
}

/// One message of the extended protocol, or one that has no business there.
fn any_message(dice: &mut Dice, flushes: bool) -> Vec<u8> {
    let (name, portal) = (dice.of(&["", "", "a", "b", "c"]), dice.of(&["", "", "p"]));
    match dice.below(20) {
        0 if dice.below(4) == 0 => {
            let sql = dice.of(&["SELECT $1", "SELECT $1::text, $2::int", "SELECT 1"]);
            typed_parse(dice, name, sql)
        }
        0..=4 => parse(name, any_statement(dice)),
        5 => any_values(dice, portal, name),
        6 => [any_values(dice, portal, name), execute_at_most(portal, 0)].concat(),
        7..=8 => named_bind(portal, name),
        // PostgreSQL 15 crashes when some portals are executed a second time: not without a Bind.
        9..=12 => [named_bind(portal, name), execute_at_most(portal, dice.of(&[0, 0, 1]))].concat(),
        13 => describe(b'S', name),
        // Of a transaction that no node knows of yet the unnamed portal is gone once it was executed.
        14 if portal.is_empty() && !flushes => [named_bind(portal, name), describe(b'P', portal)].concat(),
        14 => describe(b'P', portal),
        15 => close(b'S', name),
        16 => close(b'P', portal),
        17 if flushes => flush(),
        18 if dice.below(4) == 0 => query(any_statement(dice)),
        18 if dice.below(8) == 0 => function_call(dice),
        19 if dice.below(4) == 0 => message(b'd', b"stray"),
        19 if dice.below(4) == 0 => {
            let (tag, body) = dice.of(&super::malformed::MALFORMED);
            message(tag, body)
        }
        _ => {
            [parse(name, any_statement(dice)), named_bind(portal, name), execute_at_most(portal, 0)].concat()
        }
    }
}

fn any_unit(dice: &mut Dice, flushes: bool) -> Vec<u8> {
    let copied = message(b'd', dice.of(&[&b"5\n"[..], b"bad\n", b""]));
    let copy_end = if dice.below(4) == 0 { message(b'f', b"no\0") } else { message(b'c', b"") };
    let copy_of = dice.of(&["COPY t FROM STDIN", "COPY missing FROM STDIN"]);
    match dice.below(10) {
        0 | 1 => query(any_statement(dice)),
        2 => query(any_query(dice)),
        3 => [query(copy_of), copied, copy_end].concat(),
        4 => {
            let early = if dice.below(2) == 0 { sync() } else { Vec::new() };
            let begin = [parse("", copy_of), bind("", &[]), execute()].concat();
            // It must not be met again by a Bind of the unnamed statement that expects no copying.
            [begin, early, copied, copy_end, sync(), close(b'S', ""), sync()].concat()
        }
        5 => query("COPY (SELECT generate_series(1, 3)) TO STDOUT"),
        _ => {
            let mut unit = Vec::new();
            for _ in 0..=dice.below(6) {
                unit.extend_from_slice(&any_message(dice, flushes));
            }
            unit.extend_from_slice(&sync());
            unit
        }
    }
}

/// What was answered, and whether the connection is there still.
#[derive(Debug, PartialEq)]
struct Answered {
    messages: Vec<Message>,
    ended: bool,
}

/// All that is answered, up to the answer of a batch that changes nothing and works in every state.
async fn all_answers(client: &mut RawClient, unit: &[u8]) -> Answered {
    let marker =
        [sync(), close(b'P', "m"), close(b'P', "m"), close(b'P', "m"), close(b'P', "m"), sync()].concat();
    let mut messages = Vec::new();
    if client.try_send(&[unit, &marker].concat()).await.is_err() {
        return Answered { messages, ended: true };
    }
    while !tags(&messages).ends_with("3333Z") {
        let Some(next) = client.read().await else { return Answered { messages, ended: true } };
        messages.push(without_place(next));
    }
    Answered { messages, ended: false }
}

/// The same of a connection that stays.
pub(super) async fn answers(who: &str, client: &mut RawClient, unit: &[u8]) -> Vec<Message> {
    let Answered { messages, ended } = all_answers(client, unit).await;
    assert!(!ended, "{who} has ended the connection after {messages:?}, sent {}", unit.escape_ascii());
    messages
}

/// In a failed transaction Bind and Parse fail alike, but for the place in PostgreSQL's source: it
/// shows that the proxy has to prepare a statement on another backend first. And there a name that is
/// taken is known to the proxy alone.
fn without_place(message: Message) -> Message {
    if message.tag != b'E' || !matches!(message.field(b'C').as_deref(), Some("25P02" | "42P05")) {
        return message;
    }
    let fields = message.body.split(|byte| *byte == 0);
    let kept: Vec<&[u8]> =
        fields.filter(|field| !matches!(field.first(), Some(b'F' | b'L' | b'R'))).collect();
    Message { body: kept.join(&0), ..message }
}

/// A database of its own on the primary itself, beside the one that is reached through the proxy.
pub(super) struct Direct {
    port: u16,
    login: Login,
}

impl Direct {
    pub(super) async fn raw_login(&self) -> RawClient {
        let mut client = RawClient::connect(self.port).await;
        client.login("direct", &self.login).await.unwrap();
        client
    }
}

/// A proxy, and beside it one server, each with what `sql` makes.
pub(super) async fn beside(overrides: &str, sql: &str) -> (Cluster, Proxy, Direct) {
    let cluster = Cluster::start(1).await;
    cluster.set_up(sql).await;
    let admin = cluster.primary().admin().await.unwrap();
    let app = &cluster.roles().app;
    admin.batch_execute(&format!("CREATE DATABASE direct OWNER {}", app.user)).await.unwrap();
    cluster.primary().connect("direct", app).await.unwrap().batch_execute(sql).await.unwrap();
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let direct = Direct { port: cluster.primary().port(), login: app.clone() };
    (cluster, proxy, direct)
}

/// In a failed transaction a statement that the server process has not seen is refused for that, before it is found that
/// its Bind gives it too few values: one server, which has it, says that first.
fn refused_alike(mut messages: Vec<Message>, expected: &[Message]) -> Vec<Message> {
    let has = |message: &Message, code: &str, text: &str| {
        message.tag == b'E'
            && message.field(b'C').as_deref() == Some(code)
            && message.field(b'M').is_some_and(|said| said.starts_with(text))
    };
    for (message, expected) in messages.iter_mut().zip(expected).filter(|(message, _)| message.tag == b'E') {
        if has(expected, "08P01", "bind message")
            && (has(message, "25P02", "") || has(message, "08P01", "bind message"))
        {
            message.body = b"refused".to_vec();
        }
    }
    messages
}

/// Whether it ended as PostgreSQL ends some by itself: an EXECUTE of a savepoint's command that the protocol has
/// prepared, outside a transaction ("DefineSavepoint: unexpected state STARTED").
fn ended_by_postgresql(answered: &Answered) -> bool {
    let last = answered.messages.last();
    answered.ended
        && last.is_some_and(|last| last.tag == b'E' && last.field(b'V').as_deref() == Some("FATAL"))
}

/// In a failed transaction a statement that the server process has not seen is refused, where one server describes it; what a
/// pipeline may have alone fails behind what SQL has prepared; and what is said of the isolation level fails behind a
/// statement that was described, and so parsed there, first. From there on both are somewhere else.
fn differs_as_documented(got: &Answered, expected: &Answered) -> bool {
    let first = got.messages.iter().zip(&expected.messages).find(|(got, expected)| got != expected);
    first.is_some_and(|(got, expected)| {
        let code = (got.tag == b'E').then(|| got.field(b'C')).flatten();
        match code.as_deref() {
            Some("25P02") => expected.tag == b't',
            Some("25001") => got.field(b'M').is_some_and(|said| {
                said.ends_with("within a pipeline") || said.ends_with("must be called before any query")
            }),
            _ => false,
        }
    })
}

/// Another session of the proxy, of which no answer of the first may show anything: it comes, takes the backend that
/// the first has used last, leaves something there, and keeps it for a while or goes.
async fn another_session(dice: &mut Dice, proxy: &Proxy, holder: &mut Option<RawClient>) {
    if dice.below(2) == 0 {
        return;
    }
    if holder.take().is_some() {
        return;
    }
    let mut other = proxy.raw_login().await;
    for _ in 0..dice.below(3) {
        let unit = match dice.below(6) {
            0 => [parse("a", "SELECT 'of another'"), named_bind("", "a"), execute(), sync()].concat(),
            1 => query("PREPARE b AS SELECT 'of another'"),
            2 => query("SET work_mem = '21MB'; SET application_name = 'another'"),
            3 => query("CREATE TEMP TABLE kept (x text, y text)"),
            4 => query("SELECT 'of another', sets()"),
            _ => query("SELECT pg_advisory_lock(9)"),
        };
        other.ask(&unit).await;
    }
    let begin = ["BEGIN; SET LOCAL work_mem = '22MB'", "BEGIN READ ONLY; SELECT 1", "SELECT 1"];
    other.ask(&query(dice.of(&begin))).await;
    if dice.below(2) == 0 {
        *holder = Some(other);
    }
}

/// `Err`: what differs.
async fn compare_seed(proxy: &Proxy, direct: &Direct, kind: Kind, seed: u64) -> Result<(), String> {
    let mut holder = None;
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut proxied = proxy.raw_login().await;
    let mut one_server = direct.raw_login().await;
    let mut history = String::new();
    for round in 0..12 {
        if kind.beside_others {
            another_session(&mut dice, proxy, &mut holder).await;
        }
        // One, or several that are sent before the first is answered.
        let units = dice.of(&[1, 1, 1, 2, 3]);
        let unit: Vec<u8> = (0..units).flat_map(|_| any_unit(&mut dice, kind.flushes)).collect();
        let expected = all_answers(&mut one_server, &unit).await;
        let got = tokio::time::timeout(PATIENCE / 2, all_answers(&mut proxied, &unit)).await;
        history.push_str(&format!("{}\n", unit.escape_ascii()));
        let Ok(mut got) = got else {
            return Err(format!("{history}seed {seed}, round {round}: no answer like {expected:?}"));
        };
        got.messages = refused_alike(got.messages, &expected.messages);
        let ended = ended_by_postgresql(&expected);
        let messages = refused_alike(expected.messages.clone(), &expected.messages);
        let expected = Answered { messages, ..expected };
        if differs_as_documented(&got, &expected) {
            return Ok(());
        }
        if got != expected || expected.ended && !ended {
            return Err(format!(
                "{history}seed {seed}, round {round}:\n     got {got:?}\nexpected {expected:?}"
            ));
        }
        history.push_str(&format!("    {}\n", tags(&expected.messages)));
        if ended {
            proxied = proxy.raw_login().await;
            one_server = direct.raw_login().await;
        }
    }
    // What a session leaves must be gone for the next one: the other side starts afresh anyway.
    drop(proxied);
    Ok(())
}

/// What a run has beside batches.
#[derive(Clone, Copy)]
struct Kind {
    flushes: bool,
    /// Other sessions come and go, so that this one is now on one backend and now on another.
    beside_others: bool,
}

const PLAIN: Kind = Kind { flushes: false, beside_others: false };
const FLUSHES: Kind = Kind { flushes: true, beside_others: false };
const BESIDE_OTHERS: Kind = Kind { flushes: false, beside_others: true };

/// `HIGHWATER_BATCH_SEEDS=FROM..TO` plays these seeds instead.
async fn compare(overrides: &str, kind: Kind, seeds: std::ops::Range<u64>) {
    let given = std::env::var("HIGHWATER_BATCH_SEEDS").ok();
    let given = given.as_deref().map(|given| given.split_once("..").expect("FROM..TO"));
    let seeds = given.map_or(seeds, |(from, to)| from.parse().unwrap()..to.parse().unwrap());
    let table = "CREATE TABLE t (x int); INSERT INTO t VALUES (1), (2);
        CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO t VALUES (7); COMMIT; END $$;
        CREATE PROCEDURE commits_and_fails() LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO t VALUES (8); COMMIT; PERFORM 1/0; END $$;
        CREATE FUNCTION sets() RETURNS text LANGUAGE plpgsql AS
            $$ BEGIN RETURN set_config('work_mem', '11MB', false); END $$;";
    let (_cluster, proxy, direct) = beside(overrides, table).await;
    let mut differ = 0;
    for seed in seeds {
        if let Err(difference) = compare_seed(&proxy, &direct, kind, seed).await {
            println!("{difference}");
            differ += 1;
            if differ == 5 {
                break;
            }
        }
    }
    assert_eq!(differ, 0, "seeds that differ, see above");
}

#[tokio::test]
async fn random_batches_are_answered_as_by_one_server() {
    compare("{ pool: { size: 2, max_prepared: 2 } }", PLAIN, 0..200).await;
}

#[tokio::test]
async fn random_batches_with_flushes_are_answered_as_by_one_server_when_nothing_is_split() {
    compare("{ pool: { size: 2, max_prepared: 2 }, routing: { split: false } }", FLUSHES, 1000..1200).await;
}

#[tokio::test]
async fn random_batches_are_answered_as_by_one_server_where_unnamed_statements_are_shared() {
    compare("{ pool: { size: 2, max_prepared: 2, share_unnamed: true } }", PLAIN, 2000..2150).await;
}

#[tokio::test]
async fn random_batches_with_flushes_are_answered_alike_where_unnamed_statements_are_shared() {
    let overrides = "{ pool: { size: 2, max_prepared: 4, share_unnamed: true }, routing: { split: false } }";
    compare(overrides, FLUSHES, 4000..4150).await;
}

#[tokio::test]
async fn random_batches_are_answered_as_by_one_server_where_transactions_are_split() {
    compare("{ pool: { size: 2, max_prepared: 2 }, routing: { transactions: split } }", PLAIN, 5000..5150)
        .await;
}

#[tokio::test]
async fn random_batches_are_answered_as_by_one_server_beside_sessions_that_take_its_backends() {
    let overrides = "{ workers: 1, pool: { size: 2, max_prepared: 2 } }";
    compare(overrides, BESIDE_OTHERS, 6000..6060).await;
}

#[tokio::test]
async fn random_batches_are_answered_as_by_one_server_beside_others_where_transactions_are_split() {
    let overrides = "{ workers: 1, pool: { size: 2, max_prepared: 2 }, routing: { transactions: split } }";
    compare(overrides, BESIDE_OTHERS, 7000..7060).await;
}

async fn one_backend() -> (Cluster, Proxy) {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "pool: { size: 1, max_prepared: 3 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    // Until the catalog facts are there every statement is one that may leave something, and its
    // backend is cleaned.
    eventually("statements stay prepared", || async {
        let mut client = proxy.raw_login().await;
        client.ask(&[parse("probe", "SELECT 1"), bind("probe", &[]), execute(), sync()].concat()).await;
        let left = client.ask(&query("SELECT count(*) FROM pg_prepared_statement()")).await;
        left[1].columns() != [Some("0".to_owned())]
    })
    .await;
    (cluster, proxy)
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

#[tokio::test]
async fn a_begin_bound_with_formats_of_no_parameters_fails_as_on_one_server() {
    let (_cluster, proxy, direct) = beside("{}", "CREATE TABLE t (x int)").await;
    let (mut proxied, mut one_server) = (proxy.raw_login().await, direct.raw_login().await);
    let bind_formats = |formats: &[u8]| message(b'B', &[b"\0\0", formats, b"\0\0\0\0"].concat());
    for (formats, expected) in [(&b"\0\x01\0\x01"[..], "12CZ"), (b"\0\x02\0\0\0\x01", "1EZ")] {
        let unit = [parse("", "BEGIN READ ONLY"), bind_formats(formats), execute(), sync()].concat();
        let answered = answers("one server", &mut one_server, &unit).await;
        assert!(tags(&answered).starts_with(expected), "{answered:?}");
        assert_eq!(answers("the proxy", &mut proxied, &unit).await, answered);
        for client in [&mut proxied, &mut one_server] {
            client.ask(&query("ROLLBACK")).await;
        }
    }
}

#[tokio::test]
async fn the_unnamed_statement_of_one_session_is_not_met_by_another() {
    let (_cluster, proxy) = one_backend().await;
    let mut one = proxy.raw_login().await;
    let unit = [parse("", "SELECT 'secret'"), bind("", &[]), execute(), sync()].concat();
    assert_eq!(tags(&one.ask(&unit).await), "12DCZ");
    let mut other = proxy.raw_login().await;
    let answer = other.ask(&[bind("", &[]), execute(), sync()].concat()).await;
    assert_eq!(code(&answer).as_deref(), Some("26000"), "{answer:?}");
    // Nor are shared statements, by a name that the server shows.
    let named = [parse("s", "SELECT 'secret'"), bind("s", &[]), execute(), sync()].concat();
    assert_eq!(tags(&one.ask(&named).await), "12DCZ");
    let shown = one.ask(&query("SELECT name FROM pg_prepared_statement()")).await;
    let shown = shown.iter().find(|message| message.tag == b'D').unwrap().columns()[0].clone().unwrap();
    let answer = other.ask(&[bind(&shown, &[]), execute(), sync()].concat()).await;
    assert_eq!(code(&answer).as_deref(), Some("26000"), "{answer:?}");
}

/// Prepared again it shows the columns of another cursor than the one that was there, or not, when the client prepared it.
#[tokio::test]
async fn a_prepared_fetch_is_run_of_whatever_cursor_there_is_by_then() {
    let (_cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    for cursor in ["", "DECLARE c CURSOR FOR SELECT 1"] {
        client.ask(&query(&format!("BEGIN; {cursor}"))).await;
        let made = client.ask(&[close(b'S', "f"), parse("f", "FETCH 1 FROM c"), sync()].concat()).await;
        assert_eq!(tags(&made), "31Z");
        client.ask(&query("ROLLBACK")).await;
        // The backend keeps three.
        for number in 0..3 {
            let unit =
                [parse("", "SELECT 1"), close(b'S', "s"), parse("s", &format!("SELECT {number}")), sync()];
            assert_eq!(tags(&client.ask(&unit.concat()).await), "131Z");
        }
        client.ask(&query("BEGIN; DECLARE c CURSOR FOR SELECT 'one', 'two'")).await;
        let answer = client.ask(&[bind("f", &[]), describe(b'P', ""), execute(), sync()].concat()).await;
        assert_eq!(tags(&answer), "2TDCZ");
        assert_eq!(answer[2].columns(), [Some("one".to_owned()), Some("two".to_owned())]);
        // Described it is as it was when the client prepared it.
        let described = if cursor.is_empty() { "tnZ" } else { "tTZ" };
        let answer = client.ask(&[describe(b'S', "f"), sync()].concat()).await;
        assert_eq!(tags(&answer), described);
        client.ask(&query("ROLLBACK")).await;
    }
}

#[tokio::test]
async fn statements_above_max_prepared_are_closed_and_prepared_again() {
    let (_cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    for number in 0..8 {
        let unit = [parse(&format!("s{number}"), &format!("SELECT {number}")), sync()].concat();
        assert_eq!(tags(&client.ask(&unit).await), "1Z");
    }
    for _ in 0..2 {
        for number in 0..8 {
            let unit = [bind(&format!("s{number}"), &[]), execute(), sync()].concat();
            let answer = client.ask(&unit).await;
            assert_eq!(tags(&answer), "2DCZ");
            assert_eq!(answer[1].columns(), [Some(number.to_string())]);
        }
    }
    let left =
        client.ask(&query("SELECT count(*) FROM pg_prepared_statement() WHERE name LIKE '\\_\\_hw%'")).await;
    assert_eq!(left[1].columns(), [Some("3".to_owned())]);
}

#[tokio::test]
async fn what_follows_an_error_that_was_flushed_is_skipped_up_to_sync() {
    let (cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    client.send(&[parse("", "INSERT INTO t VALUES (1)"), bind("", &[]), execute(), flush()].concat()).await;
    for tag in *b"12C" {
        assert_eq!(client.read().await.unwrap().tag, tag);
    }
    client.send(&[parse("bad", "SELEC"), flush()].concat()).await;
    assert_eq!(client.read().await.unwrap().tag, b'E');
    let rest =
        [parse("", "INSERT INTO t VALUES (2)"), bind("", &[]), execute(), query("SELECT 1"), sync()].concat();
    assert_eq!(tags(&client.ask(&rest).await), "Z");
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "0");
    assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_parse_that_the_proxy_answers_itself_is_answered_at_flush() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    for _ in 0..5 {
        // From the second on, a backend may have the statement already.
        let mut client = proxy.raw_login().await;
        client.send(&[parse("s", "SELECT 1"), flush()].concat()).await;
        assert_eq!(client.read().await.unwrap().tag, b'1');
        assert_eq!(tags(&client.ask(&[bind("s", &[]), execute(), sync()].concat()).await), "2DCZ");
    }
}

#[tokio::test]
async fn a_query_inside_an_open_unit_is_looked_at_like_any_other() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "pool: { size: 1 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let mut client = proxy.raw_login().await;
    // Setting something after a write, in one open unit: the next session must not see it.
    let unit = [parse("", "INSERT INTO t VALUES (1)"), bind("", &[]), execute()].concat();
    let answer = client.ask(&[unit, query("SET work_mem = '77MB'")].concat()).await;
    assert_eq!(tags(&answer), "12CCZ");
    drop(client);
    let mut next = proxy.raw_login().await;
    let shown = next.ask(&query("SHOW work_mem")).await;
    assert_ne!(shown[1].columns(), [Some("77MB".to_owned())]);
    // A write after a read that runs on a replica.
    next.send(&[parse("", "SELECT 1"), bind("", &[]), execute(), flush()].concat()).await;
    for tag in *b"12DC" {
        assert_eq!(next.read().await.unwrap().tag, tag);
    }
    let answer = next.ask(&query("INSERT INTO t VALUES (41 + 1)")).await;
    assert_eq!(answer.last().unwrap().tag, b'Z');
    assert_eq!(cluster.ran("41 + 1")[1], 0, "a write was sent to the replica");
    assert_eq!(tags(&next.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_no_half_read_answer_to_the_next() {
    let (cluster, proxy) = one_backend().await;
    for _ in 0..20 {
        let mut client = proxy.raw_login().await;
        client.send(&query("SELECT repeat('theirs', 200) FROM generate_series(1, 100000)")).await;
        assert_eq!(client.read().await.unwrap().tag, b'T');
        drop(client);
        let mut next = proxy.raw_login().await;
        let answer = next.ask(&query("SELECT 'mine'")).await;
        assert_eq!(tags(&answer), "TDCZ");
        assert_eq!(answer[1].columns(), [Some("mine".to_owned())]);
    }
    // A read that nobody waits for is stopped on the node, too.
    let mut client = proxy.raw_login().await;
    client.send(&query("SELECT pg_sleep(3600)")).await;
    let running =
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(3600)'";
    cluster.primary().wait_for(running, "1").await.unwrap();
    drop(client);
    cluster.primary().wait_for(running, "0").await.unwrap();
    // A write that was sent whole happens.
    let mut client = proxy.raw_login().await;
    client.send(&[query("INSERT INTO t SELECT 1 FROM pg_sleep(2)"), message(b'X', b"")].concat()).await;
    drop(client);
    cluster.primary().wait_for("SELECT count(*) FROM t", "1").await.unwrap();
}

#[tokio::test]
async fn long_statements_pass_whatever_their_length() {
    let (_cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    for length in [1_000, 200_000, 300_000, 600_000, 1_200_000, 5_000_000] {
        let sql = format!("SELECT length('{}')", "x".repeat(length));
        for name in ["", "long"] {
            let unit = [parse(name, &sql), bind(name, &[]), execute(), close(b'S', name), sync()].concat();
            let answer = client.ask(&unit).await;
            assert_eq!(tags(&answer), "12DC3Z", "{length}");
            assert_eq!(answer[2].columns(), [Some(length.to_string())]);
        }
        assert_eq!(client.ask(&query(&sql)).await[1].columns(), [Some(length.to_string())]);
    }
}

#[tokio::test]
async fn ten_thousand_statements_in_one_unit_are_answered_in_time() {
    let (_cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    let mut bytes = Vec::new();
    for number in 0..4_000 {
        bytes.extend_from_slice(&parse(&format!("n{number}"), &format!("SELECT {number}")));
        bytes.extend_from_slice(&[bind(&format!("n{number}"), &[]), execute()].concat());
    }
    // Answered by the proxy alone, all of them behind a statement that takes its time.
    bytes.extend_from_slice(&[parse("", "SELECT pg_sleep(0.5)"), bind("", &[]), execute()].concat());
    for _ in 0..40_000 {
        bytes.extend_from_slice(&close(b'S', "nobody"));
    }
    bytes.extend_from_slice(&sync());
    client.send(&bytes).await;
    let answer = tokio::time::timeout(Duration::from_secs(60), client.read_ready()).await.expect("too slow");
    assert_eq!(answer.iter().filter(|message| message.tag == b'D').count(), 4_001);
    assert_eq!(answer.iter().filter(|message| message.tag == b'3').count(), 40_000);
}

#[tokio::test]
async fn large_copies_and_results_and_clients_that_do_not_read_take_little_memory() {
    let (cluster, proxy) = one_backend().await;
    let mut client = proxy.raw_login().await;
    client.ask(&query("SELECT 1")).await;
    let before = resident_kib(proxy.pid());
    client.send(&query("CREATE UNLOGGED TABLE big (x text); COPY big FROM STDIN")).await;
    let line = [vec![b'x'; 100_000], b"\n".to_vec()].concat();
    let data = message(b'd', &line);
    let mut most = 0;
    for number in 0..2_000 {
        client.send(&data).await;
        if number % 100 == 0 {
            most = most.max(resident_kib(proxy.pid()));
        }
    }
    let answer = client.ask(&message(b'c', b"")).await;
    assert_eq!(tags(&answer).chars().rev().take(2).collect::<String>(), "ZC");
    client.send(&query("SELECT x FROM big")).await;
    let mut rows = 0;
    while let Some(message) = client.read().await {
        rows += usize::from(message.tag == b'D');
        if rows % 100 == 0 {
            most = most.max(resident_kib(proxy.pid()));
        }
        if message.tag == b'Z' {
            break;
        }
    }
    assert_eq!(rows, 2_000);
    assert!(most - before.min(most) < 20 * 1024, "{before} KiB, and up to {most} KiB on the way");
    // Whoever asks and does not read is made to stop.
    let mut deaf = proxy.raw_login().await;
    let many: Vec<u8> = sync().repeat(20_000);
    let stuck = tokio::time::timeout(Duration::from_secs(3), async {
        loop {
            deaf.send(&many).await;
        }
    });
    assert!(stuck.await.is_err());
    let after = resident_kib(proxy.pid());
    assert!(after - before.min(after) < 20 * 1024, "{before} KiB, then {after} KiB");
    drop(cluster);
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

#[tokio::test]
async fn ten_thousand_statements_of_all_kinds_and_errors_among_them_are_answered_in_order() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int PRIMARY KEY)").await;
    let overrides = "pool: { size: 2, max_prepared: 5 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let mut client = proxy.raw_login().await;
    let mut bytes = Vec::new();
    // Units of one to four statements; each seventh unit fails at its first statement, after which nothing
    // of it is left.
    let (mut number, mut expected, mut units) = (0, Vec::new(), 0);
    while number < 10_000 {
        let fails = units % 7 == 3;
        if fails {
            bytes.extend_from_slice(&[parse("", "SELECT 1/0"), bind("", &[]), execute()].concat());
            expected.push("1E".to_owned());
        }
        // A Flush behind a read would have it run on a replica, where no write may follow.
        let flushes = number % 3 == 0;
        for _ in 0..=units % 4 {
            let text = number.to_string();
            let name = format!("n{}", number % 9);
            let (sql, answer) = match number % 3 {
                0 => ("INSERT INTO t VALUES ($1::int)".to_owned(), "312C".to_owned()),
                1 => (format!("SELECT $1::text, {}", number % 9), "312DC".to_owned()),
                _ => ("SELECT x::text FROM t WHERE x = $1::int - 2".to_owned(), "312DC".to_owned()),
            };
            bytes.extend_from_slice(&close(b'S', &name));
            bytes.extend_from_slice(&[parse(&name, &sql), bind(&name, &[&text]), execute()].concat());
            if flushes && number % 50 < 3 {
                bytes.extend_from_slice(&flush());
            }
            if !fails {
                expected.push(answer);
            }
            number += 1;
        }
        units += 1;
        expected.push("Z".to_owned());
        bytes.extend_from_slice(&sync());
    }
    client.send(&bytes).await;
    let mut got = Vec::new();
    for _ in 0..units {
        got.extend(
            tokio::time::timeout(Duration::from_secs(60), client.read_ready()).await.expect("too slow"),
        );
    }
    let errors = got.iter().filter(|message| message.tag == b'E').count();
    assert_eq!(errors, (0..units).filter(|unit| unit % 7 == 3).count());
    // Reads find the row of the insert two before, unless that was in a failed unit: so rows are counted apart.
    let without_rows = |tags: &str| tags.replace('D', "");
    let same = without_rows(&tags(&got)) == without_rows(&expected.concat());
    assert!(same, "answers are missing, or not in order");
    let there = cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap();
    let inserted =
        got.iter().filter(|message| message.tag == b'C' && message.body == b"INSERT 0 1\0").count();
    assert_eq!(there, inserted.to_string());
}

#[tokio::test]
async fn portals_live_as_long_as_their_transaction_and_give_rows_in_portions() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t SELECT generate_series(1, 10)").await;
    let overrides = "pool: { size: 2, max_prepared: 2 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", &cluster.roles().app).await.unwrap();
    let mut proxied = proxy.raw_login().await;
    let rows = "SELECT x FROM t ORDER BY x";
    let binary = message(b'B', b"bin\0s\0\0\0\0\0\0\x01\0\x01");
    let units = [
        // Within one unit, with a Flush in the middle.
        [parse("s", rows), named_bind("p", "s"), execute_at_most("p", 3), flush(), execute_at_most("p", 3)]
            .concat(),
        [describe(b'P', "p"), execute_at_most("p", 0), close(b'P', "p"), execute_at_most("p", 1), sync()]
            .concat(),
        // It ended with the unit.
        [execute_at_most("p", 1), sync()].concat(),
        query("BEGIN"),
        [named_bind("p", "s"), named_bind("q", "s"), execute_at_most("p", 2), sync()].concat(),
        [parse("other", "SELECT 1"), parse("more", "SELECT 2"), parse("most", "SELECT 3"), sync()].concat(),
        // Its statement may have been closed on the server meanwhile; the portal lives on.
        [execute_at_most("p", 2), describe(b'P', "q"), execute_at_most("q", 1), sync()].concat(),
        [
            parse("w", "INSERT INTO t VALUES (11) RETURNING x"),
            named_bind("w", "w"),
            execute_at_most("w", 0),
            sync(),
        ]
        .concat(),
        [close(b'P', "p"), execute_at_most("q", 0), binary.clone(), execute_at_most("bin", 2), sync()]
            .concat(),
        [describe(b'P', "bin"), execute_at_most("bin", 1), sync()].concat(),
        [named_bind("q", "s"), sync()].concat(),
        query("ROLLBACK"),
        [execute_at_most("q", 0), sync()].concat(),
        [binary, execute_at_most("bin", 2), sync()].concat(),
    ];
    for (number, unit) in units.iter().enumerate() {
        if unit.ends_with(&sync()) || unit.first() == Some(&b'Q') {
            let expected: Vec<_> = direct.ask(unit).await;
            assert_eq!(same_table(proxied.ask(unit).await), same_table(expected), "unit {number}");
        } else {
            direct.send(unit).await;
            proxied.send(unit).await;
        }
    }
}

fn same_table(messages: Vec<Message>) -> Vec<Message> {
    messages.into_iter().map(without_place).collect()
}
