//! What a session may be promised, as words and numbers: levels, limits of staleness, causal tokens. Pure.
//!
//! The words are the same wherever they are said: in the configuration, at startup, by
//! `SET highwater.consistency`, in a comment of a statement. What they mean is in `session::mark`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::wal::{Lsn, TimelineId, WalPosition};

/// How fresh what a session reads must be. In this order each level promises all that the one before does,
/// except that [`Level::Global`] and [`Level::Strong`] each add to [`Level::Session`] something of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Any replica in service: nothing but `max_lag`.
    Eventual,
    /// A session reads what it has written itself.
    ReadYourWrites,
    /// Besides, what it reads never goes back, whichever node answers.
    #[default]
    Session,
    /// The same for all sessions of this proxy at this level, as if they were one.
    Global,
    /// A read shows all that was committed, by anybody, before it arrived.
    Strong,
}

impl Level {
    /// The words, in the order of the levels.
    pub const WORDS: [&'static str; 5] = ["eventual", "read_your_writes", "session", "global", "strong"];

    /// All levels, in their order.
    pub const ALL: [Level; 5] =
        [Level::Eventual, Level::ReadYourWrites, Level::Session, Level::Global, Level::Strong];

    /// Its word.
    pub const fn word(self) -> &'static str {
        Level::WORDS[self as usize]
    }

    /// Whether what a read shows counts for the session's mark.
    pub fn notes_reads(self) -> bool {
        self >= Level::Session
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The text is none of the words that are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAWord(pub &'static [&'static str]);

impl FromStr for Level {
    type Err = NotAWord;

    fn from_str(text: &str) -> Result<Level, NotAWord> {
        one_of(text, &Level::WORDS, &Level::ALL)
    }
}

/// What becomes of a read that no replica can serve yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnStale {
    /// It waits up to `catch_up_wait` for a replica, then goes to the primary.
    #[default]
    Wait,
    /// It goes to the primary at once.
    Primary,
    /// It waits up to `catch_up_wait`, then fails: the primary is spared.
    Error,
}

impl OnStale {
    /// The words.
    pub const WORDS: [&'static str; 3] = ["wait", "primary", "error"];

    /// All, in the order of the words.
    pub const ALL: [OnStale; 3] = [OnStale::Wait, OnStale::Primary, OnStale::Error];

    /// Its word.
    pub const fn word(self) -> &'static str {
        OnStale::WORDS[self as usize]
    }
}

impl FromStr for OnStale {
    type Err = NotAWord;

    fn from_str(text: &str) -> Result<OnStale, NotAWord> {
        one_of(text, &OnStale::WORDS, &OnStale::ALL)
    }
}

/// Where the reads of a session, or one of them, run. What is not a read runs on the primary, whatever is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Route {
    /// On a replica that may serve, or else on the primary: [`OnStale`] says when.
    #[default]
    Auto,
    /// On the primary.
    Primary,
    /// As `auto`, with more patience: the primary only after a longer wait, or when no replica is in service.
    Replica,
}

impl Route {
    /// The words.
    pub const WORDS: [&'static str; 3] = ["auto", "primary", "replica"];

    /// All, in the order of the words.
    pub const ALL: [Route; 3] = [Route::Auto, Route::Primary, Route::Replica];

    /// Its word.
    pub const fn word(self) -> &'static str {
        Route::WORDS[self as usize]
    }
}

impl FromStr for Route {
    type Err = NotAWord;

    fn from_str(text: &str) -> Result<Route, NotAWord> {
        one_of(text, &Route::WORDS, &Route::ALL)
    }
}

/// Where a commit must be before it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Durability {
    /// On the primary's disk.
    Async,
    /// Besides, on the disks of the synchronous replicas.
    Sync,
    /// Besides, applied there: who reads from them sees it.
    Applied,
}

