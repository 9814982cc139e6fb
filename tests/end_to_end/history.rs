//! A checker of histories: given what sessions did and were answered, which promises were broken?
//!
//! The objects are lists that grow at their end, one row each: an append is `UPDATE lists SET v = v || $1`, which
//! the row's lock puts in one order with all others, and a read returns the whole list. So a read names the
//! exact version that it saw, and what it must have seen is compared with that (the list-append histories of
//! Elle, Kingsbury and Alvaro 2020). Pure: histories in, violations out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// Which list.
pub type Key = usize;
/// Which session: one client connection, or several that share a name, and may be at work at the same time.
pub type SessionId = usize;

/// What a session was promised when it sent an operation; as the words of `consistency.level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Eventual,
    ReadYourWrites,
    Session,
    Global,
    Strong,
}

impl Level {
    pub const ALL: [Level; 5] =
        [Level::Eventual, Level::ReadYourWrites, Level::Session, Level::Global, Level::Strong];

    pub fn word(self) -> &'static str {
        ["eventual", "read_your_writes", "session", "global", "strong"][self as usize]
    }
}

/// What was done.
#[derive(Clone, Debug)]
pub enum What {
    /// A value that no other append has.
    Append { key: Key, value: u32 },
    /// A read, and the list it returned.
    Read { key: Key, list: Vec<u32> },
    /// The session took over all that another session knew when that had its token shown: the operation's
    /// index in the history.
    TakesToken { shown_by: usize },
    /// Its token was shown.
    ShowsToken,
    /// A connection was opened, in a session of its own: it must be shown all that was acknowledged before.
    Begins,
}

/// Whether commits are acknowledged only once they are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    Waited,
    /// `synchronous_commit = off`: a crash may take the end of what was acknowledged and shown; who was shown
    /// it must have been told, that is, be another session from then on.
    NotWaited,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The client cannot know whether it was done.
    Unknown,
}

/// The transaction that an operation was part of. Its appends are answered when its COMMIT is; its reads are given
/// without what it had appended itself by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which; no other has it.
    pub transaction: usize,
    /// When its BEGIN was sent, on the clock that all share.
    pub began: u64,
}

/// One operation. Failed ones that surely did nothing are left out.
#[derive(Clone, Debug)]
pub struct Operation {
    pub session: SessionId,
    pub level: Level,
    pub what: What,
    /// Moments of one clock that all sessions share: when it was sent, and when its answer was read.
    pub sent: u64,
    pub answered: u64,
    pub outcome: Outcome,
    pub part: Option<Part>,
}

/// A promise that was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Promise {
    /// Every read shows a beginning of the one list there is.
    ConsistentPrefix,
    /// A session reads what it has written.
    ReadYourWrites,
    /// A session's reads do not go back.
    MonotonicReads,
    /// A session's writes are done in their order.
    MonotonicWrites,
    /// A write is done on top of what its session has read.
    WritesFollowReads,
    /// Whoever sees an effect sees its causes: what its writer knew, also what it knew by a token.
    Causal,
    /// A read shows all that was acknowledged before it was sent, to anybody (at level `global`: to anybody at that
    /// level, and all writes).
    RealTime,
    /// At every level: a transaction's reads show all that was acknowledged before its BEGIN was sent.
    SinceBegin,
    /// What was acknowledged is there at the end.
    Durable,
    /// Who was shown what a crash has taken is not shown the list without it, as if nothing had happened.
    Told,
}

/// Where a promise was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    pub promise: Promise,
    /// The level of the operation that shows it.
    pub level: Level,
    /// Its index in the history.
    pub operation: usize,
    /// The operation that makes it one.
    pub because_of: Option<usize>,
}

/// What somebody knows: how long each list is at least.
type Known = BTreeMap<Key, usize>;

fn merge(into: &mut Known, other: &Known) {
    for (key, length) in other {
        let known = into.entry(*key).or_default();
        *known = (*known).max(*length);
    }
}

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// Its transaction begins.
    Began,
    Sent,
    Answered,
}

