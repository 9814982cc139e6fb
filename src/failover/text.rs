//! A [`Record`] as text, and back: lines of a key and its values, nodes by their names (an index would mean
//! another node after an edit of the configuration). Pure.
//!
//! Promises: what is written is read the same; what was not written by this is refused, with the line.

use std::fmt;
use std::fmt::Write as _;

use crate::failover::event::Quarantine;
use crate::failover::record::{Entry, Forked, Intent, Record, Stage};
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

/// A node that the configuration does not have any more; written as `?`.
const GONE: NodeId = NodeId(u16::MAX);

/// A line is not of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidRecord {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for InvalidRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for InvalidRecord {}

/// The record as lines; `names` are the nodes', by [`NodeId`].
pub fn write(record: &Record, names: &[String]) -> String {
    let name = |node: &NodeId| names.get(node.index()).map_or("?", String::as_str);
    let list = |nodes: &[NodeId]| nodes.iter().map(name).collect::<Vec<_>>().join(" ");
    let mut text = String::new();
    let mut line = |key: &str, values: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", format!("{key} {values}").trim_end());
    };
    if let Some(system) = record.system_identifier {
        line("system", system.to_string());
    }
    line("epoch", record.epoch.0.to_string());
    if let Some(primary) = &record.primary {
        line("primary", name(primary).to_owned());
    }
    if let Some(timeline) = record.timeline {
        line("timeline", timeline.to_string());
    }
    for Forked { old_primary, old_timeline, fork } in &record.forks {
        line("forked", format!("{} {old_timeline} {fork}", name(old_primary)));
    }
    if let Some(Intent { from, planned, epoch, stage, covered }) = &record.intent {
        let stage = match stage {
            Stage::Prepare => "prepare".to_owned(),
            Stage::Promote(node) => format!("promote {}", name(node)),
        };
        line("intent", format!("{} {planned} {} {covered} {stage}", name(from), epoch.0));
    }
    line("severed", list(&record.severed));
    line("repoint", list(&record.repoint));
    line("fenced", list(&record.fenced));
    for (node, why) in &record.quarantined {
        line("quarantined", format!("{} {}", name(node), why.label()));
    }
    let sync = &record.sync;
    line("sync", format!("{} {} {}", sync.num, sync.degraded, list(&sync.members)));
    line("cooling", record.cooling.to_string());
    line("paused", record.paused.to_string());
    for entry in &record.history {
        line(
            "history",
            format!(
                "{} {} {} {} {} {} {} {}",
                entry.unix_ms,
                entry.epoch.0,
                name(&entry.from),
                name(&entry.to),
                entry.planned,
                entry.fork,
                entry.lost_acked_bytes_min,
                entry.took_ms
            ),
        );
    }
    text
}

/// Reads what [`write()`] has written.
pub fn read(text: &str, names: &[String]) -> Result<Record, InvalidRecord> {
    let mut record = Record::default();
    for (index, line) in text.lines().enumerate() {
        let mut fields = Fields { names, rest: line.split(' ') };
        let taken = take_line(&mut record, &mut fields).and_then(|()| match fields.rest.next() {
            None => Ok(()),
            Some(_) => Err("there is more on it than belongs there".to_owned()),
        });
        taken.map_err(|what| InvalidRecord { line: index + 1, what })?;
    }
    Ok(record)
}

fn take_line(record: &mut Record, fields: &mut Fields<'_>) -> Result<(), String> {
    match fields.word()? {
        "system" => record.system_identifier = Some(fields.number()?),
        "epoch" => record.epoch = Epoch(fields.number()?),
        "primary" => record.primary = Some(fields.node()?),
        "timeline" => record.timeline = Some(TimelineId(fields.number()?)),
        "forked" => {
            record.forks.push(Forked {
                old_primary: fields.past_node()?,
                old_timeline: TimelineId(fields.number()?),
                fork: fields.lsn()?,
            });
        }
        "intent" => {
            record.intent = Some(Intent {
                from: fields.node()?,
                planned: fields.number()?,
                epoch: Epoch(fields.number()?),
                covered: fields.number()?,
                stage: match fields.word()? {
                    "prepare" => Stage::Prepare,
                    "promote" => Stage::Promote(fields.node()?),
                    other => return Err(format!("`{other}` is no stage")),
                },
            });
        }
        "severed" => record.severed = fields.nodes_left(),
        "repoint" => record.repoint = fields.nodes_left(),
        "fenced" => record.fenced = fields.nodes_left(),
        "quarantined" => {
            let node = fields.past_node()?;
            let word = fields.word()?;
            let why = [Quarantine::OldPrimary, Quarantine::Diverged].into_iter().find(|q| q.label() == word);
            let why = why.ok_or_else(|| format!("`{word}` is no reason"))?;
            record.quarantined.extend((node != GONE).then_some((node, why)));
        }
        "sync" => {
            record.sync.num = fields.number()?;
            record.sync.degraded = fields.number()?;
            record.sync.members = fields.nodes()?;
        }
        "cooling" => record.cooling = fields.number()?,
        "paused" => record.paused = fields.number()?,
        "history" => record.history.push(Entry {
            unix_ms: fields.number()?,
            epoch: Epoch(fields.number()?),
            from: fields.past_node()?,
            to: fields.past_node()?,
            planned: fields.number()?,
            fork: fields.lsn()?,
            lost_acked_bytes_min: fields.number()?,
            took_ms: fields.number()?,
        }),
        other => return Err(format!("`{other}` is no key of a record")),
    }
    Ok(())
}

