//! What a comment in a statement asks for: `/* highwater.consistency=strong */`, `/* highwater.route=replica */`. Pure.
//!
//! Only comments that begin with `highwater` count. A value may be quoted, and stand behind `=`, `:` or nothing; of
//! two for one name the last holds. Names that are not known are passed over, as they may be a later version's; a value
//! that is not known is the client's error. No hint makes a read of what is none.

use super::lexer::{Lexer, Token};
use crate::consistency::{Durability, Level, Override, Route};

/// The words that `highwater.consistency` may have in a comment: `global` is an agreement among sessions.
pub const LEVELS: [Level; 4] = [Level::Eventual, Level::ReadYourWrites, Level::Session, Level::Strong];

/// What the comments of a statement ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// How fresh its answer must be, in place of what the session is promised.
    pub level: Option<Level>,
    /// Where it runs if it is a read.
    pub route: Option<Route>,
    /// Where its commit must be.
    pub durability: Option<Durability>,
    /// A value is none of its words: see [`invalid`].
    pub invalid: bool,
}

impl Hints {
    /// With what a comment says, the last word holding.
    pub(super) fn and(mut self, comment: &[u8]) -> Hints {
        read(comment, |name, value| match name {
            Name::Consistency => match level(value) {
                Some(level) => self.level = Some(level),
                None => self.invalid = true,
            },
            Name::Route => match route(value) {
                Some(route) => self.route = Some(route),
                None => self.invalid = true,
            },
            Name::Durability => match durability(value) {
                Some(durability) => self.durability = Some(durability),
                None => self.invalid = true,
            },
        });
        self
    }

    /// As a part of a promise.
    pub fn says(self) -> Override {
        Override { level: self.level, route: self.route, ..Override::default() }
    }
}

/// The first setting in a comment of the text whose value is none of its words: its name and that value.
pub fn invalid(text: &[u8]) -> Option<(&'static str, String)> {
    let mut lexer = Lexer::new(text);
    loop {
        let token = lexer.next_token();
        let mut found = None;
        if let Some(comment) = lexer.hint() {
            read(comment, |name, value| {
                let known = match name {
                    Name::Consistency => level(value).is_some(),
                    Name::Route => route(value).is_some(),
                    Name::Durability => durability(value).is_some(),
                };
                if !known {
                    found.get_or_insert((name.text(), String::from_utf8_lossy(value).into_owned()));
                }
            });
        }
        if found.is_some() || matches!(token, Token::End | Token::Unclear) {
            return found;
        }
    }
}

#[derive(Clone, Copy)]
enum Name {
    Consistency,
    Route,
    Durability,
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Name::Consistency => "highwater.consistency",
            Name::Route => "highwater.route",
            Name::Durability => "highwater.durability",
        }
    }
}

fn read(comment: &[u8], mut found: impl FnMut(Name, &[u8])) {
    let mut words = comment
        .split(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_')))
        .filter(|word| !word.is_empty());
    while let Some(word) = words.next() {
        for name in [Name::Consistency, Name::Route, Name::Durability] {
            if word.eq_ignore_ascii_case(name.text().as_bytes()) {
                found(name, words.clone().next().unwrap_or_default());
            }
        }
    }
}

fn level(value: &[u8]) -> Option<Level> {
    let level = std::str::from_utf8(value).ok()?.parse().ok()?;
    LEVELS.contains(&level).then_some(level)
}

fn durability(value: &[u8]) -> Option<Durability> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn route(value: &[u8]) -> Option<Route> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_comment_says() {
        let hints = |level, route| Hints { level, route, durability: None, invalid: false };
        for (comment, expected) in [
            ("/* highwater.consistency=eventual */", hints(Some(Level::Eventual), None)),
            ("/*highwater.consistency: 'STRONG', action='x'*/", hints(Some(Level::Strong), None)),
            (
                "/* HIGHWATER.Route = replica highwater.consistency = session */",
                hints(Some(Level::Session), Some(Route::Replica)),
            ),
            ("/* highwater.route=auto highwater.route=primary */", hints(None, Some(Route::Primary))),
            ("/* highwater.x=1 */ /* highwater */", Hints::default()),
            (
                "/* highwater.durability=Applied */",
                Hints { durability: Some(Durability::Applied), ..Hints::default() },
            ),
        ] {
            assert_eq!(Hints::default().and(comment.as_bytes()), expected, "{comment}");
            assert_eq!(invalid(format!("select 1 {comment}").as_bytes()), None, "{comment}");
        }
        for (comment, name, value) in [
            ("/* highwater.consistency=best */", "highwater.consistency", "best"),
            ("/* highwater.consistency=global */", "highwater.consistency", "global"),
            ("/* highwater.consistency */", "highwater.consistency", ""),
            ("/* highwater.durability=off */", "highwater.durability", "off"),
            ("/* highwater.consistency=strong highwater.route=nearest */", "highwater.route", "nearest"),
        ] {
            assert!(Hints::default().and(comment.as_bytes()).invalid, "{comment}");
            let text = format!("select '/* highwater.route=no */' {comment} from t");
            assert_eq!(invalid(text.as_bytes()), Some((name, value.to_owned())), "{comment}");
        }
    }
}
