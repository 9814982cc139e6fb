//! What a text does to a session's settings: SET, RESET, DISCARD ALL and calls of set_config. Pure.
//!
//! Only asked for texts that [`StatementClass::settings`](super::StatementClass) marks. A value is restated
//! in an ASCII form that means the same whatever the settings of the backend that is to read it
//! (`standard_conforming_strings`, `client_encoding`). Where the new value does not show, the name is said
//! to be touched, and whoever asks reads the value back; where not even the name shows, it is untracked.

use super::Lexing;
use super::lexer::{Lexer, TextKind, Token};

/// What one statement does to settings, once it has completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The setting has the value that `sql` gives it.
    Set {
        /// The name, in lower case.
        name: String,
        /// A statement that gives it the value.
        sql: String,
    },
    /// It has its default again.
    Reset(String),
    /// It has a value until the transaction ends.
    Local(String),
    /// One of Highwater's own has.
    LocalOwn {
        /// The name, in lower case.
        name: String,
        /// A statement that gives it the value for good.
        sql: String,
    },
    /// It may have a new value.
    Touched(String),
    /// RESET ALL.
    ResetAll,
    /// DISCARD ALL.
    DiscardAll,
    /// Nobody knows what has changed.
    Untracked,
}

/// What the names of Highwater's own settings begin with.
const OWN: &str = "highwater.";

/// An argument of set_config.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Argument {
    Constant(Vec<u8>),
    /// `$1` is 0.
    Parameter(usize),
    Computed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Effect {
    Change(Change),
    Call {
        name: Argument,
        value: Argument,
        /// The third argument, if it is `true` or `false`.
        local: Option<bool>,
        /// It is called exactly once.
        sure: bool,
    },
}

/// What the statements of a text do to settings, one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effects {
    statements: Vec<Vec<Effect>>,
    /// It does nothing else, and shows nothing of the database.
    pub quiet: bool,
    utf8: bool,
}

/// Reads a text. With [`Lexing::Unsafe`] nothing can be told.
pub fn effects(text: &[u8], lexing: Lexing) -> Effects {
    let utf8 = lexing == Lexing::Utf8;
    let untracked =
        || Effects { statements: vec![vec![Effect::Change(Change::Untracked)]], quiet: false, utf8 };
    if lexing == Lexing::Unsafe && reset_batch(text).is_none() {
        return untracked();
    }
    let mut effects = Effects { statements: Vec::new(), quiet: true, utf8 };
    let mut lexer = Lexer::new(text);
    let mut tokens = Vec::new();
    let mut depth = 0_u32;
    loop {
        match lexer.next_token() {
            Token::Unclear => return untracked(),
            token @ (Token::End | Token::Punctuation(b';')) if token == Token::End || depth == 0 => {
                if !tokens.is_empty() {
                    let (found, quiet) = statement(&tokens, utf8);
                    effects.statements.push(found);
                    effects.quiet &= quiet;
                    tokens.clear();
                }
                if token == Token::End {
                    return effects;
                }
            }
            token => {
                match token {
                    Token::Punctuation(b'(') => depth += 1,
                    Token::Punctuation(b')') => depth = depth.saturating_sub(1),
                    _ => {}
                }
                let name = match token {
                    Token::Word | Token::Quoted => lexer.name().to_vec(),
                    _ => Vec::new(),
                };
                tokens.push(Piece { token, raw: lexer.raw(), name });
            }
        }
    }
}

