//! A libpq connection string, as `primary_conninfo` holds it: read, changed in a few places, written again.
//! Pure.
//!
//! Promises: what is not changed keeps its value, whatever it is (a password, certificates, options of a later
//! libpq); nothing here prints a value ([`Conninfo`] has no `Display`, and its `Debug` shows keywords only).

use std::fmt;

/// Keywords and values, in the order of the text.
#[derive(Clone, PartialEq, Eq)]
pub struct Conninfo {
    parts: Vec<(String, String)>,
}

impl fmt::Debug for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keywords: Vec<&str> = self.parts.iter().map(|(keyword, _)| keyword.as_str()).collect();
        write!(f, "Conninfo({})", keywords.join(" "))
    }
}

/// The text is not a connection string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidConninfo;

impl fmt::Display for InvalidConninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a connection string of libpq's")
    }
}

impl std::error::Error for InvalidConninfo {}

impl Conninfo {
    /// Reads either form: `host=a port=1`, or `postgresql://user@a:1/?sslmode=require`.
    pub fn parse(text: &str) -> Result<Conninfo, InvalidConninfo> {
        match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
            Some(rest) => parse_uri(rest),
            None => parse_keywords(text),
        }
        .map(|parts| Conninfo { parts })
    }

    /// The value of `keyword`; the last one where there are several, as libpq takes it.
    pub fn get(&self, keyword: &str) -> Option<&str> {
        self.parts.iter().rev().find(|(its, _)| its == keyword).map(|(_, value)| value.as_str())
    }

    /// Sets `keyword`, in its old place if it has one.
    pub fn set(&mut self, keyword: &str, value: &str) {
        match self.parts.iter().position(|(its, _)| its == keyword) {
            Some(at) => {
                self.parts[at].1 = value.to_owned();
                let mut index = 0;
                self.parts.retain(|(its, _)| {
                    index += 1;
                    index - 1 <= at || its != keyword
                });
            }
            None => self.parts.push((keyword.to_owned(), value.to_owned())),
        }
    }

    /// Leaves `keyword` out.
    pub fn remove(&mut self, keyword: &str) {
        self.parts.retain(|(its, _)| its != keyword);
    }

    /// The same, but to this server: host and port only. An address that stood beside the host name would win
    /// over it, so it goes.
    pub fn towards(mut self, host: &str, port: u16) -> Conninfo {
        self.remove("hostaddr");
        self.set("host", host);
        self.set("port", &port.to_string());
        self
    }

    /// The same, with a `connect_timeout` that differs: the server takes it for another string, and connects anew.
    pub fn kicked(mut self) -> Conninfo {
        let before = self.get("connect_timeout").and_then(|text| text.parse::<u32>().ok()).unwrap_or(10);
        // Two values in turn, so that many kicks do not walk away from what was configured; libpq's least is 2.
        self.set("connect_timeout", &(before.max(2) ^ 1).max(2).to_string());
        self
    }

    /// As keywords and values, which is what `primary_conninfo` usually is.
    pub fn text(&self) -> String {
        let quote = |value: &str| {
            let plain = !value.is_empty()
                && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./:,@%+*".contains(&b));
            if plain {
                return value.to_owned();
            }
            format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
        };
        let parts: Vec<String> =
            self.parts.iter().map(|(keyword, value)| format!("{keyword}={}", quote(value))).collect();
        parts.join(" ")
    }
}

type Parts = Vec<(String, String)>;

fn parse_keywords(text: &str) -> Result<Parts, InvalidConninfo> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (keyword, value) = rest.split_once('=').ok_or(InvalidConninfo)?;
        let keyword = keyword.trim_end();
        if keyword.is_empty() || !keyword.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(InvalidConninfo);
        }
        let (value, after) = take_value(value.trim_start())?;
        parts.push((keyword.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(parts)
}

/// One value, quoted or not, and what follows it.
fn take_value(text: &str) -> Result<(String, &str), InvalidConninfo> {
    let (quoted, body) = match text.strip_prefix('\'') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let mut value = String::new();
    let mut characters = body.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => value.push(characters.next().ok_or(InvalidConninfo)?.1),
            '\'' if quoted => return Ok((value, &body[at + 1..])),
            c if !quoted && c.is_ascii_whitespace() => return Ok((value, &body[at..])),
            c => value.push(c),
        }
    }
    if quoted { Err(InvalidConninfo) } else { Ok((value, "")) }
}

