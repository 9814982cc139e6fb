//! The connection over which a sampler asks where a node is: it speaks the protocol itself.
//!
//! Sampling is the one question that is asked thousands of times a second, so it has no task of its own between it and the
//! socket, and no allocation: a question is one run of bytes that was made when the connection was, and its answer is read
//! where it lies (`answer`).
//!
//! Promises: connecting, and each answer, has a deadline, and an answer a bound; one question is under way at most, and one
//! that was given up, or answered by nonsense, is the connection's last; what a server says as it ends a connection is heard,
//! whenever that comes. Dropping it closes the connection at once. Deliberately does not judge what it reads, or retry.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep_until};

use super::answer::{self, Answer, Nonsense, Progress};
use super::{
    APPLICATION, KEEPALIVE, NodeError, NodeFailure, Nodes, SETTINGS, START, SampleAnswer, WAL_SIZES,
};
use crate::login::{self, LoginError, LoginTarget, Who};
use crate::net::Stream;
use crate::scram::LoginKeys;
use crate::topology::NodeId;
use crate::wal::Lsn;
use crate::wire;

// What a primary says. Columns of an ARRAY are evaluated from left to right; `age` is stable, so it is read when its turn comes,
// and it is the next transaction id minus 3 as a signed 32-bit number.
macro_rules! primary {
    () => {
        "ARRAY['primary', \
  pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, pg_current_wal_flush_lsn()::text, \
  ((age('3'::xid)::bigint & 4294967295) + 3)::text, \
  left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)]"
    };
}

// One CASE over the whole row: a promotion between two columns cannot mix the roles.
const SAMPLE: &str = concat!(
    "\
SELECT CASE WHEN pg_is_in_recovery() THEN ARRAY[",
    replica!(),
    ", \
  (SELECT pid::text FROM pg_stat_get_wal_receiver())] \
ELSE ",
    primary!(),
    " END"
);

// The same of a server that was seen not to be in recovery, which it never is again while a connection lasts: a server makes ready
// to run each of the subqueries above, whether they are run or not (95 us a sample for 66 without them).
const SAMPLE_OF_PRIMARY: &str =
    concat!("SELECT CASE WHEN pg_is_in_recovery() THEN ARRAY['replica'] ELSE ", primary!(), " END");

