//! The proxy on real servers: one binary, one fixture, a file per part. A test's name is the promise
//! it keeps.
#![allow(clippy::unwrap_used, missing_docs)]

mod allow_lists;
mod browser;
mod errors;
mod etcd;
mod extension_users;
mod fixture;
mod fixture_holds;
mod history;
mod orders;
mod private_cluster;
mod proxied;
mod rejoin;
