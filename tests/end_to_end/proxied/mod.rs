//! What is promised to those who connect to the proxy.

mod cancel;
mod consistency;
mod drivers;
mod faults;
mod garbage;
mod limits;
mod login;
mod operator;
mod pooling;
mod protocol;
mod read_only;
mod relay;
mod replication;
mod routing;
mod startup;
mod tools;
mod traps;
