//! Sessions of all levels on real servers, under faults: their histories break no promise.
//!
//! `make consistency` runs these at length; HIGHWATER_HISTORY_OPERATIONS sets the size of each. One that breaks a promise is
//! written to the file HIGHWATER_HISTORY_FILE, an operation a line, if that is set.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use highwater::demo::cluster::{Login, PrivateNode};
use tokio_postgres::{AsyncMessage, NoTls, Statement};

use self::work::{Failed, OBJECTS, Tally, Way};
use super::consistency::{Trouble, a_while, synchronous};
use crate::fixture::*;
use crate::history::{self, Flush, Level, Operation, Outcome, Part, Shown, What};

mod work;

/// Sessions of each level.
const OF_EACH: usize = 4;
/// Sessions that change their level as they go.
const CHANGING: usize = 4;
/// Named sessions, and connections of each.
const NAMED: usize = 2;
const OF_A_NAME: usize = 3;
/// All of them.
const SESSIONS: usize = Level::ALL.len() * OF_EACH + CHANGING + NAMED;
/// Lists that are in use at a time, and operations until the next ones are.
const HOT: usize = 6;
const WHILE_HOT: usize = 1_500;
/// Tokens on their way from session to session.
const TOKENS: usize = 16;

fn wanted(usually: usize) -> usize {
    std::env::var("HIGHWATER_HISTORY_OPERATIONS").map_or(usually, |n| n.parse().unwrap())
}

/// A cluster with a role per level, two more, and the lists.
async fn with_lists(replicas: usize, operations: usize) -> Cluster {
    let cluster = Cluster::start(replicas).await;
    for role in Level::ALL.map(Level::word).into_iter().chain(["changing", "named"]) {
        let role = format!("CREATE ROLE {role} LOGIN PASSWORD 'level'");
        cluster.primary().execute(&role).await.unwrap();
    }
    let lists = (operations / WHILE_HOT + 2) * HOT;
    cluster
        .set_up(&format!(
            "CREATE TABLE lists (k int PRIMARY KEY, v int[] NOT NULL);
             INSERT INTO lists SELECT i, '{{}}' FROM generate_series(0, {lists}) i;
             GRANT SELECT, UPDATE ON lists TO PUBLIC;
             {OBJECTS}"
        ))
        .await;
    cluster
}

/// Where explicit transactions read.
#[derive(Clone, Copy)]
enum Transactions {
    Primary,
    Split,
}

async fn start(cluster: &Cluster, transactions: Transactions) -> Proxy {
    // A user for each level, hence many pools: together they must leave the nodes connections for others.
    let rules: Vec<String> =
        Level::ALL.iter().map(|l| format!("{{ user: {0}, level: {0} }}", l.word())).collect();
    let transactions = match transactions {
        Transactions::Primary => "primary",
        Transactions::Split => "split",
    };
    let overrides = format!(
        "pool: {{ size: 10 }}\n\
         routing: {{ transactions: {transactions} }}\n\
         consistency: {{ catch_up_wait: 100ms, rules: [ {} ] }}\n\
         failover: {{ mode: follow, check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }}",
        rules.join(", ")
    );
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// A client, and whether it was told (by a notice) that what it has seen may be gone.
struct Connection {
    client: tokio_postgres::Client,
    told: Arc<AtomicBool>,
    /// An append and a read, prepared once.
    prepared: Option<(Statement, Statement)>,
    /// A COPY of it was refused: tokio-postgres then sends one Sync too many, and takes its answer for the next statement's.
    is_off_by_one: bool,
}

impl Connection {
    async fn statements(&mut self) -> Result<(Statement, Statement), tokio_postgres::Error> {
        if self.prepared.is_none() {
            let append = self.client.prepare("UPDATE lists SET v = v || $1::int WHERE k = $2").await?;
            let read = self.client.prepare("SELECT v FROM lists WHERE k = $1").await?;
            self.prepared = Some((append, read));
        }
        Ok(self.prepared.clone().unwrap())
    }
}

async fn connect(
    port: u16,
    user: &str,
    hears: impl Fn() + Send + 'static,
) -> Result<Connection, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).dbname("app").user(user).password("level");
    config.connect_timeout(Duration::from_secs(5));
    let (client, mut connection) = config.connect(NoTls).await?;
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    // A notice is taken here before the answer that it stands ahead of is handed to the client.
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notice(notice) = message
                && notice.code().code() == "HW001"
            {
                hears();
                tell.store(true, Ordering::SeqCst);
            }
        }
    });
    Ok(Connection { client, told, prepared: None, is_off_by_one: false })
}

