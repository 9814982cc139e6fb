//! The classifier as a whole: what is a read, what is left behind, and which texts share a skeleton.

use std::time::Duration;

use proptest::prelude::*;

use super::catalog::{CatalogRows, FunctionRow, Mark, Object, OperatorRow, TypeRow};
use super::*;
use crate::consistency::{Level, Route};

fn classifier() -> Classifier {
    Classifier::new(&LimitsConfig {
        nodes: 16,
        unit_hold: 65_536,
        statement_text: 65_536,
        statements_per_session: 100,
        session_settings: 1024,
        databases: 1,
        class_cache: 256,
        parser_text: 16 * 1024,
        parser_deadline: Duration::from_secs(20),
        admin_connections: 0,
        statement_stats: 0,
    })
}

fn catalog() -> Catalog {
    Catalog::from_rows(
        7,
        CatalogRows {
            server_major: 15,
            attributes: vec!["nextval".into()],
            setters: vec!["set_tenant".into()],
            firing: vec!["audited".into()],
            leaving: vec!["guarded".into()],
            functions: [(20_001, "fx"), (20_003, "set_tenant")]
                .map(|(oid, name)| FunctionRow {
                    oid,
                    name: name.into(),
                    language: "c".into(),
                    kind: "f".into(),
                    one_argument: true,
                    ..FunctionRow::default()
                })
                .into(),
            types: vec![TypeRow { oid: 20_002, name: "ct".into() }],
            marks: vec![
                (Object::Relation(1), Mark::Elsewhere),
                (Object::Type(20_002), Mark::Code),
                (Object::Operator(1), Mark::Code),
                (Object::Operator(2), Mark::Code),
            ],
            relations: vec![(1, "seq".into())],
            operators: [(1, "#*#"), (2, "~~*")]
                .map(|(oid, token)| OperatorRow { oid, token: token.into(), ..OperatorRow::default() })
                .into(),
            ..CatalogRows::default()
        },
    )
}

fn statement<'a>(text: &'a [u8], catalog: &'a Catalog) -> Statement<'a> {
    Statement { text, parameter_types: &[], catalog, lexing: Lexing::Utf8 }
}

fn class_and_key(classifier: &Classifier, catalog: &Catalog, text: &[u8]) -> (StatementClass, ClassKey) {
    match classifier.lookup(&statement(text, catalog)) {
        Lookup::Known(class, key) => (class, key),
        Lookup::Ask(question) => {
            let key = question.key();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            (runtime.block_on(classifier.ask(question)), key)
        }
    }
}

fn class(text: &str) -> StatementClass {
    class_and_key(&classifier(), &catalog(), text.as_bytes()).0
}

#[test]
fn behind_two_colons_or_as_stands_a_type() {
    for (text, kind) in [
        ("select a::fx, a::s.fx, a::fx(1, 2), a :: s . fx ( 1 ), a::db.s.fx from t", Kind::Read),
        ("select a::ct from t", Kind::Write),
        ("select a::s.ct from t", Kind::Write),
        ("select a::s.fx, t.fx from t", Kind::Write),
        ("select (a::s).fx from t", Kind::Write),
        ("select a::s.fx[1], t.fx from t", Kind::Write),
        ("select a::s, s.fx from t", Kind::Write),
        ("select a::s fx(1)", Kind::Write),
        ("select a::s(fx(1))", Kind::Write),
        ("select s.fx(a)", Kind::Write),
        ("select cast(a as s.fx), cast(a as db.s.fx(1)) from t", Kind::Read),
        ("select cast(a as s.fx), t.fx from t", Kind::Write),
        ("select cast(a as s.ct)", Kind::Write),
        ("select a as s, t.fx from t", Kind::Write),
        ("select a: :fx(1)", Kind::Write),
    ] {
        assert_eq!(class(text).kind, kind, "{text}");
    }
}

