//! Large messages, and many of them: they pass as on one server, and the proxy's memory does not grow
//! with them. `make sizes` moves more of it (`HIGHWATER_SIZES=full`).

use std::time::Duration;

use crate::fixture::*;

const MIB: usize = 1 << 20;

/// `quick` MiB, or `full` with `make sizes`.
fn mib(quick: usize, full: usize) -> usize {
    match std::env::var("HIGHWATER_SIZES").as_deref() {
        Ok("full") => full * MIB,
        _ => quick * MIB,
    }
}

/// What the proxy's resident memory may grow by, whatever passes through.
const GROWTH: usize = 20 * MIB;

/// The proxy's resident memory at its highest since this was made.
struct Peak<'a> {
    proxy: &'a Proxy,
    before: usize,
}

impl Peak<'_> {
    fn watch(proxy: &Proxy) -> Peak<'_> {
        // Makes VmHWM count from now on: proc(5).
        std::fs::write(format!("/proc/{}/clear_refs", proxy.pid()), "5").unwrap();
        Peak { proxy, before: Peak::bytes(proxy, "VmRSS:") }
    }

    fn bytes(proxy: &Proxy, field: &str) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
    }

    fn growth(&self) -> usize {
        Peak::bytes(self.proxy, "VmHWM:").saturating_sub(self.before)
    }

    fn assert_small(&self, what: &str) {
        let growth = self.growth();
        println!("{what}: resident memory {} KiB, and {} KiB more", self.before / 1024, growth / 1024);
        assert!(growth < GROWTH, "{what}: {} KiB more resident memory", growth / 1024);
    }
}

/// Waits for `done`, which may take longer than a single answer.
async fn in_time<T>(done: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE * 10, done).await.expect("not done in time")
}

#[tokio::test]
async fn ten_thousand_pipelined_statements_are_answered_in_order() {
    const COUNT: usize = 10_000;
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let peak = Peak::watch(&proxy);
    let mut client = proxy.raw_login().await;
    client.ask(&[parse("read", "SELECT $1::int + 1"), sync()].concat()).await;
    client.ask(&[parse("write", "INSERT INTO t VALUES ($1::int)"), sync()].concat()).await;
    let run = |statement: &str, number: usize| [bind(statement, &[&number.to_string()]), execute()].concat();

    // All before one Sync; and each with its own, none of them waited for.
    let one_unit = (0..COUNT).flat_map(|n| run("read", n)).chain(sync()).collect::<Vec<u8>>();
    let own_units = (0..COUNT).flat_map(|n| [run("read", n), sync()].concat()).collect::<Vec<u8>>();
    for (unit, ready) in [(one_unit, 1), (own_units, COUNT)] {
        let (mut next, mut left) = (1, ready);
        let each = |message: Message| {
            match message.tag {
                b'D' => {
                    assert_eq!(message.columns(), [Some(next.to_string())]);
                    next += 1;
                }
                b'Z' => left -= 1,
                tag => assert!(matches!(tag, b'2' | b'C'), "{message:?}"),
            }
            left > 0
        };
        in_time(client.send_and_read(&unit, each)).await;
        assert_eq!(next, COUNT + 1);
    }

    // Writes: all of a unit, or with an error near its end none of it.
    let writes = (0..COUNT).flat_map(|n| run("write", n)).collect::<Vec<u8>>();
    let failing =
        [&writes[..], &bind("write", &["no number"]), &execute(), &run("write", 0), &sync()].concat();
    for (unit, inserted) in [(failing, 0), ([&writes[..], &sync()].concat(), COUNT)] {
        let mut errors = 0;
        let each = |message: Message| {
            errors += usize::from(message.tag == b'E');
            message.tag != b'Z'
        };
        in_time(client.send_and_read(&unit, each)).await;
        assert_eq!(errors, usize::from(inserted == 0));
        let rows = client.ask(&query("SELECT count(*) FROM t")).await;
        assert_eq!(rows[1].columns(), [Some(inserted.to_string())]);
    }
    peak.assert_small("10,000 statements at once");
}

