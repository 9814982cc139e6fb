//! Transaction commands that say nothing but that one begins or ends, and which reads depend on the transaction they
//! run in. Pure.
//!
//! For `routing.transactions: split`: only a command that is understood to its last word can be answered without a
//! server, and only a read that does not depend on when its transaction began may run apart from it.

use super::Catalog;
use super::lexer::{Lexer, Token};
use super::scan::names_the_clock;

/// A statement that begins or ends a transaction and does nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionCommand {
    /// BEGIN or START TRANSACTION, with the tag of its answer.
    Begin {
        /// The isolation level it asks for.
        isolation: Isolation,
        /// `BEGIN` or `START TRANSACTION`.
        tag: &'static str,
        /// It asks for READ ONLY.
        read_only: bool,
    },
    /// COMMIT, END.
    Commit,
    /// ROLLBACK, ABORT.
    Rollback,
}

/// What a BEGIN says of the isolation level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Nothing: `default_transaction_isolation` decides.
    Default,
    /// READ COMMITTED, or READ UNCOMMITTED, which is the same in PostgreSQL.
    ReadCommitted,
    /// One in which all statements see the same snapshot.
    Other,
}

/// The words of these commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Begin,
    Start,
    Commit,
    End,
    Rollback,
    Abort,
    Work,
    Transaction,
    And,
    No,
    Not,
    Chain,
    Isolation,
    Level,
    Read,
    Committed,
    Uncommitted,
    Repeatable,
    Serializable,
    Only,
    Write,
    Deferrable,
    Comma,
}

/// Longer than any command with each of its options once.
const MOST_PARTS: usize = 24;

impl TransactionCommand {
    /// The command that `text` is. `None`: it is not one, or says more (AND CHAIN, TO SAVEPOINT, PREPARED, a hint
    /// in a comment).
    pub fn read(text: &[u8]) -> Option<TransactionCommand> {
        use Part as P;
        let mut parts = [P::Comma; MOST_PARTS];
        let parts = read_parts(text, &mut parts)?;
        let without_noise = |rest: &'_ [Part]| match rest {
            [P::Work | P::Transaction, ..] => 1,
            _ => 0,
        };
        let (first, rest) = parts.split_first()?;
        let noise = without_noise(rest);
        match first {
            P::Begin => begin(&rest[noise..], "BEGIN"),
            P::Start if matches!(rest, [P::Transaction, ..]) => begin(&rest[1..], "START TRANSACTION"),
            P::Commit | P::End if ends(&rest[noise..]) => Some(TransactionCommand::Commit),
            P::Rollback | P::Abort if ends(&rest[noise..]) => Some(TransactionCommand::Rollback),
            _ => None,
        }
    }
}

fn read_parts<'a>(text: &[u8], parts: &'a mut [Part; MOST_PARTS]) -> Option<&'a [Part]> {
    let mut lexer = Lexer::new(text);
    let mut count = 0;
    loop {
        let token = lexer.next_token();
        if lexer.hint().is_some() {
            return None;
        }
        let part = match token {
            Token::End => return Some(&parts[..count]),
            Token::Punctuation(b';') => {
                let ends = lexer.next_token() == Token::End && lexer.hint().is_none();
                return ends.then_some(&parts[..count]);
            }
            Token::Punctuation(b',') => Part::Comma,
            Token::Word => part(lexer.name())?,
            _ => return None,
        };
        *parts.get_mut(count)? = part;
        count += 1;
    }
}

fn part(word: &[u8]) -> Option<Part> {
    Some(match word {
        b"begin" => Part::Begin,
        b"start" => Part::Start,
        b"commit" => Part::Commit,
        b"end" => Part::End,
        b"rollback" => Part::Rollback,
        b"abort" => Part::Abort,
        b"work" => Part::Work,
        b"transaction" => Part::Transaction,
        b"and" => Part::And,
        b"no" => Part::No,
        b"not" => Part::Not,
        b"chain" => Part::Chain,
        b"isolation" => Part::Isolation,
        b"level" => Part::Level,
        b"read" => Part::Read,
        b"committed" => Part::Committed,
        b"uncommitted" => Part::Uncommitted,
        b"repeatable" => Part::Repeatable,
        b"serializable" => Part::Serializable,
        b"only" => Part::Only,
        b"write" => Part::Write,
        b"deferrable" => Part::Deferrable,
        _ => return None,
    })
}

