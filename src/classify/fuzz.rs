//! Random texts against the token scan. `make fuzz` runs it for as long as one likes; a few thousand texts are part
//! of every test run, always the same ones.
//!
//! What must hold of any text: the scan ends, after looking at each byte a bounded number of times (counted, not timed);
//! the same text gives the same verdict; a comment changes nothing; a write that stands at the border of two tokens,
//! or behind a semicolon, is seen; the small reader (`plain`) parts it as the scan does, and the second parser knows of nothing that
//! it has overlooked. A failure prints the text and the seed that makes it.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use siphasher::sip128::SipHasher13;

use super::builtin::Vocabulary;
use super::catalog::{Catalog, CatalogRows};
use super::lexer::{Lexer, Token, work};
use super::opinion;
use super::plain;
use super::scan::{self, Scanned};
use super::shape;
use super::{Classifier, Kind, Lexing, Lookup, Statement};

/// Bytes looked at and tokens made for each byte of a text, at most. A byte is lexed once; once more when a list is
/// folded or a row turns out to have another width; once more behind a string that may go on.
const WORK_PER_BYTE: u64 = 8;

/// Texts to begin with: one of each kind, and the traps of PostgreSQL's lexer.
const SEEDS: &[&str] = &[
    "SELECT a.id, b.\"Name\" FROM a JOIN b USING (id) WHERE a.x = $1 AND b.y IN (1, 2, -3) ORDER BY 1 LIMIT 20",
    "WITH RECURSIVE t(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t WHERE n < 100) SELECT sum(n) FROM t",
    "INSERT INTO t (a, b) VALUES (1, 'x'), ($1, NULL) ON CONFLICT DO NOTHING RETURNING *",
    "UPDATE t SET a = E'it\\'s', b = U&'d\\0061t\\+000061' WHERE c = B'01' AND d = X'1F'",
    "COPY (SELECT 1) TO STDOUT WITH (FORMAT csv, DELIMITER ';')",
    "EXPLAIN (ANALYZE, FORMAT json) SELECT now(), age(timestamp '2001-04-10')",
    "SELECT $tag$ $x$ ; DROP TABLE t; $x$ $tag$, $$'$$, a$x$, text'\\', 'a'\n'b' -- end\r FROM t",
    "SELECT U&\"d!0061t!+000061\" UESCAPE '!', U&'d!0061' UESCAPE '!' /* a /* nested */ comment */ FROM t",
    "SELECT a<--b\n1, a*/* c */b, a @- 1, a ~~* 'x', 1.5e-3, .5, a::int[], a[1:2], (r).f",
    "SET LOCAL app.tenant = 'x'; SELECT set_config('role', $1, true); RESET ALL",
    "DO $$ BEGIN PERFORM set_config('a.b', 'c', false); END $$",
    "PREPARE p (int) AS SELECT $1; EXECUTE p (1); DEALLOCATE p",
    "SELECT current_setting('app.x'), CASE WHEN a THEN 'now' ELSE 'today' END FROM ONLY s.t AS x (y, z)",
    "/* highwater.route=replica */ SELECT 1 /* highwater.consistency=strong */ -- x",
    "SELECT é, \"Ünïcödé\", '\u{1F600}', $1, $2 FROM täble WHERE \u{00A0} = 1",
    "LISTEN x; NOTIFY x, 'y'; UNLISTEN *; LOCK TABLE t; VACUUM t; BEGIN; COMMIT",
];

