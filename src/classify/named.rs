//! SQL's PREPARE and EXECUTE, as far as a session must understand them to keep track of names.
//! Anything but exactly one such statement is `None`.

use std::collections::HashSet;
use std::ops::Range;

use super::lexer::{Lexer, Token};

/// `PREPARE name [ (types) ] AS statement`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqlPrepare {
    /// The name, decoded.
    pub name: Vec<u8>,
    /// Where the text has the statement.
    pub statement: Range<usize>,
    /// A query that names the parameters' types and is a read if they are harmless.
    pub types: Option<Vec<u8>>,
}

/// `EXECUTE name [ (arguments) ]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqlExecute {
    /// The name, decoded.
    pub name: Vec<u8>,
    /// A query of the arguments, which is a read if they are harmless.
    pub arguments: Option<Vec<u8>>,
}

/// The prepared statements that a text may name: at least these, and mostly words that name none. `None`: it may name any.
pub fn statements_named(text: &[u8]) -> Option<HashSet<Vec<u8>>> {
    let alone = sql_execute(text).map(|execute| execute.name);
    match alone.or_else(|| sql_prepare(text).map(|prepare| prepare.name)) {
        Some(name) => Some(HashSet::from([name])),
        None => words(text),
    }
}

/// The words of a text, names among them, as the server folds them. `None`: it is not clear, or has a string, in which
/// there may be others.
fn words(text: &[u8]) -> Option<HashSet<Vec<u8>>> {
    let mut lexer = Lexer::new(text);
    let mut words = HashSet::new();
    loop {
        match lexer.next_token() {
            Token::End => return Some(words),
            Token::Unclear | Token::Text(_) => return None,
            Token::Word | Token::Quoted => {
                words.insert(lexer.name().to_vec());
            }
            Token::Number | Token::Parameter | Token::Operator | Token::Punctuation(_) => {}
        }
    }
}

/// Whether a text may execute or deallocate what SQL can name, alone or beside something else.
pub fn may_name_statements(text: &[u8]) -> bool {
    may_have(text, &[b"execute", b"deallocate"])
}

/// Whether a text may execute what SQL can name: `EXPLAIN ANALYZE EXECUTE`, `CREATE TABLE .. AS EXECUTE`, or behind something.
pub fn may_execute(text: &[u8]) -> bool {
    may_have(text, &[b"execute"])
}

fn may_have(text: &[u8], words: &[&[u8]]) -> bool {
    let mut lexer = Lexer::new(text);
    loop {
        match lexer.next_token() {
            Token::End => return false,
            Token::Unclear => return true,
            Token::Word if words.contains(&lexer.name()) => return true,
            _ => {}
        }
    }
}

/// Reads a PREPARE.
pub fn sql_prepare(text: &[u8]) -> Option<SqlPrepare> {
    let mut lexer = Lexer::new(text);
    let name = verb_and_name(&mut lexer, b"prepare")?;
    let mut token = lexer.next_token();
    let mut types = None;
    if token == Token::Punctuation(b'(') {
        types = Some(list(&mut lexer, text, b"SELECT CAST(NULL AS ", b"), CAST(NULL AS ", b")")?);
        token = lexer.next_token();
    }
    if token != Token::Word || lexer.name() != b"as" {
        return None;
    }
    let mut statement: Option<Range<usize>> = None;
    loop {
        match lexer.next_token() {
            Token::End => break,
            Token::Unclear => return None,
            Token::Punctuation(b';') if lexer.next_token() == Token::End => break,
            Token::Punctuation(b';') => return None,
            _ => {
                let start = statement.map_or(lexer.start(), |range| range.start);
                statement = Some(start..lexer.end());
            }
        }
    }
    Some(SqlPrepare { name, statement: statement?, types })
}

/// Reads an EXECUTE.
pub fn sql_execute(text: &[u8]) -> Option<SqlExecute> {
    let mut lexer = Lexer::new(text);
    let name = verb_and_name(&mut lexer, b"execute")?;
    let mut token = lexer.next_token();
    let mut arguments = None;
    if token == Token::Punctuation(b'(') {
        arguments = Some(list(&mut lexer, text, b"SELECT ", b", ", b"")?);
        token = lexer.next_token();
    }
    if token == Token::Punctuation(b';') {
        token = lexer.next_token();
    }
    (token == Token::End).then_some(SqlExecute { name, arguments })
}

