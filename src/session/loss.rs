//! What becomes of a session whose backend is lost, or left because the primary is being changed.
//!
//! Nothing is done twice and nothing is claimed that is not known. Of what was underway:
//!
//! | the session | is told |
//! |---|---|
//! | runs nothing, and has nothing on the backend that another cannot be given | nothing: it goes on |
//! | runs nothing, and has a transaction open or other state there | 57P01, and ends |
//! | runs a write, or a statement that may have ended its transaction | 08007: nobody knows what became of it |
//! | runs any other statement of a transaction | 57P01, and ends: the transaction is undone |
//! | runs a read of which nothing was shown | nothing: it runs elsewhere |
//! | runs a read of which something was shown | 08006 |
//!
//! After 08007 the session goes on where it has nothing else on the backend; else the error ends it.
//!
//! **LISTEN.** Another backend can be made to listen to the same channels: on the next primary, ahead of the session's
//! next statement there, or as soon as there is one while the session is idle. Notifications sent in between do not
//! reach it, and cannot be had afterwards: it is told so by a warning ([`MISSED`]) each time.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use bytes::BufMut;

use super::exchange::{Purpose, Unit, put_report};
use super::pins::{PinSet, Pins};
use super::place::Placed;
use super::{End, Role, Session, settings};
use crate::backend::{Backend, Dirt, clean};
use crate::classify::{self, PinReason};
use crate::gate::Posture;
use crate::node::NodeFailure;
use crate::route::RouteReason;
use crate::topology::{NodeId, Standing};
use crate::wire::{ErrorReport, TransactionStatus};

/// What sessions have that ends with their primary, as the metric labels it.
pub const ENDED_LABELS: [&str; 3] = [TRANSACTION, STATE, OUTCOME];

const TRANSACTION: &str = "transaction";
const STATE: &str = "state";
const OUTCOME: &str = "outcome";

/// The warning to a session that listens on another backend than before.
pub const MISSED: &str = "HW003";

/// How long one try to listen again may take, and how long after it the next one comes.
const TRY: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(200);

/// Bytes of LISTEN commands that are kept for another backend at most.
const MOST_LISTENS: usize = 16 * 1024;

/// What binds a session to its backend and yet can be had on another.
const CARRIED: PinSet = PinSet::of(PinReason::Listen).and(PinReason::SessionPooling);

/// The channels a session listens to: commands that make a backend listen to them.
#[derive(Debug)]
pub(super) struct Listening {
    /// Those that its backend listens to; `None`: it is not known.
    there: Option<Box<[u8]>>,
    /// Those that it listened to on a backend that is gone.
    lost: Option<Box<[u8]>>,
    /// The running unit is a LISTEN of this channel.
    asked: Option<Box<[u8]>>,
}

impl Default for Listening {
    fn default() -> Listening {
        Listening { there: Some(Box::default()), lost: None, asked: None }
    }
}

impl Listening {
    /// A unit begins that is this Query.
    pub(super) fn asked(&mut self, text: &[u8]) {
        self.asked = classify::listen_target(text).map(Into::into);
    }

    /// A unit has ended. `certain`: it was one command, outside a transaction, and has succeeded; `listens`: the
    /// session does now, whoever has asked for it; `anew`: the unit may have added channels. Whether the backend has to be
    /// asked which they are.
    pub(super) fn after(&mut self, certain: bool, listens: bool, anew: bool) -> bool {
        let asked = self.asked.take();
        if !listens {
            self.there = Some(Box::default());
            return false;
        }
        match (&self.there, asked) {
            _ if !anew => false,
            (Some(there), Some(channel)) if certain => {
                let mut command = b"LISTEN \"".to_vec();
                for byte in channel {
                    command.extend_from_slice(if byte == b'"' {
                        b"\"\""
                    } else {
                        std::slice::from_ref(&byte)
                    });
                }
                command.push(b'"');
                if memchr::memmem::find(there, &command).is_none() {
                    let both =
                        if there.is_empty() { command } else { [there, &b"; "[..], &command].concat() };
                    self.seen(Some(both));
                }
                self.there.is_none()
            }
            _ => true,
        }
    }