/// What mutations put in.
const PIECES: &[&str] = &[
    "'",
    "\"",
    "$$",
    "$a$",
    "--",
    "\n",
    "\r",
    "/*",
    "*/",
    ";",
    "(",
    ")",
    ",",
    ".",
    "::",
    ":=",
    "\\",
    "E'",
    "U&'",
    "U&\"",
    "UESCAPE '!'",
    "B'",
    "X'",
    "N'",
    "$1",
    "0x1F",
    "1_000",
    "1e",
    "+",
    "-",
    "@",
    "<>",
    "IN (",
    "VALUES (",
    "NULL",
    "select ",
    " from t ",
    " as ",
    " with a as (",
    "case when ",
    " end ",
    "now()",
    "nextval('s')",
    "/* highwater.route=primary */",
    "\0",
    "é",
    "\u{1F600}",
    "\u{feff}",
    "\u{00a0}",
    "\x0b",
    "\x0c",
    "\t",
    "''",
    "\"\"",
    "operator(pg_catalog.+)",
    "[1]",
    " array[",
    "'a'\n'b'",
    "'now'",
    "pg_temp.",
    "not ",
    " join ",
    "1",
    "x",
];

struct Bench {
    vocabulary: Vocabulary,
    catalog: Catalog,
}

impl Bench {
    fn new() -> Bench {
        let catalog = Catalog::from_rows(1, CatalogRows { server_major: 15, ..CatalogRows::default() });
        Bench { vocabulary: Vocabulary::new(), catalog }
    }

    fn scan(&self, text: &[u8]) -> Scanned {
        scan::scan(text, SipHasher13::new_with_key(&[7; 16]), &self.vocabulary, &self.catalog, false)
    }

    /// All that must hold of a text; whether it may be a read. `Err` says what does not hold.
    fn check(&self, text: &[u8], rng: &mut StdRng) -> Result<bool, String> {
        work::take();
        let scanned = self.scan(text);
        let done = work::take();
        let bound = WORK_PER_BYTE * (text.len() as u64 + 16);
        if done > bound {
            return Err(format!("{done} steps for {} bytes", text.len()));
        }
        if self.scan(text) != scanned {
            return Err("another verdict the second time".to_owned());
        }
        let borders = borders(text)?;
        let with = |before: &[u8], after: &[u8]| self.scan(&[before, text, after].concat());
        if with(b"", b"\n;delete from t").class.kind == Kind::Read {
            return Err("a write behind it is not seen".to_owned());
        }
        if let Some(tokens) = plain::read(text, 18) {
            if tokens as usize != borders.len() {
                return Err(format!("{tokens} tokens for the small reader, {} for the scan", borders.len()));
            }
            if opinion::is_surely_none(text) {
                return Err("plain, and the second parser sees more than a read in it".to_owned());
            }
        }
        if scanned.class.kind == Kind::Read {
            for padded in [with(b"/* c */ ", b""), with(b"-- c\n", b"\n/* c */"), with(b" \t", b"\n--")] {
                if padded != scanned {
                    return Err("a comment around it makes a difference".to_owned());
                }
            }
            // Between any two tokens: only what is inside of one can hide it.
            let at = *borders.choose(rng).unwrap_or(&0);
            let write: &[u8] = b" , pg_try_advisory_lock ( 1 ) , ";
            let put_in = [&text[..at], write, &text[at..]].concat();
            if self.scan(&put_in).class.kind == Kind::Read {
                return Err(format!("a call put in at {at} is not seen"));
            }
        }
        Ok(scanned.class.kind == Kind::Read)
    }
}

/// Where tokens begin. Each must begin where the one before has ended, or later, and the last at the text's end.
fn borders(text: &[u8]) -> Result<Vec<usize>, String> {
    let mut lexer = Lexer::new(text);
    let mut found = Vec::new();
    let mut end = 0;
    loop {
        let token = lexer.next_token();
        if token == Token::Unclear {
            return Ok(found);
        }
        if lexer.start() < end || lexer.end() < lexer.start() || lexer.end() > text.len() {
            return Err(format!("{token:?} at {}..{} behind {end}", lexer.start(), lexer.end()));
        }
        if token == Token::End {
            return Ok(found);
        }
        if lexer.end() == end {
            return Err(format!("{token:?} of no bytes at {end}"));
        }
        found.push(lexer.start());
        end = lexer.end();
    }
}