fn ends(rest: &[Part]) -> bool {
    matches!(rest, [] | [Part::And, Part::No, Part::Chain])
}

/// The transaction modes behind BEGIN, with commas or without.
fn begin(mut modes: &[Part], tag: &'static str) -> Option<TransactionCommand> {
    use Part as P;
    let (mut isolation, mut read_only) = (Isolation::Default, false);
    while !modes.is_empty() {
        let used = match modes {
            [P::Isolation, P::Level, level @ ..] => {
                // Of two the server knows which counts.
                if isolation != Isolation::Default {
                    return None;
                }
                let (found, used) = match level {
                    [P::Read, P::Committed | P::Uncommitted, ..] => (Isolation::ReadCommitted, 4),
                    [P::Repeatable, P::Read, ..] => (Isolation::Other, 4),
                    [P::Serializable, ..] => (Isolation::Other, 3),
                    _ => return None,
                };
                isolation = found;
                used
            }
            [P::Read, access @ (P::Only | P::Write), ..] => {
                // Of several the last counts.
                read_only = *access == P::Only;
                2
            }
            [P::Not, P::Deferrable, ..] => 2,
            [P::Deferrable, ..] => 1,
            _ => return None,
        };
        modes = match &modes[used..] {
            [P::Comma] => return None,
            [P::Comma, rest @ ..] => rest,
            rest => rest,
        };
    }
    Some(TransactionCommand::Begin { isolation, tag, read_only })
}

/// Whether the answer to a read may depend on when its transaction began. What is not understood does.
pub fn depends_on_transaction(text: &[u8], catalog: &Catalog) -> bool {
    names_a_moment(text, catalog, |name| matches!(name, b"now" | b"transaction_timestamp" | b"age"))
}

/// Whether the answer to a read may depend on what the server's clock shows, be it only once a transaction.
pub fn asks_for_time(text: &[u8], catalog: &Catalog) -> bool {
    names_a_moment(text, catalog, |name| {
        matches!(
            name,
            b"now"
                | b"transaction_timestamp"
                | b"age"
                | b"statement_timestamp"
                | b"clock_timestamp"
                | b"timeofday"
                | b"pg_sleep_until"
        )
    })
}

fn names_a_moment(text: &[u8], catalog: &Catalog, is_function: fn(&[u8]) -> bool) -> bool {
    let mut lexer = Lexer::new(text);
    loop {
        match lexer.next_token() {
            Token::End => return false,
            Token::Unclear => return true,
            Token::Text(_) if names_the_clock(lexer.raw()) => return true,
            token @ (Token::Word | Token::Quoted) => {
                let name = lexer.name();
                let called = || lexer.clone().next_token() == Token::Punctuation(b'(');
                let keyword = token == Token::Word
                    && matches!(
                        name,
                        b"current_timestamp"
                            | b"current_date"
                            | b"current_time"
                            | b"localtime"
                            | b"localtimestamp"
                    );
                // age() of one argument counts from today.
                if keyword || catalog.name(name).moment || (is_function(name) && called()) {
                    return true;
                }
            }
            _ => {}
        }
    }
}

