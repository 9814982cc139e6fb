//! A small second reader: texts of which it is certain without `sqlparser` that they are one query which does nothing
//! but read, once the scan has found nothing in their names, calls and operators.
//!
//! What it rests on: in PostgreSQL's grammar (`SelectStmt` of `gram.y`, 15 to 18) a statement that begins with SELECT
//! changes something by itself only with INTO, with FOR (a lock) or with a WITH (whose parts may be INSERT and kin). These three
//! are reserved words: unquoted they are nothing else. All other effects come from what is named, which the
//! scan judges by name. So this reader has to be sure of three things: where each token begins and ends, that there is one statement,
//! and that each name before a parenthesis is the call for which the scan has taken it.
//!
//! It reads the bytes itself and shares nothing with `lexer`: the two are one another's check. It knows little, on purpose: SELECT
//! as object-relational mappers write it. No comment, no backslash, no dollar quoting, no prefix of a string,
//! no name outside ASCII unless it is quoted, no operator but the common ones, no reserved word that it does not know.
//! Whatever else there is, the second parser is asked as before.
//!
//! One pass, no allocation, no recursion.

/// Servers whose grammar this was compared with (`pg_get_keywords`).
const MAJORS: std::ops::RangeInclusive<u16> = 10..=18;

/// Parentheses within each other: as the scan allows.
const MAX_DEPTH: u32 = 40;

/// The most bytes of a name: longer ones are cut by the server.
const NAME_BYTES: usize = 63;

/// What the token before was.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Start,
    /// A word of the grammar behind which an expression, a relation or a query may begin, in parentheses, too.
    Opens,
    /// Any other word of the grammar.
    Word,
    /// AS.
    As,
    /// A name, which would be a call before `(`.
    Callable,
    /// A name that can be none: an alias, or a type's.
    Name,
    /// A string, number or parameter.
    Value,
    Open,
    Close,
    Comma,
    Dot,
    Cast,
    Operator,
    End,
}

