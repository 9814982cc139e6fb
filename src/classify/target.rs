//! Which table a statement writes to, or which channel it listens to, where its first words say so. Pure.

use super::lexer::{Lexer, Token};

/// A table as a statement names it; names are folded as the server folds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The schema, if it is named.
    pub schema: Option<Vec<u8>>,
    /// The table.
    pub table: Vec<u8>,
}

/// The table that INSERT, UPDATE, DELETE, MERGE, COPY .. FROM or TRUNCATE is about. `None`: it is something else, or
/// begins with WITH, or writes to several tables, or is several statements.
pub fn target(text: &[u8]) -> Option<Target> {
    let mut lexer = Lexer::new(text);
    let word = |lexer: &mut Lexer<'_>| match lexer.next_token() {
        Token::Word => Some(lexer.name().to_vec()),
        _ => None,
    };
    let command = word(&mut lexer)?;
    let noise: &[&[u8]] = match &command[..] {
        b"insert" => &[b"into"],
        b"delete" => &[b"from", b"only"],
        b"update" => &[b"only"],
        b"merge" => &[b"into", b"only"],
        b"truncate" => &[b"table", b"only"],
        b"copy" => &[],
        _ => return None,
    };
    let mut parts = vec![name_behind(&mut lexer, noise)?];
    let mut next = lexer.next_token();
    while next == Token::Punctuation(b'.') && parts.len() < 3 {
        parts.push(name(&mut lexer)?);
        next = lexer.next_token();
    }
    let table = parts.pop()?;
    let schema = parts.pop();
    let several = command == b"truncate" && next == Token::Punctuation(b',');
    let reads = command == b"copy" && !is_copied_to(&mut lexer, next);
    (!several && !reads && is_the_only(&mut lexer, next)).then_some(Target { schema, table })
}

/// Whether a single command about transactions leaves the one that is open uncommitted: it is none of COMMIT, END and
/// PREPARE TRANSACTION.
pub fn keeps_uncommitted(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    let words: [&[u8]; 6] = [b"savepoint", b"release", b"rollback", b"abort", b"begin", b"start"];
    lexer.next_token() == Token::Word && words.contains(&lexer.name())
}

/// Whether `text` is code that may end transactions of its own: DO and CALL.
pub fn is_code(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    lexer.next_token() == Token::Word && matches!(lexer.name(), b"do" | b"call")
}

/// The channel that a LISTEN names, as the server folds it. `None`: it is something else, or more.
pub fn listen_target(text: &[u8]) -> Option<Vec<u8>> {
    let mut lexer = Lexer::new(text);
    let listens = lexer.next_token() == Token::Word && lexer.name() == b"listen";
    let channel = name(&mut lexer).filter(|_| listens)?;
    match lexer.next_token() {
        Token::End => Some(channel),
        Token::Punctuation(b';') if lexer.next_token() == Token::End => Some(channel),
        _ => None,
    }
}

/// The first name that is none of the words that may stand before it.
fn name_behind(lexer: &mut Lexer<'_>, noise: &[&[u8]]) -> Option<Vec<u8>> {
    let mut noise = noise;
    loop {
        match lexer.next_token() {
            Token::Word => match noise.iter().position(|word| *word == lexer.name()) {
                Some(at) => noise = &noise[at + 1..],
                None => return Some(lexer.name().to_vec()),
            },
            Token::Quoted => return Some(lexer.name().to_vec()),
            _ => return None,
        }
    }
}

fn name(lexer: &mut Lexer<'_>) -> Option<Vec<u8>> {
    matches!(lexer.next_token(), Token::Word | Token::Quoted).then(|| lexer.name().to_vec())
}

/// Behind the table of COPY: a list of columns, and FROM.
fn is_copied_to(lexer: &mut Lexer<'_>, mut next: Token) -> bool {
    if next == Token::Punctuation(b'(') {
        while !matches!(next, Token::Punctuation(b')') | Token::End | Token::Unclear) {
            next = lexer.next_token();
        }
        next = lexer.next_token();
    }
    next == Token::Word && lexer.name() == b"from"
}

/// Nothing but an empty statement follows.
fn is_the_only(lexer: &mut Lexer<'_>, mut next: Token) -> bool {
    let mut ended = false;
    loop {
        match next {
            Token::End => return true,
            Token::Unclear => return false,
            Token::Punctuation(b';') => ended = true,
            _ if ended => return false,
            _ => {}
        }
        next = lexer.next_token();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_that_is_written_to_is_named_at_the_beginning() {
        let check = |text: &str, expected: Option<&str>| {
            let found = target(text.as_bytes()).map(|target| {
                let text = |name: Vec<u8>| String::from_utf8(name).unwrap();
                let schema = target.schema.map(|schema| text(schema) + ".").unwrap_or_default();
                schema + &text(target.table)
            });
            assert_eq!(found.as_deref(), expected, "{text}");
        };
        check("INSERT INTO views VALUES (1)", Some("views"));
        check("/* x */ insert into Public.\"My Views\" (a) select * from payments;", Some("public.My Views"));
        check("UPDATE ONLY views v SET x = 1", Some("views"));
        check("UPDATE views SET x = 1", Some("views"));
        check("DELETE FROM ONLY (views) WHERE x = 1", None);
        check("DELETE FROM views USING payments WHERE x = 1", Some("views"));
        check("DELETE FROM db.s.views", Some("s.views"));
        check("MERGE INTO views v USING w ON v.x = w.x WHEN MATCHED THEN DELETE", Some("views"));
        check("TRUNCATE TABLE views", Some("views"));
        check("TRUNCATE views, payments", None);
        check("COPY views (a, b) FROM STDIN", Some("views"));
        check("COPY views FROM '/x'", Some("views"));
        check("COPY views TO STDOUT", None);
        check("COPY (SELECT 1) TO STDOUT", None);
        check("INSERT INTO views VALUES (1); INSERT INTO payments VALUES (1)", None);
        check("INSERT INTO views VALUES (1) ; ;", Some("views"));
        check("WITH x AS (DELETE FROM payments RETURNING *) INSERT INTO views SELECT * FROM x", None);
        check("SELECT 1", None);
        check("INSERT", None);
        check("INSERT INTO", None);
        check("INSERT INTO views VALUES (' )", None);
    }

    #[test]
    fn what_ends_a_transaction_by_committing_it_is_known() {
        for text in
            ["SAVEPOINT a", "/* x */ rollback to a", "RELEASE a", "Abort", "BEGIN", "START TRANSACTION"]
        {
            assert!(keeps_uncommitted(text.as_bytes()), "{text}");
        }
        for text in ["COMMIT", "end", "PREPARE TRANSACTION 'x'", "COMMIT AND CHAIN", "", "'"] {
            assert!(!keeps_uncommitted(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn the_channel_is_named_by_a_plain_listen() {
        let check = |text: &str, expected: Option<&str>| {
            let found = listen_target(text.as_bytes()).map(|name| String::from_utf8(name).unwrap());
            assert_eq!(found.as_deref(), expected, "{text}");
        };
        check("LISTEN Jobs", Some("jobs"));
        check("/* x */ listen \"My \"\"Jobs\" ;", Some("My \"Jobs"));
        check("LISTEN a; LISTEN b", None);
        check("LISTEN a.b", None);
        check("LISTEN", None);
        check("UNLISTEN a", None);
        check("LISTEN 'a'", None);
    }
}