#[test]
fn reads() {
    for text in [
        "select 1",
        "select * from t where a = $1;",
        "(select 1) union all (select 2)",
        "values (1,2),(3,4)",
        "with x(a) as (select 1), y(b) as (select 2) select count(*) from x, y",
        "select now(), lower('X')",
        "select * from t where a in (1,2,3) and b like 'x%'",
        "copy t (a, b) to stdout with (format csv)",
        "copy (select 1) to stdout",
        "explain analyze select 1",
        "explain (analyze, format json) select 1",
        "select coalesce(a, 1), cast(b as varchar(10)), row_number() over (order by c) from t",
        "select current_setting('app.tenant')",
        "select x.a from (values (1)) x(a)",
        "select x.a from t x(a) join u y(b) using (a)",
        "select substring(a from 1 for 2) from t",
        "select c.relname from pg_catalog.pg_class c where c.relname operator(pg_catalog.~) '^(t)$'",
        "select exists(select 1 from t), array(select 1)",
        "select a.update from a",
        "select $$;$$",
        "table t",
        "TABLE s.t ORDER BY 1 LIMIT 2;",
        "select * from t where a between symmetric 1 and 2 and b between asymmetric $1 and $2",
        "select (r.k).n from (select information_schema._pg_expandarray(i.indkey) as k from pg_catalog.pg_index i) r",
        "with x as materialized (select 1), y as not materialized (select 2), z(a) as (select 3) table x",
        "with a as (select 1), b(x, y) as (select 1, 2) (select x from b) order by (1), 1",
    ] {
        assert_eq!(class(text), StatementClass::READ, "{text}");
    }
}

#[test]
fn not_reads() {
    for text in [
        "select pg_advisory_lock(1)",
        "select U&\"pg_try_advisory_\\006Cock\"(9)",
        "select U&\"pg!005ftry_advisory_lock\" uescape '!' (11)",
        "select 1 --x\r, pg_try_advisory_lock(1)",
        "select last_value from seq",
        "select * from \"seq\"",
        "select fx(1)",
        "select t.fx from t",
        "select nextval('s')",
        "select ('s'::regclass).nextval",
        "select a #*# b from t",
        "select a ilike 'x' from t",
        "select null::ct",
        "select * into x from t",
        "select * from t for update",
        "select * from t for no key update",
        "select * from t for share",
        "select (select 1 from t for key share)",
        "with x as (delete from t returning 1) select 1",
        "with x as (select 1) insert into t select 1",
        "copy t from stdin",
        "copy t to '/tmp/x'",
        "copy t to program 'x'",
        "copy (insert into t values (1) returning a) to stdout",
        "explain insert into t values (1)",
        "select pg_is_in_recovery()",
        "show transaction_read_only",
        "select current_setting('transaction_read_only')",
        "select current_setting('a.b' || 'c')",
        "select current_setting(x) from t",
        "select * from pg_stat_activity",
        "select * from pg_locks",
        "select * from pg_sequences",
        "select inet_server_addr()",
        "select pg_backend_pid()",
        "select setseed(1)",
        "select lastval()",
        "select pg_stat_reset()",
        "select pg_reload_conf()",
        "checkpoint",
        "alter system set x = 1",
        "select pg_wal_replay_pause()",
        "select lo_export(1, 'x')",
        "lock table t in access share mode",
        "do $$ begin end $$",
        "call p()",
        "merge into t using s on true when matched then do nothing",
        "listen x",
        "notify x",
        "select txid_current()",
        "select pg_current_snapshot()",
        "select pg_notify('a','b')",
        "vacuum",
        "analyze",
        "cluster t",
        "reindex table t",
        "refresh materialized view m",
        "truncate t",
        "prepare transaction 'x'",
        "commit prepared 'x'",
        "grant select on t to x",
        "comment on table t is 'x'",
        "select query_to_xml('select 1', true, true, '')",
        "select ts_stat('select 1')",
        "select ts_rewrite('a'::tsquery, 'select 1')",
        "select pg_relation_size('t')",
        "select 1; select 2",
        "select 1_000",
        "select 0x1F",
        "insert into t values (1)",
        "begin",
        "declare c cursor for select 1",
        "execute p",
        "prepare p as select 1",
        "select distinct on (a) unknown_fn(b) from t",
        "select * from lateral unknown_fn(1)",
        "select * from rows from (unknown_fn(1))",
        "select * from t x, unknown_fn(1)",
        "select * from t unknown_fn, unknown_fn(1)",
        "select a is distinct from b and unknown_fn(1)",
        "select a is distinct from b order by unknown_fn(1)",
        "select case when a is distinct from b then 1 else unknown_fn(1) end",
        "select a operator(pg_catalog.+) unknown_fn(b) from t",
        "select unknown_fn(1)",
        "select dblink_exec('x')",
        "select pg_export_snapshot()",
        "select lo_open(1, 131072)",
        "select pg_sleep(1) from pg_settings",
        "select )",
        "select (",
        "discard all",
        "table t for update",
        "select set_config('a.b', 'x', true)",
        "explain analyze create table x as select 1",
        // The query of a WITH in parentheses: what stands behind its commas is no part of the list.
        "with a as (select 1) (select 1) order by 1, query_to_xml('x', true, true, '')",
        "with a as (select 1) (select 1) order by (1), lo_export(1, 'x')",
        "select * from (with a as (select 1) (select 1) order by (1), lo_export(1, 'x')) s",
        "with a as (select 1) (select 1) union (select 2) order by 1, lo_import('x')",
        "with recursive t as (select 1 as n) cycle n set c using path (select 1) order by 1, lo_import('x')",
        "with recursive t as (select 1 as n) search depth first by n set o (select 1) order by 1, lo_import('x')",
        "with a as (select 1) ((select 1)) order by 1, ts_stat('x')",
    ] {
        assert_ne!(class(text).kind, Kind::Read, "{text}");
    }
}

