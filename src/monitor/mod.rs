//! What the nodes are and where they are: samples of positions for the sessions' marks, probes for the
//! control loop, and the pure judgements over them.
//!
//! Promises: asking costs the same however many sessions there are; every question has a deadline; a
//! node that does not answer costs one task some waiting and nobody else anything. Deliberately does
//! not decide who is the primary or who may serve: that is `control`.

pub mod clock;
pub mod floor;
pub mod gap;
pub mod health;
pub mod lag;
pub mod probe;
mod received;
pub mod replay;
pub mod sample;
pub mod stream;
pub mod watch;

pub use received::ReceivedTimeline;
