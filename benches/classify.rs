//! What a classification costs: a hit by whole text, a hit by shape (another value in it), a hit by
//! skeleton (other white space, too), a text never seen as mappers write it (scan and small reader), the scan of others, the second
//! opinion with its way to the parser's thread and back, and both together; and what the facts of a database with 50,000
//! relations cost to read and to hold (a private server is made for that). Two minutes; a word behind `--` picks among them.
#![allow(missing_docs, clippy::print_stdout)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group};
use highwater::classify::catalog::CatalogRows;
use highwater::classify::{Catalog, Classifier, Lexing, Lookup, Statement};
use highwater::config::LimitsConfig;
use highwater::demo::cluster::{ClusterOptions, PrivateCluster};

const ORM: &str = "SELECT \"u\".\"id\", \"u\".\"name\", count(o.id) AS orders FROM \"users\" u LEFT JOIN orders o ON \
                   o.user_id = u.id WHERE u.id = $1 AND o.state IN ('paid', 'sent') GROUP BY 1, 2 ORDER BY 2 LIMIT 20";

fn classify(c: &mut Criterion) {
    let classifier = Classifier::new(&LimitsConfig {
        nodes: 16,
        unit_hold: 65_536,
        statement_text: 65_536,
        statements_per_session: 100,
        session_settings: 1024,
        databases: 1,
        class_cache: 10_000,
        parser_text: 16 * 1024,
        parser_deadline: Duration::from_secs(1),
        admin_connections: 0,
        statement_stats: 0,
    });
    let catalog = Catalog::from_rows(1, CatalogRows { server_major: 15, ..CatalogRows::default() });
    let lookup = |text: &str| {
        classifier.lookup(&Statement {
            text: text.as_bytes(),
            parameter_types: &[],
            catalog: &catalog,
            lexing: Lexing::Utf8,
        })
    };
    assert!(matches!(lookup(ORM), Lookup::Known(..)), "judged without the parser, and held from now on");
    c.bench_function("hit by whole text", |b| b.iter(|| lookup(black_box(ORM))));
    let texts: Vec<String> = (0..100_000).map(|n| ORM.replace("20", &n.to_string())).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("hit by shape", |b| b.iter(|| lookup(black_box(next.next().expect("cycles")))));
    // More texts than the tables hold, each with its own white space.
    let blanks = |n: usize| (0..17).map(|bit| if n >> bit & 1 == 1 { ' ' } else { '\t' }).collect::<String>();
    let texts: Vec<String> =
        (0..100_000).map(|n| ORM.replacen("SELECT ", &format!("SELECT{} ", blanks(n)), 1)).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("hit by skeleton", |b| b.iter(|| lookup(black_box(next.next().expect("cycles")))));
    // Another name in each text, so that neither table knows it: hashing, scan, two look-ups that miss, the small reader.
    let unseen = |n: usize| SHAPES[n % SHAPES.len()].replace("users", &format!("users{n}"));
    let texts: Vec<String> = (0..200_000).map(unseen).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("uncached: a text as mappers write it", |b| {
        b.iter(|| lookup(black_box(next.next().expect("cycles"))))
    });
    // A comment is not for the small reader.
    let commented = |n: usize| format!("{} /* c */", unseen(n));
    let texts: Vec<String> = (300_000..500_000).map(commented).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("scan of another, for the second opinion", |b| {
        b.iter(|| lookup(black_box(next.next().expect("cycles"))))
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut n = 200_000;
    c.bench_function("second opinion", |b| {
        b.iter_batched(
            || {
                n += 1;
                lookup(&commented(n))
            },
            |found| match found {
                Lookup::Ask(question) => Some(runtime.block_on(classifier.ask(question))),
                Lookup::Known(..) => None,
            },
            criterion::BatchSize::SmallInput,
        )
    });
    let mut n = 10_000_000;
    c.bench_function("uncached: another, scan and second opinion", |b| {
        b.iter_batched(
            || {
                n += 1;
                commented(n)
            },
            |text| match lookup(&text) {
                Lookup::Ask(question) => runtime.block_on(classifier.ask(question)),
                Lookup::Known(class, _) => class,
            },
            criterion::BatchSize::SmallInput,
        )
    });
}

/// Relations of the large catalog.
const RELATIONS: usize = 50_000;

/// What the proxy does when it first meets a database, three times, as its bars are: time, and resident memory.
async fn load_of_a_large_catalog() {
    let options = ClusterOptions { replicas: 0, ..ClusterOptions::default() };
    let cluster = PrivateCluster::start(&options, &mut |_| {}).await.expect("a private server");
    let mut client =
        cluster.primary().connect("app", &cluster.roles().superuser).await.expect("a connection");
    let started = Instant::now();
    // A table takes a lock for as long as its transaction.
    for first in (0..RELATIONS).step_by(1_000) {
        let tables = format!(
            "DO $$ BEGIN FOR n IN {first}..{} LOOP EXECUTE format('CREATE TABLE relation_%s (id int)', n); END LOOP; END $$",
            first + 999
        );
        client.batch_execute(&tables).await.expect("tables");
    }
    println!("made {RELATIONS} relations in {:.1?}", started.elapsed());
    let row = client.query_one("SELECT current_setting('server_version_num')::int4 / 10000", &[]).await;
    let major = u16::try_from(row.expect("a version").get::<_, i32>(0)).expect("a version");
    for identity in 1..=3 {
        let (started, before) = (Instant::now(), resident());
        let rows = highwater::catalogs::load(&mut client, major).await.expect("the catalog's rows");
        let read = started.elapsed();
        let catalog = Catalog::from_rows(identity, rows);
        let all = started.elapsed();
        println!(
            "catalog of {RELATIONS} relations: read in {read:.3?}, understood in {all:.3?} (bar: 2 s); {:.1} MB more resident than before (bar: 30 MB)",
            resident().saturating_sub(before) as f64 / 1024.0
        );
        assert!(catalog.is_loaded());
    }
}

/// Resident memory of this process, in kB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).expect("a number")
}

/// As Django, SQLAlchemy, Hibernate, ActiveRecord and Prisma write them.
const SHAPES: &[&str] = &[
    ORM,
    "SELECT \"users\".\"id\", \"users\".\"password\", \"users\".\"last_login\", \"users\".\"email\" FROM \"users\" WHERE \
     \"users\".\"id\" = 42 LIMIT 21",
    "SELECT users.id AS users_id, users.name AS users_name, a.id AS a_id, a.street AS a_street FROM users LEFT OUTER \
     JOIN addresses AS a ON users.id = a.user_id WHERE users.name ILIKE $1::VARCHAR AND users.active IS true ORDER BY \
     users.created_at DESC LIMIT $2::INTEGER OFFSET $3::INTEGER",
    "select u1_0.id,u1_0.email,u1_0.name,r1_0.user_id,r1_1.id,r1_1.label from users u1_0 left join users_roles r1_0 on \
     u1_0.id=r1_0.user_id left join roles r1_1 on r1_1.id=r1_0.role_id where u1_0.email=$1 and u1_0.deleted_at is null",
    "SELECT \"users\".* FROM \"users\" WHERE \"users\".\"id\" IN ($1, $2, $3, $4, $5) AND EXISTS (SELECT 1 FROM posts WHERE \
     posts.author_id = \"users\".id AND posts.state = 'published') ORDER BY \"users\".\"id\" ASC",
    "SELECT \"public\".\"users\".\"id\", \"public\".\"users\".\"email\" FROM \"public\".\"users\" WHERE (1=1 AND \
     \"public\".\"users\".\"email\" = $1) LIMIT $2 OFFSET $3",
    "SELECT date_trunc('day', users.created_at) AS day, count(DISTINCT users.id), coalesce(sum(o.total), 0) FROM users \
     JOIN orders o ON o.user_id = users.id WHERE users.created_at BETWEEN $1 AND $2 GROUP BY 1 HAVING count(*) > 5 ORDER BY 1",
];

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    targets = classify
}

fn main() {
    let picked = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    if picked.as_deref().is_none_or(|word| "catalog".contains(word)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(load_of_a_large_catalog());
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