fn verb_and_name(lexer: &mut Lexer<'_>, verb: &[u8]) -> Option<Vec<u8>> {
    if lexer.next_token() != Token::Word || lexer.name() != verb {
        return None;
    }
    matches!(lexer.next_token(), Token::Word | Token::Quoted).then(|| lexer.name().to_vec())
}

/// The items of a list, behind its opening parenthesis, up to the closing one.
fn list(lexer: &mut Lexer<'_>, text: &[u8], before: &[u8], between: &[u8], behind: &[u8]) -> Option<Vec<u8>> {
    let mut out = before.to_vec();
    let mut item: Option<Range<usize>> = None;
    let mut depth = 0_usize;
    loop {
        let token = lexer.next_token();
        match token {
            Token::End | Token::Unclear | Token::Punctuation(b';') => return None,
            Token::Punctuation(b')') if depth == 0 => {
                out.extend_from_slice(&text[item?]);
                out.extend_from_slice(behind);
                return Some(out);
            }
            Token::Punctuation(b',') if depth == 0 => {
                out.extend_from_slice(&text[item.take()?]);
                out.extend_from_slice(between);
                continue;
            }
            Token::Punctuation(b'(' | b'[') => depth += 1,
            Token::Punctuation(b')' | b']') => depth = depth.checked_sub(1)?,
            _ => {}
        }
        let start = item.map_or(lexer.start(), |range| range.start);
        item = Some(start..lexer.end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prepare_is_taken_apart() {
        let check = |text: &str, name: &str, statement: &str, types: Option<&str>| {
            let read = sql_prepare(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(read.name, name.as_bytes(), "{text}");
            assert_eq!(&text[read.statement], statement, "{text}");
            assert_eq!(read.types.as_deref(), types.map(str::as_bytes), "{text}");
        };
        check("PREPARE p AS SELECT 1", "p", "SELECT 1", None);
        check("prepare \"P x\" as select ';' ; -- end", "P x", "select ';'", None);
        check(
            "PREPARE Q (int, varchar(10), numeric(1,2)[]) AS VALUES ($1)",
            "q",
            "VALUES ($1)",
            Some("SELECT CAST(NULL AS int), CAST(NULL AS varchar(10)), CAST(NULL AS numeric(1,2)[])"),
        );
        for text in [
            "PREPARE p AS",
            "PREPARE TRANSACTION 'x'",
            "PREPARE p AS SELECT 1; SELECT 2",
            "PREPARE p () AS SELECT 1",
            "PREPARE p (int AS SELECT 1",
            "PREPARE p (a; b) AS SELECT 1",
            "PREPARE p",
            "EXECUTE p",
            "PREPARE p AS SELECT 'open",
        ] {
            assert_eq!(sql_prepare(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn an_execute_is_found_wherever_it_stands() {
        for text in ["EXECUTE p", "EXPLAIN ANALYZE EXECUTE p", "CREATE TABLE t AS Execute p", "SELECT 'open"]
        {
            assert!(may_execute(text.as_bytes()) && may_name_statements(text.as_bytes()), "{text}");
        }
        for text in ["DEALLOCATE p", "SELECT 'execute p', \"execute\" -- execute"] {
            assert!(!may_execute(text.as_bytes()), "{text}");
        }
        assert!(may_name_statements(b"DEALLOCATE p"));
    }

    #[test]
    fn an_execute_is_taken_apart() {
        let check = |text: &str, name: &str, arguments: Option<&str>| {
            let read = sql_execute(text.as_bytes()).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(read.name, name.as_bytes(), "{text}");
            assert_eq!(read.arguments.as_deref(), arguments.map(str::as_bytes), "{text}");
        };
        check("EXECUTE p", "p", None);
        check("execute P ; ", "p", None);
        check("EXECUTE p(1, f(2, ARRAY[3, 4]), 'x')", "p", Some("SELECT 1, f(2, ARRAY[3, 4]), 'x'"));
        for text in [
            "EXECUTE p()",
            "EXECUTE p(1",
            "EXECUTE p(1]) ",
            "EXECUTE p(1); SELECT 2",
            "EXECUTE p; ;",
            "EXECUTE",
            "EXPLAIN EXECUTE p",
        ] {
            assert_eq!(sql_execute(text.as_bytes()), None, "{text}");
        }
    }
}