impl Durability {
    /// The words.
    pub const WORDS: [&'static str; 3] = ["async", "sync", "applied"];

    /// All, in the order of the words.
    pub const ALL: [Durability; 3] = [Durability::Async, Durability::Sync, Durability::Applied];

    /// Its word.
    pub const fn word(self) -> &'static str {
        Durability::WORDS[self as usize]
    }

    /// PostgreSQL's `synchronous_commit` for it. Not `off` for the least: that acknowledges what a mere crash of the
    /// primary takes away.
    pub const fn synchronous_commit(self) -> &'static str {
        match self {
            Durability::Async => "local",
            Durability::Sync => "on",
            Durability::Applied => "remote_apply",
        }
    }

    /// Of two writes of one transaction the one that asks for more counts. `None` asks for what the server does by
    /// itself: at least as much as `async`.
    pub fn stronger(one: Option<Durability>, other: Option<Durability>) -> Option<Durability> {
        let rank = |of: Option<Durability>| match of {
            Some(Durability::Async) => 0,
            None => 1,
            Some(Durability::Sync) => 2,
            Some(Durability::Applied) => 3,
        };
        if rank(other) > rank(one) { other } else { one }
    }
}

impl FromStr for Durability {
    type Err = NotAWord;

    fn from_str(text: &str) -> Result<Durability, NotAWord> {
        one_of(text, &Durability::WORDS, &Durability::ALL)
    }
}

/// Whether replicas may say, in the primary's place, what a read at level `strong` must show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum QuorumRead {
    /// While the primary does not answer.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl QuorumRead {
    /// The words.
    pub const WORDS: [&'static str; 3] = ["auto", "on", "off"];

    /// All, in the order of the words.
    pub const ALL: [QuorumRead; 3] = [QuorumRead::Auto, QuorumRead::On, QuorumRead::Off];

    /// Its word.
    pub const fn word(self) -> &'static str {
        QuorumRead::WORDS[self as usize]
    }
}

impl FromStr for QuorumRead {
    type Err = NotAWord;

    fn from_str(text: &str) -> Result<QuorumRead, NotAWord> {
        one_of(text, &QuorumRead::WORDS, &QuorumRead::ALL)
    }
}

fn one_of<T: Copy>(text: &str, words: &'static [&'static str], values: &[T]) -> Result<T, NotAWord> {
    // PostgreSQL takes the words of its settings in any case.
    let at = words.iter().position(|word| word.eq_ignore_ascii_case(text)).ok_or(NotAWord(words))?;
    Ok(values[at])
}

/// How far behind the primary a replica that answers may be, on top of the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LagLimit {
    /// In time.
    Time(Duration),
    /// In bytes of the write-ahead log.
    Bytes(u64),
}

impl LagLimit {
    /// Reads `250ms`, `10s`, `16MiB` or `64kB`. `None`: it is none of these. A bare number is refused: of what?
    pub fn parse(text: &str) -> Option<LagLimit> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let count: u64 = text[..digits].parse().ok()?;
        let time = |micros: u64| Some(LagLimit::Time(Duration::from_micros(count.checked_mul(micros)?)));
        let bytes = |shift: u32| Some(LagLimit::Bytes(count.checked_mul(1 << shift)?));
        match text[digits..].trim() {
            "us" => time(1),
            "ms" => time(1_000),
            "s" => time(1_000_000),
            "min" | "m" => time(60_000_000),
            "h" => time(3_600_000_000),
            "B" => bytes(0),
            // PostgreSQL's kB is 1024 bytes.
            "kB" | "KiB" => bytes(10),
            "MB" | "MiB" => bytes(20),
            "GB" | "GiB" => bytes(30),
            _ => None,
        }
    }

    /// Whether a replica keeps it that is, at most, so far behind. What is not known does not.
    pub fn allows(self, behind: Option<Duration>, behind_bytes: Option<u64>) -> bool {
        match self {
            LagLimit::Time(limit) => behind.is_some_and(|behind| behind <= limit),
            LagLimit::Bytes(limit) => behind_bytes.is_some_and(|behind| behind <= limit),
        }
    }
}

