//! A statement's text without its literals, for people. Pure.
//!
//! The cache's skeleton is a hash; this is what a person is shown in its place. Every constant is a `?`, several behind
//! each other (as in IN and VALUES) are one; comments are left out; what cannot be read ends the text, because a
//! literal may begin there.

use super::lexer::{Lexer, Token};

/// The skeleton of `text`, at most about `most` bytes of it.
pub fn skeleton_text(text: &[u8], most: usize) -> String {
    let mut out = String::new();
    let mut lexer = Lexer::new(text);
    let mut end = 0;
    // Since a constant, nothing but commas and parentheses has come that a list of constants may have.
    let mut folding = None;
    loop {
        let token = lexer.next_token();
        let constant = matches!(token, Token::Text(_) | Token::Number | Token::Parameter);
        match token {
            Token::End => break,
            Token::Unclear => {
                out.push_str(if out.is_empty() { "…" } else { " …" });
                break;
            }
            _ => {}
        }
        if out.len() >= most {
            out.push_str(" …");
            break;
        }
        match (constant, folding) {
            // `?, ?` is `?`.
            (true, Some(true)) => {
                out.truncate(out.trim_end_matches([',', ' ']).len());
                folding = Some(false);
                end = lexer.end();
                continue;
            }
            (true, _) => folding = Some(false),
            (false, Some(_)) if token == Token::Punctuation(b',') => folding = Some(true),
            (false, _) => folding = None,
        }
        if lexer.start() > end && !out.is_empty() {
            out.push(' ');
        }
        if constant {
            out.push('?');
        } else {
            let raw = lexer.raw();
            out.push_str(&String::from_utf8_lossy(&raw[..raw.len().min(most)]));
        }
        end = lexer.end();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_literal_is_shown() {
        for (text, expected) in [
            ("select 1", "select ?"),
            (
                "SELECT  a,b FROM t\n WHERE x = 'secret' -- secret\n and y=$1",
                "SELECT a,b FROM t WHERE x = ? and y=?",
            ),
            ("insert into t values (1, 'a', $$b$$), (2, E'c\\'d', $1)", "insert into t values (?), (?)"),
            ("select * from t where a in (1,2,3) and b=4", "select * from t where a in (?) and b=?"),
            ("alter role r password 'secret' /* secret */", "alter role r password ?"),
            ("select U&'s' uescape '!', x'1f', b'1', 1.5e3", "select ? uescape ?"),
            ("select \"Column\" from t", "select \"Column\" from t"),
            ("select 'secret", "select …"),
            ("select 'a' 'secret\\'", "select ? ?"),
            ("", ""),
        ] {
            assert_eq!(skeleton_text(text.as_bytes(), 500), expected, "{text}");
        }
        assert_eq!(skeleton_text(b"select aaaa, bbbb", 8), "select aaaa …");
    }
}