impl Effects {
    /// What each statement does, given the values bound to its parameters (`None`: not known).
    pub fn bind(&self, values: &[Option<Vec<u8>>]) -> Vec<Vec<Change>> {
        let resolve = |argument: &Argument| match argument {
            Argument::Constant(text) => Some(text.clone()),
            Argument::Parameter(at) => values.get(*at).cloned().flatten(),
            Argument::Computed => None,
        };
        let one = |effect: &Effect| match effect {
            Effect::Change(change) => Some(change.clone()),
            Effect::Call { name, value, local, sure } => {
                let name = resolve(name).and_then(|name| String::from_utf8(name).ok());
                let Some(name) = name.filter(|name| name.is_ascii()) else { return Some(Change::Untracked) };
                let key = canonical(&name);
                if key == "seed" {
                    return Some(Change::Untracked);
                }
                if lasts_a_transaction(&key) {
                    return None;
                }
                let value = resolve(value).and_then(|value| literal(&value, self.utf8));
                match (local, value) {
                    (Some(true), Some(value)) if *sure && key.starts_with(OWN) => {
                        Some(Change::LocalOwn { sql: set_config(&key, &value)?, name: key })
                    }
                    (Some(true), _) if *sure => Some(Change::Local(key)),
                    (Some(true), _) => None,
                    (Some(false), Some(value))
                        if *sure && !matches!(key.as_str(), "session_authorization" | "datestyle") =>
                    {
                        Some(Change::Set { sql: set_config(&key, &value)?, name: key })
                    }
                    _ => Some(Change::Touched(key)),
                }
            }
        };
        // Nothing is left of SET LOCAL but that an application's own setting is known by name.
        let lasts = |change: &Change| !matches!(change, Change::Local(name) if !name.contains('.'));
        self.statements.iter().map(|effects| effects.iter().filter_map(one).filter(lasts).collect()).collect()
    }
}

/// The value that a statement of [`Change::Set`] gives; `None`: a list, or a form that only the server reads.
pub fn value_of(sql: &str) -> Option<String> {
    let mut lexer = Lexer::new(sql.as_bytes());
    let calls = lexer.next_token() == Token::Word && lexer.name() == b"select";
    // Behind TO, or behind the comma after the name.
    loop {
        match lexer.next_token() {
            Token::End | Token::Unclear => return None,
            Token::Word if !calls && lexer.name() == b"to" => break,
            Token::Punctuation(b',') if calls => break,
            _ => {}
        }
    }
    let value = match lexer.next_token() {
        Token::Word | Token::Quoted => String::from_utf8(lexer.name().to_vec()).ok()?,
        Token::Number => std::str::from_utf8(lexer.raw()).ok()?.to_owned(),
        Token::Text(TextKind::Escaped) => unescaped(std::str::from_utf8(lexer.raw()).ok()?)?,
        _ => return None,
    };
    let ends = match lexer.next_token() {
        Token::End => !calls,
        Token::Punctuation(b',') => calls,
        _ => false,
    };
    ends.then_some(value)
}

/// What a text that [`literal`] has written says.
fn unescaped(raw: &str) -> Option<String> {
    let mut rest = raw.strip_prefix("E'")?.strip_suffix('\'')?.chars();
    let mut text = String::new();
    while let Some(character) = rest.next() {
        match character {
            '\'' => text.push(rest.next()?),
            '\\' => match rest.next()? {
                'U' => {
                    let digits: String = rest.by_ref().take(8).collect();
                    text.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                }
                other => text.push(other),
            },
            other => text.push(other),
        }
    }
    Some(text)
}

/// A statement that gives a setting a value which was read back from a server.
pub fn restate(name: &str, value: &[u8], utf8: bool) -> Option<String> {
    set_config(name, &literal(value, utf8)?)
}

fn set_config(name: &str, value: &str) -> Option<String> {
    Some(format!("SELECT pg_catalog.set_config({}, {value}, false)", literal(name.as_bytes(), false)?))
}

/// A text as an ASCII literal that means the same under any setting; `None`: that cannot be done.
pub fn literal(text: &[u8], utf8: bool) -> Option<String> {
    let text = std::str::from_utf8(text).ok().filter(|text| utf8 || text.is_ascii())?;
    let mut out = String::with_capacity(text.len() + 3);
    out.push_str("E'");
    for character in text.chars() {
        match character {
            '\'' => out.push_str("''"),
            '\\' => out.push_str("\\\\"),
            '\0' => return None,
            character if character.is_ascii() => out.push(character),
            character => out.push_str(&format!("\\U{:08X}", u32::from(character))),
        }
    }
    out.push('\'');
    Some(out)
}

