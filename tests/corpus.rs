//! PostgreSQL's own regression SQL against the classifier, with two real servers as the oracle: `make corpus`.
//!
//! Each file runs on the primary, statement by statement, as it stands. A statement that looks like a
//! query and succeeds there outside a transaction runs on the standby too; what it left (a transaction id, locks,
//! settings, advisory locks) and what the standby said shows whether it was a pure read. Called a read and not
//! one: a failure. A pure read that is not called one: listed by its reason.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::time::Duration;

use highwater::classify::{Catalog, Classifier, Kind, Lexing, Lookup, Statement, StatementClass};
use highwater::config::LimitsConfig;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// What a statement may leave, as one value: compared with what was there before it, for an earlier statement's
/// session lock is not its own.
const LEFT: &str = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL, string_agg(concat_ws(' ', locktype, mode, classid, \
    objid, objsubid, relation), ',' ORDER BY locktype, mode, classid, objid, objsubid, relation) FROM pg_locks \
    WHERE pid = pg_backend_pid() AND (locktype = 'advisory' OR locktype = 'relation' AND mode <> 'AccessShareLock' \
    OR locktype IN ('tuple', 'transactionid'))";
const SETTINGS: &str = "SELECT md5(string_agg(name || coalesce(setting, ''), ',' ORDER BY name)) FROM pg_settings \
    WHERE name NOT LIKE 'transaction%'";

async fn connect(target: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(target, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The rows as text, or the SQLSTATE.
async fn run(client: &Client, text: &str) -> Result<Vec<String>, String> {
    match tokio::time::timeout(Duration::from_secs(15), client.simple_query(text)).await {
        Err(_) => Err("timeout".to_owned()),
        Ok(Err(error)) => Err(error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())),
        Ok(Ok(messages)) => Ok(messages
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => {
                    Some((0..row.len()).map(|i| row.get(i).unwrap_or("~")).collect::<Vec<_>>().join("|"))
                }
                _ => None,
            })
            .collect()),
    }
}

