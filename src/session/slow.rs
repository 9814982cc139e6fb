//! Log lines about single statements: slow ones (`log.slow_statement`), and those that the proxy itself had to fail.
//!
//! Promises: no literal and no bound value is ever in a line; at most `log.slow_per_second` lines in a second, the
//! others are counted; with `log.slow_statement: 0s` a statement costs one comparison. Deliberately does not time
//! anything by itself: the figures are those of the metrics.

use std::time::Duration;

use super::prepared::Found;
use super::{Role, Session};
use crate::classify::{self, Lexing};
use crate::route::{ClassLabel, RouteReason};
use crate::topology::NodeId;
use crate::wire::{self, ErrorReport, HEADER};

/// Bytes of a text's head, and of its tail, that are kept.
const HEAD: usize = 4096;
const TAIL: usize = 1024;
/// Bytes of a skeleton in a line.
const SKELETON: usize = 1000;
/// Messages of a unit among which its first text is looked for.
const MESSAGES: usize = 64;

/// The running unit, in case that it turns out to be slow.
#[derive(Default)]
pub(super) struct Kept {
    text: Vec<u8>,
    waited: Duration,
}

/// Head and tail of a text, for which comments at both ends are enough.
fn ends(text: &[u8]) -> Vec<u8> {
    match text.len().checked_sub(HEAD + TAIL) {
        None | Some(0) => text.to_vec(),
        // What is between the two may end in the middle of a literal: nothing behind it is read as SQL.
        Some(_) => [&text[..HEAD], b"\0", &text[text.len() - TAIL..]].concat(),
    }
}

impl Session {
    /// Remembers the unit that is about to run, if slow statements are logged.
    pub(super) fn keep_text(&mut self) {
        if self.config.log.slow_statement.is_zero() {
            self.kept = None;
            return;
        }
        let text = self.unit_text();
        self.kept = Some(Box::new(Kept { text, waited: self.started.elapsed() }));
    }

    /// The first text of the unit at the start of the client's input: of a Query, a Parse, or the statement that a Bind
    /// names. Empty: there is none.
    fn unit_text(&self) -> Vec<u8> {
        let input = &self.client.input;
        let mut at = 0;
        for _ in 0..MESSAGES {
            let Some(Ok(Some(header))) = input.get(at..).map(wire::header) else { break };
            let body = &input[at + HEADER..(at + header.len).min(input.len())];
            match header.tag {
                b'Q' => return ends(body.strip_suffix(b"\0").unwrap_or(body)),
                b'P' => {
                    let text = wire::cstr(body).map(|(_, rest)| rest).unwrap_or_default();
                    return ends(wire::cstr(text).map_or(text, |(text, _)| text));
                }
                b'B' => {
                    let name = super::messages::bind_names(body).map(|(_, statement, _)| statement);
                    if let Some(Found::Statement(statement)) = name.map(|name| self.statements.find(name)) {
                        return ends(statement.text());
                    }
                }
                b'S' => break,
                _ => {}
            }
            at += header.len;
        }
        Vec::new()
    }

    /// The unit has run, and took so long.
    pub(super) fn look_if_slow(&self, node: NodeId, class: ClassLabel, reason: RouteReason, took: Duration) {
        if let Some(kept) = &self.kept
            && took >= self.config.log.slow_statement
        {
            self.log_slow(kept, node, class, reason, took);
        }
    }

    #[cold]
    fn log_slow(&self, kept: &Kept, node: NodeId, class: ClassLabel, reason: RouteReason, took: Duration) {
        if !self.may_log() {
            return;
        }
        tracing::warn!(
            duration_ms = milliseconds(took),
            wait_ms = milliseconds(kept.waited.min(took)),
            node = self.shared.nodes.name(node),
            route = if self.role == Role::Primary { "primary" } else { "replica" },
            class = ClassLabel::LABELS[class as usize],
            reason = reason.label(),
            pid = self.handle.pid,
            user = self.own.user(),
            database = &*self.database,
            application_name = self.application_name(),
            traceparent = classify::traceparent(&kept.text),
            statement = self.skeleton(&kept.text),
            "slow statement"
        );
    }

    /// The unit at the start of the input is failed by us: said in the log if that is not the client's doing.
    pub(super) fn log_failed(&self, report: &ErrorReport) {
        const OURS: [&str; 4] = ["08", "53", "57P", "HW"];
        if !OURS.iter().any(|class| report.sqlstate.starts_with(class)) || !self.may_log() {
            return;
        }
        let text = self.unit_text();
        tracing::warn!(
            sqlstate = report.sqlstate,
            error = report.message,
            pid = self.handle.pid,
            user = self.own.user(),
            database = &*self.database,
            application_name = self.application_name(),
            traceparent = classify::traceparent(&text),
            statement = self.skeleton(&text),
            "statement failed"
        );
    }

    fn may_log(&self) -> bool {
        let allowed = self.shared.lines.allows(self.config.log.slow_per_second);
        if !allowed {
            self.shared.metrics.log_suppressed.inc();
        }
        allowed
    }

    fn application_name(&self) -> Option<String> {
        let name = self.reported.get(b"application_name").filter(|name| !name.is_empty())?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// The text without its literals; of one whose literals cannot be told for sure, nothing but its first word.
    fn skeleton(&self, text: &[u8]) -> String {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        match self.lexing {
            Lexing::Unsafe => {
                let word =
                    text.trim_ascii_start().iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
                format!("{} …", String::from_utf8_lossy(&text.trim_ascii_start()[..word]))
            }
            Lexing::Utf8 | Lexing::AsciiNames => classify::skeleton_text(text, SKELETON),
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1_000_000.0).round() / 1000.0
}