/// A named session of several connections. Those that were told that something is gone, or were ended, go on in
/// another, together: the next name.
struct Name {
    number: usize,
    now: Mutex<(usize, usize)>,
    /// The names before this were told that something is gone: nobody else is who joins one of them.
    told_before: Arc<AtomicUsize>,
}

/// Who plays.
#[derive(Clone, Copy)]
enum Player<'a> {
    Of(Level),
    Changing,
    Named(&'a Name),
}

impl Player<'_> {
    fn user(self) -> &'static str {
        match self {
            Player::Of(level) => level.word(),
            Player::Changing => "changing",
            Player::Named(_) => "named",
        }
    }
}

/// One player's session.
struct Seat {
    connection: Connection,
    session: usize,
    /// Of a named session: the name's number.
    generation: usize,
    level: Level,
    /// It was told that something is gone, and is another session since.
    told: bool,
}

/// All that is shared by the sessions of one run.
struct Run<'a> {
    proxy: &'a Proxy,
    operations: usize,
    begun: AtomicUsize,
    clock: AtomicU64,
    values: AtomicU32,
    sessions: AtomicUsize,
    transactions: AtomicUsize,
    history: Mutex<Vec<Operation>>,
    tally: Mutex<Tally>,
    errors: Mutex<BTreeMap<String, usize>>,
    /// What was rolled back: nobody may ever see it.
    undone: Mutex<BTreeSet<u32>>,
    /// What a player saw by itself to be wrong.
    broken: Mutex<Vec<String>>,
    /// Tokens, with the operation that showed each.
    tokens: Mutex<VecDeque<(String, usize)>>,
}

