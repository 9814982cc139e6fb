//! What is promised to those who connect to the proxy.

mod cancel;
mod consistency;
mod drivers;
mod faults;
mod garbage;
mod histories;
mod leaks;
mod levels;
mod login;
mod notifications;
mod operator;
mod pins;
mod prepared;
mod protocol;
mod relay;
mod routing;
mod settings;
mod tools;
mod traps;
