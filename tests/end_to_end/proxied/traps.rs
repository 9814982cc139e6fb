//! What no parser of a statement's text can see: objects of the catalog through which a harmless
//! looking SELECT takes a lock, writes, or answers differently on a standby. A standby refuses none of
//! these by itself, so each must start on the primary.

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
    CREATE FUNCTION like_it(composite, text) RETURNS boolean LANGUAGE sql IMMUTABLE
        AS 'SELECT pg_try_advisory_xact_lock(8)';
    CREATE OPERATOR ~~ (LEFTARG = composite, RIGHTARG = text, FUNCTION = like_it);
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
    cluster.set_up("SET check_function_bodies = off").await;
    cluster.set_up(&objects()).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    // The facts are loaded once a read of plain things reaches a replica.
    eventually("plain reads reach a replica", || async {
        client.simple_query("SELECT x AS loaded FROM plain").await.unwrap();
        let ran = cluster.ran("loaded");
        ran[1] + ran[2] > 0
    })
    .await;

    let hidden = [
        "SELECT * FROM locking_view",
        "SELECT * FROM view_of_view",
        "SELECT liar()",
        "SELECT atomic()",
        "SELECT swallows()",
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
        "SELECT c LIKE 'x' FROM composites",
        "SELECT abs(e) FROM cast_moods",
        "SELECT e > 1 FROM cast_moods",
        "SELECT locking_sum(id) FROM plain",
        "SELECT locking_sum(id) OVER () FROM plain",
        "SELECT last_value FROM counter",
        "SELECT * FROM pg_sequences",
        "SELECT count(*) FROM unlogged",
        "SELECT * FROM parent",
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

#[tokio::test]
async fn a_parameters_type_can_hide_a_function_too() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("SET check_function_bodies = off").await;
    cluster.set_up(&objects()).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    eventually("plain reads reach the replica", || async {
        client.simple_query("SELECT x AS loaded FROM plain").await.unwrap();
        cluster.ran("loaded")[1] > 0
    })
    .await;
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
    eventually("plain reads reach the replica", || async {
        client.simple_query("SELECT lower(x) AS loaded FROM plain").await.unwrap();
        cluster.ran("loaded")[1] > 0
    })
    .await;

    // Through the proxy: from the very next statement on.
    client
        .batch_execute(
            "CREATE FUNCTION lower(int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_try_advisory_xact_lock(1)'",
        )
        .await
        .unwrap();
    client.simple_query("SELECT lower(x), lower(id) AS shadowed FROM plain").await.unwrap();
    assert_eq!(cluster.ran("shadowed"), [1, 0]);

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
    eventually("the view has become unsafe", || async {
        let before = cluster.ran("changed");
        client.simple_query("SELECT one AS changed FROM later").await.unwrap();
        let after = cluster.ran("changed");
        after[0] > before[0]
    })
    .await;
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
    for ask in ["SELECT lastval()", "SELECT currval('t_id_seq')"] {
        let mut one = proxy.raw_login().await;
        let mut other = proxy.raw_login().await;
        for _ in 0..3 {
            assert_eq!(tags(&one.ask(&insert).await), "CZ");
            assert_eq!(tags(&other.ask(&insert).await), "CZ");
        }
        // The only backend is the one on which the other has drawn after it.
        let refused = one.ask(&query(ask)).await;
        assert_eq!(tags(&refused), "TEZ", "{ask}");
        assert_eq!(refused[1].field(b'C').as_deref(), Some("55000"), "{ask}");
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