/// Whether a Bind may carry a text such as 'now', which is turned into a time.
pub fn parameters_name_the_clock(values: &[u8]) -> bool {
    const WORDS: [&[u8]; 4] = [b"now", b"today", b"tomorrow", b"yesterday"];
    let is_letter = |at: Option<usize>| at.and_then(|at| values.get(at)).is_some_and(u8::is_ascii_alphabetic);
    WORDS.iter().any(|word| {
        values.windows(word.len()).enumerate().any(|(at, window)| {
            window.eq_ignore_ascii_case(word)
                && !is_letter(at.checked_sub(1))
                && !is_letter(Some(at + word.len()))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_to_their_last_word() {
        use Isolation::{Default, Other, ReadCommitted};
        let begins =
            |isolation, tag, read_only| Some(TransactionCommand::Begin { isolation, tag, read_only });
        let begin = |isolation| begins(isolation, "BEGIN", false);
        let reads = |isolation| begins(isolation, "BEGIN", true);
        let start = |isolation| begins(isolation, "START TRANSACTION", false);
        let (commit, rollback) = (Some(TransactionCommand::Commit), Some(TransactionCommand::Rollback));
        for (text, expected) in [
            ("BEGIN", begin(Default)),
            (" begin ; ", begin(Default)),
            ("begin work", begin(Default)),
            ("BEGIN /* for the report */ TRANSACTION -- so", begin(Default)),
            ("BEGIN READ ONLY", reads(Default)),
            ("BEGIN READ WRITE READ ONLY", reads(Default)),
            ("BEGIN READ ONLY, READ WRITE", begin(Default)),
            ("begin read write, not deferrable", begin(Default)),
            ("BEGIN ISOLATION LEVEL READ COMMITTED", begin(ReadCommitted)),
            ("begin isolation level read uncommitted read only deferrable", reads(ReadCommitted)),
            ("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY", reads(Other)),
            ("begin isolation level serializable", begin(Other)),
            ("START TRANSACTION", start(Default)),
            ("start transaction read only", begins(Default, "START TRANSACTION", true)),
            ("COMMIT", commit),
            ("commit work;", commit),
            ("end transaction and no chain", commit),
            ("ROLLBACK", rollback),
            ("abort work", rollback),
        ] {
            assert_eq!(TransactionCommand::read(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_command_that_says_more_is_the_servers() {
        for text in [
            "",
            ";",
            "START",
            "start work",
            "begin; select 1",
            "begin;;",
            "begin read",
            "begin read only,",
            "begin , read only",
            "begin isolation level",
            "begin isolation level read committed isolation level serializable",
            "begin read committed",
            "commit and chain",
            "commit prepared 'x'",
            "rollback to a",
            "rollback to savepoint a",
            "rollback and chain",
            "\"begin\"",
            "begin /* highwater.route=primary */",
            "prepare transaction 'x'",
            "select 1",
            "begin $$",
            "set transaction read only",
        ] {
            assert_eq!(TransactionCommand::read(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn reads_that_use_the_transactions_time_are_found() {
        let catalog = Catalog::unknown(1);
        let depends = |text: &str| depends_on_transaction(text.as_bytes(), &catalog);
        for text in [
            "select now()",
            "select pg_catalog.now ()",
            "select \"now\"()",
            "select * from t where at < CURRENT_TIMESTAMP(3)",
            "select localtime",
            "select age(born) from t",
            "select transaction_timestamp()",
            "select * from t where at < 'now'",
            "select date 'Today'",
            "select $$tomorrow$$::date",
            "select E'no\\x77'::timestamptz",
            "select 'unclear",
        ] {
            assert!(depends(text), "{text}");
        }
        for text in [
            "select 1",
            "select age, now from t",
            "select clock_timestamp(), statement_timestamp()",
            "select a.\"current_date\" from a",
            "select * from t where name = 'anna'",
        ] {
            assert!(!depends(text), "{text}");
        }
    }

    #[test]
    fn reads_that_ask_for_the_time_are_found() {
        let catalog = Catalog::unknown(1);
        let asks = |text: &str| asks_for_time(text.as_bytes(), &catalog);
        for text in [
            "select now()",
            "select clock_timestamp () - '1 s'",
            "select * from t where at <= statement_timestamp()",
            "select timeofday()",
            "select * from t where at <= localtimestamp",
            "select * from t where at <= 'NOW'",
            "select 'unclear",
        ] {
            assert!(asks(text), "{text}");
        }
        for text in ["select 1", "select clock_timestamp from t", "select 'clock_timestamp()'"] {
            assert!(!asks(text), "{text}");
        }
    }

    #[test]
    fn parameters_that_are_turned_into_a_time_are_found() {
        for (values, expected) in [
            (&b"\0\0\0\x03now"[..], true),
            (b"\0\0\0\x03NOW\0\0", true),
            (b"\0\0\0\x0e today 10:00 \0\0", true),
            (b"\0\0\0\x05knows", false),
            (b"\0\0\0\x01x", false),
            (b"", false),
        ] {
            assert_eq!(parameters_name_the_clock(values), expected, "{values:?}");
        }
    }
}