#[tokio::test]
async fn a_large_value_passes_both_ways_in_text_and_binary() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let peak = Peak::watch(&proxy);
    let value: Vec<u8> = (0..mib(32, 100)).map(|n| ((n * 31) >> 3) as u8).collect();

    let client = proxy.connect().await;
    let back = in_time(client.query_one("SELECT $1::bytea", &[&value])).await.unwrap();
    assert!(back.get::<_, &[u8]>(0) == value, "another value came back");
    drop((back, client));
    peak.assert_small("a value in binary");

    let text = value.iter().fold(String::from("\\x"), |mut text, byte| {
        text.extend([byte >> 4, byte & 15].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])));
        text
    });
    let mut client = proxy.raw_login().await;
    let unit = [parse("", "SELECT $1::bytea"), bind("", &[&text]), execute(), sync()].concat();
    let mut rows = 0;
    let each = |message: Message| {
        if message.tag == b'D' {
            rows += 1;
            assert!(message.body[6..] == *text.as_bytes(), "another value came back");
        }
        message.tag != b'Z'
    };
    in_time(client.send_and_read(&unit, each)).await;
    assert_eq!(rows, 1);
    peak.assert_small("a value as text");
}

#[tokio::test]
async fn a_large_statement_runs() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let peak = Peak::watch(&proxy);
    let mut client = proxy.raw_login().await;
    let sql = format!("SELECT length('{}')", "x".repeat(64 * MIB));
    let length = Some((64 * MIB).to_string());
    for (unit, row) in [
        (query(&sql), 1),
        ([parse("", &sql), bind("", &[]), execute(), sync()].concat(), 2),
        // Named: held by the server alone.
        ([parse("long", &sql), bind("long", &[]), execute(), sync()].concat(), 2),
    ] {
        let answer = in_time(client.ask(&unit)).await;
        assert_eq!(answer.get(row).map(Message::columns), Some(vec![length.clone()]), "{}", tags(&answer));
    }
    peak.assert_small("a statement of 64 MiB");
}

#[tokio::test]
async fn as_many_columns_and_parameters_as_postgresql_knows_pass() {
    let cluster = Cluster::start(1).await;
    let columns: Vec<String> = (1..=1600).map(|n| format!("column_number_{n} int")).collect();
    cluster
        .set_up(&format!(
            "CREATE TABLE wide ({}); INSERT INTO wide (column_number_1600) VALUES (7)",
            columns.join(",")
        ))
        .await;
    let proxy = Proxy::start(&cluster).await;
    let app = &cluster.roles().app;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", app).await.unwrap();
    let mut proxied = proxy.raw_login().await;

    let values: Vec<String> = (1..=65_535).map(|n| format!("(${n}::int)")).collect();
    let numbers: Vec<String> = (1..=65_535).map(|n| n.to_string()).collect();
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let sum = format!("SELECT count(*), sum(x) FROM (VALUES {}) v (x)", values.join(","));
    for unit in [
        query("SELECT * FROM wide"),
        [parse("", "SELECT * FROM wide"), describe(b'S', ""), bind("", &[]), execute(), sync()].concat(),
        [parse("many", &sum), describe(b'S', "many"), bind("many", &numbers), execute(), sync()].concat(),
        [bind("many", &numbers), execute(), sync()].concat(),
        // One more column than there can be, and one number that no Parse has.
        query(&format!("SELECT {}1", "1,".repeat(1664))),
        [parse("", "SELECT $65536::int"), sync()].concat(),
    ] {
        let (expected, got) = (in_time(direct.ask(&unit)).await, in_time(proxied.ask(&unit)).await);
        assert_eq!(tags(&got), tags(&expected));
        assert!(got == expected, "{:?}\n{:?}", &got[0], &expected[0]);
    }
}

