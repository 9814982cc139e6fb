//! What an adversary would try: statements that look like reads and take a lock, write, or speak of their own server, each
//! by a way of its own. The standby refuses none of them by itself.

use highwater::demo::cluster::ClusterOptions;

use crate::fixture::*;

/// Made by a superuser, because operator classes and their like take one. All code in it that is not harmless takes an
/// advisory lock.
const OBJECTS: &str = "
    CREATE TABLE plain (id int PRIMARY KEY, x text);
    INSERT INTO plain SELECT n, 'x' || n FROM generate_series(1, 20) n;
    CREATE FUNCTION locks(int) RETURNS int LANGUAGE plpgsql IMMUTABLE
        AS $$ BEGIN PERFORM pg_try_advisory_xact_lock(21); RETURN $1; END $$;
    CREATE DOMAIN checked AS int CHECK (pg_try_advisory_xact_lock(22) OR VALUE > 0);

    CREATE FUNCTION hash_locked(int, int8) RETURNS int8 LANGUAGE plpgsql IMMUTABLE
        AS $$ BEGIN PERFORM pg_try_advisory_xact_lock(23); RETURN 1; END $$;
    CREATE OPERATOR =## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq, HASHES);
    CREATE OPERATOR CLASS hashed_ops FOR TYPE int4 USING hash AS OPERATOR 1 =##, FUNCTION 2 hash_locked(int, int8);
    CREATE TABLE hashed (id int) PARTITION BY HASH (id hashed_ops);
    CREATE TABLE hashed_0 PARTITION OF hashed FOR VALUES WITH (MODULUS 1, REMAINDER 0);

    CREATE FUNCTION compare_locked(int, int) RETURNS int LANGUAGE plpgsql IMMUTABLE
        AS $$ BEGIN PERFORM pg_try_advisory_xact_lock(24); RETURN $1 - $2; END $$;
    CREATE OPERATOR <## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4lt);
    CREATE OPERATOR <=## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4le);
    CREATE OPERATOR ==## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq);
    CREATE OPERATOR >=## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4ge);
    CREATE OPERATOR >## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4gt);
    CREATE OPERATOR CLASS ordered_ops FOR TYPE int4 USING btree AS
        OPERATOR 1 <##, OPERATOR 2 <=##, OPERATOR 3 ==##, OPERATOR 4 >=##, OPERATOR 5 >##,
        FUNCTION 1 compare_locked(int, int);
    CREATE TABLE ranged (id int) PARTITION BY RANGE (id ordered_ops);
    CREATE TABLE ranged_0 PARTITION OF ranged FOR VALUES FROM (0) TO (10);
    CREATE TABLE ranged_1 PARTITION OF ranged FOR VALUES FROM (10) TO (20);

    CREATE FUNCTION differs_locked(int, int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE
        AS $$ BEGIN PERFORM pg_try_advisory_xact_lock(45); RETURN $1 <> $2; END $$;
    CREATE OPERATOR =!# (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq, COMMUTATOR = =!#, NEGATOR = <>!#);
    CREATE OPERATOR <>!# (LEFTARG = int, RIGHTARG = int, FUNCTION = differs_locked, NEGATOR = =!#);
    CREATE TYPE span AS RANGE (SUBTYPE = int4, SUBTYPE_OPCLASS = ordered_ops);

    CREATE VIEW columns_of_domain AS SELECT 1 AS one
        FROM xmltable('/a' PASSING ('<a>1</a>'::xml) COLUMNS d checked PATH '.');
    CREATE VIEW record_of_domain AS SELECT 1 AS one FROM json_to_recordset('[{\"d\": 1}]') AS r (d checked);
    CREATE FUNCTION atomic_of_domain() RETURNS int LANGUAGE sql STABLE
        BEGIN ATOMIC SELECT 1 FROM json_to_recordset('[{\"d\": 1}]') AS r (d checked); END;

    CREATE FUNCTION label_as_case() RETURNS int LANGUAGE plpgsql STABLE AS
        $$ BEGIN IF (SELECT 1 AS case) = 1 THEN LOCK TABLE plain IN ACCESS SHARE MODE; END IF; RETURN 1; END $$;
    CREATE FUNCTION bare_label_case() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN IF (SELECT 1 case) = 1 THEN LOCK TABLE plain IN ACCESS SHARE MODE; END IF; RETURN 1; END $$;
    CREATE FUNCTION sets_behind_case() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN IF (SELECT 1 case) = 1 THEN SET work_mem = '1MB'; END IF; RETURN 1; END $$;
    CREATE FUNCTION swallows_behind_case() RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN IF (SELECT 1 case) = 1 THEN TRUNCATE plain; END IF; RETURN 'done';
           EXCEPTION WHEN OTHERS THEN RETURN 'swallowed'; END $$;
    CREATE FUNCTION strict(int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN locks($1); END $$;
    CREATE FUNCTION calls_strict() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN strict(1); END $$;
    CREATE VIEW begin AS SELECT locks(1) AS got;
    CREATE FUNCTION reads_begin() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM got FROM begin; RETURN 1; END $$;
    CREATE FUNCTION opens() RETURNS refcursor LANGUAGE plpgsql AS
        $$ DECLARE c refcursor := 'opened'; BEGIN OPEN c FOR SELECT id FROM plain ORDER BY id; RETURN c; END $$;

    CREATE TYPE pair AS (a int, b int);
    CREATE FUNCTION pair_to_json(pair) RETURNS json LANGUAGE sql IMMUTABLE
        AS $$ SELECT CASE WHEN pg_try_advisory_xact_lock(25) THEN '1'::json END $$;
    CREATE CAST (pair AS json) WITH FUNCTION pair_to_json(pair);
    CREATE TABLE pairs (p pair); INSERT INTO pairs VALUES (ROW(1, 2));
    CREATE VIEW over_pairs AS SELECT p FROM pairs;
    CREATE FUNCTION returns_pair() RETURNS SETOF pairs LANGUAGE sql STABLE AS 'SELECT * FROM pairs';

    CREATE FUNCTION wraps(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT locks(1) + $1';
    CREATE TABLE wrapped (id int); CREATE INDEX ON wrapped (wraps(id));
    CREATE SCHEMA mine;
    CREATE FUNCTION mine.now() RETURNS timestamptz LANGUAGE sql STABLE
        AS 'SELECT clock_timestamp() WHERE pg_try_advisory_xact_lock(26)';
    CREATE DOMAIN mine.money AS numeric CHECK (pg_try_advisory_xact_lock(27) OR VALUE > 0);
    CREATE VIEW mine.pg_class AS SELECT pg_try_advisory_xact_lock(28) AS got;
    CREATE FUNCTION total_locked(bigint, int) RETURNS bigint LANGUAGE sql IMMUTABLE
        AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(29) THEN $1 + $2 END';
    CREATE AGGREGATE total (int) (SFUNC = total_locked, STYPE = bigint, INITCOND = '0');
    CREATE FUNCTION final_locked(bigint) RETURNS bigint LANGUAGE sql IMMUTABLE
        AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(30) THEN $1 END';
    CREATE AGGREGATE final (int) (SFUNC = int4_sum, STYPE = bigint, FINALFUNC = final_locked);
    CREATE FUNCTION ordered_final(bigint[], float8) RETURNS bigint LANGUAGE sql IMMUTABLE
        AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(31) THEN $1[1] END';
    CREATE AGGREGATE ordered_set (float8 ORDER BY bigint) (SFUNC = array_append, STYPE = bigint[], FINALFUNC = ordered_final);
    CREATE FUNCTION any_overload(anyelement) RETURNS anyelement LANGUAGE sql IMMUTABLE AS 'SELECT $1';
    CREATE FUNCTION any_overload(date) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN locks(1); END $$;
    CREATE FUNCTION by_default(a int DEFAULT locks(1)) RETURNS int LANGUAGE sql AS 'SELECT $1';
    CREATE FUNCTION in_do() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN DO 'BEGIN PERFORM locks(1); END'; RETURN 1; END $$;
    CREATE FUNCTION prepares() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN EXECUTE 'PREPARE made AS SELECT 1'; RETURN 1; END $$;
    CREATE TABLE guarded (id int); INSERT INTO guarded VALUES (1);
    ALTER TABLE guarded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY guard ON guarded USING (EXISTS (SELECT FROM record_of_domain));
    CREATE VIEW barrier WITH (security_barrier) AS SELECT id FROM plain WHERE locks(id) > 0;
    CREATE VIEW invoker WITH (security_invoker) AS SELECT id FROM plain WHERE locks(id) > 0;
    CREATE VIEW locking_rows AS SELECT id FROM plain FOR SHARE;
    CREATE VIEW nested_locking AS WITH q AS (SELECT * FROM locking_rows) SELECT * FROM q;
    CREATE SEQUENCE counter;
    CREATE VIEW over_counter AS SELECT last_value FROM counter;
    CREATE TABLE parent (id int); CREATE UNLOGGED TABLE child () INHERITS (parent);
    CREATE TABLE split_up (id int) PARTITION BY LIST (id);
    CREATE UNLOGGED TABLE part PARTITION OF split_up DEFAULT;
    CREATE VIEW activity AS SELECT pid FROM pg_stat_activity;
    CREATE VIEW standing AS SELECT pg_is_in_recovery() AS standby;
    GRANT ALL ON ALL TABLES IN SCHEMA public TO app; GRANT ALL ON SCHEMA mine TO app; GRANT ALL ON ALL TABLES IN SCHEMA mine TO app;
    GRANT ALL ON SCHEMA public TO app;
";

async fn started(objects: &str, overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up_as_superuser(objects).await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
    (cluster, proxy)
}

#[tokio::test]
async fn what_looks_like_a_read_and_is_none_starts_on_the_primary() {
    let (cluster, proxy) = started(OBJECTS, "consistency: { catch_up_wait: 2s }").await;
    let mut wrong = Vec::new();
    for (number, statement) in [
        // Support functions of operator classes.
        "SELECT * FROM hashed WHERE id = 5",
        "SELECT * FROM hashed WHERE id =## 5",
        "SELECT * FROM ranged WHERE id <## 5",
        "SELECT id FROM plain ORDER BY id USING <##",
        "SELECT * FROM plain a JOIN plain b ON a.id ==## b.id",
        "SELECT * FROM plain WHERE NOT (id =!# 5)",
        "SELECT span(1, 5) @> 3",
        "SELECT '[1,5)'::span",
        "SELECT satisfies_hash_partition('hashed'::regclass, 1, 0, 5)",
        // Types that are named nowhere but in a list of columns.
        "SELECT * FROM columns_of_domain",
        "SELECT one FROM record_of_domain",
        "SELECT atomic_of_domain()",
        "SELECT * FROM guarded",
        "SELECT 1 FROM json_to_recordset('[{\"d\": 1}]') AS r (d checked)",
        "SELECT 1 FROM xmltable('/a' PASSING ('<a>1</a>'::xml) COLUMNS d checked PATH '.')",
        "SELECT jsonb_populate_record(NULL::pair, '{}')",
        "SELECT '{1}'::checked[]",
        "SELECT '{1}'::_checked",
        "SELECT checked '5'",
        "SELECT checked(5)",
        "SELECT CAST('5' AS public.checked)",
        "SELECT to_json(p) FROM pairs",
        "SELECT row_to_json(o) FROM over_pairs o",
        "SELECT json_agg(r) FROM returns_pair() r",
        // Bodies.
        "SELECT label_as_case()",
        "SELECT bare_label_case()",
        "SELECT sets_behind_case()",
        "SELECT swallows_behind_case()",
        "SELECT calls_strict()",
        "SELECT reads_begin()",
        "SELECT in_do()",
        "SELECT prepares()",
        // Names of built-in things in another schema, whatever the search path is.
        "SELECT now()",
        "SELECT mine.now()",
        "SELECT '5'::money",
        "SELECT * FROM pg_class",
        // Aggregates, overloads, defaults.
        "SELECT total(id) FROM plain",
        "SELECT total(id) OVER (ORDER BY id) FROM plain",
        "SELECT final(id) FILTER (WHERE id > 1) FROM plain",
        "SELECT ordered_set(0.5) WITHIN GROUP (ORDER BY id) FROM plain",
        "SELECT any_overload(current_date)",
        "SELECT any_overload(1)",
        "SELECT by_default()",
        // Views.
        "SELECT id FROM barrier WHERE id = 1",
        "SELECT id FROM invoker WHERE id = 1",
        "SELECT * FROM locking_rows",
        "SELECT * FROM nested_locking",
        "SELECT * FROM over_counter",
        "SELECT * FROM activity",
        "SELECT * FROM standing",
        // Tables.
        "SELECT * FROM wrapped",
        "SELECT * FROM parent",
        "SELECT * FROM split_up",
        "TABLE split_up",
        "COPY split_up TO STDOUT",
        "COPY (SELECT locks(1)) TO STDOUT",
        "COPY (WITH gone AS (DELETE FROM plain WHERE id = 0 RETURNING *) SELECT * FROM gone) TO STDOUT",
        // Words.
        "VALUES (nextval('counter'))",
        "SELECT CASE nextval('counter') WHEN 1 THEN 2 END",
        "SELECT * FROM plain WHERE id = ANY (ARRAY(SELECT locks(id) FROM plain))",
        "SELECT * FROM plain FETCH FIRST (SELECT locks(1)) ROWS ONLY",
        "SELECT * FROM plain LIMIT locks(1)",
        "SELECT * FROM plain TABLESAMPLE bernoulli (locks(50))",
        "SELECT * FROM plain TABLESAMPLE system (50) REPEATABLE (locks(1))",
        "SELECT count(*) OVER (ORDER BY id ROWS BETWEEN locks(1) PRECEDING AND CURRENT ROW) FROM plain",
        "SELECT * FROM ROWS FROM (generate_series(1, 2), locks(1)) r (a, b)",
        "SELECT * FROM plain p, LATERAL locks(p.id) l (n)",
        "WITH RECURSIVE q (n) AS (SELECT 1 UNION ALL SELECT locks(n) + 1 FROM q WHERE n < 3) SELECT * FROM q",
        "WITH q AS (SELECT 1) (WITH r AS (SELECT locks(1)) SELECT * FROM r)",
        "SELECT DISTINCT ON (id) locks(id) FROM plain",
        "SELECT 1 OPERATOR(public.<##) locks(1)",
        "SELECT (SELECT 1 FROM plain LIMIT 1 FOR KEY SHARE)",
        "SELECT 1 WHERE EXISTS (SELECT FROM plain FOR/**/NO/**/KEY--\n UPDATE)",
        "SELECT 1 INTO/**/TEMP made",
        "EXPLAIN (ANALYZE) SELECT 1 INTO made_by_explain",
        "EXPLAIN (ANALYZE, COSTS off) MERGE INTO plain USING plain p ON plain.id = p.id WHEN MATCHED THEN DO NOTHING",
        "EXPLAIN ANALYZE DECLARE c CURSOR FOR SELECT locks(1)",
        "SELECT pg_catalog.set_config('work_mem', '1MB', false)",
        "SELECT \"set_config\"('work_mem', '1MB', false)",
        "SELECT set_config(n, v, false) FROM (VALUES ('work_mem', '1MB')) s (n, v)",
        "SELECT current_setting(lower('PORT'))",
        "SELECT current_setting($$port$$)",
        "SELECT current_setting(E'po\\162t')",
        "SELECT current_setting('highwater.consistency', true)",
        "SELECT xmin, pg_current_xact_id() FROM plain",
        "SELECT * FROM pg_stat_database",
        "SELECT * FROM pg_catalog.pg_locks",
        "SELECT pg_catalog . pg_is_in_recovery ( )",
        "SELECT * FROM pg_is_in_recovery()",
        "SELECT * FROM current_setting('port') s",
        "SELECT * FROM pg_show_all_settings()",
        "SELECT * FROM pg_sequences",
        "SELECT * FROM pg_get_sequence_data('counter')",
        "SELECT pg_sequence_last_value('counter')",
        "SELECT ('counter'::regclass).pg_sequence_last_value",
        "SELECT lo_import('/nonexistent')",
        "SELECT xpath('/a', query_to_xml('SELECT locks(1)', true, true, ''))",
        "SELECT pg_input_is_valid('1', 'checked')",
        "SELECT 'a\\', pg_try_advisory_xact_lock(32) --'",
        "SELECT $a$ $A$ $a$, pg_try_advisory_xact_lock(33) -- $A$",
        "SELECT E'\\'', pg_try_advisory_xact_lock(34) --'",
        "SELECT e'\\\\', pg_try_advisory_xact_lock(35) --'",
        "SELECT 'a'\n'b', pg_try_advisory_xact_lock(36) --'",
        "SELECT B'0''', pg_try_advisory_xact_lock(37) --'",
        "SELECT n'a', pg_try_advisory_xact_lock(38)",
        "SELECT U&'a\\0027', pg_try_advisory_xact_lock(39) --'",
        "SELECT 1/* /* */ ' */, pg_try_advisory_xact_lock(40) --'",
        "SELECT 1 /* \" */, \"pg_try_advisory_xact_lock\"(41)",
        "SELECT 1*/**/pg_backend_pid()",
        "SELECT -pg_backend_pid()",
        "SELECT 1a, pg_backend_pid()",
        "SELECT 0x1F, pg_backend_pid()",
        "SELECT 1_000, pg_backend_pid()",
        "SELECT 1 @-pg_backend_pid()",
        "SELECT pg_try_advisory_xact_lock(42)::text COLLATE \"C\"",
        "SELECT id AS \"a\"\"b\", pg_try_advisory_xact_lock(43) FROM plain",
        "SELECT ((((pg_try_advisory_xact_lock(44)))))",
        "/* highwater.route=replica */ SELECT locks(1)",
        "SELECT x FROM plain; SELECT x FROM plain",
    ]
    .iter()
    .enumerate()
    {
        let client = proxy.connect().await;
        let marked = format!("/* hidden{number}. */ {statement}");
        // Twice: once unknown, once out of the cache. An error would be the same on one server.
        let _ = client.simple_query(&marked).await;
        let _ = client.simple_query(&marked).await;
        // A text that the server cannot parse is in its log as what failed.
        let marker = format!("/* hidden{number}. */");
        let ran: Vec<usize> = cluster.nodes().iter().map(|node| node.log().matches(&marker).count()).collect();
        if ran[0] < 2 || ran[1] > 0 {
            wrong.push(format!("{statement}: {ran:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What is defined by code (DO, a procedure, a function) counts from the next statement on, as what is defined by itself.
#[tokio::test]
async fn what_code_defines_is_known_to_the_next_statement() {
    let objects = "
        CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a');
        CREATE VIEW shown AS SELECT true AS got;
        CREATE FUNCTION gets() RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION redefines(body text) RETURNS void LANGUAGE plpgsql AS
            $$ BEGIN EXECUTE 'CREATE OR REPLACE VIEW shown AS SELECT ' || body || ' AS got'; END $$;
        CREATE PROCEDURE redefine(body text) LANGUAGE plpgsql AS $$ BEGIN PERFORM redefines(body); END $$;
        ALTER VIEW shown OWNER TO app; ALTER FUNCTION gets() OWNER TO app;
        GRANT ALL ON ALL TABLES IN SCHEMA public TO app; GRANT ALL ON SCHEMA public TO app";
    let (cluster, proxy) = started(objects, "consistency: { catch_up_wait: 2s }").await;
    let client = proxy.connect().await;
    let lock = "pg_try_advisory_xact_lock(1)";
    let mut wrong = Vec::new();
    for (number, (code, read)) in [
        (format!("DO $$ BEGIN EXECUTE 'CREATE OR REPLACE VIEW shown AS SELECT {lock} AS got'; END $$"), "SELECT got FROM shown"),
        (format!("DO $$ BEGIN CREATE OR REPLACE FUNCTION gets() RETURNS boolean LANGUAGE sql AS 'SELECT {lock}'; END $$"), "SELECT gets()"),
        (format!("SELECT redefines('{lock}')"), "SELECT got FROM shown"),
        (format!("CALL redefine('{lock}')"), "SELECT got FROM shown"),
    ]
    .into_iter()
    .enumerate()
    {
        client.batch_execute("CREATE OR REPLACE VIEW shown AS SELECT true AS got").await.unwrap();
        client.batch_execute("CREATE OR REPLACE FUNCTION gets() RETURNS boolean LANGUAGE sql AS 'SELECT true'").await.unwrap();
        eventually("it is harmless again", || async {
            client.simple_query(&format!("{read} /* before{number}. */")).await.unwrap();
            cluster.ran(&format!("before{number}."))[1] > 0
        })
        .await;
        client.simple_query(&code).await.unwrap();
        client.simple_query(&format!("{read} /* after{number}. */")).await.unwrap();
        let ran = cluster.ran(&format!("after{number}."));
        if ran != [1, 0] {
            wrong.push(format!("{code}: {ran:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A replica that is late has the function as it was: with the facts as they are now it would take the lock there.
#[tokio::test]
async fn a_late_replica_is_not_asked_for_what_has_been_made_harmless_since() {
    let objects = "
        CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a');
        CREATE FUNCTION gets() RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(1)';
        ALTER FUNCTION gets() OWNER TO app; GRANT ALL ON ALL TABLES IN SCHEMA public TO app; GRANT ALL ON SCHEMA public TO app";
    let (cluster, proxy) = started(objects, "consistency: { level: eventual }").await;
    let client = proxy.connect().await;
    cluster.node(1).pause_replay().await.unwrap();
    let other = proxy.connect().await;
    other
        .batch_execute("CREATE OR REPLACE FUNCTION gets() RETURNS boolean LANGUAGE sql AS 'SELECT true'")
        .await
        .unwrap();
    eventually("it is known to be harmless", || async {
        client.simple_query("SELECT gets() /* late. */").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("reason", "behind")]) > 0.0
    })
    .await;
    for _ in 0..5 {
        client.simple_query("SELECT gets() /* late. */").await.unwrap();
    }
    assert_eq!(cluster.ran("late.")[1], 0);
    cluster.node(1).resume_replay().await.unwrap();
    eventually("the replica has it, too", || async {
        client.simple_query("SELECT gets() /* there. */").await.unwrap();
        cluster.ran("there.")[1] > 0
    })
    .await;
}

/// Settings that make another text of a text, or another table of a table, wherever they come from.
#[tokio::test]
async fn settings_that_change_what_a_text_says_are_heeded() {
    let objects = "
        CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a');
        CREATE ROLE other_strings LOGIN PASSWORD 'x'; ALTER ROLE other_strings SET standard_conforming_strings = off;
        CREATE ROLE other_path LOGIN PASSWORD 'x'; ALTER ROLE other_path SET search_path = pg_temp, public;
        CREATE FUNCTION other_strings() RETURNS void LANGUAGE sql AS $$ SELECT set_config('standard_conforming_strings', 'off', false) $$;
        GRANT ALL ON ALL TABLES IN SCHEMA public TO public";
    let (cluster, proxy) = started(objects, "consistency: { catch_up_wait: 2s }").await;
    let off = "SET standard_conforming_strings = off";
    // With the setting on it is one string.
    let two_faced = "SELECT 'a\\'', pg_try_advisory_xact_lock(1) --'";
    let mut wrong = Vec::new();
    let mut check = |what: &str, marker: &str| {
        let ran = cluster.ran(marker);
        if ran[1] > 0 || ran[0] == 0 {
            wrong.push(format!("{what}: {ran:?}"));
        }
    };
    // Set by a message of its own, by a pipeline before it, by a function, for the transaction, by a role.
    for (number, first) in
        [off, "SELECT other_strings()", "DO $$ BEGIN SET standard_conforming_strings = off; END $$"]
            .iter()
            .enumerate()
    {
        let mut client = proxy.raw_login().await;
        client.ask(&query(first)).await;
        client.ask(&query(&format!("/* strings{number}. */ {two_faced}"))).await;
        check(first, &format!("strings{number}."));
        let mut client = proxy.raw_login().await;
        let text = format!("/* piped{number}. */ {two_faced}");
        let unit =
            [parse("", first), bind("", &[]), execute(), parse("", &text), bind("", &[]), execute(), sync()]
                .concat();
        client.ask(&unit).await;
        check(&format!("piped: {first}"), &format!("piped{number}."));
        // Several units sent at once.
        let mut client = proxy.raw_login().await;
        let text = format!("/* ahead{number}. */ {two_faced}");
        client.ask(&query("SELECT x FROM plain")).await;
        client.send(&[query(first), query(&text)].concat()).await;
        client.read_ready().await;
        client.read_ready().await;
        check(&format!("sent ahead: {first}"), &format!("ahead{number}."));
        let mut client = proxy.raw_login().await;
        for text in [
            "BEGIN READ ONLY",
            &first.replace("SET ", "SET LOCAL "),
            &format!("/* local{number}. */ {two_faced}"),
            "COMMIT",
        ] {
            client.ask(&query(text)).await;
        }
        check(&format!("local: {first}"), &format!("local{number}."));
    }
    let mut client = RawClient::connect(proxy.port()).await;
    client.login_with(&[("user", "other_strings"), ("database", "app")], "x").await.unwrap();
    client.ask(&query(&format!("/* role. */ {two_faced}"))).await;
    check("a role's", "role.");

    // A table made where the search path has temporary tables first is temporary, though nothing says so.
    for (number, first) in
        ["SET search_path = pg_temp, public", "SELECT set_config('search_path', 'pg_temp, public', false)"]
            .iter()
            .enumerate()
    {
        let mut client = proxy.raw_login().await;
        for text in [first, "CREATE TABLE plain (other int)", "INSERT INTO plain VALUES (7)"] {
            client.ask(&query(text)).await;
        }
        client.ask(&query(&format!("SELECT other FROM plain /* temporary{number}. */"))).await;
        check(first, &format!("temporary{number}."));
    }
    let mut client = RawClient::connect(proxy.port()).await;
    client.login_with(&[("user", "other_path"), ("database", "app")], "x").await.unwrap();
    client.ask(&query("CREATE TABLE plain (other int)")).await;
    client.ask(&query("SELECT other FROM plain /* path. */")).await;
    check("a role's path", "path.");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// How it is noticed that the catalog has changed: by PostgreSQL's counts.
#[tokio::test]
async fn nothing_is_a_read_where_changes_of_the_catalog_are_not_counted() {
    let settings = [("log_statement", "all"), ("track_counts", "off")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let cluster =
        Cluster::start_with(ClusterOptions { replicas: 1, settings, ..ClusterOptions::default() }).await;
    cluster.set_up("CREATE TABLE plain (id int, x text)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    eventually("it is said", || async { proxy.log().contains("track_counts is off") }).await;
    for _ in 0..5 {
        client.simple_query("SELECT x AS uncounted FROM plain").await.unwrap();
    }
    assert_eq!(cluster.ran("uncounted"), [5, 0]);
}

/// A function may leave a cursor open for the rest of its transaction.
#[tokio::test]
async fn a_cursor_that_a_function_has_opened_can_be_read() {
    let (_cluster, proxy) =
        started(OBJECTS, "{ consistency: { catch_up_wait: 2s }, routing: { transactions: split } }").await;
    for begin in ["BEGIN", "BEGIN READ ONLY"] {
        let client = proxy.connect().await;
        client.batch_execute(begin).await.unwrap();
        client.simple_query("SELECT x FROM plain LIMIT 1").await.unwrap();
        client.simple_query("SELECT opens()").await.unwrap();
        let rows = client
            .simple_query("FETCH ALL FROM opened")
            .await
            .unwrap_or_else(|error| panic!("{begin}: {error}"));
        assert!(rows.len() > 20, "{begin}");
        client.batch_execute("COMMIT").await.unwrap();
    }
}
