//! What the players of a history do: appends and reads by all the ways in which an application sends them.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use futures_util::future;
use futures_util::{SinkExt, pin_mut};
use tokio_postgres::types::ToSql;

use super::{Run, Seat};
use crate::history::{Key, Level, Outcome, Part, What};

/// Tables and functions of the workload, beside `lists`.
pub(super) const OBJECTS: &str = "
    CREATE FUNCTION append(list int, value int) RETURNS int LANGUAGE plpgsql AS $$
        BEGIN
            UPDATE lists SET v = v || value WHERE k = list;
            RETURN value;
        END $$;
    CREATE FUNCTION list_of(list int) RETURNS int[] LANGUAGE sql STABLE AS 'SELECT v FROM lists WHERE k = list';
    CREATE TABLE inbox (list int, value int);
    CREATE FUNCTION take_in() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM append(NEW.list, NEW.value);
            RETURN NULL;
        END $$;
    CREATE TRIGGER take_in AFTER INSERT ON inbox FOR EACH ROW EXECUTE FUNCTION take_in();
    GRANT INSERT ON inbox TO PUBLIC;";

/// The SQLSTATE that a DO block of ours fails with after it has committed.
const AFTER_COMMIT: &str = "ZZ001";

/// By which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// A statement of its own, prepared for it.
    Append,
    Prepared,
    /// A SELECT of a function that writes.
    Function,
    /// Rows that come by COPY, and a trigger.
    Copy,
    /// BEGIN, several statements, COMMIT or ROLLBACK.
    Transaction,
    /// The same in one Query.
    Batch,
    /// Several statements sent before the first is answered.
    Pipeline,
    /// A block that commits, and then fails.
    CommitAndFail,
    Read,
    ReadPrepared,
    ReadFunction,
    /// BEGIN READ ONLY, reads, COMMIT.
    ReadOnly,
}

impl Way {
    pub(super) const ALL: [Way; 12] = [
        Way::Append,
        Way::Prepared,
        Way::Function,
        Way::Copy,
        Way::Transaction,
        Way::Batch,
        Way::Pipeline,
        Way::CommitAndFail,
        Way::Read,
        Way::ReadPrepared,
        Way::ReadFunction,
        Way::ReadOnly,
    ];

    pub(super) fn of_an_append() -> Way {
        Way::ALL[usize::from(rand::random::<u8>()) % 8]
    }

    /// Most reads are plain ones.
    pub(super) fn of_a_read() -> Way {
        match rand::random::<u8>() % 8 {
            0 => Way::ReadPrepared,
            1 => Way::ReadFunction,
            2 => Way::ReadOnly,
            _ => Way::Read,
        }
    }
}

/// What was done by each way, and failed.
pub(super) type Tally = BTreeMap<Way, (usize, usize)>;

/// An operation that has been sent.
pub(super) struct Step {
    pub what: What,
    pub sent: u64,
    pub part: Option<Part>,
}

/// A failure, and what may have been done all the same.
pub(super) struct Failed {
    pub error: tokio_postgres::Error,
    pub in_doubt: Vec<Step>,
}

impl From<tokio_postgres::Error> for Failed {
    fn from(error: tokio_postgres::Error) -> Failed {
        Failed { error, in_doubt: Vec::new() }
    }
}

type Worked = Result<(), Failed>;

fn int(number: impl TryInto<i32>) -> i32 {
    number.try_into().ok().unwrap()
}

fn list_in(row: &tokio_postgres::Row) -> Vec<u32> {
    let list: Vec<i32> = row.get(0);
    list.into_iter().map(|v| u32::try_from(v).unwrap()).collect()
}

/// A list in PostgreSQL's text form.
fn list_of(text: &str) -> Vec<u32> {
    let inner = text.trim_start_matches('{').trim_end_matches('}');
    inner.split(',').filter(|value| !value.is_empty()).map(|value| value.parse().unwrap()).collect()
}

