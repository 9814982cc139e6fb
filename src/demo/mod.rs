//! A private cluster, for a first look and for tests.

pub mod cluster;
pub mod port;