#[test]
fn hints() {
    for text in [
        "/* highwater.route=primary */ select 1",
        "select 1 /* highwater.route = 'primary' */",
        "select /* HIGHWATER.ROUTE: Primary */ 1",
        "select 1 /* highwater.x=1 */ /* highwater.route=primary */",
    ] {
        assert_eq!((class(text).reason, class(text).shown()), (ClassReason::Hint, Kind::Read), "{text}");
        assert_ne!(class(text).kind, Kind::Read, "{text}");
    }
    for (text, reason) in [
        ("/* highwater.route=primary */ delete from t", ClassReason::Command),
        ("/* highwater.route=primary */ select nextval('s')", ClassReason::UnsafeFunction),
        ("/* highwater.route=primary */ select 1; select 2", ClassReason::Several),
    ] {
        assert_eq!((class(text).reason, class(text).shown()), (reason, Kind::Write), "{text}");
    }
    for text in ["select 1 /* route=primary */", "select '/* highwater.route=primary */'"] {
        assert_eq!(class(text), StatementClass::READ, "{text}");
    }
    let hinted = class("select 1 /* highwater.route=replica, highwater.consistency=strong */");
    assert_eq!(hinted.kind, Kind::Read);
    assert_eq!((hinted.hints.route, hinted.hints.level), (Some(Route::Replica), Some(Level::Strong)));
    // Out of the cache, too; and another hint is another statement.
    let (classifier, catalog) = (classifier(), catalog());
    for _ in 0..2 {
        for (text, level) in [
            ("select a from t /* highwater.consistency=eventual */", Some(Level::Eventual)),
            ("select a from t /* highwater.consistency=strong */", Some(Level::Strong)),
            ("select a from t", None),
        ] {
            let (class, _) = class_and_key(&classifier, &catalog, text.as_bytes());
            assert_eq!((class.kind, class.hints.level), (Kind::Read, level), "{text}");
        }
    }
    assert!(class("insert into t values (1) /* highwater.consistency=best */").hints.invalid);
    // No hint makes a read of what is none.
    for text in
        ["/* highwater.route=replica */ delete from t", "select nextval('s') /* highwater.route=replica */"]
    {
        assert_eq!(class(text).kind, Kind::Write, "{text}");
    }
}

