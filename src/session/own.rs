//! Settings of Highwater's own, `highwater.*`: what they may say, and what a causal token stands for. Pure.
//!
//! They are custom settings to PostgreSQL, which keeps them as any other: SET, SET LOCAL, set_config, RESET,
//! rolled back with their transaction, shown by SHOW. What they say is understood here.

use std::time::Duration;

use crate::classify::hint;
use crate::consistency::{
    Durability, LagLimit, Level, NotAWord, OnStale, Override, QuorumRead, Route, Token,
};
use crate::positions::{Sample, SampleBody};
use crate::topology::Topology;
use crate::wal::Lsn;
use crate::wire::ErrorReport;

/// What the names of all of them begin with.
pub const PREFIX: &str = "highwater.";

/// One of the settings, with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Own {
    /// `highwater.consistency`.
    Level(Level),
    /// `highwater.durability`; `None`: what holds otherwise.
    Durability(Option<Durability>),
    /// `highwater.max_lag`; `None`: no limit of its own.
    MaxLag(Option<LagLimit>),
    /// `highwater.on_stale`.
    OnStale(OnStale),
    /// `highwater.route`.
    Route(Route),
    /// `highwater.quorum_read`.
    QuorumRead(QuorumRead),
    /// `highwater.token`.
    Token(Token),
    /// `highwater.session`; `None`: the session's own mark.
    Session(Option<Box<str>>),
}

/// The names, in the order of the alphabet.
pub const NAMES: [&str; 8] = [
    "highwater.consistency",
    "highwater.durability",
    "highwater.max_lag",
    "highwater.on_stale",
    "highwater.quorum_read",
    "highwater.route",
    "highwater.session",
    "highwater.token",
];

/// Longest name of a session.
const SESSION_BYTES: usize = super::shared_mark::NamedMarks::NAME_BYTES;

impl Own {
    /// Reads a setting; the name is folded to lower case, as PostgreSQL does. `None`: it is not one of
    /// Highwater's. `Err`: what PostgreSQL would say of such a value of its own.
    pub fn read(name: &str, value: &str) -> Option<Result<Own, ErrorReport>> {
        let name = name.to_ascii_lowercase();
        let key = name.strip_prefix(PREFIX)?;
        Some(match key {
            "consistency" => word(&name, value).map(Own::Level),
            "durability" if value.is_empty() => Ok(Own::Durability(None)),
            "durability" => word(&name, value).map(|durability| Own::Durability(Some(durability))),
            "on_stale" => word(&name, value).map(Own::OnStale),
            "route" => word(&name, value).map(Own::Route),
            "quorum_read" => word(&name, value).map(Own::QuorumRead),
            "max_lag" if value.is_empty() => Ok(Own::MaxLag(None)),
            "max_lag" => LagLimit::parse(value).map(|limit| Own::MaxLag(Some(limit))).ok_or_else(|| {
                invalid(&name, value).hint("A time or a size of write-ahead log, as 250ms, 5s, 64kB or 16MB.")
            }),
            "token" => value.parse().map(Own::Token).map_err(|_| {
                invalid(&name, value)
                    .hint("A token is what SHOW highwater.token shows, as 7461230921873421312:1/0/16B3748.")
            }),
            "session" if value.is_empty() => Ok(Own::Session(None)),
            "session" if value.len() <= SESSION_BYTES => Ok(Own::Session(Some(value.into()))),
            "session" => {
                Err(invalid(&name, value).detail(format!("A name has at most {SESSION_BYTES} bytes.")))
            }
            // As PostgreSQL answers for a prefix that an extension has reserved.
            _ => Err(ErrorReport::error("42602", format!("invalid configuration parameter name \"{name}\""))
                .detail("\"highwater\" is a reserved prefix.")
                .hint(format!("There are: {}.", NAMES.join(", ")))),
        })
    }
}

fn word<T: std::str::FromStr<Err = NotAWord>>(name: &str, value: &str) -> Result<T, ErrorReport> {
    value.parse().map_err(|NotAWord(words)| {
        invalid(name, value).hint(format!("Available values: {}.", words.join(", ")))
    })
}

/// Why a statement does not run: a comment in it gives one of the settings a value that is none of its words.
pub fn refused_hint(text: &[u8]) -> Option<ErrorReport> {
    let (name, value) = hint::invalid(text)?;
    let words = match name {
        "highwater.route" => Route::WORDS.to_vec(),
        "highwater.durability" => Durability::WORDS.to_vec(),
        _ => hint::LEVELS.map(Level::word).to_vec(),
    };
    let report =
        invalid(name, &value).detail("A comment of the statement says so; the statement was not run.");
    Some(report.hint(format!("Available values in a comment: {}.", words.join(", "))))
}

