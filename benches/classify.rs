//! What a classification costs: a hit by whole text, a hit by skeleton, the scan of texts never seen, and the second
//! opinion with its way to the parser's thread and back.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use highwater::classify::catalog::CatalogRows;
use highwater::classify::{Catalog, Classifier, Lexing, Lookup, Statement};
use highwater::config::LimitsConfig;

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
    if let Lookup::Ask(question) = lookup(ORM) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(classifier.ask(question));
    }
    c.bench_function("hit by whole text", |b| b.iter(|| lookup(black_box(ORM))));
    let texts: Vec<String> = (0..100_000).map(|n| ORM.replace("20", &n.to_string())).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("hit by skeleton", |b| b.iter(|| lookup(black_box(next.next().expect("cycles")))));
    // Another name in each text, so that neither table knows it: hashing, scan and two look-ups that miss.
    let unseen = |n: usize| SHAPES[n % SHAPES.len()].replace("users", &format!("users{n}"));
    let texts: Vec<String> = (0..200_000).map(unseen).collect();
    let mut next = texts.iter().cycle();
    c.bench_function("scan of an unseen text", |b| {
        b.iter(|| lookup(black_box(next.next().expect("cycles"))))
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut n = 200_000;
    c.bench_function("second opinion", |b| {
        b.iter_batched(
            || {
                n += 1;
                lookup(&unseen(n))
            },
            |found| match found {
                Lookup::Ask(question) => Some(runtime.block_on(classifier.ask(question))),
                Lookup::Known(..) => None,
            },
            criterion::BatchSize::SmallInput,
        )
    });
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

criterion_group!(benches, classify);
criterion_main!(benches);