// Whoever is idle in a transaction, or waits for a lock, is not at its commit: a backend is idle no more before it looks
// at what it was told to do, and waits for no lock between its commit record and the end of the transaction. Each step
// depends on the one before it: position, who holds which ids and what they do, and whether these transactions still
// run, so that it was in them that their backends did that. Only of clients' backends is it known when they are idle; and
// not all control users may see that (it takes `pg_read_all_stats`).
//
// The ids of a prepared transaction are held by no process. What commits it is a COMMIT PREPARED in its database, never
// inside a function or a transaction: a statement whose text its backend shows from before it begins until it is over,
// with that word in it, or cut off. So while no backend there shows such a text, and none is of a kind that has no text
// (those that apply a subscription), it merely stands.
//
// A backend holds the ids of its savepoints, too, but not of those that were released, as all are by PREPARE TRANSACTION. An id
// that nobody held is of a transaction that was among the holders, or had not got so far; so if all of these stand, it does.
const NOT_COMMITTING: &str = "\
SELECT p.lsn::text, \
  (SELECT array_agg(x.xid) FROM \
     (SELECT coalesce(array_agg(own.id), '{}') AS held, coalesce(bool_and(own.stands), true) AS all_stand, \
             coalesce(array_agg(own.id) FILTER (WHERE own.stands), '{}') AS standing \
      FROM (SELECT h.transactionid::text::int8 AS id, \
              (EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = h.pid AND NOT l.granted) \
               OR EXISTS (SELECT FROM pg_stat_get_activity(NULL::int4) AS a \
                          WHERE p.lsn IS NOT NULL AND a.pid = h.pid AND a.backend_type = 'client backend' \
                            AND a.state IN ('idle in transaction', 'idle in transaction (aborted)')) \
               OR (h.pid IS NULL AND NOT EXISTS (\
                    SELECT FROM pg_stat_get_activity(NULL::int4) AS a \
                    WHERE p.lsn IS NOT NULL AND a.pid <> pg_backend_pid() \
                      AND a.datid IN (SELECT dbid FROM pg_prepared_xact()) \
                      AND (a.backend_type IN ('autovacuum worker', 'parallel worker') \
                        OR (a.backend_type IN ('client backend', 'walsender') \
                          AND (a.state IN ('idle', 'idle in transaction', 'idle in transaction (aborted)') \
                            OR (a.state = 'active' AND octet_length(a.query) < p.text_size - 8 \
                              AND lower(a.query COLLATE \"C\") NOT LIKE '%prepared%')))) IS NOT TRUE))) AS stands \
            FROM pg_locks AS h \
            WHERE p.lsn IS NOT NULL \
              AND h.locktype = 'transactionid' AND h.mode = 'ExclusiveLock' AND h.granted OFFSET 0) AS own \
      OFFSET 0) AS ids, unnest($1::int8[]) AS x (xid) \
   WHERE ((x.xid & 4294967295) = ANY (ids.standing) \
          OR (ids.all_stand AND (x.xid & 4294967295) <> ALL (ids.held))) \
     AND CASE WHEN ids.held IS NOT NULL THEN pg_xact_status(x.xid::text::xid8) END = 'in progress') \
FROM (SELECT pg_current_wal_insert_lsn() AS lsn, \
        (SELECT pg_size_bytes(CASE WHEN s ~ '[0-9]B$' THEN rtrim(s, 'B') ELSE s END) \
         FROM current_setting('track_activity_query_size') AS s) AS text_size OFFSET 0) AS p";

/// Names of the statements that a connection has prepared.
const SAMPLE_NAME: &str = "sample";
const SAMPLE_OF_PRIMARY_NAME: &str = "sample_of_primary";
const NOT_COMMITTING_NAME: &str = "not_committing";

/// What a statement that is prepared and run at once is answered by: ParseComplete, BindComplete, one row, its end, ready.
const PREPARED_AND_RUN: &[u8] = b"12DCZ";
/// The same, where one of that name is closed first.
const PREPARED_ANEW_AND_RUN: &[u8] = b"312DCZ";
/// One that is only run.
const RUN: &[u8] = b"2DCZ";
/// Two that are only prepared.
const PREPARED: &[u8] = b"11Z";

/// Room for what comes with one receive: several samples would fit, so that the runtime knows from a short one that nothing is left.
const ROOM: usize = 4096;
/// A buffer that an answer has made larger than this is given back.
const KEPT: usize = 64 * 1024;

