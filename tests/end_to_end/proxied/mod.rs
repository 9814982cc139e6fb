//! What is promised to those who connect to the proxy.

mod cancel;
mod consistency;
mod drivers;
mod faults;
mod garbage;
mod leaks;
mod login;
mod notifications;
mod operator;
mod pins;
mod protocol;
mod relay;
mod routing;
mod tools;
mod traps;
