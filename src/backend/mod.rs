//! (placeholder of the skeleton)

pub mod login;
