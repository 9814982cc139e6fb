//! `failover.coordination`: whether several proxies share the cluster, and by what they agree.

use std::path::PathBuf;
use std::time::Duration;

use super::{FailoverMode, Reader, Secret, Section};

/// The part of a lease that is not used: writes stop so much of it before its end.
const MARGIN: u32 = 10;

/// How several proxies over one cluster agree: by etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoordinationConfig {
    /// Where etcd answers, tried in turn.
    pub endpoints: Vec<Endpoint>,
    /// Under which keys: the same for all proxies of one cluster, and no other's. Without a slash at the end.
    pub prefix: String,
    /// What this proxy is called in logs and answers.
    pub name: String,
    /// A proxy that has not been heard of for so long counts as gone; it has stopped writes before that.
    pub ttl: Duration,
    /// How long one request may take.
    pub timeout: Duration,
    /// How often etcd is asked.
    pub interval: Duration,
    /// Who logs in; `None`: nobody does.
    pub user: Option<String>,
    /// The password.
    pub password: Option<Secret>,
    /// Root certificates for `https`; `None`: the system's.
    pub ca: Option<PathBuf>,
}

/// One member of etcd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// `https`.
    pub tls: bool,
}

impl Endpoint {
    /// Of `http://host:port` or `https://host:port`.
    pub fn parse(text: &str) -> Option<Endpoint> {
        let (tls, rest) = match text.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix("http://")?),
        };
        let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let good = !host.is_empty()
            && !host.contains(|c: char| c.is_whitespace() || c == '/' || c == '@')
            && (bracketed.is_some() || !host.contains(':'));
        good.then_some(Endpoint { host: host.to_owned(), port: port.parse().ok()?, tls })
    }
}

impl CoordinationConfig {
    /// So long before the end of the lease writes stop: for clocks that go at different speeds.
    pub fn margin(&self) -> Duration {
        self.ttl / MARGIN
    }
}

