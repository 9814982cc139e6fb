//! Failover without servers: stories of the machine (`scenarios`), and a model of nodes, clients and a
//! proxy that tries to break it (`model`).
#![allow(clippy::unwrap_used, missing_docs)]

mod hands;
mod model;
mod nodes;
mod plan;
mod proxy;
mod scenarios;
mod schedules;
mod world;
