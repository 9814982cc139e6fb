//! What a classification costs: a hit by whole text, a hit by skeleton, and the scan of a text that is not a read.
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
        unit_hold: 65_536,
        statement_text: 65_536,
        statements_per_session: 100,
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
}

criterion_group!(benches, classify);
criterion_main!(benches);
