//! TCP ports that stay ours for as long as we say, whether or not a server listens on them.
//!
//! The trick: a socket bound without `SO_REUSEADDR` claims the port against everybody, and setting
//! the option afterwards lets the one server we start bind beside it (PostgreSQL, std and tokio all
//! set it). The socket never listens, so a connection made while the server is down is refused, as
//! it should be; and nobody takes the port between a crash and the restart.
//!
//! Promises: no two holders in any process of the machine have the same port; all are below 32768,
//! where Linux starts to give ports to outgoing connections. Does not reserve beyond 127.0.0.1.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use rand::RngExt;
use socket2::{Domain, Socket, Type};

/// Where ports are looked for: above the well-known ones, below the ephemeral ones.
const RANGE: std::ops::Range<u16> = 10_000..32_000;

/// How many ports are tried before giving up.
const ATTEMPTS: usize = 500;

/// A port on 127.0.0.1 that only servers we start will get; free again when dropped.
#[derive(Debug)]
pub struct ReservedPort {
    number: u16,
    _holder: Socket,
}

impl ReservedPort {
    /// Claims a free port. Fails when several hundred random ones are all taken, or with the
    /// system's own error when sockets cannot be made.
    pub fn claim() -> io::Result<ReservedPort> {
        let mut rng = rand::rng();
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..ATTEMPTS {
            match ReservedPort::claim_number(rng.random_range(RANGE)) {
                Ok(port) => return Ok(port),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Claims this port, or fails with `AddrInUse`.
    pub fn claim_number(number: u16) -> io::Result<ReservedPort> {
        let holder = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        holder.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, number)).into())?;
        holder.set_reuse_address(true)?;
        Ok(ReservedPort { number, _holder: holder })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_port_is_refused_to_others_and_open_to_our_server() {
        let port = ReservedPort::claim().unwrap();
        assert!(port.number() < 32768);
        let again = ReservedPort::claim_number(port.number()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);

        let address = (Ipv4Addr::LOCALHOST, port.number());
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let server = std::net::TcpListener::bind(address).unwrap();
        std::net::TcpStream::connect(address).unwrap();
        drop(server);
        // A restart gets it back while connections of the last run may linger.
        std::net::TcpListener::bind(address).unwrap();
    }
}