/// Checks histories.
pub struct Checker<'a> {
    history: &'a [Operation],
    finals: &'a BTreeMap<Key, Vec<u32>>,
    /// Where in its list a value is.
    position: HashMap<u32, (Key, usize)>,
    /// Values that were appended and may have been taken by a crash.
    taken: HashSet<u32>,
    /// What stood before a taken value in a list that showed it: it is the same in all of them.
    before: HashMap<u32, Option<u32>>,
    found: Vec<Violation>,
}

/// The violations in a history. `finals`: the lists on the primary after everything; `history` in the order in which
/// each session did it (sessions may be mixed in any way).
pub fn check(history: &[Operation], finals: &BTreeMap<Key, Vec<u32>>, flush: Flush) -> Vec<Violation> {
    let mut position = HashMap::new();
    for (key, list) in finals {
        for (at, value) in list.iter().enumerate() {
            assert!(position.insert(*value, (*key, at)).is_none(), "value {value} is there twice");
        }
    }
    let taken = history
        .iter()
        .filter_map(|operation| match operation.what {
            What::Append { value, .. } if flush == Flush::NotWaited => Some(value),
            _ => None,
        })
        .filter(|value| !position.contains_key(value))
        .collect();
    let mut checker = Checker { history, finals, position, taken, before: HashMap::new(), found: Vec::new() };
    checker.prefixes();
    checker.sessions();
    checker.real_time();
    checker.since_begin();
    checker.found.sort_by_key(|v| v.operation);
    checker.found
}

