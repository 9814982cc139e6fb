//! A text's *shape*: its bytes, but for what stands in numbers, strings and comments. Pure; one pass, no allocation.
//!
//! It stands before the scan, for texts that an application writes again and again with other values in them: two texts of
//! one shape are cut into the same tokens, so the scan says the same of both, unless it looked at a value
//! (`Scanned::by_value`). The skeleton folds more (case, white space, longer lists) but takes the whole scan to find.
//!
//! What is not the plain case has no shape: other strings than `'..'`, line comments, nested ones and hints, numbers that
//! are not digits alone, several statements, and statements in which a value may be more than that.

use std::hash::Hasher as _;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::scan::names_the_clock;

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// It counts as it is written.
    Raw(&'a [u8]),
    /// `42`
    Number(&'a [u8]),
    /// `'x'`
    Text(&'a [u8]),
    /// Behind `IN (`: numbers, strings, or both (a bit each), up to the parenthesis.
    List(u8),
    /// `/* .. */`
    Comment,
}

/// A shape's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// By the key and whatever else the hasher was fed.
    pub(super) hash: u128,
    /// Other texts have it too.
    pub(super) folded: bool,
}

/// The shape of a text; `hash` has been fed whatever else the class depends on.
pub(super) fn shape(text: &[u8], mut hash: SipHasher13) -> Option<Shape> {
    let mut folded = false;
    // No piece that counts as it is written has a NUL in it, so none reads like a mark.
    fold(text, |piece| match piece {
        Piece::Raw(raw) => hash.write(raw),
        Piece::Number(_) => (folded, _) = (true, hash.write(b"\0n")),
        Piece::Text(_) => (folded, _) = (true, hash.write(b"\0s")),
        Piece::List(kinds) => (folded, _) = (true, hash.write(&[0, b'L', kinds])),
        Piece::Comment => (folded, _) = (true, hash.write(b"\0c")),
    })?;
    Some(Shape { hash: hash.finish128().into(), folded })
}

/// What a byte may begin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Name,
    Digit,
    Quote,
    DoubleQuote,
    Dollar,
    Minus,
    Slash,
    Semicolon,
    Refused,
}