struct Fields<'a> {
    names: &'a [String],
    rest: std::str::Split<'a, char>,
}

impl<'a> Fields<'a> {
    fn word(&mut self) -> Result<&'a str, String> {
        self.rest.next().ok_or_else(|| "something is missing".to_owned())
    }

    /// A number, or `true` or `false`.
    fn number<T: std::str::FromStr>(&mut self) -> Result<T, String> {
        let word = self.word()?;
        word.parse().map_err(|_| format!("`{word}` is not what belongs there"))
    }

    fn lsn(&mut self) -> Result<Lsn, String> {
        self.number()
    }

    fn node(&mut self) -> Result<NodeId, String> {
        let word = self.word()?;
        named(self.names, word)
    }

    /// One of which only is told what was: it may have left the configuration.
    fn past_node(&mut self) -> Result<NodeId, String> {
        let word = self.word()?;
        Ok(named(self.names, word).unwrap_or(GONE))
    }

    /// Those that something is left to be done with: not those that have left the configuration.
    fn nodes_left(&mut self) -> Vec<NodeId> {
        let names = self.names;
        self.rest.by_ref().filter_map(|word| named(names, word).ok()).collect()
    }

    fn nodes(&mut self) -> Result<Vec<NodeId>, String> {
        let names = self.names;
        self.rest.by_ref().map(|word| named(names, word)).collect()
    }
}

fn named(names: &[String], word: &str) -> Result<NodeId, String> {
    let index = names.iter().position(|name| name == word).and_then(|index| u16::try_from(index).ok());
    index.map(NodeId).ok_or_else(|| format!("the configuration has no node `{word}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::record::SyncState;

    #[test]
    fn a_node_may_leave_the_configuration_unless_it_still_matters() {
        let text = write(&full(), &names());
        let without = |gone: &str| {
            let names = names().into_iter().map(|name| if name == gone { "x".to_owned() } else { name });
            read(&text, &names.collect::<Vec<_>>())
        };
        let left = without("a").unwrap();
        assert_eq!(left.severed, [NodeId(2)]);
        assert_eq!(left.quarantined, [(NodeId(2), Quarantine::Diverged)]);
        assert_eq!((left.forks[1].old_primary, left.forks[1].fork), (GONE, full().forks[1].fork));
        assert_eq!((left.history[0].from, left.history.len()), (GONE, full().history.len()));
        assert!(read(&write(&left, &names()), &names()).is_ok());
        // The primary, a candidate, and who confirms commits.
        assert!(without("b").is_err() && without("c").is_err());
    }

    fn names() -> Vec<String> {
        ["a", "b", "c"].map(str::to_owned).to_vec()
    }

    fn full() -> Record {
        Record {
            system_identifier: Some(7_123_456_789_012_345_678),
            epoch: Epoch(4),
            primary: Some(NodeId(1)),
            timeline: Some(TimelineId(3)),
            forks: vec![
                Forked { old_primary: NodeId(2), old_timeline: TimelineId(1), fork: Lsn(0x28) },
                Forked { old_primary: NodeId(0), old_timeline: TimelineId(2), fork: Lsn(0x1_0000_0028) },
            ],
            intent: Some(Intent {
                from: NodeId(1),
                planned: true,
                epoch: Epoch(5),
                stage: Stage::Promote(NodeId(2)),
                covered: true,
            }),
            severed: vec![NodeId(2), NodeId(0)],
            repoint: vec![NodeId(2)],
            fenced: vec![NodeId(1)],
            quarantined: vec![(NodeId(0), Quarantine::OldPrimary), (NodeId(2), Quarantine::Diverged)],
            sync: SyncState { members: vec![NodeId(1), NodeId(2)], num: 1, degraded: true },
            cooling: true,
            paused: true,
            history: vec![Entry {
                unix_ms: 1_800_000_000_000,
                epoch: Epoch(4),
                from: NodeId(0),
                to: NodeId(1),
                planned: false,
                fork: Lsn(0x1_0000_0028),
                lost_acked_bytes_min: 17,
                took_ms: 900,
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_the_same() {
        let mut prepare = full();
        prepare.intent.as_mut().unwrap().stage = Stage::Prepare;
        for record in [Record::default(), full(), prepare] {
            assert_eq!(read(&write(&record, &names()), &names()), Ok(record));
        }
        // By name: the order of the configuration may change.
        let turned = read(&write(&full(), &names()), &["c", "a", "b"].map(str::to_owned)).unwrap();
        assert_eq!(turned.primary, Some(NodeId(2)));
    }

    #[test]
    fn what_was_not_written_is_refused_with_its_line() {
        for (text, line, what) in [
            ("epoch 1\nnonsense 2", 2, "no key"),
            ("epoch x", 1, "not what belongs"),
            ("epoch 1 2", 1, "more on it"),
            ("primary", 1, "missing"),
            ("primary z", 1, "no node `z`"),
            ("intent a false 1 false waiting", 1, "no stage"),
            ("forked a 1 nowhere", 1, "not what belongs"),
            ("quarantined a bored", 1, "no reason"),
        ] {
            let error = read(text, &names()).unwrap_err();
            assert_eq!(error.line, line, "{text}");
            assert!(error.what.contains(what), "{text}: {error}");
        }
    }
}