impl Run<'_> {
    pub(super) async fn work(&self, seat: &mut Seat, way: Way, key: Key) -> Worked {
        let worked = match way {
            Way::Append => self.append(seat, key).await,
            Way::Prepared => self.append_prepared(seat, key).await,
            Way::Function => self.append_by("SELECT append($2, $1)", seat, key).await,
            Way::Copy => self.copy(seat, key).await,
            Way::Transaction => self.transaction(seat, key).await,
            Way::Batch => self.batch(seat, key).await,
            Way::Pipeline => self.pipeline(seat, key).await,
            Way::CommitAndFail => self.commit_and_fail(seat, key).await,
            Way::Read => self.read_by("SELECT v FROM lists WHERE k = $1", seat, key).await,
            Way::ReadPrepared => self.read_prepared(seat, key).await,
            Way::ReadFunction => self.read_by("SELECT list_of($1)", seat, key).await,
            Way::ReadOnly => self.read_only(seat, key).await,
        };
        let mut tally = self.tally.lock().unwrap();
        let (done, failed) = tally.entry(way).or_default();
        *if worked.is_ok() { done } else { failed } += 1;
        worked
    }

    fn value(&self) -> u32 {
        self.values.fetch_add(1, Ordering::SeqCst)
    }

    fn step(&self, what: What, part: Option<Part>) -> Step {
        Step { what, sent: self.now(), part }
    }

    fn sends_append(&self, key: Key, part: Option<Part>) -> (u32, Step) {
        let value = self.value();
        (value, self.step(What::Append { key, value }, part))
    }

    /// Another list that is in use; greater, so that nobody waits for each other in a circle.
    fn beside(key: Key) -> Option<Key> {
        let last = key / super::HOT * super::HOT + super::HOT - 1;
        (key < last).then(|| key + 1 + usize::from(rand::random::<u8>()) % (last - key))
    }

    /// Takes it down that these were answered just now.
    fn answered(&self, seat: &mut Seat, steps: impl IntoIterator<Item = Step>) {
        self.hear(seat);
        for Step { what, sent, part } in steps {
            self.record(seat, what, sent, Outcome::Done, part);
        }
    }

    async fn append(&self, seat: &mut Seat, key: Key) -> Worked {
        self.append_by("UPDATE lists SET v = v || $1::int WHERE k = $2", seat, key).await
    }

    async fn append_by(&self, sql: &str, seat: &mut Seat, key: Key) -> Worked {
        let (value, step) = self.sends_append(key, None);
        match seat.connection.client.execute(sql, &[&int(value), &int(key)]).await {
            Ok(rows) => assert_eq!(rows, 1),
            Err(error) => return Err(Failed { error, in_doubt: vec![step] }),
        }
        self.answered(seat, [step]);
        Ok(())
    }

    async fn append_prepared(&self, seat: &mut Seat, key: Key) -> Worked {
        let (append, _) = seat.connection.statements().await?;
        let (value, step) = self.sends_append(key, None);
        match seat.connection.client.execute(&append, &[&int(value), &int(key)]).await {
            Ok(rows) => assert_eq!(rows, 1),
            Err(error) => return Err(Failed { error, in_doubt: vec![step] }),
        }
        self.answered(seat, [step]);
        Ok(())
    }

    /// Several appends that are seen together or not at all.
    fn appends(&self, key: Key) -> (Part, Vec<(Key, u32)>, Vec<Step>) {
        let part = self.begins();
        let mut lists = vec![key];
        lists.extend(Self::beside(key));
        let (mut values, mut steps) = (Vec::new(), Vec::new());
        for key in lists {
            let (value, step) = self.sends_append(key, Some(part));
            values.push((key, value));
            steps.push(step);
        }
        (part, values, steps)
    }

    async fn copy(&self, seat: &mut Seat, key: Key) -> Worked {
        let (_, values, steps) = self.appends(key);
        let rows: String = values.iter().map(|(key, value)| format!("{key}\t{value}\n")).collect();
        let copied = async {
            let sink = seat.connection.client.copy_in("COPY inbox FROM STDIN").await?;
            pin_mut!(sink);
            sink.send(bytes::Bytes::from(rows)).await?;
            sink.finish().await
        };
        let copied: Result<u64, tokio_postgres::Error> = copied.await;
        match copied {
            Ok(rows) => assert_eq!(rows, values.len() as u64),
            Err(error) => {
                seat.connection.is_off_by_one = true;
                return Err(Failed { error, in_doubt: steps });
            }
        }
        self.answered(seat, steps);
        Ok(())
    }

    async fn batch(&self, seat: &mut Seat, key: Key) -> Worked {
        let (_, values, steps) = self.appends(key);
        let updates: Vec<String> = values
            .iter()
            .map(|(key, value)| format!("UPDATE lists SET v = v || {value} WHERE k = {key}"))
            .collect();
        // With and without a transaction that is spelled out.
        let sql = match rand::random() {
            true => format!("BEGIN; {}; COMMIT", updates.join("; ")),
            false => updates.join("; "),
        };
        if let Err(error) = seat.connection.client.batch_execute(&sql).await {
            return Err(Failed { error, in_doubt: steps });
        }
        self.answered(seat, steps);
        Ok(())
    }

    async fn commit_and_fail(&self, seat: &mut Seat, key: Key) -> Worked {
        let (value, step) = self.sends_append(key, None);
        let sql = format!(
            "DO $$ BEGIN PERFORM append({key}, {value}); COMMIT; RAISE 'after' USING ERRCODE = '{AFTER_COMMIT}'; END $$"
        );
        match seat.connection.client.batch_execute(&sql).await {
            Err(error) if error.code().is_some_and(|code| code.code() == AFTER_COMMIT) => {
                self.answered(seat, [step]);
                Ok(())
            }
            Err(error) => Err(Failed { error, in_doubt: vec![step] }),
            Ok(()) => panic!("a block that fails has succeeded"),
        }
    }

    /// A write and reads behind it, all sent before anything is answered.
    async fn pipeline(&self, seat: &mut Seat, key: Key) -> Worked {
        let (append, read) = seat.connection.statements().await?;
        let other = Self::beside(key).unwrap_or(key);
        let (value, step) = self.sends_append(key, None);
        let read_of = |key| self.step(What::Read { key, list: Vec::new() }, None);
        let (own, beside) = (read_of(key), read_of(other));
        let client = &seat.connection.client;
        let (value_sent, key_sent, other_sent) = (int(value), int(key), int(other));
        let parameters: [&(dyn ToSql + Sync); 2] = [&value_sent, &key_sent];
        let (of_own, of_other): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) =
            ([&key_sent], [&other_sent]);
        let (appended, first, second) = future::join3(
            client.execute(&append, &parameters),
            client.query_one(&read, &of_own),
            client.query_one(&read, &of_other),
        )
        .await;
        self.hear(seat);
        let is_loss = |error: &tokio_postgres::Error| error.code().is_some_and(|code| code.code() == "HW001");
        let errors = [appended.as_ref().err(), first.as_ref().err(), second.as_ref().err()];
        let told_by_error = errors.into_iter().flatten().any(is_loss);
        let done = appended.is_ok();
        let mut failed = None;
        match appended {
            Ok(_) => self.answered(seat, [step]),
            Err(error) => failed = Some(Failed { error, in_doubt: vec![step] }),
        }
        // What is lost in between, the session is told of, by a notice or an error. Which answers came before a notice is not
        // known; those behind an error are of another session.
        let told = seat.told || told_by_error;
        let owed = done && !told && seat.level >= Level::ReadYourWrites;
        for (Step { sent, .. }, of, read) in [(own, key, first), (beside, other, second)] {
            if told {
                seat.session = self.new_session();
            }
            match read {
                Ok(row) => {
                    let list = list_in(&row);
                    if owed && failed.is_none() && of == key && !list.contains(&value) {
                        let (session, level) = (seat.session, seat.level);
                        let end = &list[list.len().saturating_sub(5)..];
                        self.broke(format!(
                            "session {session} at {level:?}: a read behind append {value} in a pipeline shows {end:?}"
                        ));
                    }
                    self.record(seat, What::Read { key: of, list }, sent, Outcome::Done, None);
                }
                Err(error) => failed = failed.or(Some(error.into())),
            }
        }
        if told {
            seat.session = self.new_session();
        }
        failed.map_or(Ok(()), Err)
    }

    async fn read_by(&self, sql: &str, seat: &mut Seat, key: Key) -> Worked {
        let sent = self.now();
        let list = list_in(&seat.connection.client.query_one(sql, &[&int(key)]).await?);
        self.answered(seat, [Step { what: What::Read { key, list }, sent, part: None }]);
        Ok(())
    }

    async fn read_prepared(&self, seat: &mut Seat, key: Key) -> Worked {
        let (_, read) = seat.connection.statements().await?;
        let sent = self.now();
        let list = list_in(&seat.connection.client.query_one(&read, &[&int(key)]).await?);
        self.answered(seat, [Step { what: What::Read { key, list }, sent, part: None }]);
        Ok(())
    }

    fn begins(&self) -> Part {
        Part { transaction: self.transactions.fetch_add(1, Ordering::SeqCst), began: self.now() }
    }

    async fn read_only(&self, seat: &mut Seat, key: Key) -> Worked {
        let part = self.begins();
        let snapshot = rand::random::<u8>() < 80;
        let begin = match snapshot {
            true => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            false if rand::random() => "BEGIN READ ONLY",
            false => "BEGIN",
        };
        // All reads under one snapshot are as old as the first.
        let mut taken = None;
        let worked = async {
            seat.connection.client.batch_execute(begin).await?;
            for _ in 0..1 + rand::random::<u8>() % 3 {
                let key = if rand::random() { key } else { Self::beside(key).unwrap_or(key) };
                let sent = self.now();
                let sent = if snapshot { *taken.get_or_insert(sent) } else { sent };
                self.read_within(seat, part, key, &[], sent).await?;
            }
            seat.connection.client.batch_execute("COMMIT").await
        }
        .await;
        self.hear(seat);
        self.over(seat, worked, Vec::new()).await
    }

    /// A read of a transaction that has appended `own` to the list.
    async fn read_within(
        &self,
        seat: &mut Seat,
        part: Part,
        key: Key,
        own: &[(Key, u32)],
        sent: u64,
    ) -> Result<(), tokio_postgres::Error> {
        let sql = format!("SELECT v FROM lists WHERE k = {key}");
        let rows = seat.connection.client.simple_query(&sql).await?;
        let text = rows.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        let mut list = list_of(&text.unwrap());
        // Nobody else has appended since: the row is locked.
        for (_, value) in own.iter().rev().filter(|(its, _)| *its == key) {
            if list.pop() != Some(*value) {
                self.broke(format!(
                    "session {}: a transaction does not read its own append {value}",
                    seat.session
                ));
            }
        }
        self.answered(seat, [Step { what: What::Read { key, list }, sent, part: Some(part) }]);
        Ok(())
    }

    /// Reads and appends, of which some are undone, all or in part.
    async fn transaction(&self, seat: &mut Seat, key: Key) -> Worked {
        let part = self.begins();
        let mut steps = Vec::new();
        let mut ends = false;
        let commits = rand::random::<u8>() > 48;
        let worked = async {
            seat.connection.client.batch_execute("BEGIN").await?;
            let mut own = Vec::new();
            for key in [Some(key), Self::beside(key)].into_iter().flatten() {
                if rand::random() {
                    self.read_within(seat, part, key, &own, self.now()).await?;
                }
                let (value, step) = self.sends_append(key, Some(part));
                let undone = rand::random::<u8>() < 48;
                let update = format!("UPDATE lists SET v = v || {value} WHERE k = {key}");
                let client = &seat.connection.client;
                if undone {
                    client.batch_execute("SAVEPOINT s").await?;
                }
                client.batch_execute(&update).await?;
                if undone {
                    client.batch_execute("ROLLBACK TO s").await?;
                    self.undone.lock().unwrap().insert(value);
                } else {
                    own.push((key, value));
                    steps.push(step);
                }
                if rand::random() {
                    self.read_within(seat, part, key, &own, self.now()).await?;
                }
            }
            ends = true;
            seat.connection.client.batch_execute(if commits { "COMMIT" } else { "ROLLBACK" }).await
        }
        .await;
        self.hear(seat);
        // Before its COMMIT was sent nothing of it can be done.
        if !commits || !ends {
            let values = steps.drain(..).filter_map(|step| match step.what {
                What::Append { value, .. } => Some(value),
                _ => None,
            });
            self.undone.lock().unwrap().extend(values);
        }
        self.over(seat, worked, steps).await
    }

    /// After a transaction: its session is in none.
    async fn over(
        &self,
        seat: &mut Seat,
        worked: Result<(), tokio_postgres::Error>,
        steps: Vec<Step>,
    ) -> Worked {
        match worked {
            Ok(()) => {
                self.answered(seat, steps);
                Ok(())
            }
            Err(error) => {
                // Of a connection that has ended it fails, too: the next statement tells.
                let _ = seat.connection.client.batch_execute("ROLLBACK").await;
                Err(Failed { error, in_doubt: steps })
            }
        }
    }
}