#[tokio::test]
async fn copy_in_and_out_pass_in_constant_memory() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x text)").await;
    let proxy = Proxy::start(&cluster).await;
    let peak = Peak::watch(&proxy);
    let mut client = proxy.raw_login().await;
    let rows = mib(200, 1024) / 8192;

    // The server reads them all and keeps one.
    let line = message(b'd', format!("{}\n", "x".repeat(8191)).as_bytes());
    client.send(&query("COPY t FROM STDIN WHERE x NOT LIKE 'x%'")).await;
    assert_eq!(client.read().await.unwrap().tag, b'G');
    let chunk = line.repeat(128);
    for _ in 0..rows / 128 {
        in_time(client.send(&chunk)).await;
    }
    let last = [message(b'd', b"the last\n"), message(b'c', b"")].concat();
    let answer = in_time(client.ask(&last)).await;
    assert_eq!((tags(&answer).as_str(), &answer[0].body[..]), ("CZ", &b"COPY 1\0"[..]));
    peak.assert_small("COPY FROM STDIN");

    let copy = format!("COPY (SELECT repeat('x', 8191) FROM generate_series(1, {rows})) TO STDOUT");
    let mut got = 0;
    let each = |message: Message| {
        got += if message.tag == b'd' { message.body.len() } else { 0 };
        message.tag != b'Z'
    };
    in_time(client.send_and_read(&query(&copy), each)).await;
    assert_eq!(got, rows * 8192);
    peak.assert_small("COPY TO STDOUT");
}

#[tokio::test]
async fn a_client_that_does_not_read_costs_others_neither_time_nor_memory() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let peak = Peak::watch(&proxy);
    let mut slow = proxy.raw_login().await;
    let rows = mib(200, 1024) / 8192;
    slow.send(&query(&format!("SELECT repeat('x', 8192) FROM generate_series(1, {rows})"))).await;
    assert_eq!(slow.read().await.unwrap().tag, b'T');
    for _ in 0..4 {
        let client = proxy.connect().await;
        for number in 0..500 {
            assert_eq!(
                client.query_one("SELECT $1::int", &[&number]).await.unwrap().get::<_, i32>(0),
                number
            );
        }
    }
    peak.assert_small("a client that does not read");
    let mut left = rows;
    while let Some(message) = in_time(slow.read()).await {
        match message.tag {
            b'D' => left -= 1,
            b'Z' => break,
            tag => assert_eq!(tag, b'C'),
        }
    }
    assert_eq!(left, 0);
}

#[tokio::test]
async fn very_long_errors_and_notices_pass() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let app = &cluster.roles().app;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", app).await.unwrap();
    let mut proxied = proxy.raw_login().await;
    let size = 10 * MIB;
    let read = format!("SELECT repeat('x', {size})::int");
    for unit in [
        query(&format!("DO $$ BEGIN RAISE NOTICE '%', repeat('x', {size}); END $$")),
        query(&format!("DO $$ BEGIN RAISE EXCEPTION '%', repeat('x', {size}); END $$")),
        // A replica's: whether it is a refusal is seen at its start.
        query(&read),
        [parse("", &read), bind("", &[]), execute(), parse("", "SELECT 1"), bind("", &[]), execute(), sync()]
            .concat(),
        query("SELECT 1"),
    ] {
        let (expected, got) = (in_time(direct.ask(&unit)).await, in_time(proxied.ask(&unit)).await);
        assert_eq!(tags(&got), tags(&expected));
        assert!(got == expected);
    }
}

#[tokio::test]
async fn more_than_postgresql_takes_is_refused_as_it_does() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let app = &cluster.roles().app;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", app).await.unwrap();
    let mut proxied = proxy.raw_login().await;
    for sql in [
        "SELECT repeat('x', 1024 * 1024 * 1024)",
        "SELECT length(repeat('x', 1 << 29) || repeat('y', 1 << 29))",
    ] {
        let (expected, got) =
            (in_time(direct.ask(&query(sql))).await, in_time(proxied.ask(&query(sql))).await);
        assert_eq!(tags(&got), "EZ");
        assert_eq!(got, expected, "{sql}");
    }
    // A message of 1 GiB ends the connection, before its body is read.
    for tag in *b"QPBdE" {
        let mut client = proxy.raw_login().await;
        let head = [&[tag][..], &0x4000_0000_u32.to_be_bytes(), b"beginning"].concat();
        client.send(&head).await;
        let said = client.read_to_end().await;
        assert!(said.iter().all(|message| message.tag == b'E'), "{said:?}");
        let closed =
            tokio::time::timeout(Duration::from_secs(30), proxied.ask(&query("SELECT 1"))).await.unwrap();
        assert_eq!(tags(&closed), "TDCZ");
    }
}
