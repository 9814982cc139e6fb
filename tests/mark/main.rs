//! The mark, without servers: stories (`scenarios`), and a model of a cluster in which sessions go by
//! its verdicts (`model`).
#![allow(clippy::unwrap_used, missing_docs)]

mod healthy;
mod model;
mod scenarios;