impl Checker<'_> {
    fn broken(&mut self, promise: Promise, operation: usize, because_of: Option<usize>) {
        let level = self.history[operation].level;
        self.found.push(Violation { promise, level, operation, because_of });
    }

    /// When each operation was sent and answered, and its transaction begun, in the order of time.
    fn events(&self) -> Vec<(u64, Moment, usize)> {
        let operations = || self.history.iter().enumerate();
        let began = operations().filter_map(|(index, o)| Some((o.part?.began, Moment::Began, index)));
        let sent = operations().map(|(index, o)| (o.sent, Moment::Sent, index));
        let answered = operations().map(|(index, o)| (o.answered, Moment::Answered, index));
        let mut events: Vec<(u64, Moment, usize)> = began.chain(sent).chain(answered).collect();
        events.sort_unstable();
        events
    }

    fn prefixes(&mut self) {
        for (index, operation) in self.history.iter().enumerate() {
            match &operation.what {
                What::Read { key, list } if !self.is_beginning(*key, list) => {
                    self.broken(Promise::ConsistentPrefix, index, None);
                }
                What::Append { value, .. }
                    if operation.outcome == Outcome::Done
                        && !self.position.contains_key(value)
                        && !self.taken.contains(value) =>
                {
                    self.broken(Promise::Durable, index, None);
                }
                _ => {}
            }
        }
    }

    /// How much of a list that was read counts: all of it, but for what a crash has taken.
    fn kept(&self, key: Key, list: &[u32]) -> usize {
        if self.taken.is_empty() { list.len() } else { self.common(key, list) }
    }

    fn common(&self, key: Key, list: &[u32]) -> usize {
        list.iter().zip(&self.finals[&key]).take_while(|(read, is)| read == is).count()
    }

    /// Whether a list is a beginning of the final one, and at its end at most what a crash has taken, in one order.
    fn is_beginning(&mut self, key: Key, list: &[u32]) -> bool {
        (self.common(key, list)..list.len()).all(|at| {
            let before = at.checked_sub(1).map(|at| list[at]);
            self.taken.contains(&list[at]) && *self.before.entry(list[at]).or_insert(before) == before
        })
    }

    /// What each session must have been shown, by what it did before. Operations are taken in the order in
    /// which they were answered, so that what an append's writer knew is known when the append is read: a
    /// read cannot be answered before the append it shows was sent.
    fn sessions(&mut self) {
        // What the writer of each value knew when it sent it, by its own reads and writes.
        let mut causes: HashMap<u32, Known> = HashMap::new();
        let together = self.together();
        // At its sending an append remembers what its session knows, and a read what it must show; at its answer
        // an operation adds to what is known.
        let events = self.events();
        let mut own: HashMap<SessionId, SessionKnows> = HashMap::new();
        let mut tokens: HashMap<usize, Known> = HashMap::new();
        let mut due: HashMap<usize, Due> = HashMap::new();
        // A transaction goes by what its session knew when it began, and by its own reads: what other connections of a
        // named session learn meanwhile, it does not wait for.
        let mut within: HashMap<(usize, SessionId), SessionKnows> = HashMap::new();
        let mut acknowledged = Known::new();
        for (_, moment, index) in events {
            let operation = &self.history[index];
            let session = own.entry(operation.session).or_default();
            let part = operation.part.map(|part| (part.transaction, operation.session));
            let knows = part.and_then(|part| within.get(&part)).unwrap_or(&*session);
            match (&operation.what, moment) {
                (_, Moment::Began) => {
                    let knows = knows.clone();
                    within.insert(part.unwrap(), knows);
                }
                (What::Append { value, key }, Moment::Sent) => {
                    let mut known = knows.all();
                    if let Some(part) = operation.part {
                        merge(&mut known, &together[&part.transaction]);
                    }
                    causes.insert(*value, known);
                    due.insert(index, knows.due(*key));
                }
                (What::Read { key, .. }, Moment::Sent) => drop(due.insert(index, knows.due(*key))),
                (What::Begins, Moment::Sent) => merge(&mut session.told, &acknowledged),
                (What::ShowsToken, Moment::Sent) => drop(tokens.insert(index, session.all())),
                (_, Moment::Sent) => {}
                (_, Moment::Answered) => {
                    if let What::Append { key, value } = operation.what
                        && operation.outcome == Outcome::Done
                        && let Some((_, at)) = self.position.get(&value)
                    {
                        let length = acknowledged.entry(key).or_default();
                        *length = (*length).max(at + 1);
                    }
                    let due = due.remove(&index).unwrap_or_default();
                    self.answered(index, session, &due, &causes, &tokens);
                    if let What::Read { key, list } = &operation.what
                        && let Some(knows) = part.and_then(|part| within.get_mut(&part))
                    {
                        self.learn(index, *key, list, knows, &causes);
                    }
                }
            }
        }
    }

    /// What each transaction has appended in all: whoever sees one of it sees the rest.
    fn together(&self) -> HashMap<usize, Known> {
        let mut together: HashMap<usize, Known> = HashMap::new();
        for operation in self.history {
            let Some(part) = operation.part else { continue };
            let known = together.entry(part.transaction).or_default();
            if let What::Append { value, key } = operation.what
                && let Some((_, at)) = self.position.get(&value)
            {
                merge(known, &Known::from([(key, at + 1)]));
            }
        }
        together
    }

    fn answered(
        &mut self,
        index: usize,
        session: &mut SessionKnows,
        due: &Due,
        causes: &HashMap<u32, Known>,
        tokens: &HashMap<usize, Known>,
    ) {
        let history = self.history;
        let operation = &history[index];
        match &operation.what {
            What::ShowsToken | What::Begins => {}
            What::TakesToken { shown_by } => {
                if let Some(known) = tokens.get(shown_by) {
                    merge(&mut session.told, known);
                    session.told_by = Some(*shown_by);
                }
            }
            What::Append { key, value } => {
                if operation.outcome != Outcome::Done {
                    return;
                }
                let Some((_, at)) = self.position.get(value).copied() else {
                    session.taken_writes.insert(*key, (*value, index));
                    return;
                };
                if let Some((written, by)) = due.written
                    && written > at
                {
                    self.broken(Promise::MonotonicWrites, index, Some(by));
                }
                if let Some((read, by)) = due.read
                    && read > at
                {
                    self.broken(Promise::WritesFollowReads, index, Some(by));
                }
                raise_known(&mut session.written, *key, at + 1, index);
            }
            What::Read { key, list } => self.read(index, *key, list, session, due, causes),
        }
    }

    fn read(
        &mut self,
        index: usize,
        key: Key,
        list: &[u32],
        session: &mut SessionKnows,
        due: &Due,
        causes: &HashMap<u32, Known>,
    ) {
        let level = self.history[index].level;
        let seen = self.kept(key, list);
        if let Some((written, by)) = due.written
            && seen < written
            && level >= Level::ReadYourWrites
        {
            self.broken(Promise::ReadYourWrites, index, Some(by));
        }
        if let Some((read, by)) = due.read
            && seen < read
            && level >= Level::Session
        {
            self.broken(Promise::MonotonicReads, index, Some(by));
        }
        if due.told.is_some_and(|told| seen < told) && level >= Level::ReadYourWrites {
            self.broken(Promise::Causal, index, session.told_by);
        }
        if let Some((known, by)) = due.effects
            && seen < known
            && level >= Level::Session
        {
            self.broken(Promise::Causal, index, Some(by));
        }
        let taken = [(due.taken_write, Level::ReadYourWrites), (due.taken_read, Level::Session)];
        for (value, by) in
            taken.into_iter().filter(|(_, least)| level >= *least).filter_map(|(taken, _)| taken)
        {
            if !list.contains(&value) {
                self.broken(Promise::Told, index, Some(by));
            }
        }
        self.learn(index, key, list, session, causes);
    }

    /// What a read adds to what is known, from level `session` on.
    fn learn(
        &self,
        index: usize,
        key: Key,
        list: &[u32],
        session: &mut SessionKnows,
        causes: &HashMap<u32, Known>,
    ) {
        if self.history[index].level < Level::Session {
            return;
        }
        let seen = self.kept(key, list);
        let before = session.read.get(&key).map_or(0, |(read, _)| *read);
        raise_known(&mut session.read, key, seen, index);
        if let Some(value) = list[seen..].last() {
            session.taken_reads.insert(key, (*value, index));
        }
        // What the newly shown effects were caused by. Those shown before have been counted.
        for value in list.iter().take(seen).skip(before) {
            for (key, length) in causes.get(value).into_iter().flatten() {
                raise_known(&mut session.effects, *key, *length, index);
            }
        }
    }

    /// What transactions' reads must show, at whatever level.
    fn since_begin(&mut self) {
        let mut acknowledged: Vec<(u64, Key, usize, usize)> = Vec::new();
        for (index, operation) in self.history.iter().enumerate() {
            if let What::Append { key, value } = operation.what
                && operation.outcome == Outcome::Done
                && let Some((_, at)) = self.position.get(&value)
            {
                acknowledged.push((operation.answered, key, at + 1, index));
            }
        }
        acknowledged.sort_unstable();
        let mut reads: Vec<(u64, usize)> = self
            .history
            .iter()
            .enumerate()
            .filter_map(|(index, o)| {
                matches!(o.what, What::Read { .. }).then_some(())?;
                Some((o.part?.began, index))
            })
            .collect();
        reads.sort_unstable();
        let mut bounds: HashMap<Key, (usize, usize)> = HashMap::new();
        let mut next = acknowledged.into_iter().peekable();
        for (began, index) in reads {
            while let Some((_, key, length, by)) = next.next_if(|(answered, ..)| *answered < began) {
                raise(&mut bounds, key, length, by);
            }
            if let What::Read { key, list } = &self.history[index].what
                && let Some((length, by)) = bounds.get(key)
                && self.kept(*key, list) < *length
            {
                self.broken(Promise::SinceBegin, index, Some(*by));
            }
        }
    }

    /// What everybody was shown, in the order of time.
    fn real_time(&mut self) {
        let mut events = self.events();
        // Within a transaction the promise is of when that began.
        for (at, moment, index) in &mut events {
            if let Some(part) = self.history[*index].part
                && *moment == Moment::Sent
            {
                *at = part.began;
            }
        }
        events.sort_unstable();
        // For each list: the most that was acknowledged, to anybody; to those at `global`, and writes.
        let mut by_all: HashMap<Key, (usize, usize)> = HashMap::new();
        let mut by_global: HashMap<Key, (usize, usize)> = HashMap::new();
        let mut must: HashMap<usize, (usize, usize)> = HashMap::new();
        for (_, moment, index) in events {
            let operation = &self.history[index];
            match (&operation.what, moment) {
                (What::Read { key, .. }, Moment::Sent) => {
                    let bound = match operation.level {
                        Level::Strong => by_all.get(key),
                        Level::Global => by_global.get(key),
                        _ => None,
                    };
                    if let Some(bound) = bound {
                        must.insert(index, *bound);
                    }
                }
                (What::Read { key, list }, Moment::Answered) => {
                    let seen = self.kept(*key, list);
                    if let Some((length, by)) = must.remove(&index)
                        && seen < length
                    {
                        self.broken(Promise::RealTime, index, Some(by));
                    }
                    raise(&mut by_all, *key, seen, index);
                    if operation.level == Level::Global {
                        raise(&mut by_global, *key, seen, index);
                    }
                }
                (What::Append { key, value }, Moment::Answered) if operation.outcome == Outcome::Done => {
                    if let Some((_, at)) = self.position.get(value) {
                        raise(&mut by_all, *key, at + 1, index);
                        raise(&mut by_global, *key, at + 1, index);
                    }
                }
                _ => {}
            }
        }
    }
}

