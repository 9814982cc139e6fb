//! Whether the body of a user's function only reads. Pure.
//!
//! A body in SQL must consist of statements each of which the scan calls a read. A body in PL/pgSQL is cut into its statements; the
//! leading word of each must be one that only controls the flow, assigns or queries, and what is left is
//! scanned as one query: the same words, names, calls and operators are refused in it as in a statement of a
//! client. Dynamic SQL (EXECUTE) is never a read.

use std::hash::Hasher as _;

use siphasher::sip128::SipHasher13;

use super::builtin::Vocabulary;
use super::catalog::Catalog;
use super::lexer::{Lexer, Token};
use super::{Kind, scan};

/// Longer bodies are not looked at.
const MAX_BYTES: usize = 64 * 1024;

/// Words, beside SELECT, VALUES and WITH, that may begin a statement of PL/pgSQL. Anything else is an assignment or
/// not a read. OPEN is none: its cursor outlives the function, and is read by FETCH, which is not sent after it.
const LEADS: &[&[u8]] = &[
    b"assert",
    b"case",
    b"close",
    b"continue",
    b"elseif",
    b"elsif",
    b"end",
    b"exit",
    b"fetch",
    b"for",
    b"foreach",
    b"get",
    b"if",
    b"loop",
    b"move",
    b"null",
    b"perform",
    b"raise",
    b"return",
    b"when",
    b"while",
];

/// Words of PL/pgSQL's own, beside those, that do not stand in what is scanned.
const STRUCTURE: &[&[u8]] = &[b"begin", b"declare", b"else", b"exception", b"into", b"strict", b"then"];

/// Words that begin the commands of SQL that are not queries, beside those that the scan refuses wherever they stand.
const COMMANDS: &[&[u8]] = &[
    b"abort",
    b"alter",
    b"analyse",
    b"analyze",
    b"checkpoint",
    b"cluster",
    b"comment",
    b"copy",
    b"create",
    b"deallocate",
    b"discard",
    b"drop",
    b"explain",
    b"grant",
    b"import",
    b"insert",
    b"listen",
    b"load",
    b"lock",
    b"notify",
    b"open",
    b"prepare",
    b"reassign",
    b"refresh",
    b"reindex",
    b"release",
    b"reset",
    b"revoke",
    b"savepoint",
    b"security",
    b"set",
    b"show",
    b"start",
    b"truncate",
    b"unlisten",
    b"vacuum",
];

/// Whether a body in this language does nothing but read, given what the catalog says of the names in it. `utf8`: the
/// server's encoding; in others names that are not ASCII may be folded, so they are not compared.
pub fn only_reads(
    language: &str,
    text: &[u8],
    utf8: bool,
    vocabulary: &Vocabulary,
    catalog: &Catalog,
) -> bool {
    if text.len() > MAX_BYTES {
        return false;
    }
    match language {
        "sql" => statements(text).is_some_and(|statements| {
            !statements.is_empty()
                && statements.iter().all(|statement| scans_as_read(statement, utf8, vocabulary, catalog))
        }),
        "plpgsql" => {
            as_one_query(text, catalog).is_some_and(|query| scans_as_read(&query, utf8, vocabulary, catalog))
        }
        _ => false,
    }
}

fn scans_as_read(text: &[u8], utf8: bool, vocabulary: &Vocabulary, catalog: &Catalog) -> bool {
    // The skeleton is of no use here, so its key need not be secret.
    let mut prefix = SipHasher13::new();
    prefix.write(b"B");
    scan::scan(text, prefix, vocabulary, catalog, !utf8).class.kind == Kind::Read
}

/// Whether a body, in whatever language, may define what makes other statements unsafe: it has ALTER, or CREATE of more than
/// tables and indexes, or the name of such a function (`known`). Word by word, for it may stand in strings.
pub fn defines(text: &[u8], known: impl Fn(&[u8]) -> bool) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | 0x80..);
    let mut after_create = false;
    let mut name = [0; 63];
    text.split(|byte| !is_word(byte)).filter(|word| !word.is_empty()).any(|word| {
        let folded = &mut name[..word.len().min(63)];
        folded.copy_from_slice(&word[..folded.len()]);
        folded.make_ascii_lowercase();
        let before = std::mem::replace(&mut after_create, &*folded == b"create");
        match &*folded {
            b"alter" => true,
            b"or" | b"replace" => {
                after_create = before;
                false
            }
            b"aggregate" | b"cast" | b"domain" | b"extension" | b"foreign" | b"function" | b"operator"
            | b"policy" | b"procedure" | b"rule" | b"type" | b"unlogged" | b"view"
                if before =>
            {
                true
            }
            name => known(name),
        }
    })
}