/// A text made from the seeds: pieces put in, bytes changed, parts taken out, doubled, joined.
fn mutated(rng: &mut StdRng) -> Vec<u8> {
    let seed = |rng: &mut StdRng| SEEDS.choose(rng).map(|seed| seed.as_bytes().to_vec()).unwrap_or_default();
    let mut text = seed(rng);
    for _ in 0..rng.random_range(0..12) {
        let at = rng.random_range(0..=text.len());
        let to = rng.random_range(at..=text.len().min(at + 20));
        match rng.random_range(0..9) {
            0..4 => {
                let piece = PIECES.choose(rng).copied().unwrap_or_default();
                text.splice(at..at, piece.bytes());
            }
            4 => drop(text.drain(at..to)),
            5 => {
                let part = text[at..to].to_vec();
                text.splice(at..at, part);
            }
            6 => text.insert(at, rng.random()),
            7 => {
                let other = seed(rng);
                text.truncate(at);
                text.extend_from_slice(&other[rng.random_range(0..=other.len())..]);
            }
            _ => {
                let other = seed(rng);
                text.extend_from_slice(b";");
                text.extend_from_slice(&other);
            }
        }
    }
    text
}

/// A long text: a piece, or a few, over and over.
fn repeated(rng: &mut StdRng, bytes: usize) -> Vec<u8> {
    let mut unit = Vec::new();
    for _ in 0..rng.random_range(1..6) {
        unit.extend_from_slice(PIECES.choose(rng).copied().unwrap_or_default().as_bytes());
    }
    let head = SEEDS.choose(rng).copied().unwrap_or_default();
    [head.as_bytes(), &unit.repeat(bytes / unit.len())].concat()
}

/// How many of the texts may be reads.
fn play(seed: u64, mutations: usize, long: usize) -> usize {
    let (bench, mut rng) = (Bench::new(), StdRng::seed_from_u64(seed));
    let mut reads = 0;
    for number in 0..mutations + long {
        let text = if number < mutations { mutated(&mut rng) } else { repeated(&mut rng, 1 << 20) };
        match bench.check(&text, &mut rng) {
            Ok(read) => reads += usize::from(read),
            Err(what) => {
                let shown = &text[..text.len().min(2000)];
                panic!("seed {seed}, text {number}: {what}:\n{}", shown.escape_ascii());
            }
        }
    }
    reads
}

#[test]
fn mutations_of_what_one_writes_are_understood_or_refused() {
    let reads = play(1, 4_000, 0);
    assert!(reads > 400, "only {reads} of 4000 had anything to hide a write in");
}

#[test]
fn a_megabyte_of_anything_takes_a_megabytes_time() {
    play(2, 0, 6);
}

/// What the small reader knows, and what it must stop at.
const PLAIN: &[&str] = &[
    "select",
    "a",
    "t.a",
    "\"b\"",
    ",",
    ".",
    "(",
    ")",
    "(a)",
    "=",
    "<>",
    "*",
    "-",
    "->>",
    "1",
    "2.5",
    "'x'",
    "'x''y'",
    "$1",
    "::",
    "int",
    "from",
    "where",
    "and",
    "in (",
    "as",
    "into",
    "for",
    "for share",
    "with",
    "update",
    "f(",
    ";",
    "--",
    "/*",
    "\\",
    "'",
    "\"",
    "e",
    "\u{e9}",
    "union",
    "not",
    "null",
    "\n",
    "E'",
    "''",
    "\"\"",
    "case",
    "end",
    "is",
    "group by",
    "$",
    "[",
    "\0",
];

