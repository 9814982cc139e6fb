//! The proxy on real servers: one binary, one fixture, a file per part. A test's name is the promise
//! it keeps.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "end_to_end/fixture.rs"]
mod fixture;
#[path = "end_to_end/private_cluster.rs"]
mod private_cluster;