#[test]
fn what_is_left() {
    use PinReason::*;
    const NOTHING: Leaves = Leaves::NOTHING;
    const UNPROVEN: Leaves = Leaves::UNPROVEN;
    let pins = Leaves::pin;
    for (text, leaves) in [
        ("set x = 1", NOTHING),
        ("set session x = 1", NOTHING),
        ("set local x = 1", NOTHING),
        ("set role a", NOTHING),
        ("set session authorization a", NOTHING),
        ("set session characteristics as transaction read only", NOTHING),
        ("set transaction read only", NOTHING),
        ("set constraints all deferred", NOTHING),
        ("reset x", NOTHING),
        ("reset all", NOTHING),
        ("reset role", NOTHING),
        ("show x", NOTHING),
        ("select set_config('a.b', 'x', true)", NOTHING),
        ("select set_config('a.b', 'x', false)", NOTHING),
        ("select set_config('a.b', 'x', $1)", NOTHING),
        ("select set_config($1, $2, not true)", NOTHING),
        ("create temp table t (a int)", pins(TemporaryTable)),
        ("create local temporary table t ()", pins(TemporaryTable)),
        ("create or replace temp view v as select 1", pins(TemporaryTable)),
        ("create table pg_temp.x ()", pins(TemporaryTable)),
        ("select 1 into temp x", pins(TemporaryTable)),
        ("select 1 into pg_temp.x", pins(TemporaryTable)),
        ("create table t (a int)", NOTHING),
        ("listen x", pins(Listen)),
        ("unlisten *", NOTHING),
        ("prepare p as select 1", pins(SqlPrepare)),
        ("execute p", pins(SqlPrepare)),
        ("deallocate p", pins(SqlPrepare)),
        ("deallocate all", Leaves::DEALLOCATES_ALL),
        ("deallocate prepare all", Leaves::DEALLOCATES_ALL),
        ("prepare transaction 'x'", NOTHING),
        ("declare c cursor with hold for select 1", pins(HoldCursor)),
        ("declare c cursor for select 1", NOTHING),
        ("declare c cursor without hold for select 1", NOTHING),
        ("select pg_advisory_lock(1)", pins(AdvisoryLock)),
        ("select pg_try_advisory_lock_shared(1)", pins(AdvisoryLock)),
        ("select pg_advisory_xact_lock(1)", NOTHING),
        ("select pg_advisory_unlock_all()", NOTHING),
        ("select pg_backend_pid()", pins(BackendPid)),
        ("load 'x'", pins(Process)),
        ("select setseed(0)", pins(Process)),
        ("select pg_export_snapshot()", NOTHING),
        ("select lastval()", pins(Other)),
        ("select dblink_connect('c', 'host=h')", pins(Process)),
        ("select isn_weak(true)", pins(Process)),
        ("select pg_create_physical_replication_slot('s', true, true)", pins(Process)),
        (
            "create temp table t (a int); select setseed(0); listen x",
            pins(TemporaryTable) | pins(Process) | pins(Listen),
        ),
        ("listen x; select pg_backend_pid()", pins(Listen) | pins(BackendPid)),
        ("select pg_advisory_lock(1), lastval()", pins(AdvisoryLock) | pins(Other)),
        ("select setseed(0), lastval(), fx(1)", pins(Process) | pins(Other) | UNPROVEN),
        ("create temp table t as select pg_advisory_lock(1)", pins(TemporaryTable) | pins(AdvisoryLock)),
        ("create temp table t as execute p", pins(TemporaryTable) | pins(SqlPrepare)),
        ("declare c cursor with hold for select fx(1)", pins(HoldCursor) | UNPROVEN),
        ("deallocate all; select pg_backend_pid()", Leaves::DEALLOCATES_ALL | pins(BackendPid)),
        ("select fx(1) from pg_prepared_statements", Leaves::SHOWS_STATEMENTS | UNPROVEN),
        ("discard all", Leaves::DISCARDS_ALL),
        ("discard temp", NOTHING),
        ("discard plans", NOTHING),
        ("call p()", UNPROVEN),
        ("do 'x'", UNPROVEN),
        ("do $$ begin update t set a = 1 where b; end $$", UNPROVEN),
        ("do $$ begin SET app.x = 1; end $$", pins(Setting) | UNPROVEN),
        ("do $$ begin perform Set_Config('a.b', 'c', false); end $$", pins(Setting) | UNPROVEN),
        ("do $$ begin perform set_tenant(1); end $$", pins(Setting) | UNPROVEN),
        ("do $$ begin execute 'set app.x = 1'; end $$", pins(Setting) | UNPROVEN),
        ("select set_tenant(1)", pins(Setting) | UNPROVEN),
        ("call set_tenant(1)", pins(Setting) | UNPROVEN),
        ("select fx(1)", UNPROVEN),
        ("insert into t (a) values (1)", NOTHING),
        ("insert into s.t (a) values (1)", NOTHING),
        ("insert into guarded values (1)", UNPROVEN),
        ("copy s.guarded from stdin", UNPROVEN),
        ("insert into t select * from guarded; create temp table g ()", UNPROVEN | pins(TemporaryTable)),
        ("select * from guarded", NOTHING),
        ("update t set a = unknown(1)", UNPROVEN),
        ("SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;", NOTHING),
        ("begin; set x = 1", NOTHING),
        ("select lower(a) from seq", NOTHING),
        ("explain execute p", pins(SqlPrepare)),
        ("commit prepared 'x'", NOTHING),
    ] {
        assert_eq!(class(text).leaves, leaves, "{text}");
    }
}

