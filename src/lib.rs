//! Highwater: a transparent PostgreSQL replication proxy.
//!
//! Contents page, in the order in which a byte meets the modules. `docs/ARCHITECTURE.md` has the map.
#![cfg_attr(test, allow(clippy::unwrap_used))]

// What the other parts lean on.
pub mod config;
pub mod consistency;
pub mod log;
pub mod metrics;
pub mod wal;
pub mod wire;
// The way of a statement.
pub mod backend;
pub mod classify;
pub mod client;
pub mod listener;
pub mod route;
pub mod session;
// Secrets and sockets of both sides of the wire.
pub mod login;
pub mod net;
pub mod scram;
// The way of the cluster.
pub mod catalogs;
pub mod control;
pub mod etcd;
pub mod failover;
pub mod gate;
pub mod monitor;
pub mod node;
pub mod positions;
pub mod topology;
// The way of the operator.
pub mod admin;
pub mod check;
pub mod console;
pub mod demo;
pub mod explain;
pub mod healthcheck;
pub mod manual;
pub mod progress;
pub mod rejoin;
pub mod reload;
pub mod server;
pub mod supervisor;
