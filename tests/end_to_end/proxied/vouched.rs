//! What the operator says of extensions that Highwater does not know: `routing.functions.extensions`.

use super::operator::with_config;
use crate::allow_lists::are_installed;
use crate::fixture::*;

/// An extension of nobody's: compiled functions and operators of ours are members of one that is not known (it has only
/// triggers of its own). Of the operators one has a token like no other, one is what everybody compares with.
const EXTENSION: &str = "CREATE EXTENSION refint;
    CREATE FUNCTION sounds(text) RETURNS text AS '$libdir/fuzzystrmatch', 'soundex' LANGUAGE c IMMUTABLE STRICT;
    CREATE FUNCTION sounds_by_default(text) RETURNS text AS '$libdir/fuzzystrmatch', 'soundex' LANGUAGE c STRICT;
    CREATE FUNCTION shortened(text, int) RETURNS text AS '$libdir/fuzzystrmatch', 'metaphone' LANGUAGE c STABLE STRICT;
    CREATE OPERATOR ### (LEFTARG = text, RIGHTARG = int, FUNCTION = shortened);
    CREATE OPERATOR = (LEFTARG = text, RIGHTARG = int, FUNCTION = shortened);
    ALTER EXTENSION refint ADD FUNCTION sounds(text);
    ALTER EXTENSION refint ADD FUNCTION sounds_by_default(text);
    ALTER EXTENSION refint ADD FUNCTION shortened(text, int);
    ALTER EXTENSION refint ADD OPERATOR ### (text, int);
    ALTER EXTENSION refint ADD OPERATOR = (text, int)";

/// What is kept back until it is vouched for; each with a place for a mark that shows where it ran.
const READS: &[&str] = &[
    "SELECT sounds('Highwater') AS by_function_{}",
    "SELECT 'Highwater' ### 4 AS by_operator_{}",
    "SELECT x AS by_equality_{} FROM t WHERE x = 1",
    "SELECT x AS by_word_{} FROM t WHERE x IN (1, 2)",
];

/// What is not, and what is whatever is said.
const PLAIN: &str = "SELECT x AS plain_{} FROM t";
const VOLATILE: &str = "SELECT sounds_by_default('Highwater') AS by_default_{}";

fn marked(text: &str, mark: &str) -> (String, String) {
    let text = text.replace("{}", mark);
    let word = text.split(' ').find(|word| word.ends_with(mark)).unwrap().to_owned();
    (text, word)
}

/// Runs it; on how many replicas it has run so far under this mark.
async fn runs_on_replica(
    cluster: &Cluster,
    client: &tokio_postgres::Client,
    text: &str,
    mark: &str,
) -> usize {
    let (text, word) = marked(text, mark);
    client.simple_query(&text).await.unwrap();
    cluster.ran(&word)[1..].iter().sum()
}

async fn none_runs_on_a_replica(
    cluster: &Cluster,
    client: &tokio_postgres::Client,
    reads: &[&str],
    mark: &str,
) {
    for text in reads {
        for _ in 0..3 {
            assert_eq!(runs_on_replica(cluster, client, text, mark).await, 0, "{text}");
        }
    }
}

/// From then on the proxy knows the facts again.
async fn a_plain_read_reaches_a_replica(cluster: &Cluster, client: &tokio_postgres::Client, mark: &str) {
    eventually("plain reads reach a replica", || async {
        runs_on_replica(cluster, client, PLAIN, mark).await > 0
    })
    .await;
}

#[tokio::test]
async fn an_unknown_extensions_functions_and_operators_read_on_replicas_only_while_it_is_vouched_for() {
    let cluster = Cluster::start_logging(1).await;
    if !are_installed(&cluster, &["refint", "fuzzystrmatch"]).await {
        return;
    }
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    cluster.set_up_as_superuser(EXTENSION).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let all: Vec<&str> = READS.iter().copied().chain([VOLATILE]).collect();
    a_plain_read_reaches_a_replica(&cluster, &client, "unknown").await;
    none_runs_on_a_replica(&cluster, &client, &all, "unknown").await;

    // Another extension's name says nothing of this one.
    proxy.configure(&cluster, "routing: { functions: { extensions: [ fuzzystrmatch, refin ] } }");
    assert!(proxy.reload().await);
    a_plain_read_reaches_a_replica(&cluster, &client, "another").await;
    none_runs_on_a_replica(&cluster, &client, &all, "another").await;

    proxy.configure(&cluster, "routing: { functions: { extensions: [ refint ] } }");
    assert!(proxy.reload().await);
    for text in READS {
        eventually("it reaches a replica", || async {
            runs_on_replica(&cluster, &client, text, "vouched").await > 0
        })
        .await;
    }
    none_runs_on_a_replica(&cluster, &client, &[VOLATILE], "vouched").await;
    let said =
        proxy.connect().await.simple_query("SELECT sounds('Highwater'), 'Highwater' ### 4").await.unwrap();
    let values = said.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => {
            Some((row.get(0).unwrap().to_owned(), row.get(1).unwrap().to_owned()))
        }
        _ => None,
    });
    assert_eq!(values, Some(("H236".to_owned(), "HFWT".to_owned())));

    // What was said before does not outlive the file.
    proxy.configure(&cluster, "");
    assert!(proxy.reload().await);
    none_runs_on_a_replica(&cluster, &client, &all, "withdrawn").await;
    a_plain_read_reaches_a_replica(&cluster, &client, "withdrawn").await;
    none_runs_on_a_replica(&cluster, &client, &all, "withdrawn").await;
}