#[test]
fn what_may_change_settings_is_marked() {
    for text in [
        "set x = 1",
        "set local x = 1",
        "set role a",
        "set session authorization a",
        "reset x",
        "reset all",
        "discard all",
        "select set_config('a.b', 'x', true)",
        "insert into t values (pg_catalog.set_config($1, $2, false))",
        "select \"set_config\"('a', 'b', false)",
        "begin; set x = 1",
        "set x = 1_000",
    ] {
        assert!(class(text).settings, "{text}");
    }
    for text in ["set transaction read only", "set constraints all deferred", "update t set a = 1", "show x"]
    {
        assert!(!class(text).settings, "{text}");
    }
}

#[test]
fn a_change_that_fires_a_trigger_which_sets_keeps_the_session() {
    let pins = Leaves::pin(PinReason::Setting);
    for text in [
        "insert into audited values (1)",
        "update s.audited set a = 1",
        "delete from \"audited\"",
        "truncate audited",
        "update pg_settings set setting = '1' where name = 'app.x'",
        "copy audited from stdin",
        "with x as (insert into audited values (1) returning 1) select * from x",
        "explain analyze delete from audited",
        "merge into audited using t on true when matched then delete",
    ] {
        assert_eq!(class(text).leaves, pins, "{text}");
    }
    for text in [
        "select * from audited",
        "select * from audited for update",
        "select * from audited for no key update",
        "copy audited to stdout",
        "insert into other values (1)",
    ] {
        assert_eq!(class(text).leaves, Leaves::NOTHING, "{text}");
    }
}

#[test]
fn kinds() {
    for (text, kind) in [
        ("", Kind::Empty),
        (" ; -- x", Kind::Empty),
        ("create table t()", Kind::Ddl),
        ("select 1; drop table t", Kind::Ddl),
        ("select 1 into t", Kind::Ddl),
        ("begin", Kind::TransactionControl),
        ("prepare transaction 'x'", Kind::TransactionControl),
        ("commit prepared 'x'", Kind::Write),
        ("set x = 1", Kind::Session),
        ("insert into t values (1)", Kind::Write),
    ] {
        assert_eq!(class(text).kind, kind, "{text}");
    }
}

#[test]
fn skeletons() {
    let (classifier, catalog) = (classifier(), catalog());
    let key = |text: &str| class_and_key(&classifier, &catalog, text.as_bytes()).1.skeleton;
    for (a, b) in [
        ("select 1", "SELECT  /* x */ 22 "),
        ("select * from t where a in (1)", "select * from t where a in (1, -2, 3)"),
        ("values (1,2)", "values (3,4),(5,6)"),
        ("select 'a'", "select 'b'"),
    ] {
        assert_eq!(key(a), key(b), "{a} {b}");
    }
    for (a, b) in [
        ("select current_setting('app.x')", "select current_setting('app.y')"),
        ("select 'now'", "select 'x'"),
        ("select U&\"a!0062\" uescape '!'", "select U&\"a!0062\" uescape '#'"),
        ("select true", "select false"),
        ("select 1 /* highwater.route=primary */", "select 1 /* highwater.route=replica */"),
        ("/* highwater.a */ select 1", "select 1"),
        ("select f(1,2)", "select f(1)"),
        ("select a", "select \"A\""),
        ("values (1,2)", "values (1,2,3)"),
        ("copy t to stdout (delimiter 'a')", "copy t to stdout (delimiter 'b')"),
        ("set x = 'a'", "set x = 'b'"),
        ("select array[1,2]", "select array[1]"),
        ("select U&'a!0062' uescape '!'", "select U&'a!0062' uescape '#'"),
    ] {
        assert_ne!(key(a), key(b), "{a} {b}");
    }
}