impl<'a> Run<'a> {
    fn new(proxy: &'a Proxy, operations: usize) -> Run<'a> {
        Run {
            proxy,
            operations,
            begun: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            values: AtomicU32::new(1),
            sessions: AtomicUsize::new(0),
            transactions: AtomicUsize::new(0),
            history: Mutex::new(Vec::new()),
            tally: Mutex::default(),
            errors: Mutex::default(),
            undone: Mutex::default(),
            broken: Mutex::default(),
            tokens: Mutex::new(VecDeque::new()),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn new_session(&self) -> usize {
        self.sessions.fetch_add(1, Ordering::SeqCst)
    }

    fn record(&self, seat: &Seat, what: What, sent: u64, outcome: Outcome, part: Option<Part>) -> usize {
        let (session, level) = (seat.session, seat.level);
        let mut history = self.history.lock().unwrap();
        history.push(Operation { session, level, what, sent, answered: self.now(), outcome, part });
        history.len() - 1
    }

    fn broke(&self, what: String) {
        self.broken.lock().unwrap().push(what);
    }

    fn failed(&self, error: &tokio_postgres::Error) {
        let said = error.as_db_error();
        let text = said.map_or("closed".to_owned(), |e| format!("{} {}", e.code().code(), e.message()));
        *self.errors.lock().unwrap().entry(text).or_default() += 1;
    }

    /// Whoever was told that something is gone is another session: what was just answered need not hold what the old
    /// one knew.
    fn hear(&self, seat: &mut Seat) {
        if seat.connection.told.swap(false, Ordering::SeqCst) {
            seat.session = self.new_session();
            seat.told = true;
        }
    }

    fn name(&self, number: usize) -> Name {
        Name { number, now: Mutex::new((0, self.new_session())), told_before: Arc::default() }
    }

    /// The session after the one of `left`, or the first.
    async fn sit(&self, player: Player<'_>, left: Option<usize>) -> Seat {
        let level = if let Player::Of(level) = player { level } else { Level::Session };
        loop {
            let (generation, session) = match player {
                Player::Named(name) => self.name_after(name, left),
                _ => (0, self.new_session()),
            };
            let hears: Box<dyn Fn() + Send> = match player {
                Player::Named(name) => {
                    let told_before = name.told_before.clone();
                    Box::new(move || {
                        told_before.fetch_max(generation + 1, Ordering::SeqCst);
                    })
                }
                _ => Box::new(|| {}),
            };
            let sent = self.now();
            // It fails while there is no node to ask: only in the runs that take the primary or the proxy away.
            if let Ok(connection) = connect(self.proxy.port(), player.user(), hears).await {
                let seat = Seat { connection, session, generation, level, told: false };
                let seated = match player {
                    Player::Named(name) => {
                        let sql = format!("SET highwater.session = 'n{}-{generation}'", name.number);
                        let set = seat.connection.client.batch_execute(&sql).await.is_ok();
                        // One of that name may have been told, and have gone on, before this one joined: it will not be.
                        set && name.told_before.load(Ordering::SeqCst) <= generation
                    }
                    _ => {
                        self.record(&seat, What::Begins, sent, Outcome::Done, None);
                        true
                    }
                };
                if seated {
                    return seat;
                }
            }
            a_while(50).await;
        }
    }

    /// The name in use, after the one of `left` and those that were told of a loss: its number and its session.
    fn name_after(&self, name: &Name, left: Option<usize>) -> (usize, usize) {
        let mut now = name.now.lock().unwrap();
        if left == Some(now.0) || now.0 < name.told_before.load(Ordering::SeqCst) {
            *now = (now.0 + 1, self.new_session());
        }
        *now
    }

    /// One client: it works until all operations are begun, in a new session whenever its last has ended.
    async fn play(&self, player: Player<'_>) {
        let mut seat = self.sit(player, None).await;
        loop {
            let number = self.begun.fetch_add(1, Ordering::SeqCst);
            if number >= self.operations {
                return;
            }
            let key = number / WHILE_HOT * HOT + usize::from(rand::random::<u8>()) % HOT;
            let worked = match rand::random::<u8>() {
                0..64 => self.work(&mut seat, Way::of_an_append(), key).await,
                64..70 => self.show_token(&mut seat).await,
                70..76 => self.take_token(&mut seat).await,
                76..84 if matches!(player, Player::Changing) => self.change(&mut seat).await,
                _ => self.work(&mut seat, Way::of_a_read(), key).await,
            };
            self.hear(&mut seat);
            let told = std::mem::take(&mut seat.told);
            let named = matches!(player, Player::Named(_));
            match worked {
                Ok(()) if told && named => seat = self.sit(player, Some(seat.generation)).await,
                Ok(()) => {}
                Err(Failed { error, in_doubt }) => {
                    self.failed(&error);
                    for step in in_doubt {
                        self.record(&seat, step.what, step.sent, Outcome::Unknown, step.part);
                    }
                    // Nothing is promised about what came before. After HW001 the session itself can be used.
                    let lost = error.code().is_some_and(|code| code.code() == "HW001");
                    if lost && !named && !seat.connection.is_off_by_one {
                        seat.session = self.new_session();
                    } else {
                        seat = self.sit(player, Some(seat.generation)).await;
                    }
                }
            }
        }
    }

    async fn show_token(&self, seat: &mut Seat) -> Result<(), Failed> {
        let sent = self.now();
        let token: String = seat.connection.client.query_one("SHOW highwater.token", &[]).await?.get(0);
        // Empty: the position could not be learned in time.
        if !token.is_empty() {
            self.hear(seat);
            let index = self.record(seat, What::ShowsToken, sent, Outcome::Done, None);
            let mut tokens = self.tokens.lock().unwrap();
            tokens.push_back((token, index));
            let excess = tokens.len().saturating_sub(TOKENS);
            tokens.drain(..excess);
        }
        Ok(())
    }

    async fn take_token(&self, seat: &mut Seat) -> Result<(), Failed> {
        let sent = self.now();
        let next = self.tokens.lock().unwrap().pop_front();
        let Some((token, shown_by)) = next else { return Ok(()) };
        seat.connection.client.batch_execute(&format!("SET highwater.token = '{token}'")).await?;
        self.hear(seat);
        self.record(seat, What::TakesToken { shown_by }, sent, Outcome::Done, None);
        Ok(())
    }

    async fn change(&self, seat: &mut Seat) -> Result<(), Failed> {
        let level = Level::ALL[usize::from(rand::random::<u8>()) % Level::ALL.len()];
        let sql = format!("SET highwater.consistency = '{}'", level.word());
        seat.connection.client.batch_execute(&sql).await?;
        seat.level = level;
        Ok(())
    }

    async fn all(&self) {
        let names: Vec<Name> = (0..NAMED).map(|number| self.name(number)).collect();
        let of_levels = Level::ALL.iter().flat_map(|level| (0..OF_EACH).map(|_| Player::Of(*level)));
        let changing = (0..CHANGING).map(|_| Player::Changing);
        let named = names.iter().flat_map(|name| (0..OF_A_NAME).map(move |_| Player::Named(name)));
        let players = of_levels.chain(changing).chain(named).map(|player| self.play(player));
        futures_util::future::join_all(players).await;
    }
}

async fn finals(node: &PrivateNode, login: &Login) -> BTreeMap<usize, Vec<u32>> {
    // The trouble goes on until all is told.
    let deadline = std::time::Instant::now() + PATIENCE;
    let rows = loop {
        if let Ok(client) = node.connect("app", login).await
            && let Ok(rows) = client.query("SELECT k, v FROM lists", &[]).await
        {
            break rows;
        }
        assert!(std::time::Instant::now() < deadline, "the lists cannot be read");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    rows.iter()
        .map(|row| {
            let list: Vec<i32> = row.get(1);
            let key: i32 = row.get(0);
            let list = list.into_iter().map(|v| u32::try_from(v).unwrap()).collect();
            (usize::try_from(key).unwrap(), list)
        })
        .collect()
}

/// What may happen besides.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Errors {
    /// None.
    Never,
    /// Statements fail: where the primary is taken away.
    Allowed,
}

/// What was played.
struct Played {
    history: Vec<Operation>,
    tally: Tally,
    errors: BTreeMap<String, usize>,
    undone: BTreeSet<u32>,
    broken: Vec<String>,
}

impl From<Run<'_>> for Played {
    fn from(run: Run<'_>) -> Played {
        Played {
            history: run.history.into_inner().unwrap(),
            tally: run.tally.into_inner().unwrap(),
            errors: run.errors.into_inner().unwrap(),
            undone: run.undone.into_inner().unwrap(),
            broken: run.broken.into_inner().unwrap(),
        }
    }
}

/// Plays a history.
async fn record(proxy: &Proxy, operations: usize) -> Played {
    let run = Run::new(proxy, operations);
    run.all().await;
    run.into()
}

/// No promise may be broken in a history, whose end `primary` holds.
async fn judge(
    name: &str,
    played: &Played,
    primary: &PrivateNode,
    login: &Login,
    errors: Errors,
    flush: Flush,
) -> BTreeMap<usize, Vec<u32>> {
    let history = played.history.as_slice();
    let finals = finals(primary, login).await;
    let found = history::check(history, &finals, flush);
    let sessions: BTreeSet<usize> = history.iter().map(|o| o.session).collect();
    let unknown = history.iter().filter(|o| o.outcome == Outcome::Unknown).count();
    let tokens = history.iter().filter(|o| matches!(o.what, What::TakesToken { .. })).count();
    let kept: BTreeSet<u32> = finals.values().flatten().copied().collect();
    let taken = history
        .iter()
        .filter(|o| o.outcome == Outcome::Done)
        .filter(|o| matches!(o.what, What::Append { value, .. } if !kept.contains(&value)))
        .count();
    println!(
        "{name}: {} operations in {} sessions, {tokens} tokens taken, {unknown} of unknown outcome, \
         {taken} acknowledged and gone, {} promises broken",
        history.len(),
        sessions.len(),
        found.len()
    );
    println!("{name}, done and failed: {:?}", played.tally);
    println!("{name}, errors: {:?}", played.errors);
    for what in played.broken.iter().take(5) {
        println!("{what}");
    }
    for violation in found.iter().take(5) {
        println!("{}", Shown(violation, history));
    }
    if let Ok(file) = std::env::var("HIGHWATER_HISTORY_FILE")
        && !found.is_empty()
    {
        let lines: Vec<String> = history.iter().enumerate().map(|(at, o)| format!("#{at} {o:?}\n")).collect();
        std::fs::write(file, lines.concat()).unwrap();
    }
    assert!(found.is_empty(), "{name}: {} promises broken", found.len());
    assert!(played.broken.is_empty(), "{name}: {:?}", played.broken);
    let back: Vec<&u32> = kept.intersection(&played.undone).collect();
    assert!(back.is_empty(), "{name}: rolled back, and there: {back:?}");
    assert!(Way::ALL.iter().all(|way| played.tally.get(way).is_some_and(|(done, _)| *done > 0)), "{name}");
    assert!(tokens > 0, "{name}: no tokens");
    if errors == Errors::Never {
        assert!(played.errors.is_empty(), "{name}: {:?}", played.errors);
        assert_eq!((sessions.len(), unknown), (SESSIONS, 0), "{name}: statements failed");
    }
    finals
}

/// Plays a history on a cluster whose primary stays; no promise may be broken.
async fn play(
    name: &str,
    cluster: &Cluster,
    proxy: &Proxy,
    operations: usize,
    errors: Errors,
) -> Vec<Operation> {
    let played = record(proxy, operations).await;
    assert!(played.history.len() > operations / 2, "{name}: {} operations", played.history.len());
    judge(name, &played, cluster.primary(), proxy.app(), errors, Flush::Waited).await;
    played.history
}

/// How many violations the same history has if all of it is called `level`: lower levels break its promises,
/// or the checker (or the trouble) would not bite.
fn broken_if_all_were(level: Level, history: &[Operation], finals: &BTreeMap<usize, Vec<u32>>) -> usize {
    let claimed: Vec<Operation> = history.iter().map(|o| Operation { level, ..o.clone() }).collect();
    history::check(&claimed, finals, Flush::Waited).len()
}

fn nodes(cluster: &Cluster) -> [std::sync::Arc<PrivateNode>; 2] {
    [cluster.node(1).clone(), cluster.node(2).clone()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_replay_stops_and_goes_beside_a_synchronous_standby() {
    let operations = wanted(6_000);
    let cluster = with_lists(2, operations).await;
    // A replica shows commits before the primary does.
    synchronous(&cluster, "ANY 1 (*)").await;
    let proxy = start(&cluster, Transactions::Primary).await;
    let nodes = nodes(&cluster);
    let trouble = Trouble::begin(move || {
        let node = nodes[usize::from(rand::random::<bool>())].clone();
        async move {
            node.pause_replay().await.unwrap();
            a_while(120).await;
            node.resume_replay().await.unwrap();
            a_while(60).await;
        }
    });
    let history = play("replay stops", &cluster, &proxy, operations, Errors::Never).await;
    trouble.end().await;
    let finals = finals(cluster.primary(), proxy.app()).await;
    for level in [Level::ReadYourWrites, Level::Session, Level::Strong] {
        let broken = broken_if_all_were(level, &history, &finals);
        println!("if all were {}: {broken} promises broken", level.word());
        assert!(broken > 0, "{level:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_beside_a_replica_two_seconds_behind() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    cluster.node(2).set_apply_delay(Duration::from_secs(2)).await.unwrap();
    let proxy = start(&cluster, Transactions::Split).await;
    play("delayed", &cluster, &proxy, operations, Errors::Never).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_replicas_crash() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    let proxy = start(&cluster, Transactions::Split).await;
    let nodes = nodes(&cluster);
    let trouble = Trouble::begin(move || {
        let node = nodes[usize::from(rand::random::<bool>())].clone();
        async move {
            if rand::random() {
                node.crash_backend().await.unwrap();
            } else {
                node.crash().await.unwrap();
                a_while(100).await;
                node.start().await.unwrap();
            }
            a_while(400).await;
        }
    });
    // A read part of whose answer had left cannot be run again.
    play("replicas crash", &cluster, &proxy, operations, Errors::Allowed).await;
    trouble.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_the_primary_restarts() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    let proxy = start(&cluster, Transactions::Split).await;
    let node = cluster.primary().clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            a_while(800).await;
            if rand::random() {
                node.crash().await.unwrap();
                node.start().await.unwrap();
            } else {
                node.crash_backend().await.unwrap();
            }
            a_while(800).await;
        }
    });
    play("the primary restarts", &cluster, &proxy, operations, Errors::Allowed).await;
    trouble.end().await;
}

/// The nodes are a chain, each confirming the one before: what was acknowledged or shown is on the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_the_next_standby_is_promoted_again_and_again() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    cluster.node(2).follow(cluster.node(1)).await.unwrap();
    for node in cluster.nodes() {
        node.set("synchronous_standby_names", "*").await.unwrap();
        // Without, no copy can be taken of a standby.
        node.set("full_page_writes", "on").await.unwrap();
    }
    cluster.primary().execute("CHECKPOINT").await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    for node in nodes(&cluster) {
        node.execute("CHECKPOINT").await.unwrap();
    }
    let proxy = start(&cluster, Transactions::Primary).await;
    let mut chain: VecDeque<Arc<PrivateNode>> = cluster.nodes().iter().cloned().collect();
    let primary = Arc::new(Mutex::new(chain[0].clone()));
    let now = primary.clone();
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let failovers = tokio::spawn(async move {
        let mut times = 0;
        loop {
            let (old, next, last) = (chain[0].clone(), chain[1].clone(), chain[2].clone());
            a_while(800).await;
            old.crash().await.unwrap();
            next.promote().await.unwrap();
            *now.lock().unwrap() = next;
            old.rebuild_from(&last).await.unwrap();
            // The copy has settings of its own.
            old.set("synchronous_standby_names", "*").await.unwrap();
            old.set("full_page_writes", "on").await.unwrap();
            chain.rotate_left(1);
            times += 1;
            if *stopped.borrow_and_update() {
                return times;
            }
        }
    });
    let played = record(&proxy, operations).await;
    stop.send(true).unwrap();
    let times = failovers.await.unwrap();
    println!("failovers: {times}");
    let primary = primary.lock().unwrap().clone();
    judge("failovers", &played, &primary, proxy.app(), Errors::Allowed, Flush::Waited).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_the_proxy_restarts_and_tokens_outlive_it() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    let proxy = start(&cluster, Transactions::Split).await;
    let run = Run::new(&proxy, operations);
    let restarts = async {
        let mut times = 0;
        while run.begun.load(Ordering::SeqCst) < operations {
            a_while(1_500).await;
            proxy.restart().await;
            times += 1;
        }
        times
    };
    let ((), times) = tokio::join!(run.all(), restarts);
    println!("restarts: {times}");
    let played = Played::from(run);
    let sessions: BTreeSet<usize> = played.history.iter().map(|o| o.session).collect();
    assert!(sessions.len() > SESSIONS, "all sessions ended with the proxy");
    judge("the proxy restarts", &played, cluster.primary(), proxy.app(), Errors::Allowed, Flush::Waited)
        .await;
}

/// A crash takes what was not flushed: acknowledged, and shown to others. Whoever was shown it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_silently_when_a_crash_takes_commits_that_nobody_waited_for() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    cluster.primary().execute("ALTER ROLE ALL SET synchronous_commit = off").await.unwrap();
    let proxy = start(&cluster, Transactions::Primary).await;
    let node = cluster.primary().clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            a_while(800).await;
            if rand::random() {
                node.crash().await.unwrap();
                node.start().await.unwrap();
            } else {
                node.crash_backend().await.unwrap();
            }
            a_while(800).await;
        }
    });
    let played = record(&proxy, operations).await;
    trouble.end().await;
    let primary = cluster.primary();
    judge("unflushed", &played, primary, proxy.app(), Errors::Allowed, Flush::NotWaited).await;
}
