//! How durable a commit is, as the server sees it: a deferred trigger writes down `synchronous_commit` as it is when the
//! transaction commits.

use crate::fixture::*;

const TABLES: &str = "
    CREATE TABLE seen (x text, as_ text);
    CREATE TABLE payments (x text); CREATE TABLE views (x text); CREATE TABLE plain (x text);
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO seen VALUES (NEW.x, current_setting('synchronous_commit')); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER see AFTER INSERT ON payments DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION see();
    CREATE CONSTRAINT TRIGGER see AFTER INSERT ON views DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION see();
    CREATE CONSTRAINT TRIGGER see AFTER INSERT ON plain DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION see()";

const RULES: &str = "
pool: { size: 1 }
durability:
  rules:
    - { table: views, durability: async }
    - { table: payments, durability: applied }";

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

async fn succeed(client: &mut RawClient, sql: &str) -> Vec<Message> {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
    answer
}

/// Runs these, one after the other, and gives what the last commit was made under.
async fn committed(cluster: &Cluster, client: &mut RawClient, units: &[&str]) -> String {
    cluster.set_up("TRUNCATE seen").await;
    for sql in units {
        succeed(client, sql).await;
    }
    cluster.primary().query_text("SELECT string_agg(DISTINCT as_, ',') FROM seen").await.unwrap()
}