#[test]
fn facts_decide() {
    let classifier = classifier();
    let known = |statement: &Statement<'_>| match classifier.lookup(statement) {
        Lookup::Known(class, _) => class.reason,
        Lookup::Ask(_) => ClassReason::Read,
    };
    let (loaded, unknown) = (catalog(), Catalog::unknown(8));
    let plain = statement(b"select $1 = $2", &loaded);
    assert_eq!(known(&plain), ClassReason::Read);
    assert_eq!(known(&Statement { parameter_types: &[23, 20_000], ..plain }), ClassReason::ParameterType);
    assert_eq!(known(&Statement { lexing: Lexing::Unsafe, ..plain }), ClassReason::Lexing);
    assert_eq!(known(&Statement { catalog: &unknown, ..plain }), ClassReason::CatalogUnknown);
    let wide = statement("select é".as_bytes(), &loaded);
    assert_eq!(known(&wide), ClassReason::Read);
    assert_eq!(known(&Statement { lexing: Lexing::AsciiNames, ..wide }), ClassReason::Unclear);
}

#[test]
fn what_a_replica_refused_is_remembered() {
    let (classifier, catalog) = (classifier(), catalog());
    let (class, key) = class_and_key(&classifier, &catalog, b"select 1");
    assert_eq!(class, StatementClass::READ);
    classifier.learn(key);
    assert_eq!(class_and_key(&classifier, &catalog, b"select 1").0.reason, ClassReason::Learned);
    assert_eq!(class_and_key(&classifier, &catalog, b"select 2").0.reason, ClassReason::Learned);
}

/// Not a crash, whatever is piled up; the parser itself is fed too, past the scan's own limits.
#[test]
fn stack_bombs() {
    let cap = 16 * 1024;
    let fill = |head: &str, unit: &str, tail: &str| {
        format!("{head}{}{tail}", unit.repeat((cap - head.len() - tail.len()) / unit.len()))
    };
    for text in [
        fill("SELECT 1 ", "JOIN ", ""),
        fill("SELECT * FROM a ", "JOIN b ", ""),
        fill("select ", "(", ""),
        fill("select ", "- ", "1"),
        fill("select ", "not ", "true"),
        fill("select ", "case when ", ""),
        fill("select 1", " and 1", ""),
        fill("select 1", "||1", ""),
        fill("select 1", " union select 1", ""),
        fill("select a", "[1]", ""),
        fill("select ", "array[", ""),
        fill("select 1", "::int", ""),
        fill("select * from ", "(select * from ", ""),
        fill("", "with a as (", ""),
        fill("explain ", "explain ", "select 1"),
        fill("select a", " between 1", ""),
        fill("select a", " is null", ""),
        fill("select interval ", "interval ", ""),
    ] {
        let _ = class(&text);
    }
}

#[test]
fn deallocate_targets() {
    for (text, name) in [
        ("deallocate a", Some("a")),
        ("DEALLOCATE PREPARE \"A b\";", Some("A b")),
        ("deallocate all", None),
        ("deallocate prepare", Some("prepare")),
        ("deallocate prepare all", None),
        ("deallocate \"all\"", Some("all")),
        ("deallocate a; select 1", None),
        ("deallocate a b", None),
        ("select 1", None),
    ] {
        assert_eq!(deallocate_target(text.as_bytes()).as_deref(), name.map(str::as_bytes), "{text}");
    }
}

