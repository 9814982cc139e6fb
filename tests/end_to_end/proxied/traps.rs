//! What no parser of a statement's text can see: objects of the catalog through which a harmless
//! looking SELECT takes a lock, writes, or answers differently on a standby. A standby refuses none of
//! these by itself, so each must start on the primary.

use crate::allow_lists::are_installed;
use crate::fixture::*;

/// Objects whose danger is hidden, and plain ones beside them.
const OBJECTS: &str = "
    CREATE TABLE plain (id int PRIMARY KEY, x text);
    INSERT INTO plain VALUES (1, 'one');
    CREATE VIEW plain_view AS SELECT id, upper(x) AS x FROM plain;
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TABLE moods (m mood);

    CREATE VIEW locking_view AS SELECT pg_try_advisory_xact_lock(1) AS got;
    CREATE VIEW view_of_view AS SELECT got FROM locking_view;
    CREATE MATERIALIZED VIEW material AS SELECT 1 AS one;

    CREATE FUNCTION liar() RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(2)';
    CREATE FUNCTION atomic() RETURNS boolean LANGUAGE sql STABLE
        BEGIN ATOMIC SELECT pg_try_advisory_xact_lock(3); END;
    CREATE FUNCTION swallows() RETURNS text LANGUAGE plpgsql STABLE AS $$
        BEGIN PERFORM writes(); RETURN 'written'; EXCEPTION WHEN OTHERS THEN RETURN 'swallowed'; END $$;
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS
        'INSERT INTO plain VALUES ((SELECT max(id) + 1 FROM plain), NULL) RETURNING id';
    CREATE FUNCTION attribute(plain) RETURNS boolean LANGUAGE sql IMMUTABLE
        AS 'SELECT pg_try_advisory_xact_lock(11)';
    CREATE FUNCTION upper(int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(4)';

    CREATE TABLE guarded (id int);
    INSERT INTO guarded VALUES (1);
    ALTER TABLE guarded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY guard ON guarded USING (pg_try_advisory_xact_lock(5));
    GRANT ALL ON guarded TO public;

    CREATE DOMAIN checked AS int CHECK (pg_try_advisory_xact_lock(6) OR VALUE > 0);
    CREATE TABLE with_domain (d checked);
    CREATE TYPE composite AS (n int, t text);
    CREATE FUNCTION equal(composite, composite) RETURNS boolean LANGUAGE sql IMMUTABLE
        AS 'SELECT pg_try_advisory_xact_lock(7)';
    CREATE OPERATOR = (LEFTARG = composite, RIGHTARG = composite, FUNCTION = equal);
    CREATE TABLE composites (c composite);
    INSERT INTO composites VALUES (ROW(1, 'a'));
    CREATE TYPE cast_mood AS ENUM ('low', 'high');
    CREATE FUNCTION as_number(cast_mood) RETURNS int LANGUAGE sql IMMUTABLE
        AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(9) THEN 1 ELSE 2 END';
    CREATE CAST (cast_mood AS int) WITH FUNCTION as_number(cast_mood) AS IMPLICIT;
    CREATE TABLE cast_moods (e cast_mood);
    CREATE AGGREGATE locking_sum (int) (SFUNC = int4_sum_locked, STYPE = bigint);

    CREATE SEQUENCE counter;
    CREATE UNLOGGED TABLE unlogged (id int);
    CREATE TABLE parent (id int) PARTITION BY RANGE (id);
    CREATE TABLE child PARTITION OF parent FOR VALUES FROM (0) TO (10);
    ALTER TABLE child ENABLE ROW LEVEL SECURITY;
    CREATE POLICY guard ON child USING (pg_try_advisory_xact_lock(8));
    CREATE TABLE far_parent (id int) PARTITION BY RANGE (id);
    CREATE FOREIGN TABLE far PARTITION OF far_parent FOR VALUES FROM (0) TO (10) SERVER nowhere;
    CREATE VIEW over_far AS SELECT id FROM far_parent;

    CREATE OPERATOR #! (RIGHTARG = bigint, FUNCTION = pg_try_advisory_xact_lock);
    CREATE FUNCTION by_default(a boolean DEFAULT pg_try_advisory_xact_lock(13)) RETURNS boolean LANGUAGE sql STABLE
        AS 'SELECT $1';
    CREATE FUNCTION dynamic() RETURNS int LANGUAGE plpgsql STABLE
        AS $$ DECLARE r int; BEGIN EXECUTE 'SELECT 1' INTO r; RETURN r; END $$;
    CREATE FUNCTION calls_liar() RETURNS boolean LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN liar(); END $$;
    CREATE FUNCTION in_view() RETURNS boolean LANGUAGE sql STABLE AS 'SELECT got FROM locking_view';
    CREATE FUNCTION of_domain(with_domain) RETURNS int LANGUAGE sql STABLE AS 'SELECT 1';
    CREATE FUNCTION configured() RETURNS int LANGUAGE sql STABLE SET standard_conforming_strings = off AS 'SELECT 1';
    CREATE FUNCTION next_one() RETURNS bigint LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN nextval('counter'); END $$;
    CREATE FUNCTION row_lock() RETURNS int LANGUAGE plpgsql STABLE
        AS $$ BEGIN PERFORM 1 FROM plain FOR SHARE; RETURN 1; END $$;
    CREATE FUNCTION by_default_volatile() RETURNS boolean LANGUAGE sql AS 'SELECT 1; SELECT pg_try_advisory_xact_lock(15)';
    CREATE FUNCTION volatile_swallows() RETURNS text LANGUAGE plpgsql AS $$
        BEGIN PERFORM writes(); RETURN 'written'; EXCEPTION WHEN OTHERS THEN RETURN 'swallowed'; END $$;
    CREATE FUNCTION volatile_dynamic() RETURNS int LANGUAGE plpgsql
        AS $$ DECLARE r int; BEGIN EXECUTE 'SELECT 1' INTO r; RETURN r; END $$;
    CREATE FUNCTION volatile_atomic() RETURNS boolean LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT pg_try_advisory_xact_lock(16); END;
    CREATE FUNCTION atomic_writes() RETURNS int LANGUAGE sql
        BEGIN ATOMIC SELECT 1; INSERT INTO plain VALUES ((SELECT max(id) + 1 FROM plain), NULL) RETURNING id; END;
    CREATE FUNCTION atomic_of_far() RETURNS bigint LANGUAGE sql STABLE BEGIN ATOMIC SELECT count(*) FROM over_far; END;
    CREATE TABLE tenant_of_server (id int);
    ALTER TABLE tenant_of_server ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY guard ON tenant_of_server USING (current_setting('transaction_read_only') = 'off');
    CREATE TABLE tenant_of_column (id int, setting text);
    ALTER TABLE tenant_of_column ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY guard ON tenant_of_column USING (current_setting(setting) = 'off');
    CREATE TABLE ruled (id int);

    CREATE FUNCTION locking_number(int) RETURNS int LANGUAGE plpgsql IMMUTABLE
        AS $$ BEGIN PERFORM pg_try_advisory_xact_lock(11); RETURN $1; END $$;
    CREATE FUNCTION liar_of(plain) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(12)';
    CREATE TABLE indexed (id int);
    CREATE INDEX ON indexed ((locking_number(1)));
    CREATE TABLE half_indexed (id int);
    CREATE INDEX ON half_indexed (id) WHERE id > locking_number(abs(1));
    CREATE TABLE heir_parent (id int);
    CREATE TABLE heir (CHECK (locking_number(1) > 0)) INHERITS (heir_parent);
    CREATE TABLE column_indexed (id int);
    CREATE INDEX ON column_indexed ((locking_number(id)));
";

/// What only a superuser may make.
const BY_SUPERUSER: &str = "
    CREATE FOREIGN DATA WRAPPER nowhere;
    CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere;
    GRANT USAGE ON FOREIGN SERVER nowhere TO app;
    CREATE FUNCTION alias(bigint) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'pg_try_advisory_xact_lock_int8';
";

fn objects() -> String {
    // The aggregate's transition function comes before it.
    OBJECTS.replace(
        "CREATE AGGREGATE",
        "CREATE FUNCTION int4_sum_locked(bigint, int) RETURNS bigint LANGUAGE sql IMMUTABLE
             AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(10) THEN 1 ELSE 2 END::bigint';
         CREATE AGGREGATE",
    )
}

#[tokio::test]
async fn what_the_catalog_hides_starts_on_the_primary() {
    let cluster = Cluster::start_logging(2).await;
    cluster.set_up_as_superuser(BY_SUPERUSER).await;
    cluster.set_up(&objects()).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    // The facts are loaded once a read of plain things reaches a replica.
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;

    let hidden = [
        "SELECT * FROM locking_view",
        "SELECT * FROM view_of_view",
        "SELECT liar()",
        "SELECT atomic()",
        "SELECT swallows()",
        "SELECT writes()",
        "SELECT by_default_volatile()",
        "SELECT volatile_swallows()",
        "SELECT volatile_dynamic()",
        "SELECT volatile_atomic()",
        "SELECT atomic_writes()",
        "SELECT upper(1)",
        "SELECT x FROM plain WHERE liar()",
        "SELECT plain.attribute FROM plain",
        "SELECT plain.liar_of FROM plain",
        "SELECT * FROM guarded",
        "SELECT 1::checked",
        "SELECT CAST(1 AS checked)",
        "SELECT * FROM with_domain",
        "SELECT json_populate_record(NULL::with_domain, '{\"d\": 1}')",
        "SELECT c IN (ROW(1, 'a')::composite) FROM composites",
        "SELECT nullif(c, c) FROM composites",
        "SELECT * FROM composites JOIN composites AS other USING (c)",
        "SELECT abs(e) FROM cast_moods",
        "SELECT e > 1 FROM cast_moods",
        "SELECT locking_sum(id) FROM plain",
        "SELECT locking_sum(id) OVER () FROM plain",
        "SELECT last_value FROM counter",
        "SELECT * FROM pg_sequences",
        "SELECT count(*) FROM unlogged",
        "SELECT * FROM parent",
        "SELECT * FROM far_parent",
        "SELECT * FROM over_far",
        "SELECT #! 14::bigint",
        "SELECT alias(15)",
        "SELECT by_default()",
        "SELECT dynamic()",
        "SELECT calls_liar()",
        "SELECT in_view()",
        "SELECT of_domain(NULL)",
        "SELECT configured()",
        "SELECT next_one()",
        "SELECT row_lock()",
        "SELECT atomic_of_far()",
        "SELECT * FROM tenant_of_server",
        "SELECT * FROM tenant_of_column",
        "SELECT * FROM indexed",
        "SELECT * FROM half_indexed",
        "SELECT * FROM heir_parent WHERE id > 1",
        "WITH a AS (SELECT 1) (SELECT 1) ORDER BY 1, query_to_xml('SELECT liar()', true, true, '')",
        "SELECT U&\"li\\0061r\"()",
        "SELECT 1 --\r, liar()",
        "SELECT \"liar\"()",
        "SELECT LIAR()",
        "SELECT public . liar ( )",
        "SELECT pg_relation_size('unlogged')",
        "SELECT query_to_xml('SELECT liar()', true, true, '')",
        "SELECT table_to_xml('locking_view', true, true, '')",
        "SELECT current_query()",
        "SELECT * FROM pg_settings",
        "SELECT ts_stat('SELECT to_tsvector(x) FROM plain')",
    ];
    for (number, statement) in hidden.iter().enumerate() {
        let marked = format!("/* hidden{number}. */ {statement}");
        // Twice: once unknown, once out of the cache. An error would be the same on one server.
        let _ = client.simple_query(&marked).await;
        let _ = client.simple_query(&marked).await;
        let ran = cluster.ran(&format!("hidden{number}."));
        assert!(ran[0] == 2 && ran[1] + ran[2] == 0, "{statement}: {ran:?}");
    }

    // Beside them, what is plain still goes to replicas.
    let plain = [
        "SELECT x FROM plain WHERE id = 1",
        "SELECT * FROM plain_view",
        "SELECT * FROM moods WHERE m = 'happy'",
        "SELECT * FROM material",
        "SELECT id, lower(x), count(*) OVER () FROM plain WHERE x LIKE 'o%' ORDER BY id LIMIT 5",
        "SELECT count(*) FROM pg_class",
        "SELECT * FROM column_indexed WHERE id = 1",
    ];
    for (number, statement) in plain.iter().enumerate() {
        for _ in 0..10 {
            client.simple_query(&format!("/* plain{number}. */ {statement}")).await.unwrap();
        }
        let ran = cluster.ran(&format!("plain{number}."));
        assert!(ran[1] + ran[2] >= 8, "{statement}: {ran:?}");
    }
}

/// What is a user's own and still nothing but a read.
const HARMLESS: &str = "
    CREATE TABLE plain (id int PRIMARY KEY, x text, tenant text DEFAULT 'a');
    INSERT INTO plain VALUES (1, 'one');
    CREATE FUNCTION in_sql(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT upper($1)';
    CREATE FUNCTION in_plpgsql(a text) RETURNS text LANGUAGE plpgsql STABLE AS $$
        DECLARE r record; n int := 0;
        BEGIN
            FOR r IN SELECT id FROM plain WHERE x = a LOOP n := n + r.id; END LOOP;
            IF n > 1 THEN RETURN in_sql(a); ELSE RETURN CASE WHEN n = 1 THEN a ELSE 'none' END; END IF;
        END $$;
    CREATE FUNCTION atomic(int) RETURNS int LANGUAGE sql STABLE BEGIN ATOMIC SELECT $1 + 1; END;
    CREATE FUNCTION volatile_in_sql(text) RETURNS text LANGUAGE sql AS 'SELECT 1; SELECT upper($1)';
    CREATE FUNCTION volatile_in_plpgsql(a text) RETURNS text LANGUAGE plpgsql AS $$
        DECLARE n int;
        BEGIN SELECT count(*) INTO n FROM plain WHERE x = a; RETURN volatile_in_sql(a) || n || random(); END $$;
    CREATE FUNCTION volatile_atomic(int) RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT $1 + 1; END;
    CREATE FUNCTION two(a int, b int DEFAULT abs(-1)) RETURNS int LANGUAGE sql STABLE AS 'SELECT a + b';
    CREATE FUNCTION add(bigint, int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1 + $2';
    CREATE AGGREGATE total (int) (SFUNC = add, STYPE = bigint, INITCOND = '0');
    CREATE VIEW over_functions AS SELECT in_sql(x) AS y FROM plain;

    CREATE TABLE tenants (id int, tenant text);
    INSERT INTO tenants VALUES (1, 'a');
    ALTER TABLE tenants ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON tenants USING (tenant = coalesce(current_setting('app.tenant', true), 'a') OR current_user = 'nobody');
    GRANT ALL ON tenants TO public;

    CREATE DOMAIN positive AS int CHECK (VALUE > 0 AND length(VALUE::text) < 5);
    CREATE TABLE with_domain (d positive);
    CREATE TYPE pair AS (n int, t text);
    CREATE FUNCTION pair_equal(pair, pair) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1.n = $2.n';
    CREATE OPERATOR === (LEFTARG = pair, RIGHTARG = pair, FUNCTION = pair_equal);
    CREATE TABLE pairs (p pair);
    CREATE FUNCTION as_pair(int) RETURNS pair LANGUAGE sql IMMUTABLE AS $$ SELECT ROW($1, 'x')::pair $$;
    CREATE CAST (int AS pair) WITH FUNCTION as_pair(int) AS IMPLICIT;
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TYPE mood_range AS RANGE (SUBTYPE = mood);
    CREATE TABLE moods (m mood, r mood_range);
    CREATE TABLE ruled (id int);
    CREATE RULE log AS ON INSERT TO ruled DO ALSO SELECT 1;
    CREATE INDEX ON plain (in_sql(x));
";

#[tokio::test]
async fn a_users_own_functions_types_and_policies_that_only_read_run_on_replicas() {
    let cluster = Cluster::start_logging(2).await;
    cluster.set_up(HARMLESS).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
    let harmless = [
        "SELECT in_sql(x) FROM plain",
        "SELECT in_plpgsql('one')",
        "SELECT atomic(1), two(1)",
        "SELECT volatile_in_sql(x), volatile_in_plpgsql(x), volatile_atomic(id) FROM plain",
        "SELECT total(id) FROM plain",
        "SELECT * FROM over_functions",
        "SELECT * FROM tenants",
        "SELECT d::positive + 1 FROM with_domain",
        "SELECT p === p FROM pairs",
        "SELECT 1 + 1, 'a' = 'b' FROM pairs WHERE p = ROW(1, 'x')::pair",
        "SELECT * FROM moods WHERE m > 'sad' AND NOT isempty(r)",
        "SELECT mood_range('sad', 'happy')",
        "SELECT * FROM ruled",
    ];
    for (number, statement) in harmless.iter().enumerate() {
        for _ in 0..10 {
            client.simple_query(&format!("/* harmless{number}. */ {statement}")).await.unwrap();
        }
        let ran = cluster.ran(&format!("harmless{number}."));
        assert!(ran[1] + ran[2] >= 8, "{statement}: {ran:?}");
    }
    // What one of them is made of changes, and with it all that rests on it.
    client
        .batch_execute(
            "CREATE OR REPLACE FUNCTION in_sql(text) RETURNS text LANGUAGE sql IMMUTABLE
                AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN $1 END'",
        )
        .await
        .unwrap();
    for (number, statement) in
        ["SELECT in_sql('a')", "SELECT in_plpgsql('one')", "SELECT * FROM over_functions"].iter().enumerate()
    {
        client.simple_query(&format!("/* spoilt{number}. */ {statement}")).await.unwrap();
        let ran = cluster.ran(&format!("spoilt{number}."));
        assert_eq!(ran, [1, 0, 0], "{statement}");
    }
}

#[tokio::test]
async fn the_operator_may_know_better_and_a_comment_may_ask_for_the_primary() {
    let cluster = Cluster::start_logging(1).await;
    cluster
        .set_up(
            "CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a');
             CREATE FUNCTION dynamic() RETURNS int LANGUAGE plpgsql
                 AS $$ DECLARE r int; BEGIN EXECUTE 'SELECT 1' INTO r; RETURN r; END $$;
             CREATE FUNCTION slow() RETURNS int LANGUAGE sql STABLE AS 'SELECT 1'",
        )
        .await;
    let overrides = "routing: { functions: { safe: [public.dynamic], primary: [slow, initcap] } }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
    for (marker, statement, ran) in [
        ("safe.", "/* safe. */ SELECT dynamic()", [0, 1]),
        ("listed.", "/* listed. */ SELECT slow()", [1, 0]),
        ("built_in.", "/* built_in. */ SELECT initcap('a')", [1, 0]),
        ("hinted.", "SELECT x AS \"hinted.\" FROM plain /* highwater.route=primary */", [1, 0]),
    ] {
        client.simple_query(statement).await.unwrap();
        assert_eq!(cluster.ran(marker), ran, "{statement}");
    }
    // No comment makes a read of a write: it runs, on the primary.
    client
        .simple_query("INSERT INTO plain VALUES (2, 'written') /* highwater.route=replica */")
        .await
        .unwrap();
    assert_eq!(cluster.ran("written"), [1, 0]);
}

/// Operators that PostgreSQL chooses for constants and rows of built-in types although an operand is a user's
/// type: nothing in the text shows them but the token.
#[tokio::test]
async fn an_unsafe_operator_that_constants_reach_makes_its_token_unsafe() {
    let cluster = Cluster::start_logging(1).await;
    cluster
        .set_up(
            "CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a');
             CREATE TYPE ct AS (n int, t text);
             CREATE FUNCTION rows(ct, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(1)';
             CREATE OPERATOR ~~ (LEFTARG = ct, RIGHTARG = text, FUNCTION = rows);
             CREATE TYPE en AS ENUM ('a', 'b');
             CREATE FUNCTION question(en, int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(2)';
             CREATE OPERATOR ? (LEFTARG = en, RIGHTARG = int, FUNCTION = question);
             CREATE DOMAIN number AS int;
             CREATE FUNCTION far(number, number) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(3)';
             CREATE OPERATOR || (LEFTARG = number, RIGHTARG = number, FUNCTION = far);
             CREATE TYPE own AS (n int);
             CREATE FUNCTION same(own, own) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(4)';
             CREATE OPERATOR = (LEFTARG = own, RIGHTARG = own, FUNCTION = same)",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain WHERE id = 1 AND x = 'a'").await;
    for (number, statement) in [
        "SELECT ROW(1, 'a') ~~ 'x'::text",
        "SELECT ROW(1, 'a') LIKE 'x'::text",
        "SELECT s LIKE 'x'::text FROM (SELECT 1, 'a'::text) s",
        "SELECT 'a' ? 5",
        "SELECT 1 || 2",
    ]
    .iter()
    .enumerate()
    {
        let _ = client.simple_query(&format!("/* token{number}. */ {statement}")).await;
        assert_eq!(cluster.ran(&format!("token{number}.")), [1, 0], "{statement}");
    }
}

/// Casts and operator classes of built-in types run without a name or a token.
#[tokio::test]
async fn what_any_statement_can_reach_sends_all_to_the_primary() {
    for (objects, hidden) in [
        (
            "CREATE FUNCTION to_point(text) RETURNS point LANGUAGE sql IMMUTABLE
                 AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN point(1, 1) END';
             CREATE CAST (text AS point) WITH FUNCTION to_point(text) AS IMPLICIT",
            "SELECT circle(x, 1.0) AS hidden FROM plain",
        ),
        (
            "CREATE FUNCTION compare(json, json) RETURNS int LANGUAGE sql IMMUTABLE
                 AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN 0 ELSE 1 END';
             CREATE FUNCTION lt(json, json) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
             CREATE OPERATOR #< (LEFTARG = json, RIGHTARG = json, FUNCTION = lt);
             CREATE OPERATOR #= (LEFTARG = json, RIGHTARG = json, FUNCTION = lt);
             CREATE OPERATOR CLASS json_order DEFAULT FOR TYPE json USING btree AS
                 OPERATOR 1 #<, OPERATOR 3 #=, FUNCTION 1 compare(json, json)",
            "SELECT j AS hidden FROM (VALUES ('1'::json), ('2'::json)) v (j) ORDER BY j",
        ),
    ] {
        let cluster = Cluster::start_logging(1).await;
        cluster.set_up("CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a')").await;
        let proxy = Proxy::start(&cluster).await;
        let client = proxy.connect().await;
        reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
        // Past the proxy, as these take a superuser; so it is noticed within moments.
        cluster.set_up_as_superuser(objects).await;
        eventually("the objects are known", || async {
            let before = cluster.ran("noticed");
            client.simple_query("SELECT x AS noticed FROM plain").await.unwrap();
            cluster.ran("noticed")[0] > before[0]
        })
        .await;
        let before = cluster.ran("hidden");
        for _ in 0..3 {
            client.simple_query(hidden).await.unwrap();
        }
        assert_eq!(cluster.ran("hidden"), [before[0] + 3, before[1]], "{hidden}");
    }
}

/// Debian's postgresql-15 brings these.
const EXTENSIONS: &[&str] = &[
    "hstore",
    "citext",
    "pg_trgm",
    "ltree",
    "intarray",
    "btree_gist",
    "btree_gin",
    "pgcrypto",
    "\"uuid-ossp\"",
    "unaccent",
    "cube",
    "earthdistance",
    "tablefunc",
    "dblink",
    "postgres_fdw",
    "file_fdw",
    "fuzzystrmatch",
    "isn",
    "seg",
    "tsm_system_rows",
];

#[tokio::test]
async fn a_database_full_of_extensions_keeps_its_offload() {
    let cluster = Cluster::start_logging(2).await;
    for extension in EXTENSIONS {
        cluster.set_up_as_superuser(&format!("CREATE EXTENSION {extension}")).await;
    }
    cluster
        .set_up(
            "CREATE TABLE plain (id int PRIMARY KEY, x text, c citext, h hstore, p ltree, a int[]);
             INSERT INTO plain VALUES (1, 'one', 'One', 'a=>1', 'a.b', '{1,2}');
             CREATE INDEX ON plain USING gist (id, x); CREATE INDEX ON plain USING gin (x gin_trgm_ops)",
        )
        .await;
    cluster
        .set_up_as_superuser(
            "CREATE FUNCTION hstore_lie(cstring) RETURNS hstore LANGUAGE c IMMUTABLE AS '$libdir/hstore', 'hstore_in'",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
    let harmless = [
        "SELECT id + 1, x LIKE 'o%', x = 'a', id BETWEEN 1 AND 2 FROM plain WHERE id IN (1, 2)",
        "SELECT h -> 'a', h ? 'a', h @> 'a=>1' FROM plain",
        "SELECT c = 'ONE', c LIKE 'o%', lower(c) FROM plain",
        "SELECT similarity(x, 'on'), x % 'on' FROM plain ORDER BY x <-> 'on'",
        "SELECT p <@ 'a', nlevel(p) FROM plain",
        "SELECT a && '{1}', sort(a) FROM plain",
        "SELECT digest(x, 'sha256'), encode(hmac(x, 'k', 'md5'), 'hex'), gen_random_uuid() FROM plain",
        "SELECT uuid_generate_v4(), unaccent(x) FROM plain",
        "SELECT cube(1, 2), earth_distance(ll_to_earth(1, 1), ll_to_earth(2, 2))",
        "SELECT levenshtein(x, 'on') FROM plain",
        "SELECT count(*) FROM plain TABLESAMPLE system_rows(10)",
        "SELECT count(*) FROM normal_rand(10, 1, 1)",
    ];
    for (number, statement) in harmless.iter().enumerate() {
        for _ in 0..10 {
            client.simple_query(&format!("/* extension{number}. */ {statement}")).await.unwrap();
        }
        let ran = cluster.ran(&format!("extension{number}."));
        assert!(ran[1] + ran[2] >= 8, "{statement}: {ran:?}");
    }
    let dangerous = [
        "SELECT * FROM dblink('dbname=nowhere', 'SELECT 1') AS t (a int)",
        "SELECT dblink_exec('dbname=nowhere', 'SELECT 1')",
        "SELECT * FROM crosstab('SELECT ''a''::text, ''b''::text, pg_try_advisory_xact_lock(1)::int') AS t (a text, b int)",
        "SELECT * FROM connectby('plain', 'id', 'id', '1', 0) AS t (a int, b int, c int)",
        "SELECT set_limit(0.5)",
        "SELECT postgres_fdw_disconnect_all()",
        "SELECT isn_weak(true)",
        "SELECT hstore_lie('a=>1'::cstring)",
    ];
    for (number, statement) in dangerous.iter().enumerate() {
        let _ = client.simple_query(&format!("/* dangerous{number}. */ {statement}")).await;
        let ran = cluster.ran(&format!("dangerous{number}."));
        assert_eq!(ran, [1, 0, 0], "{statement}");
    }
}

#[tokio::test]
async fn a_parameters_type_can_hide_a_function_too() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up_as_superuser(BY_SUPERUSER).await;
    cluster.set_up(&objects()).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM plain").await;
    let oid: u32 = client.query_one("SELECT 'composite'::regtype::oid", &[]).await.unwrap().get(0);
    let mut raw = proxy.raw_login().await;
    let mut body = b"\0SELECT $1 = $2 /* typed. */\0\0\x02".to_vec();
    body.extend_from_slice(&oid.to_be_bytes());
    body.extend_from_slice(&oid.to_be_bytes());
    let bytes = [message(b'P', &body), bind("", &["(1,a)", "(1,a)"]), execute(), sync()].concat();
    let answer = raw.ask(&bytes).await;
    assert_eq!(tags(&answer), "12DCZ", "{answer:?}");
    assert_eq!(cluster.ran("typed."), [1, 0]);
}

#[tokio::test]
async fn what_becomes_dangerous_later_is_noticed_however_it_was_made() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'a')").await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT lower(x) AS loaded FROM plain").await;

    // Through the proxy: from the very next statement on.
    client
        .batch_execute(
            "CREATE FUNCTION lower(int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(1)'",
        )
        .await
        .unwrap();
    client.simple_query("SELECT lower(x), lower(id) AS shadowed FROM plain").await.unwrap();
    assert_eq!(cluster.ran("shadowed"), [1, 0]);

    // Inside a transaction: from its commit on, in other sessions too; never in between.
    client.batch_execute("DROP FUNCTION lower(int)").await.unwrap();
    eventually("lower is safe again", || async {
        client.simple_query("SELECT lower(x) AS again FROM plain").await.unwrap();
        cluster.ran("again")[1] > 0
    })
    .await;
    let other = proxy.connect().await;
    client
        .batch_execute(
            "BEGIN; CREATE FUNCTION lower(int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(1)'; COMMIT",
        )
        .await
        .unwrap();
    other.simple_query("SELECT lower(x), lower(id) AS committed FROM plain").await.unwrap();
    assert_eq!(cluster.ran("committed"), [1, 0]);
    client.batch_execute("BEGIN").await.unwrap();
    client.batch_execute("DROP FUNCTION lower(int)").await.unwrap();
    client
        .batch_execute("CREATE FUNCTION upper(int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(1)'")
        .await
        .unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    other.simple_query("SELECT upper(x), upper(id) AS by_steps FROM plain").await.unwrap();
    assert_eq!(cluster.ran("by_steps"), [1, 0]);

    // Past the proxy: within moments.
    cluster.set_up("CREATE VIEW later AS SELECT 1 AS one").await;
    eventually("the view is read on the replica", || async {
        let _ = client.simple_query("SELECT one AS seen FROM later").await;
        cluster.ran("seen")[1] > 0
    })
    .await;
    cluster
        .set_up(
            "CREATE OR REPLACE VIEW later AS SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN 1 END AS one",
        )
        .await;
    let replaced = std::time::Instant::now();
    eventually("the view has become unsafe", || async {
        let before = cluster.ran("changed");
        client.simple_query("SELECT one AS changed FROM later").await.unwrap();
        let after = cluster.ran("changed");
        after[0] > before[0]
    })
    .await;
    // A second for the counts to arrive, one to look at them, and what eight test clusters at once take.
    assert!(replaced.elapsed() < std::time::Duration::from_secs(5), "{:?}", replaced.elapsed());
    let before = cluster.ran("changed");
    for _ in 0..5 {
        client.simple_query("SELECT one AS changed FROM later").await.unwrap();
    }
    assert_eq!(cluster.ran("changed"), [before[0] + 5, before[1]]);
}

#[tokio::test]
async fn lastval_never_shows_what_another_session_has_drawn() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (id serial)").await;
    let options = ProxyOptions { overrides: "pool: { size: 1 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let insert = query("INSERT INTO t DEFAULT VALUES");
    for (ask, extended) in
        [("SELECT lastval()", false), ("SELECT currval('t_id_seq')", false), ("SELECT lastval()", true)]
    {
        let mut one = proxy.raw_login().await;
        let mut other = proxy.raw_login().await;
        for _ in 0..3 {
            assert_eq!(tags(&one.ask(&insert).await), "CZ");
            assert_eq!(tags(&other.ask(&insert).await), "CZ");
        }
        // The only backend is the one on which the other has drawn after it.
        let bound = [parse("", ask), bind("", &[]), execute(), sync()].concat();
        let refused = one.ask(&if extended { bound } else { query(ask) }).await;
        assert_eq!(tags(&refused), if extended { "12EZ" } else { "TEZ" }, "{ask}");
        assert_eq!(refused[refused.len() - 2].field(b'C').as_deref(), Some("55000"), "{ask}");
        // From now on the backend is its own.
        one.ask(&insert).await;
        let drawn = cluster.primary().query_text("SELECT max(id) FROM t").await.unwrap();
        assert_eq!(one.ask(&query(ask)).await[1].columns(), [Some(drawn)], "{ask}");
    }
    // Nobody in between: right at once.
    let mut one = proxy.raw_login().await;
    one.ask(&insert).await;
    let drawn = cluster.primary().query_text("SELECT max(id) FROM t").await.unwrap();
    assert_eq!(one.ask(&query("SELECT lastval()")).await[1].columns(), [Some(drawn)]);
}

#[tokio::test]
async fn inside_a_transaction_and_beside_other_state_lastval_shows_nothing_of_others() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (id serial); CREATE TABLE u (x int)").await;
    let options = ProxyOptions { overrides: "pool: { size: 1 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let insert = query("INSERT INTO t DEFAULT VALUES");
    let bound = |sql: &str| [parse("", sql), bind("", &[]), execute(), sync()].concat();
    let units: [(&str, Vec<Vec<u8>>); 6] = [
        ("beside another", vec![query("SELECT pg_backend_pid(), lastval()")]),
        ("beside a seed", vec![query("SELECT setseed(0.1), lastval()")]),
        ("inside", vec![query("BEGIN"), query("SELECT lastval()")]),
        (
            "inside, behind a read",
            vec![query("BEGIN"), query("SELECT 1"), query("SELECT currval('t_id_seq')")],
        ),
        ("inside, bound", vec![bound("BEGIN"), bound("SELECT lastval()")]),
        // From here on it is known that somebody asks.
        (
            "inside, behind a write",
            vec![query("BEGIN"), query("INSERT INTO u VALUES (1)"), query("SELECT lastval()")],
        ),
    ];
    for (what, units) in units {
        let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
        assert_eq!(tags(&one.ask(&insert).await), "CZ");
        assert_eq!(tags(&other.ask(&insert).await), "CZ");
        let mut last = Vec::new();
        for unit in units {
            last = one.ask(&unit).await;
        }
        let error = last.iter().find(|message| message.tag == b'E');
        let error = error.unwrap_or_else(|| panic!("{what}: {last:?}"));
        assert_eq!(error.field(b'C').as_deref(), Some("55000"), "{what}");
        one.try_send(&message(b'X', b"")).await.unwrap();
        one.read_to_end().await;
    }
    // What a transaction has drawn itself it is shown.
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    other.ask(&insert).await;
    for unit in [query("BEGIN"), insert.clone()] {
        one.ask(&unit).await;
    }
    let own = one.ask(&query("SELECT lastval() = max(id) FROM t")).await;
    assert_eq!(own[1].columns(), [Some("t".to_owned())]);
}

#[tokio::test]
async fn a_text_search_template_of_unknown_code_keeps_what_parses_texts_on_the_primary() {
    let cluster = Cluster::start_logging(1).await;
    if !are_installed(&cluster, &["dict_int"]).await {
        return;
    }
    cluster
        .set_up(
            "CREATE TABLE plain (id int, x text); INSERT INTO plain VALUES (1, 'one');
             CREATE VIEW parsed AS SELECT id, to_tsvector('simple', x) AS words FROM plain",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let texts = [
        "SELECT to_tsvector('simple', x) FROM plain",
        "SELECT id FROM plain WHERE x @@ 'one'",
        "SELECT plainto_tsquery('one')",
        "SELECT * FROM parsed",
    ];
    let where_they_run = async |mark: &str| {
        for (number, text) in texts.iter().enumerate() {
            client.simple_query(&format!("/* {mark}{number}. */ {text}")).await.unwrap();
        }
        (0..texts.len()).map(|number| cluster.ran(&format!("{mark}{number}."))).collect::<Vec<_>>()
    };
    let known = async |mark: &str| {
        eventually("plain reads reach a replica", || async {
            client.simple_query(&format!("SELECT x AS {mark}loaded FROM plain")).await.unwrap();
            cluster.ran(&format!("{mark}loaded"))[1] > 0
        })
        .await;
    };
    known("first").await;
    assert_eq!(where_they_run("before").await, [[0, 1]; 4]);
    let template =
        "CREATE FUNCTION begins(internal) RETURNS internal LANGUAGE c AS '$libdir/dict_int', 'dintdict_init';
        CREATE FUNCTION lexizes(internal, internal, internal, internal) RETURNS internal LANGUAGE c
            AS '$libdir/dict_int', 'dintdict_lexize';
        CREATE TEXT SEARCH TEMPLATE mine (INIT = begins, LEXIZE = lexizes)";
    // Past the proxy, which notices within about a second.
    cluster.set_up_as_superuser(template).await;
    let stays = std::cell::Cell::new(0);
    eventually("it is noticed", || async {
        stays.set(stays.get() + 1);
        where_they_run(&format!("while{}_", stays.get())).await == [[1, 0]; 4]
    })
    .await;
    known("second").await;
    assert_eq!(where_they_run("there").await, [[1, 0]; 4]);
    cluster.set_up_as_superuser("DROP TEXT SEARCH TEMPLATE mine").await;
    eventually("that it is gone is noticed", || async {
        stays.set(stays.get() + 1);
        where_they_run(&format!("after{}_", stays.get())).await == [[0, 1]; 4]
    })
    .await;
}
