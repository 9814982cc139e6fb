//! No session sees another's state, and none loses its own: many clients over few backends change all
//! kinds of session state at random, and each has a twin on a direct connection to another server, to
//! which the same is done. Whatever one answers differently from the other is a leak or a loss.

mod holes;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use highwater::demo::cluster::ClusterOptions;

use crate::fixture::*;

/// A small generator of numbers: the same on every machine, from a seed that a failure prints.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, stream: u64) -> Dice {
        let mut dice =
            Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9));
        // Zero is the one state it would never leave.
        dice.0 |= 1;
        for _ in 0..8 {
            dice.below(2);
        }
        dice
    }

    fn below(&mut self, n: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % n
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// A number from the environment, for longer runs.
fn given(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().expect(variable))
}

/// Drops the temporary table, never the permanent one.
const DROP_SHADOW: &str = "DO $$ BEGIN IF to_regclass('pg_temp.shadow') IS NOT NULL \
    THEN DROP TABLE pg_temp.shadow; END IF; END $$";

/// What every twin pair meets: a name that a temporary one can hide, and a row of its own to write to.
const OBJECTS: &str = "
    CREATE ROLE leaking;
    GRANT leaking TO app;
    CREATE TABLE shadow AS SELECT 'permanent' AS x;
    CREATE TABLE own (client int PRIMARY KEY, n int NOT NULL DEFAULT 0);
    INSERT INTO own SELECT generate_series(0, 999);
    GRANT SELECT, UPDATE ON shadow, own TO app, leaking;
";

/// One side of a twin pair.
struct Side {
    client: RawClient,
    parameters: BTreeMap<String, String>,
    /// Outside a transaction.
    idle: bool,
}

impl Side {
    async fn connect(port: u16, login: &highwater::demo::cluster::Login) -> Side {
        let mut client = RawClient::connect(port).await;
        client.login("app", login).await.expect("a login");
        let parameters = client.parameters.clone();
        Side { client, parameters, idle: true }
    }

    /// What is answered, without what differs between any two servers: object ids, process ids, and when
    /// a changed parameter is told. (That it is told shows in `parameters`.)
    async fn ask(&mut self, bytes: &[u8]) -> Vec<String> {
        self.client.send(bytes).await;
        let own_pid = self.client.key[..4].to_vec();
        let mut said = Vec::new();
        loop {
            let message = self.client.read().await.unwrap_or_else(|| panic!("closed after {said:?}"));
            match message.tag {
                b'S' => {
                    let mut texts = message.body.split(|byte| *byte == 0);
                    let mut text = || String::from_utf8_lossy(texts.next().unwrap()).into_owned();
                    self.parameters.insert(text(), text());
                }
                b'T' | b't' => said.push(char::from(message.tag).to_string()),
                b'E' | b'N' => said.push(format!(
                    "{} {:?} {:?}",
                    char::from(message.tag),
                    message.field(b'C'),
                    message.field(b'M')
                )),
                b'A' => said.push(format!(
                    "A from {}: {}",
                    if message.body[..4] == own_pid { "itself" } else { "another" },
                    message.body[4..].escape_ascii()
                )),
                b'Z' => {
                    self.idle = message.body == b"I";
                    said.push(format!("{message:?}"));
                    return said;
                }
                _ => said.push(format!("{message:?}")),
            }
        }
    }
}

/// A session through the proxy, and one that does the same on a server of its own.
struct Twins {
    number: u64,
    dice: Dice,
    proxied: Side,
    direct: Side,
    /// What was done of late, for a failure to show.
    history: Vec<String>,
    steps: u64,
}

/// How the twins are connected again.
struct Ways<'a> {
    proxy: u16,
    server: u16,
    login: [&'a highwater::demo::cluster::Login; 2],
}

impl Ways<'_> {
    async fn both(&self) -> (Side, Side) {
        (Side::connect(self.proxy, self.login[0]).await, Side::connect(self.server, self.login[1]).await)
    }
}

impl Twins {
    /// Does the same to both, and compares.
    async fn both(&mut self, what: &str, bytes: &[u8]) {
        self.history.push(what.to_owned());
        let expected = self.direct.ask(bytes).await;
        let got = self.proxied.ask(bytes).await;
        if got != expected {
            self.fail(&format!("{got:#?}"), &format!("{expected:#?}"));
        }
        for name in ["TimeZone", "DateStyle", "session_authorization", "client_encoding", "is_superuser"] {
            let (got, expected) = (&self.proxied.parameters[name], &self.direct.parameters[name]);
            if got != expected {
                self.fail(&format!("{name} {got}"), &format!("{name} {expected}"));
            }
        }
    }