/// A megabyte of anything ends, and is no read unless the second parser may see it.
#[test]
fn long_texts_end() {
    let (classifier, catalog) = (classifier(), catalog());
    for unit in [
        "(",
        "a.",
        "'",
        "\"",
        "$$",
        "/*",
        "--",
        "\r",
        "é",
        "\0",
        "1",
        ",",
        "a(",
        "E'\\",
        "x in (1,",
        "values (1),",
        ";",
        "$1",
    ] {
        let text = format!("select {}", unit.repeat((1 << 20) / unit.len()));
        match classifier.lookup(&statement(text.as_bytes(), &catalog)) {
            Lookup::Known(class, _) => assert_ne!(class.kind, Kind::Read, "{unit}"),
            Lookup::Ask(_) => panic!("{unit}: longer than the parser may see"),
        }
    }
}

#[test]
fn a_nul_and_broken_utf8_are_no_reads() {
    let (classifier, catalog) = (classifier(), catalog());
    for text in [&b"select 1\0, nextval('s')"[..], b"select \xff(1)", b"select '\xc3", b"\0", b"select\x001"]
    {
        assert_ne!(class_and_key(&classifier, &catalog, text).0.kind, Kind::Read, "{text:?}");
    }
}

proptest! {
    /// Whatever is changed in a text with a write, or put around it: it takes a comment, a string or a longer word
    /// to hide the write's name, and those are not made of these pieces.
    #[test]
    fn a_call_of_a_writer_is_seen_among_anything(
        before in "(a,|b \\+ |lower\\(c\\),|\\$1,|'x',|\\( 1 \\),|case when a then b end,|\"q\",|/\\* c \\*/|é,| ){0,12}",
        space in "( |\n|\t|\r|/\\* x \\*/|-- y\n){0,3}",
        name in "(nextval|NextVal|\"nextval\"|pg_catalog.nextval|pg_notify|fx|public.fx|lo_export)",
        after in "(, 1|,'x'| from t| where true|\\+ 1| ){0,5}",
    ) {
        let (classifier, catalog) = (classifier(), catalog());
        let text = format!("select {before} {name}{space}(1){after}");
        prop_assert_ne!(class_and_key(&classifier, &catalog, text.as_bytes()).0.kind, Kind::Read);
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (classifier, catalog) = (classifier(), catalog());
        let first = class_and_key(&classifier, &catalog, &bytes);
        prop_assert_eq!(first, class_and_key(&classifier, &catalog, &bytes));
    }

    #[test]
    fn a_write_behind_a_semicolon_is_no_read(text in "[ -~]{0,60}") {
        let (classifier, catalog) = (classifier(), catalog());
        let text = format!("{text};delete from t");
        prop_assert_ne!(class_and_key(&classifier, &catalog, text.as_bytes()).0.kind, Kind::Read);
    }

    #[test]
    fn numbers_fold(a in 0u32.., b in 0u32..) {
        let (classifier, catalog) = (classifier(), catalog());
        let key = |n: u32| class_and_key(&classifier, &catalog, format!("select * from t where a = {n}").as_bytes()).1.skeleton;
        prop_assert_eq!(key(a), key(b));
    }
}

#[test]
#[ignore = "a report, not a check: reads statements, parted by lines of %%, from $HIGHWATER_CORPUS"]
fn report_corpus() {
    let text = std::fs::read_to_string(std::env::var("HIGHWATER_CORPUS").unwrap()).unwrap();
    for text in text.split("%%\n").filter(|text| !text.trim().is_empty()) {
        println!("{:?} {}", class(text), text.split_whitespace().collect::<Vec<_>>().join(" "));
    }
}

#[test]
fn what_may_end_a_transaction_is_told_from_what_cannot() {
    for stays in [
        "",
        "select 1",
        "select 1;",
        "(select 1)",
        "savepoint a",
        "prepare p as select 1",
        "PREPARE \"transaction\" AS SELECT 1",
        "begin",
        "prepare /* transaction */ p (int) as select $1",
        "execute p",
    ] {
        assert!(stays_in_transaction(stays.as_bytes()), "{stays}");
        assert!(!ends_failure(stays.as_bytes()), "{stays}");
        assert_eq!(is_empty(stays.as_bytes()), stays.is_empty(), "{stays}");
    }
    for empty in ["", " ", "-- commit", "/* commit */ "] {
        assert!(is_empty(empty.as_bytes()) && !ends_failure(empty.as_bytes()), "{empty}");
    }
    for ends in ["commit", "ROLLBACK TO a", "/* */ abort", "end;", "commit and chain"] {
        assert!(ends_failure(ends.as_bytes()) && !is_empty(ends.as_bytes()), "{ends}");
    }
    for ends in [
        "commit",
        "ROLLBACK TO a",
        "abort",
        "end;",
        "prepare transaction 'x'",
        "PREPARE --\n TRANSACTION 'x'",
        "prepare transaction as select 1",
        "select 1; commit",
        "; commit",
        "select 'a",
        "/* commit",
    ] {
        assert!(!stays_in_transaction(ends.as_bytes()), "{ends}");
    }
}