impl Nodes {
    /// A connection of its own to the control database of `node`, for a sampler. `deadline` bounds the connection with its
    /// login, then its preparation, and then each question.
    pub async fn open_sampler(&self, node: NodeId, deadline: Duration) -> Result<SampleClient, NodeError> {
        let config = self.config.load_full();
        let no_node =
            || self.failure(node, NodeFailure::Refused, "no such node in the configuration".to_owned());
        let address = config.nodes.get(node.index()).ok_or_else(no_node)?;
        let tls = self.dialer.load().tls.clone();
        let target = LoginTarget {
            host: &address.host,
            port: address.port,
            tls: &tls,
            connect_timeout: deadline,
            tcp_user_timeout: config.failover.tcp_user_timeout,
        };
        let keys = config.control.password.clone().map(LoginKeys::password);
        let who = Who::Control(keys.as_ref());
        let parameters =
            [("application_name", APPLICATION), ("client_encoding", "UTF8"), ("options", SETTINGS)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let (user, database) = (&config.control.user, &config.control.database);
        let logged_in = login::log_in_as(&target, who, user, database, &parameters)
            .await
            .map_err(|error| self.not_logged_in(node, &error))?;
        let lost = |error: io::Error| self.failure(node, NodeFailure::of_io(&error), error.to_string());
        KEEPALIVE.set(logged_in.stream.tcp()).map_err(lost)?;
        let line = Line::new(logged_in.stream, logged_in.leftover);
        let mut client = SampleClient {
            line,
            alarm: Alarm::new(deadline),
            name: self.name(node),
            deadline,
            told_to_end: false,
            question: run(SAMPLE_NAME, None),
            asks_primary: false,
            knows_not_committing: false,
            wal_sizes: (0, 0),
            start: None,
        };
        client.prepare().await?;
        Ok(client)
    }

    fn not_logged_in(&self, node: NodeId, error: &LoginError) -> NodeError {
        let kind = match error {
            LoginError::Refused { sqlstate, .. } => NodeFailure::of_answer(sqlstate),
            LoginError::Timeout { .. } => NodeFailure::Timeout,
            LoginError::Io { cause, .. } => NodeFailure::of_io(cause),
            _ => NodeFailure::Broken,
        };
        self.failure(node, kind, error.to_string())
    }
}

/// Appends a Parse.
fn put_parse(out: &mut Vec<u8>, name: &str, sql: &str) {
    wire::put(out, b'P', |out| {
        wire::put_cstr(out, name.as_bytes());
        wire::put_cstr(out, sql.as_bytes());
        out.extend_from_slice(&0u16.to_be_bytes());
    });
}

/// Appends a Close of a statement, which there need not be.
fn put_close(out: &mut Vec<u8>, name: &str) {
    wire::put(out, b'C', |out| {
        out.push(b'S');
        wire::put_cstr(out, name.as_bytes());
    });
}

/// Appends Bind and Execute of a prepared statement; parameter and columns in the binary format.
fn put_run(out: &mut Vec<u8>, name: &str, parameter: Option<&[u8]>) {
    wire::put(out, b'B', |out| {
        wire::put_cstr(out, b"");
        wire::put_cstr(out, name.as_bytes());
        match parameter {
            None => out.extend_from_slice(&[0, 0, 0, 0]),
            Some(value) => {
                out.extend_from_slice(&[0, 1, 0, 1, 0, 1]);
                let length = u32::try_from(value.len()).expect("a parameter of ours is far below 4 GiB");
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(value);
            }
        }
        out.extend_from_slice(&[0, 1, 0, 1]);
    });
    wire::put(out, b'E', |out| {
        wire::put_cstr(out, b"");
        out.extend_from_slice(&0u32.to_be_bytes());
    });
}

fn put_sync(out: &mut Vec<u8>) {
    wire::put(out, b'S', |_| {});
}

/// The question that runs a prepared statement.
fn run(name: &str, parameter: Option<&[u8]>) -> Vec<u8> {
    let mut question = Vec::new();
    put_run(&mut question, name, parameter);
    put_sync(&mut question);
    question
}

/// One sampler's connection, with its questions prepared.
pub struct SampleClient {
    line: Line,
    alarm: Alarm,
    name: String,
    deadline: Duration,
    told_to_end: bool,
    /// Where the node is: the bytes that ask for it.
    question: Vec<u8>,
    /// They ask a primary, as it has shown itself to be.
    asks_primary: bool,
    /// Whether the other question is prepared, too: when it is first asked.
    knows_not_committing: bool,
    wal_sizes: (u64, u64),
    start: Option<Arc<str>>,
}

impl SampleClient {
    /// Each question to come may take so long.
    pub fn answer_within(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Where the node is. One round trip. After an error the connection is of no use.
    pub async fn sample(&mut self) -> Result<SampleAnswer, NodeError> {
        let asked = self.line.ask(&self.question, RUN);
        let row = self.alarm.within(self.deadline, asked).await.map_err(|fault| self.failed(fault))?;
        let answer =
            answer::sample(&self.line.buffer[row], self.wal_sizes).ok_or_else(|| self.unreadable())?;
        if !self.asks_primary && matches!(answer, SampleAnswer::Primary(_)) {
            self.asks_primary = true;
            self.question = run(SAMPLE_OF_PRIMARY_NAME, None);
        }
        Ok(answer)
    }

    /// Which of `xids` have no commit record below the returned position, as far as this node, the primary, can tell by
    /// what their backends do. `None`: it does not answer that. One round trip.
    pub async fn not_committing(&mut self, xids: &[u64]) -> Result<Option<(Lsn, Vec<u64>)>, NodeError> {
        let mut question = Vec::new();
        let expected = if self.knows_not_committing {
            RUN
        } else {
            // Where it was refused it may have been prepared all the same.
            put_close(&mut question, NOT_COMMITTING_NAME);
            put_parse(&mut question, NOT_COMMITTING_NAME, NOT_COMMITTING);
            PREPARED_ANEW_AND_RUN
        };
        question.append(&mut run(NOT_COMMITTING_NAME, Some(&answer::int8_array(xids))));
        let asked = self.line.ask(&question, expected);
        match self.alarm.within(self.deadline, asked).await {
            Ok(row) => {
                self.knows_not_committing = true;
                Ok(answer::not_committing(&self.line.buffer[row]))
            }
            Err(Fault::Refused(_)) => Ok(None),
            Err(fault) => Err(self.failed(fault)),
        }
    }

    /// The server's start that this connection belongs to. `None`: the control user may not see it (it takes
    /// `pg_read_all_stats`, which `pg_monitor` has).
    pub fn start(&self) -> Option<&Arc<str>> {
        self.start.as_ref()
    }

    /// Resolves when the connection has ended, for whatever reason.
    pub async fn ended(&mut self) {
        let fault = self.line.idle().await;
        self.failed(fault);
    }

    /// Whether the server has ended it at an administrator's word, as it does when it is shut down in order.
    pub fn was_told_to_end(&self) -> bool {
        self.told_to_end
    }

    /// Asks for what does not change while the connection lasts, and prepares the questions, all in one round trip.
    async fn prepare(&mut self) -> Result<(), NodeError> {
        let mut questions = Vec::new();
        for sql in [WAL_SIZES, START] {
            put_parse(&mut questions, "", sql);
            put_run(&mut questions, "", None);
            put_sync(&mut questions);
        }
        put_parse(&mut questions, SAMPLE_NAME, SAMPLE);
        put_parse(&mut questions, SAMPLE_OF_PRIMARY_NAME, SAMPLE_OF_PRIMARY);
        put_sync(&mut questions);
        let line = &mut self.line;
        let asked = async {
            line.send(&questions, 3).await?;
            let sizes = line.answer(PREPARED_AND_RUN).await?;
            let start = line.answer(PREPARED_AND_RUN).await?;
            line.answer(PREPARED).await?;
            Ok((sizes, start))
        };
        let (sizes, start) =
            self.alarm.within(self.deadline, asked).await.map_err(|fault| self.failed(fault))?;
        let [block, segment] = answer::columns(&self.line.buffer[sizes]).ok_or_else(|| self.unreadable())?;
        let (Some(block), Some(segment)) = (answer::int8(block), answer::int8(segment)) else {
            return Err(self.unreadable());
        };
        self.wal_sizes = (block, segment);
        let [id, ..] = answer::columns::<4>(&self.line.buffer[start]).ok_or_else(|| self.unreadable())?;
        self.start = answer::text(id).map(Arc::from);
        Ok(())
    }

    /// What a fault means; what the server has said is taken to heart.
    fn failed(&mut self, fault: Fault) -> NodeError {
        let (kind, cause) = match fault {
            Fault::Late => (NodeFailure::Timeout, "no answer in time".to_owned()),
            Fault::Nonsense(Nonsense(what)) => (NodeFailure::Broken, what.to_owned()),
            Fault::Io(error) => (NodeFailure::of_io(&error), error.to_string()),
            Fault::Refused(error) | Fault::Ended(error) => {
                let said = wire::error_fields(&self.line.buffer[error]);
                // What the server says to an idle connection answers the question that has just come.
                self.told_to_end |= super::orders_shutdown(said.sqlstate, said.routine);
                let [message, code] = [said.message, said.sqlstate].map(String::from_utf8_lossy);
                (NodeFailure::of_answer(said.sqlstate), format!("{message} ({code})"))
            }
        };
        NodeError { node: self.name.clone(), cause, kind }
    }

    fn unreadable(&self) -> NodeError {
        NodeError {
            node: self.name.clone(),
            cause: "its answer cannot be read".to_owned(),
            kind: NodeFailure::Answered,
        }
    }
}

/// Why there is no answer. Errors of the server are given by where they lie in the line's buffer.
#[derive(Debug)]
enum Fault {
    Late,
    Io(io::Error),
    Nonsense(Nonsense),
    /// An error as answer.
    Refused(Range<usize>),
    /// An error as the connection's end.
    Ended(Range<usize>),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Io(error)
    }
}

impl From<Nonsense> for Fault {
    fn from(nonsense: Nonsense) -> Fault {
        Fault::Nonsense(nonsense)
    }
}

/// The socket with what has been read of it.
struct Line {
    stream: Stream,
    buffer: Vec<u8>,
    /// Up to here the buffer has been taken, and goes with the next question.
    taken: usize,
    /// Answers still to come. Not none when a question is sent: the one before was given up, and its answer would be taken
    /// for this one's.
    owed: u8,
}

impl Line {
    fn new(stream: Stream, buffer: Vec<u8>) -> Line {
        Line { stream, buffer, taken: 0, owed: 0 }
    }

