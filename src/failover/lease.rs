//! Several proxies over one cluster: what they tell each other by keys in etcd, and what follows from it. Pure.
//!
//! | key | who writes it | what it says |
//! |---|---|---|
//! | `proxies/NAME/LEASE` | each proxy, with its lease | that it is there, and what it has acknowledged |
//! | `leader` | whoever makes it, with its lease | whose machine acts; its *token* is the revision that made it |
//! | `record` | the leader | the record, and which attempt its intent belongs to |
//! | `close` | the leader | the attempt for which all are to close their connections to the old primary |
//! | `upstreams/NODE` | the leader | how a standby was configured before it was cut off |
//!
//! What the leader writes, it writes on the condition that `leader` is still the one that it made, and that nobody
//! has changed the key since. A proxy may use the primary until its lease is nearly over by its own clock, counted from
//! before its last confirmed sign of life was *sent* ([`until`]): so when its key is gone from etcd, it has stopped.
//! A fence (I2) holds once everybody who is there has acknowledged it, and whoever has not is not there any more
//! ([`View::missing`]).

use std::time::Duration;

use crate::etcd::Entries;
use crate::failover::record::Record;

/// The names of the keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Under this prefix, which has no slash at its end.
    pub fn new(prefix: &str) -> Keys {
        Keys { prefix: format!("{prefix}/") }
    }

    /// Of all of them.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Who leads.
    pub fn leader(&self) -> String {
        format!("{}leader", self.prefix)
    }

    /// The record.
    pub fn record(&self) -> String {
        format!("{}record", self.prefix)
    }

    /// For which attempt to close.
    pub fn close(&self) -> String {
        format!("{}close", self.prefix)
    }

    /// How a standby was configured.
    pub fn upstream(&self, node: &str) -> String {
        format!("{}upstreams/{node}", self.prefix)
    }

    /// A proxy of this name, with this lease.
    pub fn proxy(&self, name: &str, lease: &str) -> String {
        format!("{}proxies/{name}/{lease}", self.prefix)
    }
}

/// The record as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The attempt that its intent belongs to.
    pub attempt: Option<String>,
    /// The record's lines.
    pub text: String,
    /// The revision that wrote it.
    pub revision: u64,
}

impl Kept {
    /// The key's value.
    pub fn value(attempt: Option<&str>, text: &str) -> String {
        format!("attempt {}\n{text}", attempt.unwrap_or("-"))
    }

    fn read(value: &str, revision: u64) -> Option<Kept> {
        let (attempt, text) = value.strip_prefix("attempt ")?.split_once('\n')?;
        let attempt = Some(attempt.to_owned()).filter(|attempt| attempt != "-");
        Some(Kept { attempt, text: text.to_owned(), revision })
    }
}

/// The leader's word to close.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// For which attempt.
    pub attempt: String,
    /// Which word it is: a later one is to be acknowledged by itself.
    pub revision: u64,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its key under `proxies`.
    pub proxy: String,
    /// The revision that made it the leader.
    pub token: u64,
}

impl Leader {
    /// Its name.
    pub fn name(&self) -> &str {
        self.proxy.split('/').next().unwrap_or_default()
    }
}

/// A proxy that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `NAME/LEASE`.
    pub proxy: String,
    /// What it has acknowledged.
    pub said: Said,
}

/// What a proxy acknowledges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Nobody is in a transaction on the primary any more, in this attempt.
    pub drained: Option<String>,
    /// The latest word to close that it has followed: none of its connections to the old primary is there.
    pub closed: u64,
    /// No node answers it.
    pub away: bool,
}

impl Said {
    /// The key's value.
    pub fn value(&self) -> String {
        let away = if self.away { " away" } else { "" };
        format!("{} {}{away}", self.drained.as_deref().unwrap_or("-"), self.closed)
    }

    fn read(value: &str) -> Option<Said> {
        let mut words = value.split(' ');
        let drained = words.next().filter(|drained| *drained != "-").map(str::to_owned);
        let closed = words.next()?.parse().ok()?;
        let away = match (words.next(), words.next()) {
            (None, _) => false,
            (Some("away"), None) => true,
            _ => return None,
        };
        Some(Said { drained, closed, away })
    }
}