#[test]
fn what_stands_behind_as_is_no_call() {
    for text in [
        "SELECT CAST(x AS fx(3))",
        "SELECT CAST(x AS public.fx(3, 4)) FROM t",
        "SELECT * FROM t AS fx (a, b)",
        "SELECT CAST(x AS \"fx\"(3)), upper('a') AS fx",
    ] {
        assert_eq!(class(text).kind, Kind::Read, "{text}");
    }
    for text in [
        "SELECT CAST(fx(1) AS int)",
        "SELECT CAST(x AS numeric(fx(1)))",
        "SELECT x AS y, fx(1)",
        "SELECT x AS fx, fx(1)",
        "SELECT CAST(x AS ct(1))",
        "SELECT CAST(x AS fx(3)), fx(3)",
        "SELECT * FROM t AS fx (a, b), fx(1)",
        "WITH a AS (SELECT fx(1)) SELECT * FROM a",
        "WITH a AS MATERIALIZED (SELECT 1), b AS (SELECT fx(1)) SELECT * FROM a",
        "CREATE TABLE y AS SELECT set_config('a.b', 'c', false)",
        "SELECT x AS public.fx(1)",
    ] {
        assert_ne!(class(text).kind, Kind::Read, "{text}");
    }
    assert!(class("CREATE TABLE y AS SELECT set_config('a.b', 'c', false)").settings);
    assert!(class("CREATE TABLE y AS VALUES (set_config('a.b', 'c', false))").settings);
}

#[test]
fn a_function_behind_its_schemas_name_is_judged_by_that_schema() {
    let function = |oid, schema: &str, body: &str| FunctionRow {
        oid,
        name: "shared".into(),
        schema: schema.into(),
        language: "sql".into(),
        kind: "f".into(),
        source: body.into(),
        one_argument: true,
        ..FunctionRow::default()
    };
    let functions =
        vec![function(20_001, "good", "select 1"), function(20_002, "Bad", "select pg_advisory_lock(1)")];
    let catalog =
        Catalog::from_rows(8, CatalogRows { server_major: 15, functions, ..CatalogRows::default() });
    let classifier = classifier();
    let is_read = |text: &str| class_and_key(&classifier, &catalog, text.as_bytes()).0.kind == Kind::Read;
    for text in [
        "SELECT good.shared(1)",
        "SELECT Good . \"shared\" /* x */ (1), x.good FROM t x",
        "SELECT * FROM good.shared(1)",
        "SELECT good.shared(good.shared(1))",
        "SELECT U&\"g\\006Fod\".shared(1)",
        "SELECT U&\"g!006Fod\" UESCAPE '!' . shared(1)",
    ] {
        assert!(is_read(text), "{text}");
    }
    for text in [
        "SELECT shared(1)",
        "SELECT \"Bad\".shared(1)",
        "SELECT bad.shared(1)",
        "SELECT public.shared(1)",
        "SELECT \"Good\".shared(1)",
        "SELECT good.shared(shared(1))",
        "SELECT good.shared(1), shared(2)",
        "SELECT good.x, shared(1)",
        "SELECT good, shared(1)",
        "SELECT a.good.shared(1)",
        "SELECT good.a.shared(1)",
        "SELECT good.*, (t).shared FROM good, t",
        "SELECT (good).shared(1)",
        "SELECT good.shared FROM t good",
        "SELECT good.\"shared\" FROM t good",
        "SELECT good.*, [1].shared(1)",
        "SELECT U&\"b!006Fod\" UESCAPE '!' . shared(1)",
    ] {
        assert!(!is_read(text), "{text}");
    }
}