    /// Asks; where in the buffer the row of the answer lies.
    async fn ask(&mut self, question: &[u8], expected: &'static [u8]) -> Result<Range<usize>, Fault> {
        self.send(question, 1).await?;
        self.answer(expected).await
    }

    /// Sends questions that have so many answers.
    async fn send(&mut self, questions: &[u8], answers: u8) -> Result<(), Fault> {
        if self.owed > 0 {
            return Err(Nonsense("its last answer has not come").into());
        }
        self.pass_over()?;
        self.owed = answers;
        let sent = async {
            self.stream.write_all(questions).await?;
            self.stream.flush().await
        };
        match sent.await {
            Ok(()) => Ok(()),
            // It is closed: why, the server has said before.
            Err(error) => match self.idle().await {
                Fault::Io(_) => Err(error.into()),
                said => Err(said),
            },
        }
    }

    /// Reads the next answer that is owed; where in the buffer its row lies.
    async fn answer(&mut self, expected: &'static [u8]) -> Result<Range<usize>, Fault> {
        let mut answer = Answer::of(expected, self.taken);
        loop {
            let progress = answer.take(&self.buffer)?;
            match progress {
                Progress::More => {}
                Progress::Ended => return Err(Fault::Ended(answer.error())),
                Progress::Whole | Progress::Refused => {
                    self.taken = answer.taken();
                    self.owed = self.owed.saturating_sub(1);
                }
            }
            match progress {
                Progress::Whole => return Ok(answer.row()),
                Progress::Refused => return Err(Fault::Refused(answer.error())),
                _ => self.receive().await?,
            }
        }
    }

