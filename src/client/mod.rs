//! A client's side of the wire, up to the point where its session begins.
//!
//! [`startup`] reads what comes before the login, [`auth`] runs the login, [`verifiers`] knows who may
//! log in. Deliberately not here: what happens after AuthenticationOk.

pub mod auth;
pub mod startup;
pub mod verifiers;
