//! PostgreSQL's lexical rules over bytes: one token at a time, no allocation, no recursion, and each byte
//! is looked at a bounded number of times (a string's continuation looks ahead over white space once more).
//!
//! It holds for `standard_conforming_strings = on` and encodings whose trail bytes are not ASCII; the
//! caller makes sure of both. What it cannot make sense of is [`Token::Unclear`], never a guess:
//! that includes forms that the server's majors read differently (`1_000`, `0x1F`, `1abc`, `\v`).

/// The most bytes of an identifier (NAMEDATALEN - 1).
const NAME_BYTES: usize = 63;

/// A lexical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// An unquoted identifier or keyword: see [`Lexer::name`].
    Word,
    /// A quoted identifier: see [`Lexer::name`].
    Quoted,
    /// A string constant whose raw bytes (prefix and quotes included) are `start..end`.
    Text(TextKind),
    /// A numeric constant.
    Number,
    /// `$1`
    Parameter,
    /// An operator: see [`Lexer::raw`].
    Operator,
    /// One of `( ) [ ] , ; : .`, `::`, `:=`.
    Punctuation(u8),
    /// Nothing follows.
    End,
    /// Not understood, or not read alike by all servers.
    Unclear,
}

/// How a string constant was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// `'..'`, `N'..'`
    Plain,
    /// `E'..'`
    Escaped,
    /// `U&'..'`
    Unicode,
    /// `B'..'`, `X'..'`
    Bits,
    /// `$tag$..$tag$`
    Dollar,
}

/// The state of a scan.
#[derive(Clone, Debug)]
pub struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    start: usize,
    end: usize,
    name: [u8; NAME_BYTES + 1],
    name_len: usize,
    hint: Option<(usize, usize)>,
}

impl<'a> Lexer<'a> {
    /// At the start of `text`.
    pub fn new(text: &'a [u8]) -> Lexer<'a> {
        Lexer { text, at: 0, start: 0, end: 0, name: [0; NAME_BYTES + 1], name_len: 0, hint: None }
    }

    /// The last word, decoded, case-folded when it was not quoted, and cut at 63 bytes.
    #[inline]
    pub fn name(&self) -> &[u8] {
        &self.name[..self.name_len]
    }

    /// The last token as written (an operator without what belongs to the next token).
    #[inline]
    pub fn raw(&self) -> &'a [u8] {
        &self.text[self.start..self.end]
    }

    /// Goes on behind the first `at` bytes of the text.
    pub fn skip_to(&mut self, at: usize) {
        self.at = at.min(self.text.len());
    }

    /// Where the last token begins.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Where it ends.
    pub fn end(&self) -> usize {
        self.end
    }