const CLASSES: [Class; 256] = {
    let mut classes = [Class::Other; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80.. => Class::Name,
            b'0'..=b'9' => Class::Digit,
            b'\'' => Class::Quote,
            b'"' => Class::DoubleQuote,
            b'$' => Class::Dollar,
            b'-' => Class::Minus,
            b'/' => Class::Slash,
            b';' => Class::Semicolon,
            b'\\' | 0 => Class::Refused,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

fn class(byte: u8) -> Class {
    CLASSES[usize::from(byte)]
}

/// A byte that goes on a name.
fn is_name(byte: u8) -> bool {
    matches!(class(byte), Class::Name | Class::Digit | Class::Dollar)
}

/// Cuts a text into pieces; nothing if it has no shape.
pub(super) fn fold<'a>(text: &'a [u8], mut found: impl FnMut(Piece<'a>)) -> Option<()> {
    // Up to `start` all has been given out.
    let (mut start, mut at) = (0, 0);
    let mut led = false;
    while let Some(&byte) = text.get(at) {
        match class(byte) {
            Class::Other => at += 1,
            Class::Name => {
                let end = end_of(text, at, is_name);
                if !led {
                    led = leads(&text[at..end]);
                    if !led {
                        return None;
                    }
                }
                at = end;
            }
            Class::Digit | Class::Quote => {
                let (mut end, mut piece) = value(text, at)?;
                if !led {
                    return None;
                }
                if opens_list(&text[..at])
                    && let Some((behind, kinds)) = values(text, at)
                {
                    (end, piece) = (behind, Some(Piece::List(kinds)));
                }
                if let Some(piece) = piece {
                    found(Piece::Raw(&text[start..at]));
                    found(piece);
                    start = end;
                }
                at = end;
            }
            Class::DoubleQuote => {
                if at > 0 && text[at - 1] == b'&' {
                    return None;
                }
                at += 2 + memchr::memchr(b'"', &text[at + 1..])?;
            }
            Class::Dollar => {
                let end = end_of(text, at + 1, |byte| byte.is_ascii_digit());
                if end == at + 1 || text.get(end).is_some_and(|&byte| is_name(byte)) {
                    return None;
                }
                at = end;
            }
            Class::Minus if text.get(at + 1) == Some(&b'-') => return None,
            Class::Slash if text.get(at + 1) == Some(&b'*') => {
                let body = &text[at + 2..];
                let body = &body[..memchr::memmem::find(body, b"*/")?];
                let nested = body.last() == Some(&b'/') || memchr::memmem::find(body, b"/*").is_some();
                if nested || matches!(body.trim_ascii_start().first(), Some(b'h' | b'H')) {
                    return None;
                }
                found(Piece::Raw(&text[start..at]));
                found(Piece::Comment);
                at += body.len() + 4;
                start = at;
            }
            Class::Minus | Class::Slash => at += 1,
            Class::Semicolon => {
                if !text[at + 1..].trim_ascii().is_empty() {
                    return None;
                }
                at += 1;
            }
            Class::Refused => return None,
        }
    }
    found(Piece::Raw(&text[start..]));
    led.then_some(())
}

fn end_of(text: &[u8], at: usize, goes_on: impl Fn(u8) -> bool) -> usize {
    text[at..].iter().position(|&byte| !goes_on(byte)).map_or(text.len(), |length| at + length)
}

/// Statements whose class does not depend on their values.
fn leads(word: &[u8]) -> bool {
    let words: [&[u8]; 5] = [b"select", b"with", b"insert", b"update", b"delete"];
    words.iter().any(|lead| word.eq_ignore_ascii_case(lead))
}

/// The value that begins here: its end, and what it is folded to; one that names the clock counts as it is.
fn value(text: &[u8], at: usize) -> Option<(usize, Option<Piece<'_>>)> {
    let before = if at == 0 { b' ' } else { text[at - 1] };
    if text[at] != b'\'' {
        let end = end_of(text, at, |byte| byte.is_ascii_digit());
        let alone = !is_name(before) && !text.get(end).is_some_and(|&byte| is_name(byte));
        return alone.then_some((end, Some(Piece::Number(&text[at..end]))));
    }
    // `E'..'`, `U&'..'`
    if is_name(before) || before == b'&' {
        return None;
    }
    let mut end = at + 1;
    loop {
        end += memchr::memchr(b'\'', &text[end..])? + 1;
        if text.get(end) != Some(&b'\'') {
            break;
        }
        end += 1;
    }
    // It may go on on a later line.
    let next = end_of(text, end, |byte| byte.is_ascii_whitespace());
    if text.get(next) == Some(&b'\'') && text[end..next].iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return None;
    }
    let raw = &text[at..end];
    Some((end, (!names_the_clock(raw)).then_some(Piece::Text(raw))))
}

/// Whether `IN (` stands right before.
fn opens_list(before: &[u8]) -> bool {
    let Some(before) = before.trim_ascii_end().strip_suffix(b"(") else { return false };
    let before = before.trim_ascii_end();
    let Some((rest, word)) = before.split_at_checked(before.len().saturating_sub(2)) else { return false };
    word.eq_ignore_ascii_case(b"in") && !rest.last().is_some_and(|&byte| is_name(byte))
}

/// A list of nothing but values: where its parenthesis is, and the kinds of them.
fn values(text: &[u8], mut at: usize) -> Option<(usize, u8)> {
    let mut kinds = 0;
    loop {
        if !matches!(class(*text.get(at)?), Class::Digit | Class::Quote) {
            return None;
        }
        let (end, piece) = value(text, at)?;
        kinds |= match piece? {
            Piece::Number(_) => 1,
            _ => 2,
        };
        let next = end_of(text, end, |byte| byte == b' ');
        match text.get(next)? {
            b')' => return Some((end, kinds)),
            b',' => at = end_of(text, next + 1, |byte| byte == b' '),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<Shape> {
        shape(text.as_bytes(), SipHasher13::new_with_key(&[7; 16]))
    }

    #[test]
    fn texts_of_one_shape() {
        for (one, other) in [
            ("select a from t1 where b = 1", "select a from t1 where b = 4200"),
            ("select a from t where b = 'x' limit 3", "select a from t where b = 'it''s --; y' limit 5"),
            ("select a from t where b in (1, 2)", "select a from t where b in (1,2,   3)"),
            ("select a from t where b in ('x', 2)", "select a from t where b in (1, 'x', 'y')"),
            ("select 1 /* traceparent='1' */", "select 2 /*x*/"),
            ("SELECT \"a1\" FROM t WHERE x=$1 AND y>-5;", "SELECT \"a1\" FROM t WHERE x=$1 AND y>-7;"),
            ("insert into t values (1, 'x')", "insert into t values (2, '')"),
        ] {
            assert!(of(one).is_some_and(|shape| shape.folded), "{one}");
            assert_eq!(of(one), of(other), "{one} | {other}");
        }
        assert!(of("select a from t where b = $1").is_some_and(|shape| !shape.folded));
    }

    #[test]
    fn texts_of_different_shape() {
        for (one, other) in [
            ("select a1", "select a2"),
            ("select \"a1\"", "select \"a2\""),
            ("select $1", "select $2"),
            ("select 1", "select '1'"),
            ("select 1", "select  1"),
            ("select f(1)", "select f(1, 2)"),
            ("select a in (1)", "select a in ('x')"),
            ("select \"in\" (1)", "select \"in\" (1, 2)"),
            ("select join (1)", "select join (1, 2)"),
            ("select 'now'", "select 'never'"),
            ("select a in ('now')", "select a in ('today')"),
            ("select 1/* */1", "select 11"),
        ] {
            assert!(of(one).is_some() && of(one) != of(other), "{one} | {other}");
        }
    }

    #[test]
    fn what_is_not_the_plain_case_has_none() {
        for text in [
            "",
            "1",
            "'x'",
            ";",
            "set x = 1",
            "do 'x'",
            "explain select 1",
            "copy t to 'x'",
            "execute p (1)",
            "fetch 1",
            "declare c cursor for select 1",
            "prepare p as select 1",
            "call p(1)",
            "select 1; select 2",
            "select E'\\''",
            "select e'x'",
            "select U&'x'",
            "select u&\"x\"",
            "select b'1'",
            "select n'x'",
            "select $$x$$",
            "select $a$x$a$",
            "select 1a",
            "select 1_0",
            "select 1e5",
            "select 0x1f",
            "select $1a",
            "select 1 -- x",
            "select 1 /* /* */ */",
            "select 1 /* x /*/",
            "select 1 /* highwater.route=primary */",
            "select 'x",
            "select \"x",
            "select /* x",
            "select \\",
            "select \0",
            "select 'a'\n'b'",
            "select 'a' \r\n 'b'",
            "select 'a\\b'\n'c'",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