#[tokio::test]
async fn check_names_the_extension_that_keeps_reads_back_and_the_key_that_lets_them_be() {
    let cluster = Cluster::start(1).await;
    if !are_installed(&cluster, &["refint", "fuzzystrmatch"]).await {
        return;
    }
    let proxy = Proxy::start(&cluster).await;
    let config = || std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config());
    assert_eq!(code, Some(0), "{said}");
    cluster.set_up_as_superuser(EXTENSION).await;
    let (code, said) = with_config("check", &config());
    let expected = "database app: reads with = run on the primary, as that may run code that is not known of the extension \
        refint; if what it declares IMMUTABLE or STABLE only reads, list it under routing.functions.extensions\n";
    assert!(code == Some(1) && said.contains(expected), "{said}");
    proxy.configure(&cluster, "routing: { functions: { extensions: [ refint ] } }");
    let (code, said) = with_config("check", &config());
    assert_eq!(code, Some(0), "{said}");
    // Of what belongs to no extension the functions are named.
    cluster.set_up_as_superuser("DROP EXTENSION refint CASCADE").await;
    let own = "CREATE FUNCTION less(text, int) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN EXECUTE 'SELECT 1'; RETURN true; END $$;
        CREATE OPERATOR < (LEFTARG = text, RIGHTARG = int, FUNCTION = less)";
    cluster.set_up_as_superuser(own).await;
    let (code, said) = with_config("check", &config());
    let expected = "database app: reads with < run on the primary, as that may run code that is not known of public.less; list \
        under routing.functions.safe those that only read\n";
    assert!(code == Some(1) && said.contains(expected), "{said}");
    proxy.configure(&cluster, "routing: { split: false }");
    let (code, said) = with_config("check", &config());
    assert_eq!(code, Some(0), "nothing is read on replicas anyway: {said}");
}

#[tokio::test]
async fn a_call_that_names_its_schema_is_judged_by_the_functions_of_that_schema() {
    let cluster = Cluster::start_logging(1).await;
    let objects = "SET check_function_bodies = off;
        CREATE TABLE t (x int); INSERT INTO t VALUES (1);
        CREATE SCHEMA good; CREATE SCHEMA bad; CREATE SCHEMA mixed;
        CREATE FUNCTION good.shared(int) RETURNS text LANGUAGE sql AS 'SELECT ''read''';
        CREATE FUNCTION bad.shared(int) RETURNS text LANGUAGE sql
            AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN ''locked'' END';
        CREATE FUNCTION mixed.shared(int) RETURNS text LANGUAGE sql AS 'SELECT ''read''';
        CREATE FUNCTION mixed.shared(text) RETURNS text LANGUAGE sql
            AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN ''locked'' END';
        CREATE FUNCTION good.through(int) RETURNS text LANGUAGE sql AS 'SELECT good.shared($1)';
        CREATE FUNCTION good.by_path(int) RETURNS text LANGUAGE sql AS 'SELECT shared($1)'";
    cluster.set_up(objects).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    a_plain_read_reaches_a_replica(&cluster, &client, "first").await;
    for text in ["SELECT good.shared(x) AS named_{} FROM t", "SELECT good.through(1) AS through_{}"] {
        eventually("it reaches a replica", || async {
            runs_on_replica(&cluster, &client, text, "first").await > 0
        })
        .await;
    }
    let others = [
        "SELECT bad.shared(x) AS bad_{} FROM t",
        "SELECT mixed.shared(x) AS mixed_{} FROM t",
        "SELECT shared(x) AS found_{} FROM t",
        "SELECT good.by_path(1) AS by_path_{}",
        "SELECT good.shared(1), shared(2) AS both_{}",
    ];
    // Whatever the path: the name alone is judged by all.
    for path in ["good, bad", "bad, good", "good"] {
        client.batch_execute(&format!("SET search_path = {path}, public")).await.unwrap();
        none_runs_on_a_replica(&cluster, &client, &others[..2], "second").await;
        none_runs_on_a_replica(&cluster, &client, &others[2..], "second").await;
    }
    // And when another one comes to live there.
    let other = "CREATE FUNCTION good.shared(text) RETURNS text LANGUAGE sql
        AS 'SELECT CASE WHEN pg_try_advisory_xact_lock(1) THEN ''locked'' END'";
    client.batch_execute(other).await.unwrap();
    a_plain_read_reaches_a_replica(&cluster, &client, "third").await;
    let now = ["SELECT good.shared(x) AS named_{} FROM t", "SELECT good.through(1) AS through_{}"];
    none_runs_on_a_replica(&cluster, &client, &now, "third").await;
}
