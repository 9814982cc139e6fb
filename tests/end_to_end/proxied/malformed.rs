//! Messages whose frame is right and whose body nobody can read: PostgreSQL answers them with an error, and the session
//! goes on behind the next Sync. So it does here, byte for byte, in whatever state it is.

use super::protocol::{answers, beside, close, named_bind};
use crate::fixture::*;

/// Bodies that end early, lack their terminators, count wrong, say too much or ask for what does not exist.
pub(super) const MALFORMED: [(u8, &[u8]); 40] = [
    (b'P', b""),
    (b'P', b"s"),
    (b'P', b"s\0SELECT 1"),
    (b'P', b"s\0SELECT 1\0"),
    (b'P', b"\0SELECT 1\0\0\x02\0\0\0\x17"),
    (b'P', b"s\0SELECT 1\0\0\0x"),
    (b'P', b"s\0INSERT INTO t VALUES (1)\0\0\0\0"),
    (b'B', b""),
    (b'B', b"p"),
    (b'B', b"\0good"),
    (b'B', b"\0good\0"),
    (b'B', b"\0good\0\0\0\0\0"),
    // Two formats for no parameter.
    (b'B', b"\0good\0\0\x02\0\0\0\0\0\0\0\0"),
    (b'B', b"\0good\0\0\0\0\x01\0\0\0\x01x\0\0"),
    (b'B', b"\0takes\0\0\0\0\x01\0\0\0\x09x\0\0"),
    (b'B', b"\0good\0\0\0\0\0\0\0x"),
    (b'B', b"\0good\0\0\0\0\0\0\x02\0\0\0\0"),
    (b'B', b"\0missing\0\xff\xff"),
    (b'D', b""),
    (b'D', b"S"),
    (b'D', b"Sgood"),
    (b'D', b"Xgood\0"),
    (b'D', b"Sgood\0x"),
    (b'C', b""),
    (b'C', b"P"),
    (b'C', b"Sgood"),
    (b'C', b"Xgood\0"),
    (b'C', b"Sgood\0\0"),
    (b'E', b""),
    (b'E', b"\0"),
    (b'E', b"\0\0\0\0"),
    (b'E', b"\0\0\0\0\0x"),
    (b'H', b"x"),
    (b'S', b"x"),
    (b'Q', b""),
    (b'Q', b"SELECT 1"),
    (b'Q', b"SELECT 1\0SELECT 2\0"),
    (b'Q', b"INSERT INTO t VALUES (2)\0x"),
    (b'F', b""),
    (b'F', b"\0\0\0\x01\0"),
];

/// What the session is in the middle of when it comes.
struct State {
    name: &'static str,
    /// Units before its own.
    before: Vec<Vec<u8>>,
    /// What its own unit begins with.
    begun: Vec<u8>,
}

fn states() -> Vec<State> {
    let run = |sql: &str| [parse("", sql), bind("", &[]), execute()].concat();
    let known = [named_bind("", "good"), bind("takes", &["x"]), sync()].concat();
    let all = [
        ("idle", vec![], vec![]),
        ("behind reads", vec![], run("SELECT 1")),
        ("behind a name", vec![], [parse("new", "SELECT 3"), named_bind("", "new"), execute()].concat()),
        ("behind a write", vec![], run("INSERT INTO t VALUES (3)")),
        ("behind an error", vec![], run("SELECT 1/0")),
        ("in a transaction", vec![query("BEGIN")], run("INSERT INTO t VALUES (4)")),
        ("in a transaction of reads", vec![query("BEGIN READ ONLY"), query("SELECT 1")], vec![]),
        // The server process has the statements, or their Bind would be refused before it is read to its end.
        ("in a failed transaction", vec![query("BEGIN"), known, query("SELECT 1/0")], vec![]),
        ("with a temporary table", vec![query("CREATE TEMP TABLE own (x int)")], run("SELECT 1")),
    ];
    all.map(|(name, before, begun)| State { name, before, begun }).into()
}

#[tokio::test]
async fn what_nobody_can_read_fails_its_unit_alone_in_the_words_of_the_server() {
    let table = "CREATE TABLE t (x int)";
    let (_cluster, proxy, direct) = beside("{ pool: { size: 2, max_prepared: 3 } }", table).await;
    for State { name: state, before, begun } in states() {
        for (tag, body) in MALFORMED {
            let (mut proxied, mut direct) = (proxy.raw_login().await, direct.raw_login().await);
            let prepared = [parse("good", "SELECT 2"), parse("takes", "SELECT $1::text"), sync()].concat();
            let unnamed = [parse("", "SELECT 'unnamed'"), sync()].concat();
            // Behind it: what the server skips, and then what of names and values is left.
            let skipped = [parse("skipped", "SELECT 5"), close(b'S', "takes"), sync()].concat();
            let left = [
                [named_bind("", ""), describe(b'S', ""), execute(), sync()].concat(),
                [named_bind("", "good"), describe(b'S', "good"), execute(), sync()].concat(),
                [bind("takes", &["given"]), execute(), sync()].concat(),
                [named_bind("", "skipped"), execute(), sync()].concat(),
                [named_bind("", "s"), execute(), sync()].concat(),
                query("ROLLBACK"),
                query("SELECT count(*) FROM t"),
            ];
            let units = [prepared, unnamed].into_iter().chain(before.clone());
            let units = units.chain([[&begun[..], &message(tag, body), &skipped].concat()]).chain(left);
            for (number, unit) in units.enumerate() {
                let what = format!("{state}, {:?} {}, unit {number}", char::from(tag), body.escape_ascii());
                let expected = answers(&format!("one server ({what})"), &mut direct, &unit).await;
                let got = answers(&format!("the proxy ({what})"), &mut proxied, &unit).await;
                assert_eq!(got, expected, "{what}");
            }
        }
    }
}