    /// The bytes of the hint comment that stood before the last token.
    #[inline]
    pub fn hint(&self) -> Option<&'a [u8]> {
        self.hint.map(|(start, end)| &self.text[start..end])
    }

    #[inline]
    fn peek(&self, ahead: usize) -> u8 {
        self.text.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// The next token.
    pub fn next_token(&mut self) -> Token {
        #[cfg(test)]
        let before = self.at;
        self.hint = None;
        if !self.skip_blank() {
            #[cfg(test)]
            work::add(self.text.len() - before);
            return Token::Unclear;
        }
        self.start = self.at;
        let token = self.token();
        self.end = self.at;
        #[cfg(test)]
        work::add(if token == Token::Unclear { self.text.len() } else { self.at } - before);
        token
    }

    fn token(&mut self) -> Token {
        let Some(&byte) = self.text.get(self.at) else { return Token::End };
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80.. => self.word(byte),
            b'0'..=b'9' => self.number(),
            b'\'' => self.quoted_text(TextKind::Plain),
            b'"' => {
                self.at += 1;
                if self.quoted_name(None) { Token::Quoted } else { Token::Unclear }
            }
            b'$' => self.dollar(),
            b'(' | b')' | b'[' | b']' | b',' | b';' => self.punctuation(byte, 1),
            b'.' if self.peek(1).is_ascii_digit() => self.number(),
            b'.' => self.punctuation(byte, 1),
            b':' => match self.peek(1) {
                b':' => self.punctuation(b'T', 2),
                b'=' => self.punctuation(b'A', 2),
                _ => self.punctuation(b':', 1),
            },
            _ if is_operator(byte) => self.operator(),
            _ => Token::Unclear,
        }
    }

    #[inline]
    fn punctuation(&mut self, byte: u8, len: usize) -> Token {
        self.at += len;
        Token::Punctuation(byte)
    }

    /// White space and comments; false: a comment does not end, or a byte that is white space only for
    /// some servers.
    fn skip_blank(&mut self) -> bool {
        loop {
            match self.peek(0) {
                b' ' | b'\t' | b'\n' | b'\r' | 0x0c => self.at += 1,
                b'-' if self.peek(1) == b'-' => self.skip_line_comment(),
                b'/' if self.peek(1) == b'*' => {
                    if !self.skip_block_comment() {
                        return false;
                    }
                }
                _ => return true,
            }
        }
    }

    fn skip_line_comment(&mut self) {
        let rest = &self.text[self.at..];
        self.at += memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
    }

    fn skip_block_comment(&mut self) -> bool {
        let start = self.at;
        let mut depth = 0usize;
        while let Some(&byte) = self.text.get(self.at) {
            match (byte, self.peek(1)) {
                (b'/', b'*') => {
                    depth += 1;
                    self.at += 2;
                }
                (b'*', b'/') => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        self.note_hint(start, self.at);
                        return true;
                    }
                }
                _ => self.at += 1,
            }
        }
        false
    }

    fn note_hint(&mut self, start: usize, end: usize) {
        let body = self.text[start + 2..end].trim_ascii_start();
        if body.len() >= 9 && body[..9].eq_ignore_ascii_case(b"highwater") {
            // Several in one gap: from the first to the last, so that none is lost from the key.
            let start = self.hint.map_or(start, |(first, _)| first);
            self.hint = Some((start, end));
        }
    }

    fn word(&mut self, first: u8) -> Token {
        match (first, self.peek(1)) {
            (b'e' | b'E', b'\'') => {
                self.at += 1;
                return self.quoted_text(TextKind::Escaped);
            }
            (b'b' | b'B' | b'x' | b'X', b'\'') => {
                self.at += 1;
                return self.quoted_text(TextKind::Bits);
            }
            (b'n' | b'N', b'\'') => {
                self.at += 1;
                return self.quoted_text(TextKind::Plain);
            }
            (b'u' | b'U', b'&') if self.peek(2) == b'\'' => {
                self.at += 2;
                return self.quoted_text(TextKind::Unicode);
            }
            (b'u' | b'U', b'&') if self.peek(2) == b'"' => {
                self.at += 3;
                return self.unicode_name();
            }
            _ => {}
        }
        let mut len = 0;
        while let Some(&byte) = self.text.get(self.at) {
            if !matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'0'..=b'9' | b'$' | 0x80..) {
                break;
            }
            if len <= NAME_BYTES {
                self.name[len] = byte.to_ascii_lowercase();
                len += 1;
            }
            self.at += 1;
        }
        self.finish_name(len);
        Token::Word
    }

    /// Cuts a name as PostgreSQL does: at 63 bytes, on a character's boundary.
    fn finish_name(&mut self, mut len: usize) {
        if len > NAME_BYTES {
            len = NAME_BYTES;
            while len > 0 && self.name[len] & 0xC0 == 0x80 {
                len -= 1;
            }
        }
        self.name_len = len;
    }

    /// The inside of `"…"`; with `escape`, of `U&"…"`. False: it does not end, is empty, or a wrong escape.
    fn quoted_name(&mut self, escape: Option<u8>) -> bool {
        let mut len = 0;
        let mut put = |name: &mut [u8; NAME_BYTES + 1], bytes: &[u8]| {
            for &byte in bytes {
                if len <= NAME_BYTES {
                    name[len] = byte;
                    len += 1;
                }
            }
        };
        let mut high: Option<u32> = None;
        loop {
            let Some(&byte) = self.text.get(self.at) else { return false };
            if byte == 0 {
                return false;
            }
            if byte == b'"' {
                if self.peek(1) != b'"' {
                    break;
                }
                if high.is_some() {
                    return false;
                }
                put(&mut self.name, b"\"");
                self.at += 2;
                continue;
            }
            if Some(byte) == escape {
                if self.peek(1) == byte {
                    if high.is_some() {
                        return false;
                    }
                    put(&mut self.name, &[byte]);
                    self.at += 2;
                    continue;
                }
                let Some(code) = self.unicode_escape() else { return false };
                let character = match (high.take(), code) {
                    (None, 0xD800..=0xDBFF) => {
                        high = Some(code);
                        continue;
                    }
                    (Some(high), 0xDC00..=0xDFFF) => {
                        char::from_u32(0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00))
                    }
                    (None, code) => char::from_u32(code),
                    (Some(_), _) => None,
                };
                let Some(character) = character.filter(|c| *c != '\0') else { return false };
                put(&mut self.name, character.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            if high.is_some() {
                return false;
            }
            put(&mut self.name, &[byte]);
            self.at += 1;
        }
        self.at += 1;
        if high.is_some() || len == 0 {
            return false;
        }
        self.finish_name(len);
        true
    }

    /// `\XXXX` or `\+XXXXXX`, whatever the escape character is.
    fn unicode_escape(&mut self) -> Option<u32> {
        let (skip, digits) = if self.peek(1) == b'+' { (2, 6) } else { (1, 4) };
        let bytes = self.text.get(self.at + skip..self.at + skip + digits)?;
        let mut code = 0;
        for &byte in bytes {
            code = code * 16 + char::from(byte).to_digit(16)?;
        }
        self.at += skip + digits;
        Some(code)
    }

    /// `U&"…" [UESCAPE 'c']`: the escape character stands behind the name, so it is looked for first.
    fn unicode_name(&mut self) -> Token {
        let inside = self.at;
        let mut end = inside;
        loop {
            let Some(found) = memchr::memchr(b'"', &self.text[end..]) else { return Token::Unclear };
            end += found;
            if self.text.get(end + 1) == Some(&b'"') {
                end += 2;
            } else {
                break;
            }
        }
        self.at = end + 1;
        let after_name = self.at;
        let mut escape = b'\\';
        let mut after = after_name;
        let hint = self.hint;
        if !self.skip_blank() {
            return Token::Unclear;
        }
        let keyword = self.text.get(self.at..self.at + 7).unwrap_or_default();
        if keyword.eq_ignore_ascii_case(b"uescape") && !is_name_byte(self.peek(7)) {
            self.at += 7;
            if !self.skip_blank() {
                return Token::Unclear;
            }
            match self.text.get(self.at..self.at + 3) {
                Some(&[b'\'', byte, b'\'']) if is_escape_character(byte) => {
                    escape = byte;
                    after = self.at + 3;
                    // A longer string ('!''…' or a continuation) is not an escape character.
                    if self.text.get(after) == Some(&b'\'') {
                        return Token::Unclear;
                    }
                }
                _ => return Token::Unclear,
            }
        }
        self.hint = hint;
        self.at = inside;
        if !self.quoted_name(Some(escape)) {
            return Token::Unclear;
        }
        self.at = after;
        Token::Quoted
    }

    /// A string constant from its quote on, with its continuations on further lines.
    fn quoted_text(&mut self, kind: TextKind) -> Token {
        loop {
            self.at += 1;
            loop {
                let rest = &self.text[self.at..];
                let found = match kind {
                    TextKind::Escaped => memchr::memchr2(b'\'', b'\\', rest),
                    _ => memchr::memchr(b'\'', rest),
                };
                let Some(found) = found else { return Token::Unclear };
                self.at += found;
                if self.text[self.at] == b'\\' || self.peek(1) == b'\'' {
                    self.at += 2;
                    if self.at > self.text.len() {
                        return Token::Unclear;
                    }
                } else {
                    break;
                }
            }
            self.at += 1;
            match self.continuation() {
                Some(quote) => self.at = quote,
                None => return Token::Text(kind),
            }
        }
    }

    /// Where the string goes on: white space (and line comments) with a line's end, then a quote.
    fn continuation(&self) -> Option<usize> {
        let mut at = self.at;
        let mut line_ended = false;
        loop {
            match self.text.get(at)? {
                b'\n' | b'\r' => {
                    line_ended = true;
                    at += 1;
                }
                b' ' | b'\t' | 0x0c => at += 1,
                b'-' if self.text.get(at + 1) == Some(&b'-') => {
                    at += memchr::memchr2(b'\n', b'\r', &self.text[at..])?;
                }
                b'\'' if line_ended => return Some(at),
                _ => {
                    #[cfg(test)]
                    work::add(at - self.at);
                    return None;
                }
            }
        }
    }

    fn dollar(&mut self) -> Token {
        if self.peek(1).is_ascii_digit() {
            self.at += 1;
            while self.peek(0).is_ascii_digit() {
                self.at += 1;
            }
            return if is_name_byte(self.peek(0)) { Token::Unclear } else { Token::Parameter };
        }
        let mut tag_end = self.at + 1;
        while self.text.get(tag_end).is_some_and(|&byte| is_name_byte(byte) && byte != b'$') {
            tag_end += 1;
        }
        if self.text.get(tag_end) != Some(&b'$') {
            return Token::Unclear;
        }
        let tag = &self.text[self.at..=tag_end];
        let body = &self.text[tag_end + 1..];
        // A finder, not a loop over '$': a body full of almost-tags must not cost its square.
        match memchr::memmem::find(body, tag) {
            Some(found) => {
                self.at = tag_end + 1 + found + tag.len();
                Token::Text(TextKind::Dollar)
            }
            None => Token::Unclear,
        }
    }

    fn number(&mut self) -> Token {
        let digits = |lexer: &mut Self| {
            while lexer.peek(0).is_ascii_digit() {
                lexer.at += 1;
            }
        };
        digits(self);
        if self.peek(0) == b'.' && self.peek(1) != b'.' {
            self.at += 1;
            digits(self);
        }
        if matches!(self.peek(0), b'e' | b'E') {
            let sign = usize::from(matches!(self.peek(1), b'+' | b'-'));
            if self.peek(1 + sign).is_ascii_digit() {
                self.at += 1 + sign;
                digits(self);
            }
        }
        if is_name_byte(self.peek(0)) { Token::Unclear } else { Token::Number }
    }

    fn operator(&mut self) -> Token {
        let start = self.at;
        let mut end = start;
        while self.text.get(end).is_some_and(|&byte| is_operator(byte)) {
            // A comment ends the operator.
            if end > start && matches!(self.text.get(end..end + 2), Some(b"--" | b"/*")) {
                break;
            }
            end += 1;
        }
        // A trailing + or - belongs to what follows, unless the operator holds a byte that no SQL operator has.
        let may_end_in_sign = self.text[start..end]
            .iter()
            .any(|byte| matches!(byte, b'~' | b'!' | b'@' | b'#' | b'^' | b'&' | b'|' | b'`' | b'?' | b'%'));
        while end - start > 1 && !may_end_in_sign && matches!(self.text[end - 1], b'+' | b'-') {
            end -= 1;
        }
        self.at = end;
        Token::Operator
    }
}