    /// The channels, as a look at the backend has shown them, or as they are known to be.
    pub(super) fn seen(&mut self, listens: Option<Vec<u8>>) {
        self.there = listens.filter(|listens| listens.len() <= MOST_LISTENS).map(Into::into);
    }

    /// The backend is lost.
    fn lose(&mut self) {
        let there = self.there.replace(Box::default());
        // What an earlier one listened to may be due still.
        self.lost = there.filter(|there| !there.is_empty()).or(self.lost.take());
    }

    /// The session listens to nothing any more.
    pub(super) fn forget(&mut self) {
        *self = Listening::default();
    }

    /// It is to be made to listen again.
    pub(super) fn is_deaf(&self) -> bool {
        self.lost.is_some()
    }

    /// The leased backend listens to what the session had listened to.
    pub(super) fn resumed(&mut self) {
        self.there = self.lost.take();
    }
}

impl Session {
    /// Whether the session can go on after `end`.
    pub(super) fn survive(&mut self, end: End) -> Result<(), End> {
        let (node, state_lost) = match end {
            End::NodeLost { node } => (node, false),
            End::StateLost { node } => (node, true),
            end => return Err(end),
        };
        let between_units = self.unit.is_over();
        if between_units && !state_lost && self.let_go() {
            return Ok(());
        }
        let in_transaction = self.status != TransactionStatus::Idle && !self.is_apart();
        // What was not sent whole has not committed by itself, and in a transaction only what may end that has.
        let ended = self.unit.may_commit || !in_transaction && self.unit.was_sent_whole();
        let unknown = !between_units && self.unit.writes && ended && !self.read_only;
        if unknown {
            self.shared.metrics.unknown_outcomes.inc();
        }
        if self.lease.as_ref().is_some_and(|lease| lease.socket.is_closed()) {
            // Whoever has told it to close waits for that, and nothing more is to be done there.
            self.lease = None;
        }
        let name = self.shared.nodes.name(node);
        let undone = in_transaction && !unknown;
        let has_state = self.pins.hold() && !self.carries();
        if state_lost || has_state || undone || !self.unit.was_sent_whole() || between_units {
            let what = match (unknown, undone) {
                (true, _) => OUTCOME,
                (false, true) => TRANSACTION,
                (false, false) => STATE,
            };
            self.shared.metrics.sessions_ended.inc(what);
            let mut report = if unknown { unknown_outcome(&name) } else { lost(&name) };
            report.severity = crate::wire::Severity::Fatal;
            return Err(End::fatal(report));
        }
        if self.unit.is_inside_answer() {
            // Nothing can be said in the middle of a message.
            return Err(end);
        }
        let report = if unknown {
            unknown_outcome(&name)
        } else {
            ErrorReport::error("08006", format!("connection to node \"{name}\" lost"))
                .detail("Part of the result had been sent already.")
        };
        put_report(&mut self.client.output, &report);
        self.statements.failed(false);
        self.lose_lease();
        self.unit = Unit::none();
        self.status = if self.lazy.is_some() { TransactionStatus::Failed } else { TransactionStatus::Idle };
        self.put_ready();
        Ok(())
    }

    /// What the session has on its backend can be given to another one.
    pub(super) fn carries(&self) -> bool {
        let now = self.pins.now();
        now.without(CARRIED).is_empty() && (!now.has(PinReason::Listen) || self.listening.there.is_some())
    }

    /// The backend is lost between two units. Whether the session can do without it: nobody need know.
    pub(super) fn let_go(&mut self) -> bool {
        let Some(lease) = &self.lease else { return false };
        if self.status != TransactionStatus::Idle || !self.carries() {
            return false;
        }
        if !lease.socket.is_closed() {
            self.shared.reports.report_failure(lease.node, NodeFailure::Broken);
        }
        self.lose_lease();
        true
    }