#[tokio::test]
async fn a_query_that_nobody_can_read_leaves_the_unnamed_statement() {
    let (_cluster, proxy, direct) = beside("{ pool: { size: 1 } }", "CREATE TABLE t (x int)").await;
    let (mut proxied, mut direct) = (proxy.raw_login().await, direct.raw_login().await);
    for unit in [
        [parse("", "SELECT 'unnamed'"), sync()].concat(),
        message(b'Q', b"SELECT 1"),
        [named_bind("", ""), execute(), sync()].concat(),
        query("SELECT 1"),
        [named_bind("", ""), execute(), sync()].concat(),
    ] {
        let expected = answers("one server", &mut direct, &unit).await;
        assert_eq!(answers("the proxy", &mut proxied, &unit).await, expected, "{}", unit.escape_ascii());
    }
}

#[tokio::test]
async fn names_of_any_length_are_what_they_are_to_the_server() {
    let (_cluster, proxy, direct) = beside("{ pool: { size: 1 } }", "CREATE TABLE t (x int)").await;
    let (mut proxied, mut direct) = (proxy.raw_login().await, direct.raw_login().await);
    let (mut other, longest) = (proxy.raw_login().await, "n".repeat(9_994));
    let (a, b) = (format!("{}a", "n".repeat(70)), format!("{}b", "n".repeat(70)));
    let run = |name: &str| [named_bind("", name), execute(), sync()].concat();
    let portal = |length: usize| [named_bind(&"p".repeat(length), &a), sync()].concat();
    for (what, unit) in [
        ("made", [parse(&a, "SELECT 1"), sync()].concat()),
        ("run", run(&a)),
        ("another that begins alike", [parse(&b, "SELECT 2"), sync()].concat()),
        ("run by that", run(&b)),
        ("described by its beginning", [describe(b'S', &a[..63]), sync()].concat()),
        ("too short", run(&a[..62])),
        ("where a session keeps its backend", query("CREATE TEMP TABLE own (x int)")),
        ("run there", run(&a)),
        ("after a look", query("DROP TABLE own")),
        ("run again", run(&b)),
        ("prepared by SQL, too", query("SELECT pg_advisory_lock(1)::text")),
        ("executed by SQL", query(&format!("EXECUTE {}", &a[..63]))),
        ("let go", query("SELECT pg_advisory_unlock(1)")),
        ("as long as a Describe may be", [describe(b'S', &longest), sync()].concat()),
        ("nothing of that name", run(&"m".repeat(15_000))),
        ("portals", portal(15_000)),
        ("both", [named_bind(&"p".repeat(50_000), &"m".repeat(50_000)), sync()].concat()),
        ("a long text under a long name", [parse(&"l".repeat(40_000), "SELECT 3"), sync()].concat()),
        ("run by its long name", run(&"l".repeat(30_000))),
        ("closed by another", [close(b'S', &b), sync()].concat()),
        ("gone", run(&a)),
    ] {
        let expected = answers(&format!("one server ({what})"), &mut direct, &unit).await;
        assert_eq!(answers(&format!("the proxy ({what})"), &mut proxied, &unit).await, expected, "{what}");
        // Somebody else has the backend meanwhile, where it is to be had.
        if !matches!(
            what,
            "where a session keeps its backend" | "run there" | "prepared by SQL, too" | "executed by SQL"
        ) {
            other.ask(&query("SELECT 1")).await;
        }
    }
}

#[tokio::test]
async fn a_sync_with_a_body_behind_an_error_of_ours_fails_and_ends_the_unit() {
    let (_cluster, proxy, _direct) = beside("{ pool: { size: 1 } }", "CREATE TABLE t (x int)").await;
    let mut client = proxy.raw_login().await;
    let refused = "SELECT 1 /* highwater.consistency=none */";
    let unit = [parse("", refused), bind("", &[]), execute(), message(b'S', b"x")].concat();
    let answer = client.ask(&unit).await;
    assert_eq!(tags(&answer), "EEZ");
    assert_eq!(answer[1].field(b'C').as_deref(), Some("08P01"));
    assert_eq!(answer[1].field(b'M').as_deref(), Some("invalid message format"));
    assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
}