/// The name under which PostgreSQL knows a setting.
fn canonical(name: &str) -> String {
    match name.to_ascii_lowercase().as_str() {
        "sort_mem" => "work_mem".to_owned(),
        "vacuum_mem" => "maintenance_work_mem".to_owned(),
        name => name.to_owned(),
    }
}

/// Settings of the transaction, not of the session, however they are set.
fn lasts_a_transaction(name: &str) -> bool {
    matches!(name, "transaction_isolation" | "transaction_read_only" | "transaction_deferrable")
}

struct Piece<'a> {
    token: Token,
    raw: &'a [u8],
    /// Of a word or quoted name.
    name: Vec<u8>,
}

impl Piece<'_> {
    fn is_word(&self, word: &str) -> bool {
        self.token == Token::Word && self.name == word.as_bytes()
    }

    fn is(&self, byte: u8) -> bool {
        self.token == Token::Punctuation(byte)
    }

    fn is_name(&self) -> bool {
        matches!(self.token, Token::Word | Token::Quoted)
    }
}

/// What one statement does, and whether that is all it does.
fn statement(tokens: &[Piece<'_>], utf8: bool) -> (Vec<Effect>, bool) {
    let word = |at: usize, word: &str| tokens.get(at).is_some_and(|piece| piece.is_word(word));
    let found = if word(0, "set") {
        set(&tokens[1..], utf8)
    } else if word(0, "reset") {
        reset(&tokens[1..])
    } else if word(0, "discard") {
        if word(1, "all") { vec![Change::DiscardAll] } else { Vec::new() }
    } else {
        return calls(tokens);
    };
    let quiet = !word(0, "discard");
    (found.into_iter().map(Effect::Change).collect(), quiet)
}

fn set(tokens: &[Piece<'_>], utf8: bool) -> Vec<Change> {
    let follows = |at: usize| tokens.get(at);
    let word = |at: usize, word: &str| follows(at).is_some_and(|piece| piece.is_word(word));
    // `SET local.x = 1` and `SET session = 1` name settings.
    let names = follows(1).is_some_and(|next| next.is(b'.') || next.raw == b"=" || next.is_word("to"));
    if word(0, "local") && !names {
        return rest(&tokens[1..], true, utf8);
    }
    if word(0, "session") && !names {
        if word(1, "authorization") {
            return vec![Change::Touched("session_authorization".to_owned())];
        }
        if word(1, "characteristics") {
            return ["isolation", "read_only", "deferrable"]
                .map(|what| Change::Touched(format!("default_transaction_{what}")))
                .into();
        }
        return rest(&tokens[1..], false, utf8);
    }
    if word(0, "constraints") && !names {
        return Vec::new();
    }
    rest(tokens, false, utf8)
}

/// What stands behind SET, SET SESSION or SET LOCAL.
fn rest(tokens: &[Piece<'_>], local: bool, utf8: bool) -> Vec<Change> {
    let word = |at: usize, word: &str| tokens.get(at).is_some_and(|piece| piece.is_word(word));
    let end_or_default = |at: usize| match tokens.len() - at {
        0 => true,
        1 => word(at, "default"),
        _ => false,
    };
    let is_setting =
        tokens.get(1).is_some_and(|next| next.raw == b"=" || next.is(b'.') || next.is_word("to"));
    let special = !is_setting;
    let one = |name: &str, head: &str, at: usize| -> Vec<Change> {
        match value_list(&tokens[at..], utf8) {
            Value::Sql(sql) => of_name(name.to_owned(), local, Some(format!("{head} {sql}"))),
            Value::Hidden => vec![Change::Touched(name.to_owned())],
            Value::None => vec![Change::Untracked],
        }
    };
    if special && word(0, "transaction") {
        return Vec::new();
    }
    if special && word(0, "time") && word(1, "zone") {
        if (tokens.len() == 3 && word(2, "local")) || end_or_default(2) {
            return of_name("timezone".to_owned(), local, None);
        }
        if word(2, "interval") {
            return vec![if local {
                Change::Local("timezone".to_owned())
            } else {
                Change::Touched("timezone".to_owned())
            }];
        }
        return one("timezone", "SET TIME ZONE", 2);
    }
    if special && word(0, "schema") && tokens.len() == 2 {
        return one("search_path", "SET SCHEMA", 1);
    }
    if special && word(0, "names") {
        if end_or_default(1) {
            return of_name("client_encoding".to_owned(), local, None);
        }
        return one("client_encoding", "SET NAMES", 1);
    }
    if special && word(0, "role") && tokens.len() == 2 {
        return one("role", "SET ROLE", 1);
    }
    if special && word(0, "xml") && word(1, "option") && tokens.len() == 3 {
        return one("xmloption", "SET XML OPTION", 2);
    }
    let Some((name, quoted, at)) = setting_name(tokens) else { return vec![Change::Untracked] };
    if name == "seed" {
        return vec![Change::Untracked];
    }
    if lasts_a_transaction(&name) {
        return Vec::new();
    }
    let touched = |name: String| vec![if local { Change::Local(name) } else { Change::Touched(name) }];
    if word(at, "from") || name == "session_authorization" {
        return touched(name);
    }
    if !(word(at, "to") || tokens.get(at).is_some_and(|piece| piece.raw == b"=")) {
        return vec![Change::Untracked];
    }
    if at + 2 == tokens.len() && word(at + 1, "default") {
        return of_name(name, local, None);
    }
    match value_list(&tokens[at + 1..], utf8) {
        Value::Sql(sql) => of_name(name, local, Some(format!("SET SESSION {quoted} TO {sql}"))),
        Value::Hidden => touched(name),
        Value::None => vec![Change::Untracked],
    }
}

fn of_name(name: String, local: bool, sql: Option<String>) -> Vec<Change> {
    vec![match sql {
        Some(sql) if local && name.starts_with(OWN) => Change::LocalOwn { name, sql },
        _ if local => Change::Local(name),
        // It has two parts, and SET may leave one of them as it is.
        Some(_) if name == "datestyle" => Change::Touched(name),
        Some(sql) => Change::Set { name, sql },
        None => Change::Reset(name),
    }]
}

fn reset(tokens: &[Piece<'_>]) -> Vec<Change> {
    let word = |at: usize, word: &str| tokens.get(at).is_some_and(|piece| piece.is_word(word));
    match tokens.len() {
        1 if word(0, "all") => return vec![Change::ResetAll],
        2 if word(0, "time") && word(1, "zone") => return vec![Change::Reset("timezone".to_owned())],
        2 if word(0, "session") && word(1, "authorization") => {
            return vec![Change::Touched("session_authorization".to_owned())];
        }
        3 if word(0, "transaction") && word(1, "isolation") => return Vec::new(),
        _ => {}
    }
    match setting_name(tokens) {
        Some((name, _, end)) if end == tokens.len() => match name.as_str() {
            "seed" => vec![Change::Untracked],
            "session_authorization" => vec![Change::Touched(name)],
            name if lasts_a_transaction(name) => Vec::new(),
            _ => vec![Change::Reset(name)],
        },
        _ => vec![Change::Untracked],
    }
}

/// The dotted name at the start: its key, its quoted form, and where it ends.
fn setting_name(tokens: &[Piece<'_>]) -> Option<(String, String, usize)> {
    let (mut key, mut quoted, mut at) = (String::new(), String::new(), 0);
    loop {
        let piece = tokens.get(at).filter(|piece| piece.is_name() && piece.name.is_ascii())?;
        let part = std::str::from_utf8(&piece.name).ok()?;
        key.push_str(part);
        quoted.push_str(&format!("\"{}\"", part.replace('"', "\"\"")));
        at += 1;
        if !tokens.get(at).is_some_and(|piece| piece.is(b'.')) {
            return Some((canonical(&key), quoted, at));
        }
        key.push('.');
        quoted.push('.');
        at += 1;
    }
}

enum Value {
    /// As SQL.
    Sql(String),
    /// It is not restated, only read back.
    Hidden,
    /// Nothing that SET takes.
    None,
}

/// The values of SET: words, names, numbers and texts, with commas between them.
fn value_list(tokens: &[Piece<'_>], utf8: bool) -> Value {
    let mut sql = String::new();
    let mut hidden = false;
    let mut at = 0;
    loop {
        let Some(mut piece) = tokens.get(at) else { return Value::None };
        if piece.token == Token::Operator && matches!(piece.raw, b"-" | b"+") {
            sql.push(char::from(piece.raw[0]));
            at += 1;
            match tokens.get(at).filter(|piece| piece.token == Token::Number) {
                Some(number) => piece = number,
                None => return Value::None,
            }
        }
        let restated = match piece.token {
            Token::Word | Token::Number => ascii(piece.raw),
            Token::Quoted if piece.raw.first() == Some(&b'"') => ascii(piece.raw),
            Token::Text(TextKind::Plain) => plain(piece.raw).and_then(|text| literal(&text, utf8)),
            Token::Quoted | Token::Text(_) => None,
            _ => return Value::None,
        };
        match restated {
            Some(text) => sql.push_str(&text),
            None => hidden = true,
        }
        at += 1;
        match tokens.get(at) {
            None => return if hidden { Value::Hidden } else { Value::Sql(sql) },
            Some(piece) if piece.is(b',') => sql.push_str(", "),
            Some(_) => return Value::None,
        }
        at += 1;
    }
}

fn ascii(raw: &[u8]) -> Option<String> {
    std::str::from_utf8(raw).ok().filter(|text| text.is_ascii()).map(str::to_owned)
}

/// What a plain string constant says; `None`: it is written in several pieces.
fn plain(raw: &[u8]) -> Option<Vec<u8>> {
    let inner = raw.strip_prefix(b"'")?.strip_suffix(b"'")?;
    let mut text = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&byte) = bytes.next() {
        if byte == b'\'' && bytes.next() != Some(&b'\'') {
            return None;
        }
        text.push(byte);
    }
    Some(text)
}

/// The calls of set_config in any other statement. They are sure to happen, once each, only if the
/// statement is nothing but a SELECT of them.
fn calls(tokens: &[Piece<'_>]) -> (Vec<Effect>, bool) {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 1 < tokens.len() {
        if tokens[at].is_name() && tokens[at].name == b"set_config" && tokens[at + 1].is(b'(') {
            let (arguments, end) = arguments(tokens, at + 2);
            found.push((arguments, at, end));
            at += 2;
        } else {
            at += 1;
        }
    }
    if found.is_empty() {
        return (Vec::new(), false);
    }
    let executes = ["prepare", "declare"].iter().all(|lead| !tokens[0].is_word(lead));
    let sure = is_plain_select(tokens, &found.iter().map(|(_, at, end)| (*at, *end)).collect::<Vec<_>>());
    let mut effects = Vec::new();
    for (arguments, ..) in found {
        effects.push(match <[&[Piece<'_>]; 3]>::try_from(arguments) {
            Ok([name, value, local]) if executes => Effect::Call {
                name: argument(name),
                value: argument(value),
                local: match local {
                    [word] if word.is_word("true") => Some(true),
                    [word] if word.is_word("false") => Some(false),
                    _ => None,
                },
                sure,
            },
            _ => Effect::Change(Change::Untracked),
        });
    }
    // What is computed may have been read.
    let constant = effects.iter().all(|effect| {
        matches!(effect, Effect::Call { name, value, local: Some(_), .. }
            if *name != Argument::Computed && *value != Argument::Computed)
    });
    (effects, sure && constant)
}

/// The arguments of a call whose parenthesis has been opened before `at`, and what comes behind it.
fn arguments<'t, 'a>(tokens: &'t [Piece<'a>], at: usize) -> (Vec<&'t [Piece<'a>]>, usize) {
    let (mut from, mut depth) = (at, 0_u32);
    let mut arguments = Vec::new();
    for (here, piece) in tokens.iter().enumerate().skip(at) {
        match piece.token {
            Token::Punctuation(b'(' | b'[') => depth += 1,
            Token::Punctuation(b')') if depth == 0 => {
                arguments.push(&tokens[from..here]);
                return (arguments, here + 1);
            }
            Token::Punctuation(b')' | b']') => depth = depth.saturating_sub(1),
            Token::Punctuation(b',') if depth == 0 => {
                arguments.push(&tokens[from..here]);
                from = here + 1;
            }
            _ => {}
        }
    }
    (Vec::new(), tokens.len())
}

fn argument(tokens: &[Piece<'_>]) -> Argument {
    let cast = |tokens: &[Piece<'_>]| match tokens {
        [] => true,
        [cast, name] => cast.is(b'T') && (name.is_word("text") || name.is_word("varchar")),
        _ => false,
    };
    match tokens {
        [first, rest @ ..] if cast(rest) => match first.token {
            Token::Text(TextKind::Plain) => plain(first.raw).map_or(Argument::Computed, Argument::Constant),
            Token::Parameter => std::str::from_utf8(&first.raw[1..])
                .ok()
                .and_then(|digits| digits.parse::<usize>().ok())
                .filter(|number| *number > 0)
                .map_or(Argument::Computed, |number| Argument::Parameter(number - 1)),
            _ => Argument::Computed,
        },
        _ => Argument::Computed,
    }
}

/// Whether a statement is `SELECT call [[AS] name], ..` and nothing else.
fn is_plain_select(tokens: &[Piece<'_>], calls: &[(usize, usize)]) -> bool {
    if !tokens[0].is_word("select") {
        return false;
    }
    let mut at = 1;
    for (number, (call, end)) in calls.iter().enumerate() {
        if number > 0 {
            if !tokens.get(at).is_some_and(|piece| piece.is(b',')) {
                return false;
            }
            at += 1;
        }
        if at + 2 == *call && tokens[at].name == b"pg_catalog" && tokens[at + 1].is(b'.') {
            at += 2;
        }
        if at != *call {
            return false;
        }
        at = *end;
        if tokens.get(at).is_some_and(|piece| piece.is_word("as")) {
            at += 1;
            if !tokens.get(at).is_some_and(Piece::is_name) {
                return false;
            }
            at += 1;
        }
    }
    at == tokens.len()
}

/// Batches that poolers and drivers send to make a session as new, and whose answers depend on nothing
/// but the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetBatch {
    /// `DISCARD ALL`
    DiscardAll,
    /// `RESET ALL`
    ResetAll,
    /// `RESET ROLE`
    ResetRole,
    /// `RESET application_name`: to the name given at login, which no backend knows.
    ResetName,
    /// `DEALLOCATE ALL`
    DeallocateAll,
    /// asyncpg's: `SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;`
    Asyncpg,
}

/// Which of those a text is, word by word.
pub fn reset_batch(text: &[u8]) -> Option<ResetBatch> {
    const BATCHES: [(&str, ResetBatch); 7] = [
        ("reset role", ResetBatch::ResetRole),
        ("reset application_name", ResetBatch::ResetName),
        ("discard all", ResetBatch::DiscardAll),
        ("reset all", ResetBatch::ResetAll),
        ("deallocate all", ResetBatch::DeallocateAll),
        ("deallocate prepare all", ResetBatch::DeallocateAll),
        ("select pg_advisory_unlock_all ( ) ; close all ; unlisten * ; reset all", ResetBatch::Asyncpg),
    ];
    if text.len() > 256 {
        return None;
    }
    let mut lexer = Lexer::new(text);
    let mut words = String::new();
    loop {
        match lexer.next_token() {
            Token::End => break,
            Token::Word => words.push_str(std::str::from_utf8(lexer.name()).ok()?),
            Token::Operator | Token::Punctuation(_) => words.push_str(std::str::from_utf8(lexer.raw()).ok()?),
            _ => return None,
        }
        words.push(' ');
    }
    let words = words.strip_suffix("; ").unwrap_or(&words).trim_end();
    BATCHES.iter().find(|(batch, _)| *batch == words).map(|(_, batch)| *batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_restated_can_be_told() {
        for value in ["strong", "", "it's", "a\\b", "naïve — ☃", "7461:1/0/16B3748"] {
            let literal = literal(value.as_bytes(), true).unwrap();
            let set = format!("SET SESSION \"highwater\".\"token\" TO {literal}");
            assert_eq!(value_of(&set).as_deref(), Some(value), "{set}");
            let call = set_config("highwater.token", &literal).unwrap();
            assert_eq!(value_of(&call).as_deref(), Some(value), "{call}");
        }
        for (sql, value) in [
            ("SET SESSION \"a\".\"b\" TO Strong", Some("strong")),
            ("SET SESSION \"a\".\"b\" TO \"Strong\"", Some("Strong")),
            ("SET SESSION \"a\".\"b\" TO 5", Some("5")),
            ("SET SESSION \"a\".\"b\" TO x, y", None),
            ("RESET \"a\".\"b\"", None),
        ] {
            assert_eq!(value_of(sql).as_deref(), value, "{sql}");
        }
    }

    fn check(text: &str, values: &[Option<&str>], expected: &[Change]) {
        let values: Vec<_> = values.iter().map(|value| value.map(|v| v.as_bytes().to_vec())).collect();
        let found: Vec<Change> =
            effects(text.as_bytes(), Lexing::Utf8).bind(&values).into_iter().flatten().collect();
        assert_eq!(found, expected, "{text}");
    }

    fn set(name: &str, sql: &str) -> Change {
        Change::Set { name: name.to_owned(), sql: sql.to_owned() }
    }

    fn touched(name: &str) -> Change {
        Change::Touched(name.to_owned())
    }

    #[test]
    fn the_forms_of_set_are_restated() {
        for (text, name, sql) in [
            ("SET x = 1", "x", "SET SESSION \"x\" TO 1"),
            ("set session Work_Mem to '64MB'", "work_mem", "SET SESSION \"work_mem\" TO E'64MB'"),
            ("SET app.tenant = 'a''b\\c'", "app.tenant", "SET SESSION \"app\".\"tenant\" TO E'a''b\\\\c'"),
            ("SET app.t = 'é'", "app.t", "SET SESSION \"app\".\"t\" TO E'\\U000000E9'"),
            ("SET x TO -5", "x", "SET SESSION \"x\" TO -5"),
            (
                "SET search_path TO a, \"B c\", 'd'",
                "search_path",
                "SET SESSION \"search_path\" TO a, \"B c\", E'd'",
            ),
            ("SET TIME ZONE 'UTC'", "timezone", "SET TIME ZONE E'UTC'"),
            ("SET TIME ZONE -3", "timezone", "SET TIME ZONE -3"),
            ("SET NAMES 'latin1'", "client_encoding", "SET NAMES E'latin1'"),
            ("SET ROLE \"Bob\"", "role", "SET ROLE \"Bob\""),
            ("SET role TO bob", "role", "SET SESSION \"role\" TO bob"),
            ("SET XML OPTION DOCUMENT", "xmloption", "SET XML OPTION DOCUMENT"),
            ("SET SCHEMA 'a'", "search_path", "SET SCHEMA E'a'"),
            ("SET local.x = 1", "local.x", "SET SESSION \"local\".\"x\" TO 1"),
        ] {
            check(text, &[], &[set(name, sql)]);
        }
    }

    #[test]
    fn what_does_not_show_is_touched_or_untracked() {
        check("SET x = U&'\\0061'", &[], &[touched("x")]);
        check("SET x = 'a'\n'b'", &[], &[touched("x")]);
        check("SET x FROM CURRENT", &[], &[touched("x")]);
        check("SET TIME ZONE INTERVAL '-3' HOUR TO MINUTE", &[], &[touched("timezone")]);
        check("SET SESSION AUTHORIZATION bob", &[], &[touched("session_authorization")]);
        check("SET seed TO 0.5", &[], &[Change::Untracked]);
        check("SET", &[], &[Change::Untracked]);
        check("SET x (1)", &[], &[Change::Untracked]);
        check("SELECT set_config(name, '1', false) FROM t", &[], &[Change::Untracked]);
        check("PREPARE p AS SELECT set_config('a.b', '1', false)", &[], &[Change::Untracked]);
        check("SELECT set_config('a.b', '1', false) FROM t", &[], &[touched("a.b")]);
        check("SELECT set_config('a.b', '1', $1)", &[Some("t")], &[touched("a.b")]);
        check("SELECT set_config('a.b', upper('1'), false)", &[], &[touched("a.b")]);
        check("SELECT set_config('a.b', '1', false) WHERE 1 = 2", &[], &[touched("a.b")]);
    }

    #[test]
    fn calls_of_set_config_are_tracked() {
        let sql = "SELECT pg_catalog.set_config(E'app.tenant', E'7', false)";
        check("SELECT set_config('app.tenant', '7', false)", &[], &[set("app.tenant", sql)]);
        check(
            "select pg_catalog.set_config('App.Tenant', $1, false) as x",
            &[Some("7")],
            &[set("app.tenant", sql)],
        );
        check(
            "SELECT set_config($1, $2::text, false)",
            &[Some("app.tenant"), Some("7")],
            &[set("app.tenant", sql)],
        );
        check("SELECT set_config($1, $2, false)", &[None, Some("7")], &[Change::Untracked]);
        check("SELECT set_config('app.tenant', '7', true)", &[], &[Change::Local("app.tenant".to_owned())]);
    }

    #[test]
    fn what_may_show_something_of_the_database_is_not_quiet() {
        let check = |text: &str, quiet: bool| {
            assert_eq!(effects(text.as_bytes(), Lexing::Utf8).quiet, quiet, "{text}");
        };
        check("SET a.b = 1; RESET work_mem", true);
        check("SELECT set_config('a.b', $1, false), set_config('a.c', 'x', true)", true);
        check("SELECT set_config('a.b', (SELECT max(x)::text FROM t), false)", false);
        check("SELECT set_config('a.b', 'x', (SELECT x FROM t))", false);
        check("SET a.b = 1; SELECT x FROM t", false);
        check("SELECT set_config('a.b', 'x', false) FROM t", false);
    }

    #[test]
    fn local_and_reset_forms() {
        check("SET LOCAL x = 1", &[], &[]);
        check("SET LOCAL a.x = 1", &[], &[Change::Local("a.x".to_owned())]);
        check("SET LOCAL a.x TO DEFAULT", &[], &[Change::Local("a.x".to_owned())]);
        check(
            "SET x TO DEFAULT; RESET y.z",
            &[],
            &[Change::Reset("x".to_owned()), Change::Reset("y.z".to_owned())],
        );
        check("RESET ALL", &[], &[Change::ResetAll]);
        check("RESET TIME ZONE", &[], &[Change::Reset("timezone".to_owned())]);
        check("SET TIME ZONE LOCAL", &[], &[Change::Reset("timezone".to_owned())]);
        check("DISCARD ALL", &[], &[Change::DiscardAll]);
        check("DISCARD TEMP", &[], &[]);
        check("SET TRANSACTION READ ONLY", &[], &[]);
        check("SET transaction_isolation = 'serializable'", &[], &[]);
        check("SET CONSTRAINTS ALL DEFERRED", &[], &[]);
    }

    #[test]
    fn only_literal_reset_batches_are_recognised() {
        assert_eq!(reset_batch(b"DISCARD ALL;"), Some(ResetBatch::DiscardAll));
        assert_eq!(
            reset_batch(b"SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;"),
            Some(ResetBatch::Asyncpg)
        );
        for text in ["DISCARD ALL; SELECT 1", "RESET \"all\"", "DISCARD PLANS", "", ";", "RESET ALL;;"] {
            assert_eq!(reset_batch(text.as_bytes()), None, "{text}");
        }
    }
}