    /// The backend is gone, and what was on it that is not carried over.
    fn lose_lease(&mut self) {
        self.lease = None;
        self.handle.idle();
        self.presence.leave();
        self.settings.forget_pending();
        self.portals.clear();
        self.pins = Pins::default();
        self.show_pins();
        self.listening.lose();
        if std::mem::take(&mut self.ddl) {
            self.catalog.invalidate();
        }
        if std::mem::take(&mut self.login_settings) {
            self.shared.nodes.login_settings.changed();
        }
    }

    /// The unit is over, or runs again, without the backend on which it ran: if the session was made to listen there, it
    /// does no more.
    pub(super) fn without_backend(&mut self) {
        if self.pins.hold() {
            self.pins = Pins::default();
            self.show_pins();
            self.listening.lose();
        }
    }

    /// Whether the end of the idle backend, which it has just announced, is none of the client's business.
    pub(super) fn outlives_backend(&self) -> bool {
        self.status == TransactionStatus::Idle && self.carries()
    }

    /// Waits for the client's next message. A session that has lost the backend on which it listened is meanwhile made
    /// to listen on another.
    pub(super) async fn await_message(&mut self) -> Result<(), End> {
        while self.listening.is_deaf() && self.status == TransactionStatus::Idle {
            if Box::pin(self.message_or_listening()).await? {
                return Ok(());
            }
        }
        self.next_message().await
    }

    /// `true`: a message has come.
    async fn message_or_listening(&mut self) -> Result<bool, End> {
        let shared = self.shared.clone();
        let there = {
            let topology = shared.topology.load();
            shared.gate.posture() == Posture::Open
                && topology
                    .primary
                    .is_some_and(|node| topology.node(node).standing == Standing::Primary { reachable: true })
        };
        // The client first: what it has said already is not kept waiting.
        let said = poll_fn(|cx| match self.poll_message(cx) {
            Poll::Pending => Poll::Ready(None),
            Poll::Ready(said) => Poll::Ready(Some(said)),
        });
        if let Some(said) = said.await {
            return said.map(|()| true);
        }
        if there && self.listen_again().await? {
            return Ok(false);
        }
        let changed = shared.topology.changed();
        tokio::select! {
            biased;
            said = self.next_message() => said.map(|()| true),
            () = changed => Ok(false),
            () = tokio::time::sleep(RETRY) => Ok(false),
        }
    }

    /// Whether the session listens again.
    async fn listen_again(&mut self) -> Result<bool, End> {
        let Some(listens) = self.listening.lost.clone() else { return Ok(true) };
        if self.lease.is_none() {
            // A unit that has just ended may have left it with a backend that cannot wait for this.
            self.handle.begin();
            let placed = tokio::time::timeout(TRY, self.place_on_primary(RouteReason::Pinned)).await;
            let placed = match placed {
                Ok(placed) => placed?,
                Err(_late) => return Ok(false),
            };
            let Ok(Placed { lease, role, .. }) = placed else { return Ok(false) };
            self.lease = Some(lease);
            self.role = role;
        }
        let heard = self.ask_to_listen(&listens).await;
        self.presence.leave();
        self.handle.idle();
        if heard.is_err() {
            let lease = self.lease.take();
            return match lease.filter(|_| self.pins.hold()) {
                Some(lease) => Err(End::StateLost { node: lease.node }),
                None => Ok(false),
            };
        }
        self.listens_again();
        self.show_pins();
        Ok(true)
    }

    async fn ask_to_listen(&mut self, listens: &[u8]) -> Result<(), clean::Broken> {
        let Some(lease) = &mut self.lease else { return Err(clean::Broken) };
        let mut sql = settings::replay(&lease.applied, self.settings.wanted()).unwrap_or_default();
        if !sql.is_empty() {
            sql.push_str("; ");
        }
        sql.push_str(std::str::from_utf8(listens).map_err(|_| clean::Broken)?);
        clean::command(lease, &sql).await?;
        lease.applied = self.settings.wanted().clone();
        let parameters = lease.parameters.clone();
        self.tell_differences(&parameters);
        self.hear_what_came();
        Ok(())
    }

    /// Puts what makes the backend listen ahead of the unit, if the session has lost one that did.
    pub(super) fn give_listens(&mut self, unit: &mut Unit, backend: &mut Backend) {
        if let Some(listens) = &self.listening.lost
            && self.role == Role::Primary
        {
            unit.put_ahead(backend, listens, Purpose::Listen);
        }
    }