/// Something that all proxies are to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To let transactions end, in this attempt.
    Drained(String),
    /// To follow the word to close of this revision.
    Closed(u64),
}

/// All keys, at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Which.
    pub revision: u64,
    /// Who leads.
    pub leader: Option<Leader>,
    /// The record; `None`: there is none yet.
    pub record: Option<Kept>,
    /// The latest word to close.
    pub close: Option<Close>,
    /// Who is there.
    pub peers: Vec<Peer>,
    /// How standbys were configured: node, value.
    pub upstreams: Vec<(String, String)>,
}

impl View {
    /// What the keys say. `Err`: which of them was not written by this version.
    pub fn read(keys: &Keys, entries: &Entries) -> Result<View, String> {
        let mut view = View { revision: entries.revision, ..View::default() };
        for entry in &entries.entries {
            let damaged = || format!("the key {} cannot be read", entry.key);
            let name = entry.key.strip_prefix(keys.prefix()).ok_or_else(damaged)?;
            match name.split_once('/') {
                None if name == "leader" => {
                    view.leader = Some(Leader { proxy: entry.value.clone(), token: entry.created });
                }
                None if name == "record" => {
                    view.record = Some(Kept::read(&entry.value, entry.modified).ok_or_else(damaged)?);
                }
                None if name == "close" => {
                    view.close = Some(Close { attempt: entry.value.clone(), revision: entry.modified });
                }
                Some(("proxies", proxy)) => {
                    let said = Said::read(&entry.value).ok_or_else(damaged)?;
                    view.peers.push(Peer { proxy: proxy.to_owned(), said });
                }
                Some(("upstreams", node)) => view.upstreams.push((node.to_owned(), entry.value.clone())),
                _ => return Err(damaged()),
            }
        }
        Ok(view)
    }

    /// Who is there but `own`, and has not done it yet. Nobody: it is done everywhere.
    pub fn missing(&self, own: &str, step: &Step) -> Vec<&str> {
        let has = |said: &Said| match step {
            Step::Drained(attempt) => said.drained.as_ref() == Some(attempt),
            // Who looks at an older state than that of the word does not know who was there then.
            Step::Closed(revision) => said.closed >= *revision,
        };
        let late = self.peers.iter().filter(|peer| peer.proxy != own && !has(&peer.said));
        late.map(|peer| peer.proxy.as_str()).collect()
    }

    /// Whether nobody is missing, as far as can be known at this revision.
    pub fn is_done(&self, own: &str, step: &Step) -> bool {
        let known = !matches!(step, Step::Closed(revision) if self.revision < *revision);
        known && self.missing(own, step).is_empty()
    }
}

/// Whether `own` is not to lead: no node answers it, and there are others whom one answers. Where that holds for all, the nodes
/// are what is gone, and another leader would see no more.
pub fn yields(own: &str, said: &Said, peers: &[Peer]) -> bool {
    said.away && peers.iter().any(|peer| peer.proxy != own && !peer.said.away)
}

/// Until when a proxy may use the primary that sent its last confirmed sign of life at `sent`.
pub fn until(sent: Duration, ttl: Duration, margin: Duration) -> Duration {
    sent + ttl.saturating_sub(margin)
}

/// What a proxy that does not lead lets its sessions do, by the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// To go to the primary.
    Open,
    /// To end their transactions there, and begin none: acknowledged as [`Said::drained`].
    Draining(String),
    /// Nothing; connections to it are closed, and that is acknowledged if the leader asks for it.
    Closed(Option<u64>),
    /// The same, as the record cannot be read: whatever may be asked in this attempt is acknowledged.
    Away(Option<String>, Option<u64>),
}

