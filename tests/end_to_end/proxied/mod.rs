//! What is promised to those who connect to the proxy.

mod cancel;
mod consistency;
mod drivers;
mod faults;
mod garbage;
mod login;
mod operator;
mod protocol;
mod relay;
mod routing;
mod sizes;
mod tools;
mod traps;