fn raise(bounds: &mut HashMap<Key, (usize, usize)>, key: Key, length: usize, by: usize) {
    let bound = bounds.entry(key).or_insert((0, by));
    if length > bound.0 {
        *bound = (length, by);
    }
}

fn raise_known(known: &mut BTreeMap<Key, (usize, usize)>, key: Key, length: usize, by: usize) {
    let bound = known.entry(key).or_insert((length, by));
    if length >= bound.0 {
        *bound = (length, by);
    }
}

/// What an operation on one list must be shown: what its session knew when it was sent. (Of what another
/// connection in the same named session does at the same time, nothing is due.)
#[derive(Default)]
struct Due {
    written: Option<(usize, usize)>,
    read: Option<(usize, usize)>,
    effects: Option<(usize, usize)>,
    told: Option<usize>,
    taken_write: Option<(u32, usize)>,
    taken_read: Option<(u32, usize)>,
}

/// What a session knows, and by which of its operations.
#[derive(Clone, Default)]
struct SessionKnows {
    written: BTreeMap<Key, (usize, usize)>,
    /// At level `session` and above.
    read: BTreeMap<Key, (usize, usize)>,
    /// The causes of what it was shown, and by which read it was.
    effects: BTreeMap<Key, (usize, usize)>,
    /// By tokens.
    told: Known,
    told_by: Option<usize>,
    /// The last value of its own, and the last one it was shown, that a crash has taken.
    taken_writes: BTreeMap<Key, (u32, usize)>,
    taken_reads: BTreeMap<Key, (u32, usize)>,
}