async fn start(overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start(0).await;
    cluster.set_up(TABLES).await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

#[tokio::test]
async fn payments_are_synchronous_and_page_views_asynchronous_on_one_cluster() {
    let (cluster, proxy) = start(RULES).await;
    let mut client = proxy.raw_login().await;
    let view = "INSERT INTO views VALUES (1)";
    let payment = "INSERT INTO public.payments VALUES (1)";
    let plain = "INSERT INTO plain VALUES (1)";
    for (units, expected) in [
        (&[view][..], "local"),
        (&[payment], "remote_apply"),
        (&[plain], "on"),
        (&["BEGIN", view, "COMMIT"], "local"),
        (&["BEGIN", view, payment, view, "COMMIT"], "remote_apply"),
        // What nothing is said about is as the server has it, and that is more.
        (&["BEGIN", view, plain, "COMMIT"], "on"),
        (&["BEGIN", plain, view, "COMMIT"], "on"),
        (&["BEGIN", "SAVEPOINT a", payment, "ROLLBACK TO a", view, "COMMIT"], "remote_apply"),
        // A session's own words.
        (&["SET synchronous_commit TO remote_write", view], "remote_write"),
        (&["RESET synchronous_commit", view], "local"),
        (&["SET highwater.durability TO sync", view, "RESET highwater.durability"], "on"),
        (&["/* highwater.durability=async */ INSERT INTO payments VALUES (1)"], "local"),
    ] {
        assert_eq!(committed(&cluster, &mut client, units).await, expected, "{units:?}");
    }
    // By the extended protocol, prepared and not, and on one backend by turns.
    let extended = |sql: &str| [parse("", sql), bind("", &[]), execute(), sync()].concat();
    client.ask(&[parse("v", view), parse("p", payment), sync()].concat()).await;
    let named = |name: &str| [bind(name, &[]), execute(), sync()].concat();
    for (unit, expected) in [
        (extended(view), "local"),
        (extended(payment), "remote_apply"),
        (named("v"), "local"),
        (named("p"), "remote_apply"),
        (extended(plain), "on"),
        ([bind("v", &[]), execute(), bind("p", &[]), execute(), sync()].concat(), "remote_apply"),
    ] {
        cluster.set_up("TRUNCATE seen").await;
        let answer = client.ask(&unit).await;
        assert!(!tags(&answer).contains('E'), "{answer:?}");
        let seen =
            cluster.primary().query_text("SELECT string_agg(DISTINCT as_, ',') FROM seen").await.unwrap();
        assert_eq!(seen, expected);
    }
    let mut other = proxy.raw_login().await;
    for _ in 0..3 {
        assert_eq!(committed(&cluster, &mut client, &[view]).await, "local");
        assert_eq!(committed(&cluster, &mut other, &[plain]).await, "on");
    }
}

#[tokio::test]
async fn a_session_a_transaction_and_a_statement_may_say_how_durable_they_are() {
    let (cluster, proxy) = start("pool: { size: 1 }").await;
    let mut client = proxy.raw_login().await;
    let plain = "INSERT INTO plain VALUES (1)";
    for (units, expected) in [
        (&[plain][..], "on"),
        (&["SET highwater.durability = 'async'", plain], "local"),
        (&["BEGIN", plain, "COMMIT"], "local"),
        (&["BEGIN", "SET LOCAL highwater.durability = applied", plain, "COMMIT"], "remote_apply"),
        (&[plain], "local"),
        (&["BEGIN", plain, "SET LOCAL highwater.durability TO sync", "COMMIT"], "on"),
        (
            &["BEGIN", "SELECT set_config('highwater.durability', 'applied', true)", plain, "COMMIT"],
            "remote_apply",
        ),
        (&["BEGIN", "SET highwater.durability = sync", plain, "COMMIT"], "on"),
        (&[plain], "on"),
        (&["BEGIN", "SET highwater.durability = async", plain, "ROLLBACK", plain], "on"),
        (
            &[
                "BEGIN",
                "SAVEPOINT a",
                "SET LOCAL highwater.durability = async",
                "ROLLBACK TO a",
                plain,
                "COMMIT",
            ],
            "on",
        ),
        (&["/* highwater.durability=applied */ INSERT INTO plain VALUES (1)"], "remote_apply"),
        (&["BEGIN", "INSERT INTO plain VALUES (1) /* highwater.durability=async */", "COMMIT"], "local"),
        (&["BEGIN", plain, "INSERT INTO plain VALUES (1) /* highwater.durability=async */", "COMMIT"], "on"),
        (&["BEGIN", "INSERT INTO plain VALUES (1) /* highwater.durability=async */", plain, "COMMIT"], "on"),
        (&["RESET highwater.durability", plain], "on"),
        // Beside what else is set, on the one backend there is.
        (&["SET highwater.durability = async", "SET TimeZone TO UTC", plain], "local"),
        (&["RESET ALL", plain], "on"),
    ] {
        assert_eq!(committed(&cluster, &mut client, units).await, expected, "{units:?}");
    }
    let shown = |answer: Vec<Message>| answer[1].columns()[0].clone().unwrap();
    assert_eq!(shown(succeed(&mut client, "SHOW highwater.durability").await), "");
    succeed(&mut client, "SET highwater.durability = Applied").await;
    assert_eq!(shown(succeed(&mut client, "SHOW highwater.durability").await), "applied");
    assert_eq!(shown(succeed(&mut client, "SHOW highwater.durability").await), "applied");
    for wrong in [
        "SET highwater.durability = 'off'",
        "SET LOCAL highwater.durability = 'off'",
        "/* highwater.durability=off */ INSERT INTO plain VALUES (1)",
    ] {
        let answer = client.ask(&query(wrong)).await;
        let error = answer.iter().find(|message| message.tag == b'E').unwrap_or_else(|| panic!("{wrong}"));
        assert_eq!(error.field(b'C').as_deref(), Some("22023"), "{error:?}");
        assert!(error.field(b'H').unwrap().contains("async, sync, applied"), "{error:?}");
    }
    succeed(&mut client, "BEGIN").await;
    let answer = client.ask(&query("SET LOCAL highwater.durability = 'off'")).await;
    assert_eq!((code(&answer).as_deref(), answer.last().unwrap().body[0]), (Some("22023"), b'E'));
    succeed(&mut client, "ROLLBACK").await;
    // At startup.
    let mut said = proxy.raw().await;
    let login = proxy.app();
    let parameters =
        [("user", login.user.as_str()), ("database", "app"), ("options", "-c highwater.durability=async")];
    said.login_with(&parameters, &login.password).await.unwrap();
    assert_eq!(committed(&cluster, &mut said, &[plain]).await, "local");
    assert_eq!(committed(&cluster, &mut said, &["RESET ALL", plain]).await, "local");
}

#[tokio::test]
async fn rules_are_for_users_and_databases_too() {
    let overrides = "durability: { default: applied, rules: [ { user: app, durability: async }, \
        { database: app, durability: sync }, { user: app, table: payments, durability: applied } ] }";
    let (cluster, proxy) = start(overrides).await;
    let mut client = proxy.raw_login().await;
    assert_eq!(committed(&cluster, &mut client, &["INSERT INTO plain VALUES (1)"]).await, "local");
    assert_eq!(committed(&cluster, &mut client, &["INSERT INTO payments VALUES (1)"]).await, "remote_apply");
}