    fn fail(&self, got: &str, expected: &str) -> ! {
        let recent = &self.history[self.history.len().saturating_sub(60)..];
        panic!(
            "client {} differs from its twin\nthrough the proxy: {got}\ndirectly: {expected}\nafter:\n{}",
            self.number,
            recent.join("\n")
        );
    }

    async fn sql(&mut self, sql: &str) {
        self.both(sql, &query(sql)).await;
    }

    /// Reads all of the session's state back.
    async fn read_back(&mut self) {
        let (low, high) = (self.number * 100, self.number * 100 + 99);
        // (A server that has once heard of a custom setting shows it as empty, not as missing, ever after.)
        // A view's own list, not pg_backend_pid(), which would pin: the keys tell whose the locks are.
        let sql = format!(
            "SELECT current_user, current_setting('work_mem'), current_setting('TimeZone'), \
             current_setting('DateStyle'), current_setting('search_path'), nullif(current_setting('app.tenant', true), ''), \
             (SELECT string_agg(relname, ',' ORDER BY relname) FROM pg_class \
                 WHERE relnamespace = pg_my_temp_schema() AND relkind IN ('r', 'v', 'S')), \
             (SELECT string_agg(objid || mode, ',' ORDER BY objid, mode) FROM pg_locks \
                 WHERE locktype = 'advisory' AND objid BETWEEN {low} AND {high}), \
             (SELECT string_agg(c, ',' ORDER BY c) FROM pg_listening_channels() c), \
             (SELECT string_agg(name, ',' ORDER BY name) FROM pg_cursors WHERE is_holdable), \
             (SELECT string_agg(proname, ',') FROM pg_proc WHERE pronamespace = pg_my_temp_schema()), \
             session_user, current_setting('default_transaction_isolation'), \
             current_setting('default_transaction_read_only'), current_setting('lock_timeout'), \
             current_setting('statement_timeout'), current_setting('client_encoding'), \
             (SELECT n FROM public.own WHERE client = {})",
            self.number
        );
        self.both("(reads all back)", &query(&sql)).await;
        // Which server process has the statements that SQL has prepared is the proxy's affair (and so what
        // pg_prepared_statements shows); that they are there, and the session's own, is not.
        if self.proxied.idle {
            self.both("EXECUTE p", &query("EXECUTE p")).await;
        }
    }

    /// Looks at a part of it, by statements that leave nothing in doubt.
    async fn glance(&mut self) {
        let sql = match self.dice.below(6) {
            0 => "SHOW work_mem".to_owned(),
            1 => "SHOW TimeZone".to_owned(),
            2 => "SELECT x FROM shadow".to_owned(),
            3 => "SELECT current_user".to_owned(),
            4 => "SHOW search_path".to_owned(),
            _ => format!("SELECT n FROM public.own WHERE client = {}", self.number),
        };
        self.sql(&sql).await;
    }