/// A body in SQL, cut at its semicolons; nothing if it cannot be read. A cut inside parentheses leaves parts that do
/// not balance, and so are no reads.
fn statements(text: &[u8]) -> Option<Vec<&[u8]>> {
    let mut lexer = Lexer::new(text);
    let (mut found, mut start, mut blank) = (Vec::new(), 0, true);
    loop {
        let token = lexer.next_token();
        match token {
            Token::Unclear => return None,
            Token::End | Token::Punctuation(b';') => {
                if !blank {
                    found.push(&text[start..lexer.start()]);
                }
                (start, blank) = (lexer.end(), true);
            }
            _ => blank = false,
        }
        if token == Token::End {
            return Some(found);
        }
    }
}

/// Where in PL/pgSQL the next word stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// It leads a statement.
    Start,
    /// In a list of declarations.
    Declarations,
    /// Inside a statement.
    Inside,
}

/// All expressions and queries of the body behind one SELECT; nothing if it holds a statement that does more, or if
/// something unsafe bears the name of a word that is left out.
fn as_one_query(text: &[u8], catalog: &Catalog) -> Option<Vec<u8>> {
    let mut lexer = Lexer::new(text);
    let mut query = b"select ".to_vec();
    let mut at = At::Start;
    // CASEs of expressions: their THEN and ELSE begin no statement.
    let mut cases = 0u32;
    let mut behind_dot = false;
    loop {
        let token = lexer.next_token();
        let mut part = lexer.raw();
        // `a.loop` is a column's name.
        let word = if token == Token::Word && !behind_dot { lexer.name() } else { b"" };
        behind_dot = token == Token::Punctuation(b'.');
        if LEADS.contains(&word) || STRUCTURE.contains(&word) {
            // Most of them are no reserved words of SQL: `RETURN strict(1)` is a call.
            let flags = catalog.name(word);
            if flags.called || flags.code || flags.elsewhere {
                return None;
            }
        }
        match (token, word) {
            (Token::End, _) => return Some(query),
            (Token::Unclear, _) => return None,
            (Token::Punctuation(b';'), _) => {
                cases = 0;
                if at == At::Inside {
                    at = At::Start;
                }
                part = b"select";
            }
            (_, b"execute" | b"commit" | b"rollback" | b"call" | b"do") => return None,
            (_, b"declare") if at == At::Start => (at, part) = (At::Declarations, b"select"),
            (_, b"declare") => return None,
            (_, b"begin") => (at, part) = (At::Start, b"select"),
            // INTO names variables here, never a table: that takes CREATE TABLE AS.
            (_, b"into" | b"strict") => continue,
            (_, b"then" | b"loop" | b"else") if at == At::Inside && cases == 0 => {
                (at, part) = (At::Start, b"select");
            }
            // `SELECT 1 AS case` looks like an open CASE, so what follows may be a statement after all.
            (_, b"then" | b"loop" | b"else") if at == At::Inside && begins_a_command(lexer.clone()) => {
                return None;
            }
            // By themselves: the next word begins a statement (EXCEPTION's is WHEN).
            (_, b"else" | b"exception" | b"loop") if at == At::Start => part = b"select",
            (_, b"case") if at != At::Start => cases += 1,
            (_, b"end") if at != At::Start => cases = cases.saturating_sub(1),
            (Token::Word, word) if at == At::Start => {
                at = At::Inside;
                // FOR stays, lest FOR SHARE be missed where the cut was wrong.
                if matches!(word, b"select" | b"values" | b"with" | b"for") {
                } else if LEADS.contains(&word) {
                    // Says nothing of what is evaluated, and the scan would trip over it.
                    part = b"";
                } else if !assigns(lexer.clone()) {
                    return None;
                }
            }
            (Token::Quoted, _) if at == At::Start => {
                at = At::Inside;
                if !assigns(lexer.clone()) {
                    return None;
                }
            }
            // A query in parentheses, a label, a directive.
            _ if at == At::Start => return None,
            _ => {}
        }
        query.extend_from_slice(part);
        query.push(b' ');
    }
}