impl fmt::Display for LagLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LagLimit::Time(time) if time.subsec_micros() % 1000 != 0 => write!(f, "{}us", time.as_micros()),
            LagLimit::Time(time) if time.subsec_millis() != 0 => write!(f, "{}ms", time.as_millis()),
            LagLimit::Time(time) => write!(f, "{}s", time.as_secs()),
            LagLimit::Bytes(bytes) => write!(f, "{bytes}B"),
        }
    }
}

/// What a statement's session is promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    /// The level.
    pub level: Level,
    /// A limit of staleness on top of it; `None`: only `consistency.max_lag`, which holds for all.
    pub max_lag: Option<LagLimit>,
    /// What becomes of a read that no replica can serve yet.
    pub on_stale: OnStale,
    /// Where reads run.
    pub route: Route,
    /// Whether replicas may answer for the primary.
    pub quorum_read: QuorumRead,
}

impl Promise {
    /// What a unit is promised of whose statements one is promised this and another `other`: what is enough for both.
    pub fn and(self, other: Promise) -> Promise {
        Promise {
            level: self.level.max(other.level),
            route: if self.route == other.route { self.route } else { Route::Auto },
            ..self
        }
    }
}

/// A part of a [`Promise`] that is said for a user, a database or a session, in place of what holds otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Override {
    /// The level.
    pub level: Option<Level>,
    /// The limit of staleness.
    pub max_lag: Option<LagLimit>,
    /// What becomes of a read that no replica can serve yet.
    pub on_stale: Option<OnStale>,
    /// Where reads run.
    pub route: Option<Route>,
    /// Whether replicas may answer for the primary.
    pub quorum_read: Option<QuorumRead>,
}

impl Override {
    /// What holds with it.
    pub fn over(self, base: Promise) -> Promise {
        Promise {
            level: self.level.unwrap_or(base.level),
            max_lag: self.max_lag.or(base.max_lag),
            on_stale: self.on_stale.unwrap_or(base.on_stale),
            route: self.route.unwrap_or(base.route),
            quorum_read: self.quorum_read.unwrap_or(base.quorum_read),
        }
    }
}

/// A causal token: a position that a session has seen, to be carried to another session, on this proxy or
/// another. Written `sysid:timeline/lsn`, as `7461230921873421312:2/0/16B3748`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// The position.
    pub position: WalPosition,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.system_identifier, self.position.timeline, self.position.lsn)
    }
}