impl SessionKnows {
    fn due(&self, key: Key) -> Due {
        Due {
            written: self.written.get(&key).copied(),
            read: self.read.get(&key).copied(),
            effects: self.effects.get(&key).copied(),
            told: self.told.get(&key).copied(),
            taken_write: self.taken_writes.get(&key).copied(),
            taken_read: self.taken_reads.get(&key).copied(),
        }
    }

    fn all(&self) -> Known {
        let mut all = self.told.clone();
        for known in [&self.written, &self.read, &self.effects] {
            let lengths: Known = known.iter().map(|(key, (length, _))| (*key, *length)).collect();
            merge(&mut all, &lengths);
        }
        all
    }
}

/// A violation with the operations that show it, for people.
pub struct Shown<'a>(pub &'a Violation, pub &'a [Operation]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown(violation, history) = self;
        writeln!(f, "{:?} broken at level {}:", violation.promise, violation.level.word())?;
        for index in violation.because_of.into_iter().chain([violation.operation]) {
            let operation = &history[index];
            let what = match &operation.what {
                What::Read { key, list } => {
                    let tail = &list[list.len().saturating_sub(5)..];
                    format!("read list {key}: {} long, ending in {tail:?}", list.len())
                }
                other => format!("{other:?}"),
            };
            writeln!(
                f,
                "  #{index} session {} at {}..{} ({}, {:?}): {what}",
                operation.session,
                operation.sent,
                operation.answered,
                operation.level.word(),
                operation.part
            )?;
        }
        Ok(())
    }
}

mod tests {
    use super::*;