/// Parts a psql script into statements; its own commands are left out.
fn statements(script: &str) -> Vec<String> {
    let bytes = script.as_bytes();
    let (mut found, mut start, mut at, mut atomic) = (Vec::new(), 0, 0, false);
    let skip_to = |at: usize, end: &str| script[at..].find(end).map_or(bytes.len(), |n| at + n + end.len());
    while at < bytes.len() {
        let blank = script[start..at].trim().is_empty();
        match bytes[at] {
            b'-' if bytes.get(at + 1) == Some(&b'-') => at = skip_to(at, "\n"),
            b'/' if bytes.get(at + 1) == Some(&b'*') => at = skip_to(at + 2, "*/"),
            b'\'' => {
                let escaped = at > 0 && matches!(bytes[at - 1], b'e' | b'E');
                at += 1;
                while at < bytes.len() && bytes[at] != b'\'' {
                    at += if escaped && bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'"' => at = skip_to(at + 1, "\""),
            b'$' => {
                let tag: usize =
                    bytes[at + 1..].iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
                let named = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
                if !named && bytes.get(at + 1 + tag) == Some(&b'$') && !bytes[at + 1].is_ascii_digit() {
                    let tag = &script[at..at + tag + 2];
                    at = skip_to(at + tag.len(), tag);
                } else {
                    at += 1;
                }
            }
            b'\\' => {
                // \gset and the like end a statement; a command by itself is dropped.
                let line = skip_to(at, "\n");
                if !blank && !script[at..line].starts_with("\\;") {
                    found.push(script[start..at].trim().to_owned());
                }
                at = line;
                start = at;
            }
            b';' => {
                let text = script[start..at].trim().to_owned();
                let lower = text.to_ascii_lowercase();
                atomic = lower.contains("begin atomic") && !lower.trim_end().ends_with("end");
                at += 1;
                if atomic {
                    continue;
                }
                if lower.contains("copy") && lower.contains("from stdin") {
                    at = skip_to(at, "\n\\.\n");
                }
                found.push(text);
                start = at;
            }
            _ => at += 1,
        }
    }
    let _ = atomic;
    found.retain(|text| !text.is_empty());
    found
}

async fn class(classifier: &Classifier, catalog: &Catalog, text: &str) -> StatementClass {
    let statement = Statement { text: text.as_bytes(), parameter_types: &[], catalog, lexing: Lexing::Utf8 };
    match classifier.lookup(&statement) {
        Lookup::Known(class, _) => class,
        Lookup::Ask(question) => classifier.ask(question).await,
    }
}

fn looks_like_a_query(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.trim_start().starts_with("--"));
    let first = lines.find(|line| !line.trim().is_empty()).unwrap_or_default();
    let word: String =
        first.trim_start_matches(|c: char| c == '(' || c.is_whitespace()).chars().take(8).collect();
    let word = word.to_ascii_lowercase();
    ["select", "with", "values", "table ", "explain", "copy"].iter().any(|lead| word.starts_with(lead))
}

#[derive(Default)]
struct Report {
    statements: usize,
    pure: usize,
    recognised: usize,
    not_pure: usize,
    missed: BTreeMap<String, Vec<String>>,
    wrong: Vec<String>,
    other_answer: Vec<String>,
}

/// Needs `HIGHWATER_REGRESS` (PostgreSQL's src/test/regress), `HIGHWATER_PRIMARY` and `HIGHWATER_STANDBY`
/// (connection strings of a database that may be filled, and of the same on a standby).
#[tokio::test]
#[ignore = "needs PostgreSQL's source: make corpus"]
async fn regression_suite() {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let (root, primary, standby) =
        (variable("HIGHWATER_REGRESS"), variable("HIGHWATER_PRIMARY"), variable("HIGHWATER_STANDBY"));
    let limit: usize =
        std::env::var("HIGHWATER_FILES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    let schedule = std::fs::read_to_string(format!("{root}/parallel_schedule")).unwrap();
    let files: Vec<&str> = schedule
        .lines()
        .filter_map(|line| line.strip_prefix("test: "))
        .flat_map(str::split_whitespace)
        // Endless or about the server itself.
        .filter(|name| {
            !["tablespace", "infinite_recurse", "stats", "database", "misc_functions"].contains(name)
        })
        .take(limit)
        .collect();
    let mut report = Report::default();
    let mut loader = connect(&primary).await;
    let watcher = connect(&standby).await;
    let mut identity = 1;
    for file in files {
        let Ok(bytes) = std::fs::read(format!("{root}/sql/{file}.sql")) else { continue };
        let Ok(script) = String::from_utf8(bytes) else { continue };
        let script = script.replace(":'filename'", &format!("'{root}/data/x'"));
        let (first, second) = (connect(&primary).await, connect(&standby).await);
        for client in [&first, &second] {
            let _ = run(client, "SET statement_timeout = '10s'; SET extra_float_digits = 1; SET datestyle = 'Postgres, MDY'; SET timezone = 'PST8PDT'").await;
        }
        let classifier = Classifier::new(&LimitsConfig {
            nodes: 16,
            unit_hold: 65_536,
            statement_text: 65_536,
            databases: 1,
            statements_per_session: 100,
            session_settings: 1024,
            class_cache: 1_000,
            parser_text: 16 * 1024,
            parser_deadline: Duration::from_secs(10),
        });
        let mut catalog: Option<Catalog> = None;
        let mut in_transaction = false;
        let mut temporary = false;
        for text in statements(&script) {
            report.statements += 1;
            let lower = text.to_ascii_lowercase();
            let code =
                lower.lines().find(|line| !line.trim().is_empty() && !line.trim_start().starts_with("--"));
            let code = code.unwrap_or_default().trim_start();
            let word = code.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default().to_owned();
            temporary |= lower.contains("temp");
            if !looks_like_a_query(&text) || in_transaction || temporary {
                let done = run(&first, &text).await;
                match word.as_str() {
                    "begin" | "start" => in_transaction = true,
                    "prepare" if lower.contains("prepare transaction") => in_transaction = false,
                    "commit" | "rollback" | "end" | "abort"
                        if !lower.contains(" to ") && !lower.contains("prepared") =>
                    {
                        in_transaction = false
                    }
                    "set" | "reset" => {
                        let _ = run(&second, &text).await;
                    }
                    _ => {}
                }
                if !matches!(word.as_str(), "insert" | "update" | "delete" | "set" | "reset") && done.is_ok()
                {
                    catalog = None;
                }
                continue;
            }
            if ["pg_terminate", "pg_cancel", "pg_reload", "pg_rotate", "replay", "pg_promote", "pg_sleep"]
                .iter()
                .any(|word| lower.contains(word))
            {
                continue;
            }
            let before = run(&first, SETTINGS).await;
            if run(&first, "BEGIN").await.is_err() {
                break;
            }
            let left_before = run(&first, LEFT).await;
            let answer = run(&first, &text).await;
            let left = run(&first, LEFT).await;
            let _ = run(&first, "COMMIT").await;
            let after = run(&first, SETTINGS).await;
            let Ok(answer) = answer else { continue };
            let left_something = left != left_before || before != after;
            if catalog.is_none() {
                identity += 1;
                let rows = highwater::catalogs::load(&mut loader, 15).await.unwrap();
                catalog = Some(Catalog::from_rows(identity, rows));
            }
            let class = class(&classifier, catalog.as_ref().unwrap(), &text).await;
            let is_read = class.kind == Kind::Read;
            let at = run(&loader, "SELECT pg_current_wal_flush_lsn()").await.unwrap();
            for _ in 0..2_000 {
                let there = format!("SELECT pg_last_wal_replay_lsn() >= '{}'", at[0]);
                if run(&watcher, &there).await == Ok(vec!["t".to_owned()]) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let there = run(&second, &text).await;
            let locks =
                "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')";
            let locked = run(&second, locks).await == Ok(vec!["t".to_owned()]);
            let _ = run(&second, "SELECT pg_advisory_unlock_all()").await;
            let one_line = format!("{file}: {}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            let refused = there
                .as_ref()
                .err()
                .is_some_and(|code| ["25006", "0A000", "55000", "XX000"].contains(&code.as_str()));
            if left_something || locked || refused {
                report.not_pure += 1;
                if is_read {
                    report
                        .wrong
                        .push(format!("left {left_something} locked {locked} {:?}: {one_line}", there.err()));
                }
                continue;
            }
            // An EXPLAIN's costs and times may differ; that it runs may not.
            let same = if word == "explain" { there.is_ok() } else { there.as_ref() == Ok(&answer) };
            if !same {
                if is_read {
                    report.other_answer.push(format!("{:?}: {one_line}", there.err()));
                }
                continue;
            }
            report.pure += 1;
            if is_read {
                report.recognised += 1;
            } else {
                report.missed.entry(format!("{:?}", class.reason)).or_default().push(one_line);
            }
        }
    }
    println!(
        "{} statements; {} pure reads, {} recognised ({:.2} %); {} that are not pure",
        report.statements,
        report.pure,
        report.recognised,
        100.0 * report.recognised as f64 / report.pure.max(1) as f64,
        report.not_pure
    );
    for (reason, missed) in &report.missed {
        println!("missed, {reason}: {}", missed.len());
        missed.iter().for_each(|text| println!("  {text}"));
    }
    println!("read, but with another answer or error: {}", report.other_answer.len());
    report.other_answer.iter().for_each(|text| println!("  {text}"));
    println!("called a read, and is none: {}", report.wrong.len());
    report.wrong.iter().for_each(|text| println!("  {text}"));
    assert!(report.wrong.is_empty());
}

/// Needs `HIGHWATER_MANY`: the connection string of a database with many relations.
#[tokio::test]
#[ignore = "a measurement"]
async fn load_of_a_large_catalog() {
    let resident = || -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let mut client = connect(&std::env::var("HIGHWATER_MANY").expect("HIGHWATER_MANY is set")).await;
    for identity in 0..5 {
        let (started, before) = (std::time::Instant::now(), resident());
        let rows = highwater::catalogs::load(&mut client, 15).await.unwrap();
        let read = started.elapsed();
        let (marks, edges, functions) = (rows.marks.len(), rows.edges.len(), rows.functions.len());
        let catalog = Catalog::from_rows(identity, rows);
        let (all, after) = (started.elapsed(), resident());
        println!(
            "{marks} marks, {edges} edges, {functions} functions: read {read:?}, in all {all:?}, {} kB more held than before",
            after.saturating_sub(before)
        );
        drop(catalog);
    }
}