    /// One change, or the try of one.
    async fn step(&mut self) {
        self.steps += 1;
        let key = self.number * 100 + self.dice.below(3) as u64;
        let channel = format!("channel_{}_{}", self.number, self.dice.below(2));
        let (n, name) = (self.number, self.dice.of(&["p", "q"]));
        let megabytes = 2 + self.dice.below(6);
        let zone = self.dice.of(&["UTC", "Asia/Tokyo", "Europe/Berlin"]);
        let sql = match self.dice.below(68) {
            0 | 1 => format!("SET work_mem = '{megabytes}MB'"),
            2 => format!("SET TimeZone = '{zone}'"),
            3 => format!("SET app.tenant = 'tenant {n}'"),
            4 => format!("SELECT set_config('app.tenant', 'tenant {n} {megabytes}', false)"),
            5 => format!("SET LOCAL work_mem = '{megabytes}MB'"),
            6 => format!("SELECT set_config('work_mem', '{megabytes}MB', true)"),
            7 => "SET search_path = pg_catalog, public".to_owned(),
            8 => "RESET work_mem".to_owned(),
            9 => "RESET ALL".to_owned(),
            10 => "SET ROLE leaking".to_owned(),
            11 => "RESET ROLE".to_owned(),
            12 => "SET no_such_setting = 1".to_owned(),
            13..=15 => "BEGIN".to_owned(),
            16 | 17 => "COMMIT".to_owned(),
            18 | 19 => "ROLLBACK".to_owned(),
            20 => "SAVEPOINT s".to_owned(),
            21 => "ROLLBACK TO s".to_owned(),
            22 => "SELECT 1/0".to_owned(),
            23 => "CREATE TEMP TABLE shadow AS SELECT 'temporary' AS x".to_owned(),
            24 => "CREATE TEMP TABLE brief (x int) ON COMMIT DROP".to_owned(),
            25 => "SELECT 1 AS x INTO TEMP made".to_owned(),
            26 => "CREATE TEMP VIEW seen AS SELECT 1 AS x".to_owned(),
            27 => self.dice.of(&[DROP_SHADOW, "DROP TABLE IF EXISTS made", "DROP TABLE made"]).to_owned(),
            28 => "DROP VIEW seen".to_owned(),
            29 => "DISCARD TEMP".to_owned(),
            30 => format!("PREPARE {name} AS SELECT {n}, {megabytes}"),
            31 => format!("EXECUTE {name}"),
            32 => format!("DEALLOCATE {name}"),
            33 => "DEALLOCATE ALL".to_owned(),
            34 => format!("SELECT pg_advisory_lock({key})"),
            35 => format!("SELECT pg_try_advisory_lock_shared({key})"),
            36 => format!("SELECT pg_advisory_unlock({key})"),
            37 => "SELECT pg_advisory_unlock_all()".to_owned(),
            38 => format!("SELECT pg_advisory_xact_lock({key})"),
            39 => format!("LISTEN {channel}"),
            40 => format!("UNLISTEN {channel}"),
            41 => format!("NOTIFY {channel}, 'to {n}'"),
            42 => "DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 50)".to_owned(),
            43 => "FETCH 2 FROM held".to_owned(),
            44 => self.dice.of(&["CLOSE held", "CLOSE ALL"]).to_owned(),
            45 => self.dice.of(&["DISCARD ALL", "DISCARD PLANS", "DISCARD SEQUENCES"]).to_owned(),
            46 => format!("UPDATE public.own SET n = n + 1 WHERE client = {n}"),
            47 => format!(
                "BEGIN; SET work_mem = '{megabytes}MB'; LISTEN {channel}; CREATE TEMP TABLE made (x int); {}",
                self.dice.of(&["COMMIT", "ROLLBACK", "SELECT 1/0"])
            ),
            48 => "DO $$ BEGIN CREATE TEMP TABLE IF NOT EXISTS done (x int); END $$".to_owned(),
            49 => format!("DO $$ BEGIN PERFORM pg_advisory_lock({key}); END $$"),
            50 => format!("DO $$ BEGIN EXECUTE 'LISTEN {channel}'; RAISE EXCEPTION 'no'; END $$"),
            51 => return self.by_the_protocol().await,
            _ => return self.hole().await,
        };
        self.sql(&sql).await;
    }

    /// Prepared statements of the protocol, which have one namespace with SQL's.
    async fn by_the_protocol(&mut self) {
        let name = self.dice.of(&["a", "b"]);
        let sql = format!("SELECT {} + $1::int", self.number);
        let (what, bytes) = match self.dice.below(4) {
            0 => ("parses", [parse(name, &sql), sync()].concat()),
            1 | 2 => ("executes", [bind(name, &["1"]), execute(), sync()].concat()),
            _ => ("closes", [message(b'C', &[b"S", name.as_bytes(), b"\0"].concat()), sync()].concat()),
        };
        self.both(&format!("({what} {name})"), &bytes).await;
    }