    /// Waits, asking nothing, for the connection's end. Can be given up and called again.
    async fn idle(&mut self) -> Fault {
        loop {
            if let Err(fault) = self.pass_over() {
                return fault;
            }
            if let Err(error) = self.receive().await {
                return Fault::Io(error);
            }
        }
    }

    /// Takes what has come unasked, and makes room in the buffer.
    fn pass_over(&mut self) -> Result<(), Fault> {
        let mut unasked = Answer::none(self.taken);
        match unasked.take(&self.buffer)? {
            Progress::Ended => return Err(Fault::Ended(unasked.error())),
            Progress::More => self.taken = unasked.taken(),
            Progress::Whole | Progress::Refused => return Err(Nonsense("an answer to nothing").into()),
        }
        if self.taken < self.buffer.len() {
            self.buffer.drain(..self.taken);
        } else {
            self.buffer.clear();
        }
        self.taken = 0;
        if self.buffer.capacity() > KEPT {
            self.buffer.shrink_to(ROOM);
        }
        Ok(())
    }

    async fn receive(&mut self) -> io::Result<()> {
        if self.buffer.capacity() - self.buffer.len() < ROOM / 4 {
            self.buffer.reserve(ROOM);
        }
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// A timer for deadlines that are hardly ever reached: it is not set for each, but put forward when it rings.
struct Alarm(Pin<Box<Sleep>>);

impl Alarm {
    fn new(deadline: Duration) -> Alarm {
        Alarm(Box::pin(sleep_until(Instant::now() + deadline)))
    }

    /// Does what may take so long.
    async fn within<T>(
        &mut self,
        time: Duration,
        what: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let due = Instant::now() + time;
        tokio::select! {
            biased;
            done = what => done,
            () = self.ring(due) => Err(Fault::Late),
        }
    }

    /// Resolves at `due`.
    async fn ring(&mut self, due: Instant) {
        if self.0.is_elapsed() || self.0.deadline() > due {
            self.0.as_mut().reset(due);
        }
        loop {
            self.0.as_mut().await;
            if self.0.deadline() >= due {
                return;
            }
            self.0.as_mut().reset(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpStream};

    /// A line, and a node at its other end.
    async fn line() -> (Line, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, theirs) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (Line::new(Stream::Plain(ours.unwrap()), Vec::new()), theirs.unwrap().0)
    }

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        wire::put(&mut out, tag, |out| out.extend_from_slice(body));
        out
    }

    fn answer_with(row: &[u8]) -> Vec<u8> {
        [message(b'2', b""), message(b'D', row), message(b'C', b"SELECT 1\0"), message(b'Z', b"I")].concat()
    }

    const LAST_WORDS: &[u8] = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0RProcessInterrupts\0\0";

    /// The SQLSTATE that the line has heard as its last.
    fn last_words(line: &Line, fault: Fault) -> Vec<u8> {
        let Fault::Ended(error) = fault else { panic!("{fault:?}") };
        wire::error_fields(&line.buffer[error]).sqlstate.to_vec()
    }

    #[tokio::test]
    async fn what_comes_in_pieces_between_two_questions_and_in_their_answers_is_passed_over() {
        let (mut line, mut node) = line().await;
        let told = message(b'S', b"TimeZone\0UTC\0");
        for round in 0..told.len() {
            node.write_all(&told[..round]).await.unwrap();
            // Given up and begun again, as by who waits for something else beside it.
            for _ in 0..2 {
                assert!(tokio::time::timeout(Duration::from_millis(1), line.idle()).await.is_err());
            }
            line.send(b"?", 1).await.unwrap();
            node.write_all(&told[round..]).await.unwrap();
            node.write_all(&answer_with(&[7, u8::try_from(round).unwrap()])).await.unwrap();
            let row = line.answer(RUN).await.unwrap();
            assert_eq!(line.buffer[row], [7, u8::try_from(round).unwrap()]);
        }
        let mut questions = vec![0; told.len()];
        node.read_exact(&mut questions).await.unwrap();
        assert_eq!(questions, vec![b'?'; told.len()]);
    }

    #[tokio::test]
    async fn what_a_node_says_last_is_heard_whenever_that_comes() {
        // While nothing is asked.
        let (mut quiet, mut node) = line().await;
        node.write_all(&message(b'E', LAST_WORDS)).await.unwrap();
        let fault = quiet.idle().await;
        assert_eq!(last_words(&quiet, fault), b"57P01");
        // Before the question, which it does not read: the network says that nobody is there.
        for questions in 1..4 {
            let (mut line, mut node) = line().await;
            node.write_all(&message(b'E', LAST_WORDS)).await.unwrap();
            drop(node);
            let mut said = Ok(());
            for _ in 0..questions {
                // Nobody has looked yet for what the one before led to.
                line.owed = 0;
                said = said.and(line.send(b"?", 1).await);
            }
            let fault = match said {
                Ok(()) => line.answer(RUN).await.unwrap_err(),
                Err(fault) => fault,
            };
            assert_eq!(last_words(&line, fault), b"57P01", "{questions}");
        }
        // Instead of an answer, or in the middle of it.
        let (mut asked, mut node) = line().await;
        asked.send(b"?", 1).await.unwrap();
        node.write_all(&[message(b'2', b""), message(b'E', LAST_WORDS)].concat()).await.unwrap();
        let fault = asked.answer(RUN).await.unwrap_err();
        assert_eq!(last_words(&asked, fault), b"57P01");
    }

    #[tokio::test]
    async fn a_question_that_was_given_up_is_a_lines_last() {
        let (mut line, mut node) = line().await;
        let given_up = tokio::time::timeout(Duration::from_millis(1), line.ask(b"?", RUN)).await;
        assert!(given_up.is_err());
        // The answer that comes is to the first question.
        node.write_all(&answer_with(&[1])).await.unwrap();
        assert!(matches!(line.ask(b"?", RUN).await, Err(Fault::Nonsense(_))));
        assert!(matches!(line.ask(b"?", RUN).await, Err(Fault::Nonsense(_))));
    }

    #[tokio::test]
    async fn an_answer_that_nobody_asked_for_is_none_to_the_next_question() {
        let (mut line, mut node) = line().await;
        node.write_all(&answer_with(&[1])).await.unwrap();
        assert!(matches!(line.idle().await, Fault::Nonsense(_)));
        assert!(matches!(line.ask(b"?", RUN).await, Err(Fault::Nonsense(_))));
    }

    #[tokio::test]
    async fn an_error_as_answer_leaves_the_line_as_it_was_and_large_answers_give_their_room_back() {
        let (mut line, mut node) = line().await;
        let refusal = message(b'E', b"SERROR\0VERROR\0C42501\0Mno\0\0");
        node.write_all(&[refusal, message(b'Z', b"I")].concat()).await.unwrap();
        line.owed = 1;
        assert!(matches!(line.answer(RUN).await, Err(Fault::Refused(_))));
        let large = vec![1; 300_000];
        let (row, sent) = {
            let large = answer_with(&large);
            tokio::join!(line.ask(b"?", RUN), async move { node.write_all(&large).await.map(|()| node) })
        };
        assert_eq!(line.buffer[row.unwrap()], large);
        assert!(line.buffer.capacity() > KEPT);
        line.pass_over().unwrap();
        assert!(line.buffer.capacity() <= KEPT);
        drop(sent.unwrap());
        assert!(matches!(line.idle().await, Fault::Io(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn each_question_has_its_own_deadline() {
        let second = Duration::from_secs(1);
        let mut alarm = Alarm::new(second);
        // Answered in time for longer than a deadline.
        for _ in 0..5 {
            let answered = async {
                tokio::time::sleep(second * 9 / 10).await;
                Ok(())
            };
            assert!(alarm.within(second, answered).await.is_ok());
        }
        // Longer ones, shorter ones, and after a rest of any length.
        for (time, rest) in [(3, 0), (1, 0), (2, 5), (1, 60)] {
            tokio::time::sleep(second * rest).await;
            let asked_at = Instant::now();
            let late = alarm.within(second * time, std::future::pending::<Result<(), Fault>>()).await;
            assert!(matches!(late, Err(Fault::Late)));
            let took = asked_at.elapsed();
            assert!(took >= second * time && took < second * time + second / 100, "{took:?}");
        }
    }
}
