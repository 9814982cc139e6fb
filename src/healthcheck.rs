//! `highwater healthcheck`: asks a running proxy how it is, so that an image needs no other program for it.
//!
//! Promises: one request, bounded in time and size; no token is needed for what it asks.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 16 * 1024;

/// Asks the proxy whose `http` is `address`: whether it lives or, with `ready`, whether it should be sent
/// clients. Its words, or why it is not well.
pub fn ask(address: &str, ready: bool) -> Result<String, String> {
    let deadline = Instant::now() + TIME;
    let path = if ready { "/readyz" } else { "/healthz" };
    let failed = |what: &str, cause: &dyn std::fmt::Display| format!("{address}: {what}: {cause}");
    let mut stream = connect(address)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: highwater\r\nConnection: close\r\n\r\n");
    stream.set_write_timeout(Some(TIME)).map_err(|e| failed("cannot set a timeout", &e))?;
    stream.write_all(request.as_bytes()).map_err(|e| failed("cannot be asked", &e))?;
    let mut answer = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("does not answer", &format_args!("nothing whole within {TIME:?}")));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| failed("cannot set a timeout", &e))?;
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk).map_err(|e| failed("does not answer", &e))? {
            0 => break,
            read if answer.len() + read > MAX_ANSWER => {
                return Err(failed("does not answer as a Highwater", &"too long"));
            }
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    let (status, body) =
        read_answer(&answer).ok_or_else(|| failed("does not speak HTTP", &"another service?"))?;
    if status == 200 { Ok(body.to_owned()) } else { Err(failed(&format!("HTTP {status}"), &body)) }
}

fn read_answer(answer: &str) -> Option<(u16, &str)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.trim()))
}

/// Each of the name's addresses in turn; an address that means all of this machine's: its loopback.
fn connect(address: &str) -> Result<TcpStream, String> {
    let found = address.to_socket_addrs().map_err(|e| format!("{address}: {e}"))?;
    let mut last = format!("{address}: no address");
    for mut one in found {
        if one.ip().is_unspecified() {
            one.set_ip(match one {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        match TcpStream::connect_timeout(&one, TIME) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = format!("{one}: {e}"),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One connection, answered with `what` whatever it asks.
    fn server(what: &'static str) -> (u16, std::thread::JoinHandle<String>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 1024];
            let read = stream.read(&mut asked).unwrap();
            let _ = stream.write_all(what.as_bytes());
            String::from_utf8_lossy(&asked[..read]).into_owned()
        });
        (port, thread)
    }

    #[test]
    fn well_is_said_only_by_a_200() {
        let (port, thread) = server("HTTP/1.1 200 OK\r\nx: y\r\n\r\nready\n");
        // As an address that a listener is given.
        assert_eq!(ask(&format!("0.0.0.0:{port}"), true), Ok("ready".to_owned()));
        assert!(thread.join().unwrap().starts_with("GET /readyz "));
        let (port, thread) = server("HTTP/1.1 503 No\r\n\r\nnot ready: draining\n");
        let error = ask(&format!("127.0.0.1:{port}"), false).unwrap_err();
        assert!(error.ends_with("HTTP 503: not ready: draining"), "{error}");
        assert!(thread.join().unwrap().starts_with("GET /healthz "));
        for nonsense in ["SSH-2.0-x\r\n", "", "HTTP/1.1 two hundred\r\n\r\n"] {
            let (port, _thread) = server(nonsense);
            assert!(ask(&format!("127.0.0.1:{port}"), true).is_err(), "{nonsense}");
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(ask(&format!("127.0.0.1:{port}"), true).unwrap_err().contains("refused"));
    }
}