/// How many tokens the text has, if it is plain.
pub(super) fn read(text: &[u8], server_major: u16) -> Option<u32> {
    if !MAJORS.contains(&server_major) {
        return None;
    }
    let mut reader = Reader { text, at: 0, before: Before::Start, depth: 0, tokens: 0 };
    while reader.step()? {}
    (reader.depth == 0 && reader.tokens > 1).then_some(reader.tokens)
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    before: Before,
    depth: u32,
    tokens: u32,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> u8 {
        self.text.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// Takes a token. `Some(false)`: there is none left; `None`: this text is for the parser.
    fn step(&mut self) -> Option<bool> {
        while matches!(self.peek(0), b' ' | b'\t' | b'\n' | b'\r') {
            self.at += 1;
        }
        let Some(&first) = self.text.get(self.at) else { return Some(false) };
        // Nothing behind a semicolon, and nothing but a word at the start.
        if self.before == Before::End || self.before == Before::Start && !first.is_ascii_alphabetic() {
            return None;
        }
        self.tokens += 1;
        self.before = match first {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => self.word()?,
            b'"' => self.quoted()?,
            b'\'' => self.string()?,
            b'0'..=b'9' => self.number()?,
            b'$' => self.parameter()?,
            b'(' | b')' | b',' | b'.' | b':' | b';' => self.punctuation(first)?,
            _ => self.operator()?,
        };
        Some(true)
    }

    fn word(&mut self) -> Option<Before> {
        let rest = &self.text[self.at..];
        let length = rest.iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count();
        let mut folded = [0; NAME_BYTES];
        let word = folded.get_mut(..length)?;
        word.copy_from_slice(&rest[..length]);
        word.make_ascii_lowercase();
        self.at += length;
        // Part of a longer name, or a prefix of a string or a name.
        if matches!(self.peek(0), b'$' | b'\'' | b'"' | 0x80..) {
            return None;
        }
        match (kind(word), self.before) {
            (Kind::Select, Before::Start | Before::Open | Before::Opens) => Some(Before::Opens),
            (_, Before::Start) | (Kind::Select | Kind::Unknown, _) => None,
            (Kind::Type | Kind::Name, Before::Cast) => Some(Before::Name),
            (Kind::Name, _) => self.name(),
            (Kind::Type, _) | (_, Before::Dot | Before::Cast | Before::As) => None,
            (Kind::As, _) => Some(Before::As),
            (Kind::Opens, _) => Some(Before::Opens),
            (Kind::Word, _) => Some(Before::Word),
        }
    }

    /// What a name is here. Where an expression may begin it may be a call's; behind one it is an alias.
    fn name(&self) -> Option<Before> {
        match self.before {
            Before::Opens | Before::Open | Before::Comma | Before::Dot | Before::Operator => {
                Some(Before::Callable)
            }
            Before::As | Before::Word | Before::Callable | Before::Name | Before::Value | Before::Close => {
                Some(Before::Name)
            }
            Before::Cast => Some(Before::Name),
            Before::Start | Before::End => None,
        }
    }

    fn quoted(&mut self) -> Option<Before> {
        let rest = &self.text[self.at + 1..];
        let length = memchr::memchr2(b'"', 0, rest)?;
        // A doubled quote goes on; what stands close to it is odd.
        let after = rest.get(length + 1).copied().unwrap_or(b' ');
        if rest[length] == 0 || !(1..=NAME_BYTES).contains(&length) || matches!(after, b'"' | b'\'') {
            return None;
        }
        self.at += length + 2;
        self.name()
    }

    fn string(&mut self) -> Option<Before> {
        // Behind a name it makes a constant of a type; behind another string it may go on with that.
        if !self.may_begin_a_value() {
            return None;
        }
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let length = memchr::memchr3(b'\'', b'\\', 0, rest)?;
            if rest[length] != b'\'' {
                return None;
            }
            self.at += length + 1;
            match self.peek(0) {
                b'\'' => self.at += 1,
                b'"' => return None,
                _ => return Some(Before::Value),
            }
        }
    }

    fn digits(&mut self) -> usize {
        let length = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += length;
        length
    }

    fn number(&mut self) -> Option<Before> {
        self.digits();
        if self.peek(0) == b'.' {
            self.at += 1;
            if self.digits() == 0 {
                return None;
            }
        }
        self.value()
    }

    fn parameter(&mut self) -> Option<Before> {
        self.at += 1;
        if self.digits() == 0 {
            return None;
        }
        self.value()
    }

    /// A number or a parameter has ended, if nothing is joined to it that some server reads on.
    fn value(&self) -> Option<Before> {
        let joined = matches!(
            self.peek(0),
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'.' | b'$' | b'\'' | b'"' | 0x80..
        );
        (self.may_begin_a_value() && !joined).then_some(Before::Value)
    }

    fn may_begin_a_value(&self) -> bool {
        matches!(self.before, Before::Opens | Before::Open | Before::Comma | Before::Operator)
    }

    fn punctuation(&mut self, byte: u8) -> Option<Before> {
        let before = self.before;
        self.at += 1;
        match byte {
            b'(' if matches!(
                before,
                Before::Callable | Before::Opens | Before::Open | Before::Comma | Before::Operator
            ) =>
            {
                self.depth += 1;
                (self.depth <= MAX_DEPTH).then_some(Before::Open)
            }
            b')' if self.depth > 0 => {
                self.depth -= 1;
                Some(Before::Close)
            }
            b',' => Some(Before::Comma),
            b'.' if before == Before::Callable && !self.peek(0).is_ascii_digit() => Some(Before::Dot),
            b':' if self.peek(0) == b':'
                && matches!(before, Before::Callable | Before::Value | Before::Close) =>
            {
                self.at += 1;
                Some(Before::Cast)
            }
            b';' if self.depth == 0 => Some(Before::End),
            _ => None,
        }
    }

    fn operator(&mut self) -> Option<Before> {
        let rest = &self.text[self.at..];
        let length = rest.iter().take_while(|byte| b"+-*/<>=~!@#%^&|`?".contains(byte)).count();
        let common: &[&[u8]] = &[
            b"=", b"<>", b"!=", b"<", b">", b"<=", b">=", b"+", b"-", b"*", b"/", b"%", b"||", b"~", b"!~",
            b"->", b"->>",
        ];
        self.at += length;
        common.contains(&&rest[..length]).then_some(Before::Operator)
    }
}

/// What a word is in the grammar.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Select,
    As,
    /// See [`Before::Opens`].
    Opens,
    Word,
    /// A type's name that is a word of the grammar: only behind `::`.
    Type,
    /// Reserved, or the beginning of a form with a grammar of its own: not for this reader.
    Unknown,
    /// Of no meaning here.
    Name,
}