fn parse_uri(rest: &str) -> Result<Parts, InvalidConninfo> {
    let mut parts = Vec::new();
    let (rest, parameters) = rest.split_once('?').map_or((rest, None), |(a, b)| (a, Some(b)));
    let (authority, database) = rest.split_once('/').map_or((rest, ""), |(a, b)| (a, b));
    let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(a, b)| (a, b));
    let (user, password) = login.split_once(':').map_or((login, ""), |(a, b)| (a, b));
    let (host_list, port_list) = split_hosts(hosts);
    for (keyword, value) in [
        ("user", user),
        ("password", password),
        ("host", &host_list),
        ("port", &port_list),
        ("dbname", database),
    ] {
        if !value.is_empty() {
            parts.push((keyword.to_owned(), percent_decoded(value)?));
        }
    }
    for parameter in parameters.unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        let (keyword, value) = parameter.split_once('=').ok_or(InvalidConninfo)?;
        parts.push((percent_decoded(keyword)?, percent_decoded(value)?));
    }
    Ok(parts)
}

/// `a:1,[::1]:2` as two lists, `a,::1` and `1,2`.
fn split_hosts(hosts: &str) -> (String, String) {
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[').and_then(|h| h.split_once(']')) {
            Some((address, port)) => (address, port.trim_start_matches(':')),
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(name);
        ports.push(port);
    }
    let ports = if ports.iter().all(|port| port.is_empty()) { String::new() } else { ports.join(",") };
    (names.join(","), ports)
}

fn percent_decoded(text: &str) -> Result<String, InvalidConninfo> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|d| std::str::from_utf8(d).ok()).ok_or(InvalidConninfo)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| InvalidConninfo)?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| InvalidConninfo)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn another_server_changes_host_and_port_and_nothing_else() {
        for (before, after) in [
            (
                "host=a port=5432 user=r password='it''s' sslmode=require",
                // A doubled quote ends one value in libpq too, and what follows is not a keyword.
                "",
            ),
            (
                r"user=r password='it\'s \\ so' host=a hostaddr=10.0.0.1 application_name=b",
                r"user=r password='it\'s \\ so' host=new application_name=b port=6000",
            ),
            ("  host = a   port = 1 user = r ", "host=new port=6000 user=r"),
            ("host=a,b port=1,2 user=r host=c", "host=new port=6000 user=r"),
            (
                "postgresql://r:p%20w@a:1,b:2/db?sslmode=require&application_name=x",
                "user=r password='p w' host=new port=6000 dbname=db sslmode=require application_name=x",
            ),
            ("postgres://r@[::1]/", "user=r host=new port=6000"),
            ("", "host=new port=6000"),
        ] {
            let parsed = Conninfo::parse(before);
            match after {
                "" => assert_eq!(parsed, Err(InvalidConninfo), "{before}"),
                after => assert_eq!(parsed.unwrap().towards("new", 6000).text(), after, "{before}"),
            }
        }
    }

    #[test]
    fn a_kick_changes_the_text_and_two_kicks_restore_it() {
        for text in ["host=a connect_timeout=5", "host=a", "host=a connect_timeout=2"] {
            let before = Conninfo::parse(text).unwrap();
            let once = before.clone().kicked();
            assert_ne!(once.text(), before.text());
            let timeout: u32 = once.get("connect_timeout").unwrap().parse().unwrap();
            assert!(timeout >= 2);
            let twice = once.clone().kicked();
            assert_ne!(twice.text(), once.text());
            assert_eq!(twice.clone().kicked().text(), once.text());
        }
    }

    #[test]
    fn its_debug_form_shows_no_value() {
        let conninfo = Conninfo::parse("host=secret-host password=hunter2").unwrap();
        assert_eq!(format!("{conninfo:?}"), "Conninfo(host password)");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_the_same(parts in proptest::collection::vec(("[a-z_]{1,12}", ".{0,20}"), 0..6)) {
            let conninfo = Conninfo { parts };
            prop_assert_eq!(Conninfo::parse(&conninfo.text()), Ok(conninfo));
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,80}") {
            let _ = Conninfo::parse(&text);
            let _ = Conninfo::parse(&format!("postgresql://{text}"));
        }
    }
}