/// See [`Wanted`]. `attempt` is the one of the record's intent.
pub fn wanted(record: &Record, attempt: Option<&str>, close: Option<&Close>) -> Wanted {
    let asked = close.filter(|close| Some(close.attempt.as_str()) == attempt).map(|close| close.revision);
    match (&record.intent, attempt) {
        (Some(intent), Some(attempt)) if intent.planned && asked.is_none() => {
            Wanted::Draining(attempt.to_owned())
        }
        (Some(_), _) => Wanted::Closed(asked),
        // It has not been opened again after a switchover that was undone.
        (None, _) if record.primary.is_some_and(|primary| record.fenced.contains(&primary)) => {
            Wanted::Closed(None)
        }
        (None, _) => Wanted::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::Entry;
    use crate::failover::record::{Intent, Stage};
    use crate::topology::{Epoch, NodeId};
    use proptest::prelude::*;

    fn entry(key: String, value: &str, created: u64, modified: u64) -> Entry {
        Entry { key, value: value.to_owned(), created, modified }
    }

    fn peer(proxy: &str, drained: Option<&str>, closed: u64) -> Peer {
        let drained = drained.map(str::to_owned);
        Peer { proxy: proxy.to_owned(), said: Said { drained, closed, away: false } }
    }

    #[test]
    fn what_is_written_is_read_the_same() {
        let keys = Keys::new("/highwater/x");
        let said = Said { drained: Some("7.1".to_owned()), closed: 12, away: true };
        let entries = vec![
            entry(keys.close(), "7.1", 8, 12),
            entry(keys.leader(), "p1/aa", 7, 7),
            entry(keys.proxy("p1", "aa"), &Said::default().value(), 3, 3),
            entry(keys.proxy("p2", "bb"), &said.value(), 4, 13),
            entry(keys.record(), &Kept::value(Some("7.1"), "epoch 3\n"), 5, 9),
            entry(keys.upstream("b"), "{}", 10, 10),
        ];
        let view = View::read(&keys, &Entries { revision: 14, entries }).unwrap();
        assert_eq!(view.leader.as_ref().map(Leader::name), Some("p1"));
        assert_eq!(view.leader.unwrap().token, 7);
        let attempt = Some("7.1".to_owned());
        assert_eq!(view.record, Some(Kept { attempt, text: "epoch 3\n".to_owned(), revision: 9 }));
        assert_eq!(view.close, Some(Close { attempt: "7.1".to_owned(), revision: 12 }));
        assert_eq!(view.peers[0], peer("p1/aa", None, 0));
        assert_eq!(view.peers[1], Peer { proxy: "p2/bb".to_owned(), said });
        assert_eq!(view.upstreams, [("b".to_owned(), "{}".to_owned())]);
        let proxy = |value| (keys.proxy("p", "a"), value);
        for (key, value) in [(keys.record(), "epoch 3"), ("/highwater/x/what".to_owned(), "")]
            .into_iter()
            .chain(["x", "- x", "- 1 x", "- 1 away x", "- "].map(proxy))
        {
            let entries = vec![entry(key.clone(), value, 1, 1)];
            assert!(View::read(&keys, &Entries { revision: 1, entries }).unwrap_err().contains(&key));
        }
    }

    #[test]
    fn whom_no_node_answers_leaves_the_lead_to_whom_one_answers() {
        let away = Said { away: true, ..Said::default() };
        let cut_off = |proxy: &str| Peer { proxy: proxy.to_owned(), said: away.clone() };
        assert!(yields("p1/aa", &away, &[cut_off("p1/aa"), peer("p2/bb", None, 0)]));
        // What is under its own key may be of before.
        assert!(!yields("p1/aa", &away, &[peer("p1/aa", None, 0)]));
        assert!(!yields("p1/aa", &away, &[cut_off("p1/aa"), cut_off("p2/bb")]));
        assert!(!yields("p1/aa", &Said::default(), &[cut_off("p1/aa"), peer("p2/bb", None, 0)]));
    }

    #[test]
    fn a_fence_waits_for_all_who_are_there_and_for_nobody_else() {
        let mut view = View { revision: 20, ..View::default() };
        view.peers = vec![peer("p1/aa", None, 0), peer("p2/bb", None, 12), peer("p3/cc", Some("x"), 11)];
        assert_eq!(view.missing("p1/aa", &Step::Closed(12)), ["p3/cc"]);
        assert!(!view.is_done("p1/aa", &Step::Closed(12)));
        view.peers.remove(2);
        assert!(view.is_done("p1/aa", &Step::Closed(12)));
        // Of before the word: somebody may have come in between.
        assert!(!view.is_done("p1/aa", &Step::Closed(21)));
        assert_eq!(view.missing("p1/aa", &Step::Drained("x".to_owned())), ["p2/bb"]);
    }

    #[test]
    fn a_follower_does_as_the_record_says() {
        let close = |attempt: &str| Close { attempt: attempt.to_owned(), revision: 9 };
        let mut record = Record { primary: Some(NodeId(0)), ..Record::default() };
        assert_eq!(wanted(&record, None, Some(&close("1.1"))), Wanted::Open);
        record.fenced = vec![NodeId(0)];
        assert_eq!(wanted(&record, None, None), Wanted::Closed(None));
        record.fenced.clear();
        for planned in [false, true] {
            let intent = |stage| Intent { from: NodeId(0), planned, epoch: Epoch(2), stage, covered: false };
            for stage in [Stage::Prepare, Stage::Promote(NodeId(1))] {
                record.intent = Some(intent(stage));
                let before = wanted(&record, Some("1.2"), Some(&close("1.1")));
                match planned {
                    true => assert_eq!(before, Wanted::Draining("1.2".to_owned())),
                    false => assert_eq!(before, Wanted::Closed(None)),
                }
                let asked = wanted(&record, Some("1.2"), Some(&close("1.2")));
                assert_eq!(asked, Wanted::Closed(Some(9)));
            }
        }
    }

    /// What happens to proxies, one after the other.
    #[derive(Clone, Copy, Debug)]
    enum Happens {
        Time(u64),
        /// A proxy sends a sign of life, which takes so long there, and its confirmation so long back.
        Sends(usize, u64, u64),
        /// It follows the word to close, if it is running.
        Acknowledges(usize),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        prop_oneof![
            (0u64..4000).prop_map(Happens::Time),
            (0usize..3, 0u64..3000, 0u64..3000)
                .prop_map(|(who, there, back)| Happens::Sends(who, there, back)),
            (0usize..3).prop_map(Happens::Acknowledges),
        ]
    }

    proptest! {
        /// However long messages take, and whoever is stopped in between: once nobody who is there is missing, nobody
        /// who has not closed may use the primary, then or later.
        #[test]
        fn nobody_uses_the_primary_once_a_fence_holds(story in prop::collection::vec(happens(), 1..60)) {
            const TTL: Duration = Duration::from_secs(10);
            let ms = Duration::from_millis;
            let (word, mut now) = (5, 0);
            // By the proxy's clock; by etcd's; signs of life and confirmations under way.
            let mut uses = [until(Duration::ZERO, TTL, ms(1000)); 3];
            let mut expires = [TTL; 3];
            let mut closed = [false; 3];
            let mut signs: Vec<(usize, u64, u64, u64)> = Vec::new();
            let mut confirmed: Vec<(usize, u64, u64)> = Vec::new();
            let mut fenced = false;
            for event in story {
                match event {
                    Happens::Time(by) => now += by,
                    Happens::Sends(who, there, back) => signs.push((who, now, now + there, back)),
                    Happens::Acknowledges(who) => closed[who] = true,
                }
                signs.retain(|&(who, sent, there, back)| {
                    if there > now {
                        return true;
                    }
                    // etcd knows no lease that is over.
                    if expires[who] > ms(there) {
                        expires[who] = expires[who].max(ms(there) + TTL);
                        confirmed.push((who, sent, there + back));
                    }
                    false
                });
                confirmed.retain(|&(who, sent, at)| {
                    if at <= now {
                        uses[who] = uses[who].max(until(ms(sent), TTL, ms(1000)));
                    }
                    at > now
                });
                let peers = (0..3).filter(|who| expires[*who] > ms(now));
                let peers = peers.map(|who| peer(&who.to_string(), None, if closed[who] { word } else { 0 }));
                let view = View { revision: word, peers: peers.collect(), ..View::default() };
                fenced |= view.is_done("leader", &Step::Closed(word));
                for who in 0..3 {
                    let may_use = !closed[who] && uses[who] > ms(now);
                    prop_assert!(!(fenced && may_use), "{who} at {now}");
                }
            }
        }
    }
}