fn kind(word: &[u8]) -> Kind {
    match word {
        b"select" => Kind::Select,
        b"as" => Kind::As,
        b"all" | b"and" | b"any" | b"between" | b"by" | b"case" | b"coalesce" | b"distinct" | b"else" | b"except"
        | b"exists" | b"from" | b"greatest" | b"having" | b"ilike" | b"in" | b"intersect" | b"join" | b"least"
        | b"like" | b"limit" | b"not" | b"nullif" | b"offset" | b"on" | b"or" | b"some" | b"then" | b"union"
        | b"using" | b"when" | b"where" => Kind::Opens,
        b"asc" | b"cross" | b"desc" | b"end" | b"false" | b"full" | b"group" | b"inner" | b"is" | b"left" | b"null"
        | b"order" | b"outer" | b"right" | b"true" => Kind::Word,
        b"bigint" | b"boolean" | b"decimal" | b"float" | b"int" | b"integer" | b"json" | b"numeric" | b"real"
        | b"smallint" | b"time" | b"timestamp" | b"varchar" => Kind::Type,
        // Reserved in one major or another.
        b"analyse" | b"analyze" | b"array" | b"asymmetric" | b"authorization" | b"binary" | b"both" | b"cast"
        | b"check" | b"collate" | b"collation" | b"column" | b"concurrently" | b"constraint" | b"create"
        | b"current_catalog" | b"current_date" | b"current_role" | b"current_schema" | b"current_time"
        | b"current_timestamp" | b"current_user" | b"default" | b"deferrable" | b"do" | b"fetch" | b"for"
        | b"foreign" | b"freeze" | b"grant" | b"initially" | b"into" | b"isnull" | b"lateral" | b"leading"
        | b"localtime" | b"localtimestamp" | b"natural" | b"notnull" | b"only" | b"overlaps" | b"placing"
        | b"primary" | b"references" | b"returning" | b"session_user" | b"similar" | b"symmetric"
        | b"system_user" | b"table" | b"tablesample" | b"to" | b"trailing" | b"unique" | b"user" | b"variadic"
        | b"verbose" | b"window" | b"with"
        // With a grammar of their own before a parenthesis or a string.
        | b"bit" | b"char" | b"character" | b"dec" | b"extract" | b"grouping" | b"inout" | b"interval"
        | b"json_array" | b"json_arrayagg" | b"json_exists" | b"json_object" | b"json_objectagg" | b"json_query"
        | b"json_scalar" | b"json_serialize" | b"json_table" | b"json_value" | b"merge_action" | b"national"
        | b"nchar" | b"none" | b"normalize" | b"out" | b"overlay" | b"position" | b"precision" | b"row" | b"setof"
        | b"substring" | b"treat" | b"trim" | b"values" | b"xmlattributes" | b"xmlconcat" | b"xmlelement"
        | b"xmlexists" | b"xmlforest" | b"xmlnamespaces" | b"xmlparse" | b"xmlpi" | b"xmlroot" | b"xmlserialize"
        | b"xmltable"
        // Not reserved, but of a meaning in a query that is not for here.
        | b"cube" | b"delete" | b"document" | b"escape" | b"execute" | b"filter" | b"insert" | b"materialized"
        | b"merge" | b"operator" | b"ordinality" | b"over" | b"partition" | b"recursive" | b"rollup" | b"rows"
        | b"sets" | b"uescape" | b"update" | b"within" => Kind::Unknown,
        _ => Kind::Name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNRESERVED: &str = "absent action comment data day first index key label last level mode name names next nulls \
                              object owner role second share state status text type value version year zone";

    /// `pg_get_keywords()` of PostgreSQL 15 to 18: all that are reserved, or cannot be any name.
    const RESERVED: &str = "all analyse analyze and any array as asc asymmetric both case cast check collate column constraint \
        create current_catalog current_date current_role current_time current_timestamp current_user default deferrable desc \
        distinct do else end except false fetch for foreign from grant group having in initially intersect into lateral \
        leading limit localtime localtimestamp not null offset on only or order placing primary references returning select \
        session_user some symmetric system_user table then to trailing true union unique user using variadic when where window \
        with authorization binary collation concurrently cross current_schema freeze full ilike inner is isnull join left \
        like natural notnull outer overlaps right similar tablesample verbose between bigint bit boolean char character \
        coalesce dec decimal exists extract float greatest grouping inout int integer interval json json_array json_arrayagg \
        json_exists json_object json_objectagg json_query json_scalar json_serialize json_table json_value least merge_action \
        national nchar none normalize nullif numeric out overlay position precision real row setof smallint substring time \
        timestamp treat trim values varchar xmlattributes xmlconcat xmlelement xmlexists xmlforest xmlnamespaces xmlparse xmlpi \
        xmlroot xmlserialize xmltable";

    fn is_plain(text: &str) -> bool {
        read(text.as_bytes(), 15).is_some()
    }

    #[test]
    fn no_word_of_the_grammar_passes_for_a_name() {
        for word in RESERVED.split_ascii_whitespace() {
            assert!(kind(word.as_bytes()) != Kind::Name, "{word}");
            assert!(!is_plain(&format!("select a.{word} from a")), "{word}");
        }
        for word in UNRESERVED.split_ascii_whitespace() {
            assert!(is_plain(&format!("select {word}, a.{word} as {word} from {word}")), "{word}");
        }
    }

    #[test]
    fn what_changes_something_is_never_plain() {
        for text in [
            "select 1 into t",
            "select 1 for update",
            "select a from t FOR\nno key update",
            "select 1 from (select 1 For Share) a",
            "with a as (insert into t values (1)) select 1",
            "select (with a as (delete from t returning 1) select 1)",
            "select 1; select 2",
            "select 1;;",
            "; select 1",
            "(select 1)",
            "values (1)",
            "table t",
            "update t set a = 1",
            "= select 1",
        ] {
            assert!(!is_plain(text), "{text}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_for_the_parser() {
        for text in [
            "select 'a\\'",
            "select E'a'",
            "select U&'a'",
            "select N'a'",
            "select x'1f'",
            "select $$a$$",
            "select $a$b$a$",
            "select 1 -- a",
            "select /* a */ 1",
            "select 1--a",
            "select 'a'\n'b'",
            "select 'a' 'b'",
            "select 'a'\"b\"",
            "select \"a\"\"b\"",
            "select \"\"",
            "select U&\"a\"",
            "select a$b",
            "select \u{e9}",
            "select 1_000",
            "select 0x1f",
            "select 1e5",
            "select 1.",
            "select .5",
            "select 1.2.3",
            "select $1a",
            "select $a",
            "select a=-1",
            "select a @> b",
            "select a operator(pg_catalog.+) b",
            "select a[1]",
            "select a::int[]",
            "select a::numeric(10, 2)",
            "select date 'now'",
            "select t 'now'",
            "select (t).f",
            "select * from t a(b)",
            "select * from (select 1) a(b)",
            "select * from t as a(b)",
            "select count(*) over (order by a) from t",
            "select count(*) filter (where a) from t",
            "select cast(a as f)",
            "select a from only (t)",
            "select 1 )",
            "select (1",
            "select",
            "",
            "select \0",
            "select '\0'",
            "select 'a",
            "select \"a",
        ] {
            assert!(!is_plain(text), "{text}");
        }
        assert!(is_plain(&format!("select {}1{}", "(".repeat(40), ")".repeat(40))));
        assert!(!is_plain(&format!("select {}1{}", "(".repeat(41), ")".repeat(41))));
        assert!(!is_plain(&format!("select {}", "a".repeat(64))));
        assert_eq!(read(b"select 1", 19), None);
        assert_eq!(read(b"select 1", 0), None);
    }

    #[test]
    fn what_mappers_write_is_plain() {
        for text in [
            "select 1",
            " SELECT a FROM t; ",
            "select * from t where a = $1 and b in (1, 2.5, 'x''y', $2) order by c desc nulls last limit 10 offset 5",
            "SELECT \"users\".* FROM \"users\" WHERE \"users\".\"id\" = 42 AND EXISTS (SELECT 1 FROM \"p\" WHERE p.u = users.id)",
            "select u1_0.id,u1_0.name from s.users u1_0 left join r on u1_0.id=r.id where u1_0.a is null or not u1_0.b>=$1::int",
            "SELECT count(DISTINCT o.id) AS n, coalesce(sum(o.total), 0), lower(name) day FROM o GROUP BY 3 HAVING count(*) > 5",
            "select a from t where name ilike $1::VARCHAR and (b->>'k') like '%\u{e9}%' and c between $2 and $3 union all select 2",
            "select case when a <> 1 then 'x' else pg_catalog.upper(b) end from \"\u{e9}\" as x cross join lower('a') y",
        ] {
            assert!(is_plain(text), "{text}");
        }
    }
}