    /// The backend listens to what another did.
    pub(super) fn listens_again(&mut self) {
        self.listening.resumed();
        self.pins.keep(PinReason::Listen);
        if let Some(lease) = &mut self.lease {
            lease.dirt = lease.dirt.max(Dirt::State);
        }
        self.shared.metrics.listens_resumed.inc();
        let mut notice = Vec::new();
        ErrorReport::error(MISSED, "notifications may have been missed")
            .detail(
                "The connection on which this session listened is gone; it listens again, on another one.",
            )
            .hint("Look for what a notification would have told.")
            .put_notice(&mut notice);
        self.client.output.put_slice(&notice);
    }

    /// The leased backend's connection was told to close.
    pub(super) fn is_left(&self) -> Option<NodeId> {
        self.lease.as_ref().filter(|lease| lease.socket.is_closed()).map(|lease| lease.node)
    }
}

fn lost(node: &str) -> ErrorReport {
    ErrorReport::fatal("57P01", format!("terminating connection because node \"{node}\" was lost"))
        .detail("The transaction or session state on it is gone.")
        .hint("In a moment you should be able to reconnect and repeat your command.")
}

fn unknown_outcome(node: &str) -> ErrorReport {
    ErrorReport::error("08007", "transaction resolution unknown").detail(format!(
        "The connection to node \"{node}\" was lost before it answered; the statement may or may not have taken effect."
    ))
}

/// A commit whose wait for a synchronous replica was cancelled: the server calls it a success.
pub(super) fn unreplicated() -> ErrorReport {
    ErrorReport::error("08007", "transaction resolution unknown")
        .detail("The transaction has committed on the primary, but might not have been replicated: waiting for a synchronous replica was cancelled.")
        .hint("It is lost if the primary is replaced before a replica has it.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(listening: &Listening) -> Option<String> {
        listening.there.as_deref().map(|there| String::from_utf8(there.to_vec()).unwrap())
    }

    #[test]
    fn what_is_listened_to_is_known_from_plain_statements_and_else_asked() {
        let mut listening = Listening::default();
        for (sql, certain, asks, expected) in [
            ("LISTEN a", true, false, Some("LISTEN \"a\"")),
            ("LISTEN a", true, false, Some("LISTEN \"a\"")),
            ("listen \"B \"\"b\";", true, false, Some("LISTEN \"a\"; LISTEN \"B \"\"b\"")),
            ("LISTEN c; LISTEN d", true, true, Some("LISTEN \"a\"; LISTEN \"B \"\"b\"")),
            ("LISTEN c", false, true, Some("LISTEN \"a\"; LISTEN \"B \"\"b\"")),
        ] {
            listening.asked(sql.as_bytes());
            assert_eq!(listening.after(certain, true, true), asks, "{sql}");
            assert_eq!(text(&listening).as_deref(), expected, "{sql}");
        }
        // The look has failed: it is not known until the next one.
        listening.seen(None);
        assert!(!listening.after(true, true, false));
        listening.asked(b"LISTEN a");
        assert!(listening.after(true, true, true) && text(&listening).is_none());
        assert!(!listening.after(true, false, false));
        assert_eq!(text(&listening).as_deref(), Some(""));
    }

    #[test]
    fn what_was_listened_to_is_kept_until_it_is_listened_to_again() {
        let mut listening = Listening::default();
        listening.lose();
        assert!(!listening.is_deaf(), "there was nothing");
        listening.seen(Some(b"LISTEN a".to_vec()));
        listening.lose();
        assert!(listening.is_deaf());
        // Lost once more before it could be had again.
        listening.lose();
        assert!(listening.is_deaf());
        listening.resumed();
        assert!(!listening.is_deaf());
        assert_eq!(text(&listening).as_deref(), Some("LISTEN a"));
        listening.seen(Some(vec![b'x'; MOST_LISTENS + 1]));
        assert!(text(&listening).is_none(), "too much to be kept");
    }
}
