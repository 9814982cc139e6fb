//! What the pure parts on a statement's way cost, beside the classification (bench `classify`): framing, the mark, and
//! which replica is picked. `cargo bench --bench pure`: half a minute.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use highwater::positions::{Late, Positions, Sample, SampleBody};
use highwater::route::balance::{Candidate, pick};
use highwater::session::mark::{Mark, ReplicaVerdict};
use highwater::topology::{Epoch, NodeId};
use highwater::wal::{Lsn, TimelineId};
use highwater::wire;

#[path = "../tests/mark/healthy.rs"]
mod healthy;

/// Publishes a sample of each node, all at one position.
fn sample(positions: &Positions, at: u64) {
    let late = Late { by: Duration::ZERO, rate: None, asked_at: Instant::now() };
    for id in 0..3 {
        let node = positions.node(NodeId(id));
        let body = match id {
            0 => SampleBody::Primary { insert: Lsn(at), floor: Lsn(at) },
            _ => SampleBody::Replica { receive: Some(Lsn(at)), replay: Lsn(at), late },
        };
        let (incarnation, timeline) = (node.incarnation(), TimelineId(1));
        positions.publish(
            NodeId(id),
            Sample { number: node.begin(), incarnation, epoch: Epoch(1), timeline, body },
        );
    }
}

/// Rows as a server sends them, one after another.
fn framing(c: &mut Criterion) {
    let mut rows = Vec::new();
    for _ in 0..1000 {
        wire::put(&mut rows, b'D', |out| {
            out.extend_from_slice(&[0, 1, 0, 0, 0, 4]);
            wire::put_cstr(out, b"row");
        });
    }
    let mut group = c.benchmark_group("framing");
    group.throughput(Throughput::Elements(1000));
    group.bench_function("1000 rows by their headers", |b| {
        b.iter(|| {
            let (mut at, mut count) = (0, 0);
            while let Ok(Some(header)) = wire::header(black_box(&rows[at..])) {
                at += header.len;
                count += 1;
            }
            count
        })
    });
    group.finish();
}

fn mark(c: &mut Criterion) {
    let (positions, topology) = (Positions::new(3), healthy::topology(&["n0", "n1", "n2"]));
    for id in 0..3 {
        positions.node(NodeId(id)).connected();
    }
    sample(&positions, 100);
    let replica = NodeId(1);
    let incarnation = positions.node(replica).incarnation();
    let mut resting = Mark::new(&positions, &topology);
    sample(&positions, 200);
    resting.absorb(&positions, &topology);
    assert!(matches!(resting.replica(&positions, &topology, replica), ReplicaVerdict::Serves { .. }));
    c.bench_function("mark: a read on a replica, from the question to the note", |b| {
        let mut mark = resting.clone();
        b.iter(|| {
            mark.absorb(&positions, &topology);
            let verdict = mark.replica(&positions, black_box(&topology), replica);
            let beside = Some(positions.node(NodeId(0)).counter());
            mark.replica_showed(positions.note(replica, Epoch(1)), incarnation, beside);
            verdict
        })
    });
    c.bench_function("mark: a sample resolves the note", |b| {
        let mut at = 1000;
        b.iter_batched(
            || {
                let mut mark = resting.clone();
                mark.primary_showed(positions.note(NodeId(0), Epoch(1)));
                at += 1;
                sample(&positions, at);
                mark
            },
            |mut mark| {
                mark.absorb(&positions, &topology);
                mark
            },
            criterion::BatchSize::SmallInput,
        )
    });
}

fn route(c: &mut Criterion) {
    for count in [2, 7] {
        let candidates: Vec<Candidate> = (1..=count)
            .map(|id| Candidate { node: NodeId(id), weight: 1, outstanding: u32::from(id), near: false })
            .collect();
        let mut chance: u64 = 1;
        c.bench_function(&format!("route: one of {count} replicas"), |b| {
            b.iter(|| {
                chance = chance.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                pick(black_box(&candidates), chance)
            })
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = framing, mark, route
}
criterion_main!(benches);
