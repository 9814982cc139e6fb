//! What is promised to those who connect to the proxy.

mod cancel;
mod consistency;
mod drivers;
mod faults;
mod garbage;
mod histories;
mod leaks;
mod levels;
mod limits;
mod login;
mod notifications;
mod operator;
mod pins;
mod pooling;
mod prepared;
mod protocol;
mod read_only;
mod relay;
mod replication;
mod routing;
mod settings;
mod sizes;
mod split;
mod startup;
mod tools;
mod traps;