fn is_operator(byte: u8) -> bool {
    matches!(
        byte,
        b'~' | b'!'
            | b'@'
            | b'#'
            | b'^'
            | b'&'
            | b'|'
            | b'`'
            | b'?'
            | b'+'
            | b'-'
            | b'*'
            | b'/'
            | b'%'
            | b'<'
            | b'>'
            | b'='
    )
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

fn is_escape_character(byte: u8) -> bool {
    byte.is_ascii() && !byte.is_ascii_hexdigit() && !matches!(byte, b'+' | b'\'' | b'"') && byte > b' '
}

/// Counts bytes looked at and tokens made, to show that both are bounded by the text's length.
#[cfg(test)]
pub(super) mod work {
    use std::cell::Cell;

    thread_local! {
        static DONE: Cell<u64> = const { Cell::new(0) };
    }

    pub(super) fn add(bytes: usize) {
        DONE.with(|done| done.set(done.get() + 1 + bytes as u64));
    }

    /// What was done on this thread since the last call.
    pub(in crate::classify) fn take() -> u64 {
        DONE.with(|done| done.replace(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<(Token, String)> {
        let mut lexer = Lexer::new(text.as_bytes());
        let mut found = Vec::new();
        loop {
            let token = lexer.next_token();
            match token {
                Token::End => return found,
                Token::Word | Token::Quoted => {
                    found.push((token, String::from_utf8_lossy(lexer.name()).into_owned()));
                }
                _ => found.push((token, String::from_utf8_lossy(lexer.raw()).into_owned())),
            }
            if token == Token::Unclear {
                return found;
            }
        }
    }

    fn check(text: &str, expected: &[(Token, &str)]) {
        let found = tokens(text);
        let found: Vec<(Token, &str)> = found.iter().map(|(token, text)| (*token, text.as_str())).collect();
        assert_eq!(found, expected, "{text}");
    }

    const PLAIN: Token = Token::Text(TextKind::Plain);

    #[test]
    fn traps() {
        use Token::*;
        check("--x\rabc", &[(Word, "abc")]);
        check("a$x$", &[(Word, "a$x$")]);
        check(r"text'\'", &[(Word, "text"), (PLAIN, r"'\'")]);
        check(r"E'a\'b' c", &[(Text(TextKind::Escaped), r"E'a\'b'"), (Word, "c")]);
        check("E'a'\n'\\'' b", &[(Text(TextKind::Escaped), "E'a'\n'\\''"), (Word, "b")]);
        check("'a' -- x\n 'b' c", &[(PLAIN, "'a' -- x\n 'b'"), (Word, "c")]);
        check("'a' 'b'", &[(PLAIN, "'a'"), (PLAIN, "'b'")]);
        check("'it''s'", &[(PLAIN, "'it''s'")]);
        check("/* a /* b */ c */ D", &[(Word, "d")]);
        check("/* a /* b */", &[(Unclear, "")]);
        check("$a$ $b$ ' $a$ x", &[(Text(TextKind::Dollar), "$a$ $b$ ' $a$"), (Word, "x")]);
        check("$$ ; $$", &[(Text(TextKind::Dollar), "$$ ; $$")]);
        check("$1", &[(Parameter, "$1")]);
        check("a+-1", &[(Word, "a"), (Operator, "+"), (Operator, "-"), (Number, "1")]);
        check("a@-1", &[(Word, "a"), (Operator, "@-"), (Number, "1")]);
        check("a<--b\n1", &[(Word, "a"), (Operator, "<"), (Number, "1")]);
        check("a*/*x*/b", &[(Word, "a"), (Operator, "*"), (Word, "b")]);
        check("1.5e-3 .5 1e5", &[(Number, "1.5e-3"), (Number, ".5"), (Number, "1e5")]);
        check("a::int", &[(Word, "a"), (Punctuation(b'T'), "::"), (Word, "int")]);
        check("x'1F' B'01'", &[(Text(TextKind::Bits), "x'1F'"), (Text(TextKind::Bits), "B'01'")]);
    }

    #[test]
    fn what_servers_read_differently_is_unclear() {
        for text in [
            "1_000", "0x1F", "1abc", "$1a", "\x0b", "'open", "\"open", "\"\"", "$x$ open", "$", "\u{0}", "\\",
        ] {
            assert_eq!(tokens(text).last().map(|(token, _)| *token), Some(Token::Unclear), "{text:?}");
        }
    }

    #[test]
    fn names_are_decoded() {
        use Token::*;
        check("U&\"pg_try_advisory_\\006Cock\"", &[(Quoted, "pg_try_advisory_lock")]);
        check("U&\"pg!005ftry\" uescape '!' (", &[(Quoted, "pg_try"), (Punctuation(b'('), "(")]);
        check("u&\"a\\+000062\" x", &[(Quoted, "ab"), (Word, "x")]);
        check("U&\"\\D83D\\DE00\"", &[(Quoted, "\u{1F600}")]);
        check("U&\"\\D83Dx\"", &[(Unclear, "U&\"\\D83D")]);
        check("\"A\"\"b\" Ab", &[(Quoted, "A\"b"), (Word, "ab")]);
        let long = "x".repeat(70);
        check(&long, &[(Word, &long[..63])]);
        let wide = format!("{}é", "x".repeat(62));
        check(&format!("\"{wide}\""), &[(Quoted, &"x".repeat(62))]);
    }

    #[test]
    fn hints_are_seen() {
        let mut lexer = Lexer::new(b"/* sqlcommenter */ /* highwater.route=primary */ select");
        assert_eq!(lexer.next_token(), Token::Word);
        assert_eq!(lexer.hint(), Some(&b"/* highwater.route=primary */"[..]));
    }
}