impl Reader<'_> {
    /// `None`: one proxy, which keeps what it does in `state_dir`.
    pub(super) fn coordination(
        &mut self,
        failover: &Section<'_>,
        mode: FailoverMode,
        state_dir: bool,
    ) -> Option<CoordinationConfig> {
        let section = self.nested(failover, "coordination", "failover.coordination");
        let etcd = self.choice(&section, "kind", &[("file", false), ("etcd", true)], &[], false);
        let mut endpoints = Vec::new();
        for (tree, trail) in self.list(&section, "endpoints") {
            match self.text_of(tree, &trail).map(|text| Endpoint::parse(&text)) {
                Some(Some(endpoint)) => endpoints.push(endpoint),
                Some(None) => self.wrong(&trail, "expected http://host:port or https://host:port"),
                None => {}
            }
        }
        let prefix = self.text_or_null(&section, "prefix");
        let name = self.text_or_null(&section, "name").or_else(host_name);
        let seconds = Duration::from_secs;
        let ttl = self.time_within(&section, "ttl", seconds(10), seconds(2)..=seconds(300));
        let least = Duration::from_millis(10);
        let (request, ask) = (seconds(1).min(ttl / 4), Duration::from_millis(100));
        let timeout = self.time_within(&section, "timeout", request, least..=ttl / 4);
        let interval = self.time_within(&section, "interval", ask, least..=ttl / 10);
        let (user, password) = (self.text_or_null(&section, "user"), self.secret(&section, "password"));
        let ca = self.path(&section, "ca");
        let at = |key: &str| section.get(key).map_or(section.trail.clone(), |(_, trail)| trail);
        if !etcd {
            if !endpoints.is_empty() {
                self.wrong(&at("endpoints"), "`kind: file` is for one proxy and asks nobody: `kind: etcd`?");
            }
            return None;
        }
        if ttl.subsec_nanos() != 0 {
            self.wrong(&at("ttl"), "etcd counts leases in whole seconds");
        }
        if endpoints.is_empty() {
            self.wrong(&at("endpoints"), "`kind: etcd` needs at least one of `endpoints`");
        }
        if user.is_some() != password.is_some() {
            self.wrong(&at("user"), "a user needs a password, and a password a user");
        }
        if mode == FailoverMode::Off {
            self.wrong(&at("kind"), "with `mode: off` nobody is promoted, and there is nothing to agree on");
        }
        if state_dir {
            self.wrong(&at("kind"), "with `kind: etcd` the record is in etcd: take failover.state_dir out");
        }
        let whole = |prefix: &String| prefix.starts_with('/') && !prefix.ends_with('/');
        let Some(prefix) = prefix.filter(whole) else {
            let what = "`kind: etcd` needs a `prefix` of this cluster's own, for example /highwater/orders";
            self.wrong(&at("prefix"), what);
            return None;
        };
        let Some(name) = name.filter(|name| !name.contains('/')) else {
            self.wrong(&at("name"), "a name for this proxy is missing (without a slash)");
            return None;
        };
        Some(CoordinationConfig { endpoints, prefix, name, ttl, timeout, interval, user, password, ca })
    }

    fn text_or_null(&mut self, section: &Section<'_>, key: &str) -> Option<String> {
        match section.get(key) {
            Some((super::Tree::Null, _)) => None,
            _ => self.text(section, key),
        }
    }
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(failover: &str) -> Result<Option<CoordinationConfig>, String> {
        let text =
            format!("control: {{ user: u }}\nnodes: [ {{ name: a, host: h }} ]\nfailover: {{ {failover} }}");
        Config::parse(&text, "f.yaml", &|_| None)
            .map(|config| config.failover.coordination)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn several_proxies_are_configured_whole_or_refused() {
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("coordination: { kind: file }").unwrap(), None);
        let etcd = "endpoints: ['http://10.0.0.1:2379', 'https://[::1]:2379/'], prefix: /highwater/x";
        let found = parse(&format!("mode: auto, coordination: {{ kind: etcd, name: p, {etcd} }}")).unwrap();
        let found = found.unwrap();
        let endpoint = |host: &str, tls| Endpoint { host: host.to_owned(), port: 2379, tls };
        assert_eq!(found.endpoints, [endpoint("10.0.0.1", false), endpoint("::1", true)]);
        assert_eq!((found.ttl, found.margin()), (Duration::from_secs(10), Duration::from_secs(1)));
        for (given, wrong) in [
            ("coordination: { endpoints: ['http://h:1'] }", "`kind: file` is for one proxy"),
            ("coordination: { kind: etcd, prefix: /x }", "needs at least one of `endpoints`"),
            ("coordination: { kind: etcd, endpoints: ['h:1'], prefix: /x }", "expected http://host:port"),
            ("coordination: { kind: etcd, endpoints: ['http://h:1'] }", "needs a `prefix`"),
            ("coordination: { kind: etcd, endpoints: ['http://h:1'], prefix: x/ }", "needs a `prefix`"),
            (&format!("coordination: {{ kind: etcd, {etcd}, ttl: 2500ms }}"), "whole seconds"),
            (&format!("coordination: {{ kind: etcd, {etcd}, ttl: 1s }}"), "expected a time from 2s"),
            (&format!("coordination: {{ kind: etcd, {etcd}, user: u }}"), "a user needs a password"),
            (&format!("coordination: {{ kind: etcd, {etcd} }}, mode: off"), "nothing to agree on"),
            (
                &format!("coordination: {{ kind: etcd, {etcd} }}, state_dir: /s"),
                "take failover.state_dir out",
            ),
            (&format!("coordination: {{ kind: etcd, {etcd}, name: a/b }}"), "a name for this proxy"),
        ] {
            let error = parse(given).unwrap_err();
            assert!(error.contains(wrong), "{given}: {error}");
        }
    }
}
