//! Failover: what is done about a primary that is lost, and how one is exchanged for another.
//!
//! How the pieces fit. [`decide::Machine`] decides, and does nothing: [`event::Event`]s and the time go in,
//! [`event::Action`]s come out. `control` is its shell: it feeds probes and the results of orders, and carries
//! actions out *in the order given*. An [`event::Action::Record`] is on disk before anything behind it begins;
//! when it cannot be written, what is behind it is dropped and the machine is told
//! ([`event::Event::RecordFailed`]). An [`event::Action::Order`] is something to be done on one node; orders run
//! beside each other, each ends in exactly one [`event::Event::OrderDone`], and `Unknown` is a result: its statement
//! may yet take effect. After a restart the machine is made from the [`record::Record`] and goes on where it was.
//!
//! | file | what it holds |
//! |---|---|
//! | `event` | what goes in and out: facts, orders, results, commands, states |
//! | `decide` | [`decide::Machine`]: the states and the order of steps |
//! | `detect` | whether the primary is gone: hard and soft evidence, what the standbys say |
//! | `command` | what operators ask for, and are told |
//! | `candidate` | who is promoted, or why nobody is |
//! | `record` | what must survive a crash of the proxy |
//! | `sync` | whose confirmation commits wait for, and what may be promised meanwhile (I9) |
//! | `text` | the record as lines of text, nodes by name |
//! | `store` | those on disk, and how standbys were configured before they were cut off |
//! | `orders` | each order as SQL on its node |
//! | `preconditions` | what nodes must grant and be set to, asked in advance |
//! | `recipe` | how a node becomes a replica again, for an operator |
//! | `keeper` | looks and statements for `sync` |
//! | `slots` | which replication slots nodes should have |
//! | `slot_keeper` | looks and statements for that |
//! | `shell` | carries out what the machine decides |
//! | `lease` | what several proxies tell each other, and what follows from it |
//! | `coordination` | this proxy among several: its lease in etcd, and whether it leads |
//! | `several` | the shell of a proxy that is one of several |
//! | `conninfo` | `primary_conninfo`, changed in host and port only |
//!
//! Promises (the invariants' numbers are those of docs/FAILOVER.md): one write target per epoch, each epoch durable
//! before a promotion is sent (I1); no promotion before all sockets of the old epoch are closed (I2) and every
//! reachable standby is cut off from the old primary (I3); with `durability: quorum` no acknowledged commit is left
//! behind (I4, I11); no second candidate after a promotion that may have begun (I6). Deliberately does not: ask
//! nodes, keep time, write files, or know sessions.

pub mod candidate;
mod command;
pub mod conninfo;
pub mod coordination;
pub mod decide;
pub mod detect;
pub mod event;
pub mod keeper;
pub mod lease;
pub mod orders;
pub mod preconditions;
pub mod recipe;
pub mod record;
pub mod shell;
pub mod slot_keeper;
pub mod slots;
pub mod store;
pub mod sync;
#[cfg(test)]
mod tests;
pub mod text;