/// The text is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidToken;

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Token, InvalidToken> {
        let decimal = |digits: &str| {
            let plain =
                !digits.is_empty() && digits.len() <= 20 && digits.bytes().all(|b| b.is_ascii_digit());
            if plain { Ok(()) } else { Err(InvalidToken) }
        };
        let (sysid, rest) = text.split_once(':').ok_or(InvalidToken)?;
        let (timeline, lsn) = rest.split_once('/').ok_or(InvalidToken)?;
        decimal(sysid)?;
        decimal(timeline)?;
        let timeline = TimelineId(timeline.parse().map_err(|_| InvalidToken)?);
        let lsn: Lsn = lsn.parse().map_err(|_| InvalidToken)?;
        // PostgreSQL's timelines begin at 1, its log behind the first segment.
        if timeline.0 == 0 || lsn == Lsn::ZERO {
            return Err(InvalidToken);
        }
        let system_identifier = sysid.parse().map_err(|_| InvalidToken)?;
        Ok(Token { system_identifier, position: WalPosition { timeline, lsn } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_read_in_any_case_and_nothing_else_is() {
        for (word, level) in Level::WORDS.iter().zip(Level::ALL) {
            assert_eq!(word.parse(), Ok(level));
            assert_eq!(word.to_uppercase().parse(), Ok(level));
            assert_eq!(level.word(), *word);
        }
        for (word, value) in OnStale::WORDS.iter().zip(OnStale::ALL) {
            assert_eq!(word.parse(), Ok(value));
        }
        for wrong in ["", "sessions", " session", "linearizable", "0"] {
            assert_eq!(wrong.parse::<Level>(), Err(NotAWord(&Level::WORDS)));
        }
    }

    #[test]
    fn a_limit_says_of_what() {
        assert_eq!(LagLimit::parse("250ms"), Some(LagLimit::Time(Duration::from_millis(250))));
        assert_eq!(LagLimit::parse("2 s"), Some(LagLimit::Time(Duration::from_secs(2))));
        assert_eq!(LagLimit::parse("16MB"), Some(LagLimit::Bytes(16 << 20)));
        assert_eq!(LagLimit::parse("64kB"), Some(LagLimit::Bytes(64 << 10)));
        for wrong in
            ["", "10", "ms", "-1s", "1.5s", "1e3s", "99999999999999999999s", "20000000000000h", "5 mb"]
        {
            assert_eq!(LagLimit::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_not_known_keeps_no_limit() {
        let time = LagLimit::Time(Duration::from_secs(1));
        assert!(time.allows(Some(Duration::from_secs(1)), None));
        assert!(!time.allows(Some(Duration::from_millis(1001)), Some(0)));
        assert!(!time.allows(None, Some(0)));
        assert!(LagLimit::Bytes(10).allows(None, Some(10)));
        assert!(!LagLimit::Bytes(10).allows(Some(Duration::ZERO), None));
    }

    #[test]
    fn an_override_takes_the_place_of_what_it_says_only() {
        let base = Promise {
            level: Level::Strong,
            max_lag: Some(LagLimit::Bytes(1)),
            on_stale: OnStale::Error,
            route: Route::Replica,
            quorum_read: QuorumRead::Auto,
        };
        let over = Override { level: Some(Level::Eventual), ..Override::default() };
        assert_eq!(over.over(base), Promise { level: Level::Eventual, ..base });
        assert_eq!(Override::default().over(base), base);
        let primary = Override { route: Some(Route::Primary), ..Override::default() };
        assert_eq!(primary.over(base), Promise { route: Route::Primary, ..base });
    }

    #[test]
    fn a_unit_keeps_what_each_of_its_statements_is_promised() {
        let of = |level, route| Promise { level, route, ..Promise::default() };
        let both = of(Level::Eventual, Route::Replica).and(of(Level::Session, Route::Replica));
        assert_eq!(both, of(Level::Session, Route::Replica));
        assert_eq!(both.and(of(Level::Eventual, Route::Auto)), of(Level::Session, Route::Auto));
    }

    #[test]
    fn malformed_tokens_are_refused() {
        for wrong in [
            "",
            ":",
            "1",
            "1:1",
            "1:1/0",
            "1:1/0/",
            "1:0/0/1",
            "1:1/0/0",
            "a:1/0/1",
            "1:b/0/1",
            "1:1/0/g",
            "-1:1/0/1",
            "+1:1/0/1",
            "1:+1/0/1",
            " 1:1/0/1",
            "1:1/0/1 ",
            "99999999999999999999:1/0/1",
            "1:4294967296/0/1",
            "1:1/0/1/2",
            "1:1/000000001/1",
        ] {
            assert_eq!(wrong.parse::<Token>(), Err(InvalidToken), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_token_reads_back_as_it_was_written(sysid: u64, timeline in 1u32.., lsn in 1u64..) {
            let position = WalPosition { timeline: TimelineId(timeline), lsn: Lsn(lsn) };
            let token = Token { system_identifier: sysid, position };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn a_limit_reads_back_as_it_is_shown(micros in 0u64..=1 << 50, bytes: u64) {
            let time = LagLimit::Time(Duration::from_micros(micros));
            prop_assert_eq!(LagLimit::parse(&time.to_string()), Some(time));
            let bytes = LagLimit::Bytes(bytes);
            prop_assert_eq!(LagLimit::parse(&bytes.to_string()), Some(bytes));
        }
    }
}