/// A text that the small reader knows, with pieces put in, taken out and glued together.
fn nearly_plain(rng: &mut StdRng) -> Vec<u8> {
    let mut words: Vec<&str> = [
        "select a , t.b as c from t where t.a = $1 and b in ( 1 , 'x' ) order by a limit 5",
        "select count( * ) , lower( \"b\" ) from \"s\" . t left join u on u.id = t.id :: int group by a",
        "select * from t where not a is null and exists ( select 1 from u where a ->> 'k' <> '' ) union all select 2 ;",
    ]
    .choose(rng)
    .map(|seed| seed.split(' ').collect())
    .unwrap_or_default();
    for _ in 0..rng.random_range(0..4) {
        let at = rng.random_range(0..=words.len());
        if rng.random() || at == words.len() {
            words.insert(at, PLAIN.choose(rng).copied().unwrap_or_default());
        } else {
            words.remove(at);
        }
    }
    let mut text = Vec::new();
    for word in words {
        text.extend_from_slice(word.as_bytes());
        text.extend_from_slice([&b" "[..], b" ", b" ", b"\n", b""].choose(rng).copied().unwrap_or_default());
    }
    text
}

#[test]
fn what_the_small_reader_takes_the_others_take_too() {
    let (bench, mut rng) = (Bench::new(), StdRng::seed_from_u64(3));
    let (mut plain, mut not) = (0, 0);
    for _ in 0..20_000 {
        let text = nearly_plain(&mut rng);
        if let Err(what) = bench.check(&text, &mut rng) {
            panic!("{what}:\n{}", text.escape_ascii());
        }
        match plain::read(&text, 18) {
            Some(_) => plain += 1,
            None => not += 1,
        }
    }
    assert!(plain > 4_000 && not > 4_000, "{plain} were plain, {not} not");
}