fn invalid(name: &str, value: &str) -> ErrorReport {
    // What a client sends is given back to it, but not without end.
    let shown: String = value.chars().take(200).collect();
    ErrorReport::error("22023", format!("invalid value for parameter \"{name}\": \"{shown}\""))
}

/// What a session's settings say of its promise.
pub fn said<'a>(settings: impl IntoIterator<Item = &'a Own>) -> Override {
    settings.into_iter().fold(Override::default(), |said, own| match own {
        Own::Level(level) => Override { level: Some(*level), ..said },
        Own::MaxLag(limit) => Override { max_lag: *limit, ..said },
        Own::OnStale(on_stale) => Override { on_stale: Some(*on_stale), ..said },
        Own::Route(route) => Override { route: Some(*route), ..said },
        Own::QuorumRead(word) => Override { quorum_read: Some(*word), ..said },
        Own::Token(_) | Own::Session(_) | Own::Durability(_) => said,
    })
}

/// What a token stands for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placed {
    /// A position on the primary's timeline.
    At(Lsn),
    /// The primary's position must be asked for once more: the token is newer than the last sample.
    Unsampled,
    /// It is refused.
    Refused(Box<ErrorReport>),
}

/// Finds what `token` stands for. `primary`: the last sample of the primary; `asked_since`: whether that was
/// sent after the token had come.
pub fn place(token: &Token, topology: &Topology, primary: Option<&Sample>, asked_since: bool) -> Placed {
    let refused = |report: ErrorReport| Placed::Refused(Box::new(report));
    let (Some(cluster), Some(current)) = (topology.system_identifier, topology.timeline) else {
        return Placed::Unsampled;
    };
    let name = "highwater.token";
    if token.system_identifier != cluster {
        return refused(
            invalid(name, &token.to_string())
                .detail(format!("It belongs to another cluster: this one's system identifier is {cluster}.")),
        );
    }
    let (timeline, lsn) = (token.position.timeline, token.position.lsn);
    if timeline > current {
        return refused(
            invalid(name, &token.to_string())
                .detail(format!(
                    "It is of timeline {timeline}; the primary known here writes timeline {current}."
                ))
                .hint("Another proxy may have seen a promotion that this one has not seen yet: try again."),
        );
    }
    if timeline < current {
        return match topology.history.as_ref().map(|history| history.fork_of(timeline)) {
            Some(Some(fork)) if lsn <= fork => Placed::At(lsn),
            Some(fork) => refused(
                ErrorReport::error("HW001", "what this token stands for was lost in a failover")
                    .detail(match fork {
                        Some(fork) => {
                            format!("The token is {token}; timeline {timeline} was left at {fork}.")
                        }
                        None => format!(
                            "The token is {token}; timeline {current} does not descend from {timeline}."
                        ),
                    })
                    .hint("Read again what later work depends on."),
            ),
            None => refused(
                ErrorReport::error(
                    "HW001",
                    "it cannot be known whether what this token stands for was lost in a failover",
                )
                .detail(format!("The token is {token}; the history of timeline {current} could not be read."))
                .hint("The control user needs to execute pg_read_file, as highwater check says."),
            ),
        };
    }
    let sampled =
        primary.filter(|sample| sample.epoch == topology.epoch).and_then(|sample| match sample.body {
            SampleBody::Primary { insert, .. } => Some(insert),
            SampleBody::Replica { .. } => None,
        });
    match sampled {
        Some(insert) if lsn <= insert => Placed::At(lsn),
        Some(insert) if asked_since => refused(
            invalid(name, &token.to_string())
                .detail(format!("It is past the end of the write-ahead log, which is at {insert}.")),
        ),
        _ => Placed::Unsampled,
    }
}