    /// Lets go of what binds the session: others are waiting for the backend.
    async fn let_go(&mut self, ways: &Ways<'_>) {
        self.sql("ROLLBACK").await;
        match self.dice.below(4) {
            0 => self.sql("DISCARD ALL").await,
            1 => {
                for sql in
                    ["SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;", "DISCARD ALL"]
                {
                    self.sql(sql).await;
                }
            }
            2 => {
                for sql in [
                    "UNLISTEN *",
                    "DISCARD TEMP",
                    "CLOSE ALL",
                    "SELECT pg_advisory_unlock_all()",
                    "DEALLOCATE ALL",
                    "RESET ROLE",
                    "RESET ALL",
                ] {
                    self.sql(sql).await;
                }
            }
            _ => {
                self.history.push("(connects anew)".to_owned());
                let (proxied, direct) = ways.both().await;
                for side in [&mut self.proxied, &mut self.direct] {
                    side.client.send(&message(b'X', b"")).await;
                    side.client.read_to_end().await;
                }
                (self.proxied, self.direct) = (proxied, direct);
            }
        }
        self.read_back().await;
    }

    /// Steps until `enough` says so; then all is let go of.
    async fn run(mut self, ways: &Ways<'_>, enough: impl Fn(u64) -> bool) -> u64 {
        while !enough(self.steps) {
            for _ in 0..=self.dice.below(8) {
                self.step().await;
                match self.dice.below(4) {
                    0 | 1 => self.read_back().await,
                    2 => self.glance().await,
                    _ => {}
                }
            }
            self.let_go(ways).await;
        }
        self.sql("DISCARD ALL").await;
        self.read_back().await;
        self.steps
    }
}

#[tokio::test]
async fn sessions_keep_their_own_state_and_see_nobody_elses() {
    let seed = given("HIGHWATER_LEAKS_SEED", rand::random::<u32>().into());
    let clients = given("HIGHWATER_LEAKS_CLIENTS", 24);
    let backends = given("HIGHWATER_LEAKS_BACKENDS", 4);
    let seconds = given("HIGHWATER_LEAKS_SECONDS", 0);
    let steps = given("HIGHWATER_LEAKS_STEPS", 100);
    println!("HIGHWATER_LEAKS_SEED={seed}: {clients} clients over {backends} backends");

    let connections = ("max_connections".to_owned(), (clients + 100).to_string());
    let prepared = ("max_prepared_transactions".to_owned(), clients.to_string());
    let options = |replicas| ClusterOptions {
        replicas,
        settings: vec![connections.clone(), prepared.clone()],
        ..ClusterOptions::default()
    };
    let (cluster, twin) = tokio::join!(Cluster::start_with(options(1)), Cluster::start_with(options(0)));
    for each in [&cluster, &twin] {
        each.primary().execute(OBJECTS).await.unwrap();
        each.primary().execute(holes::FUNCTIONS).await.unwrap();
        each.wait_caught_up(0).await.unwrap();
    }
    // Two hundred logins at once take their time on a busy machine.
    let overrides = format!(
        "{{ pool: {{ size: {backends}, query_wait_timeout: 60s }}, auth: {{ login_timeout: 120s }} }}"
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..Default::default() }).await;
    let ways =
        Ways { proxy: proxy.port(), server: twin.primary().port(), login: [proxy.app(), &twin.roles().app] };

    let begun = Instant::now();
    let enough = |done: u64| match seconds {
        0 => done >= steps,
        seconds => begun.elapsed() >= Duration::from_secs(seconds),
    };
    let (ways, enough) = (&ways, &enough);
    let sessions = (0..clients).map(|number| async move {
        let (proxied, direct) = ways.both().await;
        let dice = Dice::new(seed, number);
        let twins = Twins { number, dice, proxied, direct, history: Vec::new(), steps: 0 };
        twins.run(ways, enough).await
    });
    let steps: u64 = futures_util::future::join_all(sessions).await.iter().sum();
    println!("{steps} steps in {:?}: no difference", begun.elapsed());

    // Nothing is pinned any more, and nothing has stayed on the server.
    eventually("no session is pinned", || async {
        let metrics = proxy.metrics().await;
        metrics.sum("highwater_pinned_sessions", &[]) == 0.0
            && metrics.sum("highwater_pin_reasons", &[]) == 0.0
    })
    .await;
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    cluster.primary().wait_for(locks, "0").await.unwrap();
    let temporary = "SELECT count(*) FROM pg_class WHERE relpersistence = 't'";
    cluster.primary().wait_for(temporary, "0").await.unwrap();
    let metrics = proxy.metrics().await;
    assert!(metrics.sum("highwater_pins_total", &[]) > 0.0, "nothing was tested: no session was ever pinned");
}