#[test]
#[ignore = "make fuzz: for HIGHWATER_FUZZ_SECONDS"]
fn for_as_long_as_one_likes() {
    let seconds = std::env::var("HIGHWATER_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let (until, first) = (Instant::now() + Duration::from_secs(seconds), rand::random::<u32>());
    let mut played = 0;
    while Instant::now() < until {
        play(u64::from(first) + played, 2_000, 1);
        played += 1;
    }
    println!("{played} seeds from {first}, 2001 texts each");
}

/// The work that the longest of each kind of text takes grows with its length and no faster: ten times the text, at
/// most eleven times the steps.
#[test]
fn steps_grow_as_the_text_does() {
    let bench = Bench::new();
    for (head, unit) in [
        ("select 'x'", "\n'x'"),
        ("select 'x'", " --\n"),
        ("select 'x' ", "'x' \n \n "),
        ("select ", "U&\"a\" "),
        ("select ", "U&\"a\" uescape '!',"),
        ("values (1)", ",(1)"),
        ("values (1)", ",(1),(1,2)"),
        ("select ", "x in (1, 2, f(1)) and "),
        ("select ", "values (1, "),
        ("select ", "x in (1, "),
        ("select ", "/* highwater.route=replica */ "),
        ("select ", "$$ "),
        ("select ", "$a$ $b$ "),
        ("select ", "/*"),
        ("select ", "@+-"),
        ("do '", "set "),
    ] {
        let steps = |bytes: usize| {
            let text = [head, &unit.repeat(bytes / unit.len())].concat();
            work::take();
            bench.scan(text.as_bytes());
            work::take()
        };
        let (short, long) = (steps(10_000), steps(100_000));
        assert!(short >= 100, "{head}{unit}..: nothing was counted");
        assert!(long <= 11 * short + 100, "{head}{unit}..: {short} steps, then {long}");
    }
}

/// Texts that differ in one thing which decides over their route or effect must not share a verdict; those that
/// differ in what never does, should.
#[test]
fn texts_share_a_verdict_only_where_they_must_not_differ() {
    let bench = Bench::new();
    let skeleton = |text: &str| bench.scan(text.as_bytes()).skeleton;
    for (a, b) in [
        // Which setting is asked for, or set, and to what.
        ("select current_setting('app.x')", "select current_setting('transaction_read_only')"),
        ("set app.x = 'a'", "set app.x = 'b'"),
        ("set standard_conforming_strings = on", "set standard_conforming_strings = off"),
        (
            "set default_transaction_isolation = 'serializable'",
            "set default_transaction_isolation = 'read committed'",
        ),
        ("set client_encoding = 'SJIS'", "set client_encoding = 'UTF8'"),
        ("set search_path = 'a'", "set search_path = 'b'"),
        ("show transaction_read_only", "show work_mem"),
        // What an escape makes of a name.
        ("select U&\"a!0062\" uescape '!' (1)", "select U&\"a!0062\" uescape '#' (1)"),
        ("select U&\"a\\0062\"", "select U&\"a\\0063\""),
        // What a comment asks for.
        ("select 1 /* highwater.route=primary */", "select 1"),
        ("select 1 /* highwater.consistency=eventual */", "select 1 /* highwater.consistency=strong */"),
        // Strings that are a moment.
        ("select * from t where at < 'now'", "select * from t where at < 'never'"),
        ("select * from t where at < 'today'", "select * from t where at < 'tomorrow'"),
        ("select * from t where at < 'yesterday'", "select * from t where at < 'tomorrow'"),
        ("select date 'NOW'", "select date '2001-04-10'"),
        // Names of the session's.
        ("execute p", "execute q"),
        ("execute p (1)", "execute p (2)"),
        ("fetch c", "fetch d"),
        ("deallocate p", "deallocate q"),
        ("select * from pg_temp.t", "select * from public.t"),
        // Words that look like values.
        ("select true", "select false"),
        ("select null", "select true"),
        ("explain (analyze on) select 1", "explain (analyze off) select 1"),
        ("explain analyze select 1", "explain select 1"),
        ("copy t to stdout", "copy t to program 'x'"),
        ("copy t to '/a'", "copy t to stdout"),
        ("copy t to stdout (format csv)", "copy t to stdout (format binary)"),
        ("copy t to stdout (delimiter 'a')", "copy t to stdout (delimiter 'b')"),
        // Lists that are no lists of values.
        ("select f(1, 2)", "select f(1)"),
        ("select array[1, 2]", "select array[1]"),
        ("select * from t where a in (1, b)", "select * from t where a in (1, 2)"),
        ("select * from t where a in (1, f(2))", "select * from t where a in (1, 2)"),
        ("values (1, 2)", "values (1, 2, 3)"),
        ("select * from t where a in ('now', 'x')", "select * from t where a in ('x', 'y')"),
        // Names as the server reads them.
        ("select a", "select \"A\""),
        ("select \"a\"(1)", "select \"b\"(1)"),
        ("select a.b", "select a, b"),
        ("select 'a' 'b'", "select 'a'\n'b'"),
        ("select a --x\r, b", "select a --x , b"),
        ("select a$x$", "select a"),
    ] {
        assert_ne!(skeleton(a), skeleton(b), "{a} | {b}");
    }
    for (a, b) in [
        ("select * from t where a = 1", "SELECT * FROM t\n WHERE a = 22 -- so"),
        ("select * from t where a = 'x' limit 10", "select * from t where a = 'y' limit 20"),
        ("select * from t where a in (1)", "select * from t where a in (1, 2, -3)"),
        ("select interval '1 day'", "select interval '2 days'"),
        ("select 1 /* controller='x' */", "select 1 /* controller='y', action='z' */"),
        ("select Abc", "select aBC"),
    ] {
        assert_eq!(skeleton(a), skeleton(b), "{a} | {b}");
    }
}

/// Texts of one shape have one class, whatever the values are, unless one of them was looked at.
#[test]
fn texts_of_one_shape_share_their_class() {
    let bench = Bench::new();
    let mut rng = StdRng::seed_from_u64(23);
    let (mut compared, mut by_value) = (0, 0);
    for n in 0..40_000 {
        let text = SEEDS.get(n).map_or_else(|| mutated(&mut rng), |seed| seed.as_bytes().to_vec());
        let mut other = Vec::new();
        let mut folded = false;
        let pieces = shape::fold(&text, |piece| {
            let strings: [&[u8]; 5] = [b"''", b"'a'", b"'it''s -- ; /* ('", b"'work_mem'", b"'app.x'"];
            let numbers: [&[u8]; 3] = [b"0", b"7", b"123456789012345678901234567890"];
            folded |= !matches!(piece, shape::Piece::Raw(_));
            match piece {
                shape::Piece::Raw(raw) => other.extend_from_slice(raw),
                shape::Piece::Number(_) => other.extend_from_slice(numbers.choose(&mut rng).unwrap()),
                shape::Piece::Text(_) => other.extend_from_slice(strings.choose(&mut rng).unwrap()),
                shape::Piece::List(1) => other.extend_from_slice(b"1,2, 3"),
                shape::Piece::List(2) => other.extend_from_slice(b"'a' ,'b'"),
                shape::Piece::List(_) => other.extend_from_slice(b"1, 'b', 2"),
                shape::Piece::Comment => other.extend_from_slice(b"/* ' \" ; */"),
            }
        });
        if pieces.is_none() || !folded {
            continue;
        }
        let (one, two) = (bench.scan(&text), bench.scan(&other));
        let shown = || format!("{} | {}", String::from_utf8_lossy(&text), String::from_utf8_lossy(&other));
        assert_eq!(one.by_value, two.by_value, "{}", shown());
        by_value += usize::from(one.by_value);
        if !one.by_value {
            assert_eq!(one.class, two.class, "{}", shown());
        }
        let key = SipHasher13::new_with_key(&[7; 16]);
        assert_eq!(shape::shape(&text, key), shape::shape(&other, key), "{}", shown());
        compared += 1;
    }
    assert!(compared > 500 && by_value > 0, "{compared} {by_value}");
}

/// What `set_config` sets is not in the skeleton, so its class must not depend on it: the session reads it from the text.
#[test]
fn a_call_of_set_config_is_read_anew_each_time() {
    let bench = Bench::new();
    for text in ["select set_config('role', 'x', false)", "select set_config('app.x', 'y', true)"] {
        let class = bench.scan(text.as_bytes()).class;
        assert!(class.settings && class.kind != Kind::Read, "{text}: {class:?}");
    }
}

/// The same text under another reading: the key holds all that the verdict depends on.
#[test]
fn a_verdict_holds_for_one_reading_of_its_text() {
    let classifier = Classifier::new(&crate::config::LimitsConfig {
        unit_hold: 65_536,
        statement_text: 65_536,
        statements_per_session: 100,
        session_settings: 1024,
        databases: 2,
        nodes: 64,
        admin_connections: 3,
        statement_stats: 100,
        class_cache: 256,
        parser_text: 16 * 1024,
        parser_deadline: Duration::from_secs(20),
    });
    let load =
        |identity| Catalog::from_rows(identity, CatalogRows { server_major: 15, ..CatalogRows::default() });
    // A new generation of the same database's facts, or another database: another identity.
    let (one, other) = (load(1), load(2));
    let plain =
        Statement { text: b"select $1 = 'x'", parameter_types: &[], catalog: &one, lexing: Lexing::Utf8 };
    let key = |statement: &Statement<'_>| match classifier.lookup(statement) {
        Lookup::Known(_, key) => key,
        Lookup::Ask(question) => question.key(),
    };
    let keys = [
        key(&plain),
        key(&Statement { parameter_types: &[23], ..plain }),
        key(&Statement { parameter_types: &[25], ..plain }),
        key(&Statement { parameter_types: &[0, 23], ..plain }),
        key(&Statement { catalog: &other, ..plain }),
        key(&Statement { lexing: Lexing::AsciiNames, ..plain }),
        key(&Statement { lexing: Lexing::Unsafe, ..plain }),
    ];
    for (number, one) in keys.iter().enumerate() {
        for other in &keys[..number] {
            assert!(one.skeleton != other.skeleton && one.whole != other.whole);
        }
    }
    // What majors read differently is understood under none.
    for text in ["select 1_000", "select 0x1F", "select 1abc"] {
        assert_ne!(Bench::new().scan(text.as_bytes()).class.kind, Kind::Read, "{text}");
    }
}