    /// Operations as words: session, level's first letter, what; one after the other in time.
    fn history(text: &str) -> Vec<Operation> {
        let mut operations: Vec<Operation> = Vec::new();
        for (at, line) in text.lines().map(str::trim).filter(|l| !l.is_empty()).enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words[at].parse::<usize>().unwrap();
            let level = *Level::ALL.iter().find(|l| l.word().starts_with(words[1])).unwrap();
            let what = match words[2] {
                "append" => What::Append { key: number(3), value: u32::try_from(number(4)).unwrap() },
                "read" => {
                    let list = words[4..].iter().map(|w| w.parse().unwrap()).collect();
                    What::Read { key: number(3), list }
                }
                "shows" => What::ShowsToken,
                "begins" => What::Begins,
                "takes" => What::TakesToken { shown_by: number(3) },
                other => panic!("{other}"),
            };
            let at = at as u64 * 10;
            operations.push(Operation {
                session: number(0),
                level,
                what,
                sent: at,
                answered: at + 5,
                outcome: Outcome::Done,
                part: None,
            });
        }
        operations
    }

    fn broken(text: &str, finals: &[(Key, &[u32])]) -> Vec<(Promise, usize)> {
        let finals = finals.iter().map(|(key, list)| (*key, list.to_vec())).collect();
        check(&history(text), &finals, Flush::Waited).into_iter().map(|v| (v.promise, v.operation)).collect()
    }

    #[test]
    fn a_history_of_one_server_breaks_no_promise() {
        let text = "0 s append 0 1\n 1 str read 0 1\n 1 s append 0 2\n 0 g read 0 1 2\n 0 s shows\n 2 s takes 4\n 2 s read 0 1 2";
        assert_eq!(broken(text, &[(0, &[1, 2])]), []);
    }

    #[test]
    fn each_promise_that_is_broken_is_found() {
        use Promise::*;
        let check = |text: &str, finals: &[(Key, &[u32])], expected: &[(Promise, usize)]| {
            assert_eq!(broken(text, finals), expected, "{text}");
        };
        check("0 e read 0 2", &[(0, &[1, 2])], &[(ConsistentPrefix, 0)]);
        check("0 e append 0 1", &[(0, &[])], &[(Durable, 0)]);
        check("0 r append 0 1\n0 r read 0", &[(0, &[1])], &[(ReadYourWrites, 1)]);
        check("0 e append 0 1\n0 e read 0", &[(0, &[1])], &[]);
        check("1 e append 0 1\n0 s read 0 1\n0 s read 0", &[(0, &[1])], &[(MonotonicReads, 2)]);
        check("1 e append 0 1\n0 r read 0 1\n0 r read 0", &[(0, &[1])], &[]);
        check("0 s append 0 1\n0 s append 0 2", &[(0, &[2, 1])], &[(MonotonicWrites, 1)]);
        check(
            "1 s append 0 1\n0 s read 0 1\n0 s append 0 2",
            &[(0, &[2, 1])],
            &[(ConsistentPrefix, 1), (WritesFollowReads, 2)],
        );
        // The second list's append was made by one who had seen the first's.
        check(
            "1 s append 0 1\n1 s append 1 2\n0 s read 1 2\n0 s read 0",
            &[(0, &[1]), (1, &[2])],
            &[(Causal, 3)],
        );
        check("1 s append 0 1\n1 s shows\n0 s takes 1\n0 s read 0", &[(0, &[1])], &[(Causal, 3)]);
        check("1 s append 0 1\n1 s shows\n0 s read 0", &[(0, &[1])], &[]);
        check("1 s append 0 1\n0 str read 0", &[(0, &[1])], &[(RealTime, 1)]);
        check("1 s append 0 1\n2 e read 0 1\n0 str read 0", &[(0, &[1])], &[(RealTime, 2)]);
        check("1 s append 0 1\n0 g read 0", &[(0, &[1])], &[(RealTime, 1)]);
        check("1 s append 0 1\n0 s begins\n0 s read 0", &[(0, &[1])], &[(Causal, 2)]);
        check("0 s begins\n1 s append 0 1\n0 s read 0", &[(0, &[1])], &[]);
    }

    #[test]
    fn what_runs_at_the_same_time_may_be_seen_in_either_order() {
        let mut operations = history("1 s append 0 1\n0 str read 0");
        operations[0].answered = operations[1].sent + 1;
        assert!(check(&operations, &BTreeMap::from([(0, vec![1])]), Flush::Waited).is_empty());
        operations[0].outcome = Outcome::Unknown;
        assert!(check(&operations, &BTreeMap::from([(0, vec![])]), Flush::Waited).is_empty());
    }

    #[test]
    fn a_transaction_is_seen_whole_or_not_and_reads_what_was_acknowledged_before_it() {
        let finals = BTreeMap::from([(0, vec![1]), (1, vec![2])]);
        let found = |operations: &[Operation]| -> Vec<(Promise, usize)> {
            check(operations, &finals, Flush::Waited).into_iter().map(|v| (v.promise, v.operation)).collect()
        };
        let mut operations = history("1 s append 0 1\n1 s append 1 2\n0 s read 0 1\n0 s read 1");
        // The read of the second list comes before that append, by itself, was answered.
        operations[1].answered = operations[3].answered + 1;
        assert_eq!(found(&operations), []);
        for operation in &mut operations[..2] {
            operation.part = Some(Part { transaction: 0, began: 0 });
        }
        assert_eq!(found(&operations), [(Promise::Causal, 3)]);

        let mut operations = history("1 s append 0 1\n1 s append 1 2\n0 e read 0");
        assert_eq!(found(&operations), []);
        operations[2].part = Some(Part { transaction: 0, began: operations[0].answered + 1 });
        assert_eq!(found(&operations), [(Promise::SinceBegin, 2)]);
        operations[2].part = Some(Part { transaction: 0, began: operations[0].answered - 1 });
        assert_eq!(found(&operations), []);
    }

    #[test]
    fn connections_of_one_session_owe_each_other_only_what_was_answered() {
        let finals = BTreeMap::from([(0, vec![1])]);
        // Both of session 0: the read was sent before the append was answered.
        let mut operations = history("0 s append 0 1\n0 s read 0");
        operations[1].sent = operations[0].answered - 1;
        assert!(check(&operations, &finals, Flush::Waited).is_empty());
        operations[1].sent = operations[0].answered + 1;
        assert_eq!(check(&operations, &finals, Flush::Waited).len(), 1);
    }

    #[test]
    fn a_transaction_owes_what_its_session_knew_when_it_began_and_what_it_has_shown_itself() {
        let finals = BTreeMap::from([(0, vec![1])]);
        // Both of session 0; the second is of a transaction, and the append is acknowledged behind both.
        let mut operations = history("1 s append 0 1\n0 s read 0 1\n0 s read 0");
        operations[0].answered = 100;
        let mut found = |began: u64, first: Option<Part>| -> Vec<Promise> {
            operations[1].part = first;
            operations[2].part = Some(Part { transaction: 0, began });
            check(&operations, &finals, Flush::Waited).into_iter().map(|v| v.promise).collect()
        };
        let (before, after) = (2, 17);
        assert_eq!(found(before, None), []);
        assert_eq!(found(after, None), [Promise::MonotonicReads]);
        assert_eq!(found(before, Some(Part { transaction: 0, began: before })), [Promise::MonotonicReads]);
    }

    #[test]
    fn a_crash_may_take_what_was_not_flushed_but_not_silently() {
        let check = |text: &str, last: &[u32], expected: &[(Promise, usize)]| {
            let finals = BTreeMap::from([(0, last.to_vec())]);
            let found = check(&history(text), &finals, Flush::NotWaited);
            let found: Vec<_> = found.into_iter().map(|v| (v.promise, v.operation)).collect();
            assert_eq!(found, expected, "{text}");
        };
        let writes = "0 s append 0 1\n0 s append 0 2\n";
        // Told, it is another session; untold, it is not.
        check(&format!("{writes}1 s read 0 1\n1 s append 0 3\n1 s read 0 1 3"), &[1, 3], &[]);
        check(&format!("{writes}0 s read 0 1"), &[1, 3], &[(Promise::Told, 2)]);
        check(&format!("{writes}1 s read 0 1 2\n1 s read 0 1 3"), &[1, 3], &[(Promise::Told, 3)]);
        check(&format!("{writes}1 r read 0 1 2\n1 r read 0 1 3"), &[1, 3], &[]);
        check(&format!("{writes}1 e read 0 1 4"), &[1], &[(Promise::ConsistentPrefix, 2)]);
        check(&format!("{writes}1 e read 0 1 2\n2 e read 0 2"), &[1], &[(Promise::ConsistentPrefix, 3)]);
    }
}