/// How long a token may wait for a sample of the primary's position.
pub const TOKEN_WAIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::positions::Incarnation;
    use crate::topology::{Epoch, NodeId};
    use crate::wal::{TimelineHistory, TimelineId};

    fn error(name: &str, value: &str) -> (String, String) {
        let report = Own::read(name, value).unwrap().unwrap_err();
        (report.sqlstate.to_string(), report.message)
    }

    #[test]
    fn other_settings_are_none_of_ours() {
        assert_eq!(Own::read("work_mem", "1MB"), None);
        assert_eq!(Own::read("app.highwater", "x"), None);
        assert_eq!(Own::read("highwater", "x"), None);
    }

    #[test]
    fn values_are_read_as_postgres_reads_its_own() {
        assert_eq!(Own::read("highwater.consistency", "strong"), Some(Ok(Own::Level(Level::Strong))));
        assert_eq!(Own::read("Highwater.Consistency", "STRONG"), Some(Ok(Own::Level(Level::Strong))));
        assert_eq!(Own::read("highwater.route", "Replica"), Some(Ok(Own::Route(Route::Replica))));
        assert_eq!(Own::read("highwater.on_stale", "error"), Some(Ok(Own::OnStale(OnStale::Error))));
        assert_eq!(Own::read("highwater.max_lag", ""), Some(Ok(Own::MaxLag(None))));
        assert_eq!(
            Own::read("highwater.max_lag", "16MB"),
            Some(Ok(Own::MaxLag(Some(LagLimit::Bytes(16 << 20)))))
        );
        assert_eq!(Own::read("highwater.session", "u1"), Some(Ok(Own::Session(Some("u1".into())))));
        assert_eq!(Own::read("highwater.session", ""), Some(Ok(Own::Session(None))));
        let report = Own::read("highwater.consistency", "best").unwrap().unwrap_err();
        assert_eq!(report.sqlstate, "22023");
        assert_eq!(report.message, "invalid value for parameter \"highwater.consistency\": \"best\"");
        assert_eq!(
            report.hint.as_deref(),
            Some("Available values: eventual, read_your_writes, session, global, strong.")
        );
        for (name, value) in
            [("max_lag", "5"), ("token", "x"), ("on_stale", ""), ("route", "nearest"), ("consistency", "")]
        {
            assert_eq!(error(&format!("highwater.{name}"), value).0, "22023", "{name}");
        }
        assert_eq!(error("highwater.session", &"x".repeat(257)).0, "22023");
        assert_eq!(error("highwater.levle", "strong").0, "42602");
        assert!(error("highwater.token", &"x".repeat(100_000)).1.len() < 300);
    }

    #[test]
    fn what_is_said_last_holds() {
        let settings = [Own::Level(Level::Strong), Own::OnStale(OnStale::Error), Own::Level(Level::Global)];
        let said = said(&settings);
        assert_eq!(
            (said.level, said.on_stale, said.max_lag),
            (Some(Level::Global), Some(OnStale::Error), None)
        );
    }

    fn topology(history: Option<&str>) -> Topology {
        Topology {
            epoch: Epoch(3),
            system_identifier: Some(7),
            primary: Some(NodeId(0)),
            timeline: Some(TimelineId(3)),
            start: None,
            history: history.map(|text| Arc::new(TimelineHistory::parse(text).unwrap())),
            nodes: Vec::new(),
            switches: Vec::new(),
        }
    }

    fn sample(insert: u64) -> Sample {
        Sample {
            number: 1,
            incarnation: Incarnation(1),
            epoch: Epoch(3),
            timeline: TimelineId(3),
            body: SampleBody::Primary { insert: Lsn(insert), floor: Lsn(0) },
        }
    }

    #[test]
    fn a_token_is_placed_on_the_primarys_timeline_or_refused() {
        let history = Some("1 0/100 x\n2 0/200 x");
        let check = |token: &str, history, sampled: Option<u64>, since, expected: &str| {
            let sample = sampled.map(sample);
            let said = match place(&token.parse().unwrap(), &topology(history), sample.as_ref(), since) {
                Placed::At(lsn) => format!("at {lsn}"),
                Placed::Unsampled => "unsampled".to_owned(),
                Placed::Refused(report) => report.sqlstate.to_string(),
            };
            assert_eq!(said, expected, "{token}");
        };
        check("7:3/0/300", history, Some(0x300), false, "at 0/300");
        check("7:3/0/301", history, Some(0x300), false, "unsampled");
        check("7:3/0/301", history, Some(0x300), true, "22023");
        check("7:3/0/300", history, None, false, "unsampled");
        check("8:3/0/300", history, Some(0x300), true, "22023");
        check("7:4/0/1", history, Some(0x300), true, "22023");
        check("7:1/0/100", history, Some(0x300), true, "at 0/100");
        check("7:1/0/101", history, Some(0x300), true, "HW001");
        check("7:2/0/200", history, None, false, "at 0/200");
        check("7:2/0/201", history, None, false, "HW001");
        check("7:2/0/1", Some("1 0/100 x"), None, false, "HW001");
        check("7:2/0/1", None, None, false, "HW001");
    }
}