/// Whether a command that is no query, or a label, comes next.
fn begins_a_command(mut lexer: Lexer<'_>) -> bool {
    match lexer.next_token() {
        Token::Word => COMMANDS.contains(&lexer.name()),
        Token::Operator => lexer.raw().starts_with(b"<<"),
        _ => false,
    }
}

/// Whether behind a statement's first name an assignment follows: `a := ..`, `a.b[1] = ..`.
fn assigns(mut lexer: Lexer<'_>) -> bool {
    let mut brackets = 0u32;
    let mut behind_dot = false;
    loop {
        let token = lexer.next_token();
        match token {
            Token::End | Token::Unclear | Token::Punctuation(b';') => return false,
            Token::Punctuation(b'[') => brackets += 1,
            Token::Punctuation(b']') => brackets = brackets.saturating_sub(1),
            _ if brackets > 0 => {}
            Token::Punctuation(b'A') => return true,
            Token::Operator => return lexer.raw() == b"=",
            Token::Punctuation(b'.') => {}
            Token::Word | Token::Quoted if behind_dot => {}
            _ => return false,
        }
        behind_dot = token == Token::Punctuation(b'.');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::catalog::{CatalogRows, FunctionRow};

    fn only_reads(language: &str, text: &str) -> bool {
        let catalog = Catalog::from_rows(1, CatalogRows { server_major: 15, ..CatalogRows::default() });
        super::only_reads(language, text.as_bytes(), true, &Vocabulary::new(), &catalog)
    }

    #[test]
    fn bodies_in_sql() {
        for text in [
            "select 1",
            " SELECT upper($1) || name FROM t WHERE id = a; ",
            "values (1)",
            "select 1; select upper(';');; -- select pg_advisory_lock(1)",
        ] {
            assert!(only_reads("sql", text), "{text}");
        }
        for text in [
            "",
            ";",
            "select 1; select pg_advisory_lock(1)",
            "select 1; insert into t values (1); select 2",
            "select (1; select 2)",
            "select 1; set x = 1",
            "select pg_advisory_lock(1)",
            "insert into t values (1)",
            "select * from t for share",
            "select unknown($1)",
            "set search_path = x",
            "select 'unclosed",
        ] {
            assert!(!only_reads("sql", text), "{text}");
        }
        assert!(!only_reads("plperl", "select 1"));
        let catalog = Catalog::from_rows(1, CatalogRows { server_major: 15, ..CatalogRows::default() });
        let read =
            |utf8| super::only_reads("sql", "select É from t".as_bytes(), utf8, &Vocabulary::new(), &catalog);
        assert!(read(true) && !read(false));
        assert!(!only_reads("sql", &format!("select 1{}", " ".repeat(MAX_BYTES))));
    }

    #[test]
    fn bodies_in_plpgsql() {
        for text in [
            "begin return 1; end",
            "BEGIN RETURN upper(a) || 'x'; END;",
            "declare x int := 5; y t.a%type; begin x := x + length(a); y = 1; r.f[1] := 2; return x; end",
            "begin if a > 1 then return 1; elsif a > 0 then null; else return 2; end if; return 3; end",
            "begin return case when a > 1 then lower(b) else upper(b) end; end",
            "begin case a when 1 then return lower(b); else return 2; end case; end",
            "declare r record; begin for r in select * from t where id = a loop return next r; end loop; end",
            "begin return query select id, count(*) from t group by id; end",
            "begin select id into strict x from t; perform length(x); exit when x > 1; raise notice '%', x; end",
            "begin return 1; exception when others then return 2; end",
            "begin while x < 3 loop x := x + 1; continue when x = 2; end loop; return x; end",
        ] {
            assert!(only_reads("plpgsql", text), "{text}");
        }
        for text in [
            "begin execute 'select 1'; end",
            "begin return query execute a; end",
            "begin for r in execute a loop null; end loop; end",
            "begin open c for execute a; end",
            "begin perform pg_advisory_lock(1); end",
            "begin return pg_advisory_lock(1); end",
            "begin x := pg_advisory_lock(1); end",
            "begin x[pg_advisory_lock(1)] := 1; end",
            "begin if pg_try_advisory_lock(1) then null; end if; end",
            "declare x bool := pg_try_advisory_lock(1); begin return x; end",
            "begin insert into t values (1); return 1; end",
            "begin return case when true then nextval('s') else 1 end; end",
            "begin if true then update t set a = 1; end if; return 1; end",
            "begin if true then null; else delete from t; end if; return 1; end",
            "begin loop truncate t; end loop; end",
            "begin null; exception when others then drop table t; end",
            "begin lock table t; end",
            "begin set x = 1; end",
            "begin reset x; end",
            "begin notify x; end",
            "begin listen x; end",
            "begin call p(); end",
            "begin do 'x'; end",
            "begin commit; end",
            "begin copy t to '/x'; end",
            "begin create table x (); end",
            "begin analyze; end",
            "begin merge into t using s on true when matched then do nothing; end",
            "begin for r in select * from t for share loop null; end loop; end",
            "begin for r in select * from t for no key update loop null; end loop; end",
            "declare c cursor for select * from t for update; begin open c; end",
            "begin with x as (delete from t returning 1) select 1 into y from x; end",
            "begin for r in insert into t values (1) returning 1 loop null; end loop; end",
            "begin return unknown(1); end",
            "begin perform 1 from s.loop for share; end",
            "begin perform 1 from s.begin for share; end",
            "begin perform a.declare; truncate t; end",
            "begin perform declare; truncate t; end",
            "begin perform a.then; truncate t; end",
            "<<l>> begin truncate t; end",
            "begin (select 1); end",
            "begin return 'unclosed; end",
            "begin \"insert\" into t values (1); end",
            "begin if (select 1 as case) = 1 then lock table t; end if; end",
            "begin if (select 1 case) = 1 then truncate t; end if; end",
            "begin if (select 1 case) = 1 then null; else set x = 1; end if; end",
            "begin if (select 1 case) = 1 then <<l>> loop exit l; end loop; end if; end",
            "begin while (select 1 case) = 1 loop notify x; end loop; end",
            "begin if (select 1 case) = 1 then if true then drop table t; end if; end if; end",
            "declare c refcursor; begin open c for select 1; return c; end",
        ] {
            assert!(!only_reads("plpgsql", text), "{text}");
        }
    }

    #[test]
    fn words_that_are_left_out_may_be_names() {
        let row = |name: &str| FunctionRow {
            name: name.into(),
            language: "plperl".into(),
            kind: "f".into(),
            ..FunctionRow::default()
        };
        let catalog = Catalog::from_rows(
            1,
            CatalogRows {
                functions: vec![row("strict"), row("move"), row("begin")],
                ..CatalogRows::default()
            },
        );
        for text in [
            "begin return strict(1); end",
            "declare x int; begin x := case when (select 1 as end) = 1 then move(1) end; return x; end",
            "begin perform 1 from begin; return 1; end",
        ] {
            assert!(only_reads("plpgsql", text), "{text}");
            let read = super::only_reads("plpgsql", text.as_bytes(), true, &Vocabulary::new(), &catalog);
            assert!(!read, "{text}");
        }
    }

    #[test]
    fn definitions_in_bodies() {
        let found = |text: &str| super::defines(text.as_bytes(), |name| name == b"migrate");
        for text in [
            "begin create view v as select 1; end",
            "begin execute 'CREATE OR REPLACE FUNCTION f() returns'; end",
            "begin execute format('alter table %I', x); end",
            "begin create unlogged table t (); end",
            "select Migrate(1)",
        ] {
            assert!(found(text), "{text}");
        }
        for text in [
            "begin create temp table t (x int); end",
            "begin create table p partition of t; end",
            "select view, type",
            "",
        ] {
            assert!(!found(text), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_body_is_survived(text in "[ -~\n]{0,200}") {
            only_reads("plpgsql", &text);
            only_reads("sql", &text);
        }

        #[test]
        fn a_write_among_statements_is_found(
            before in "(x := 1;|if a then null; end if;|return next 1;|perform length(b);| ){0,4}",
            write in "(insert into t values \\(1\\)|delete from t|perform nextval\\('s'\\)|execute 'x'|truncate t);",
            after in "(x := 1;|return 2;| ){0,3}",
        ) {
            let text = format!("begin {before}{write}{after} end");
            proptest::prop_assert!(!only_reads("plpgsql", &text));
        }
    }
}
