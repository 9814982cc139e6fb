//! `currval` and `lastval` on server processes that many sessions use: they speak of what this session has drawn, or are an
//! error as on one server; never of what another has drawn there.
//!
//! Any write may draw, and only the server knows whether it did. So a backend remembers who wrote there last, and whoever
//! asks finds what others have drawn taken away (`DISCARD SEQUENCES`), as long as nothing of its own can be there. What a
//! transaction has written before it asks for the first time cannot be told from that any more: where somebody of the same
//! database and user has ever asked, it is taken away before the first write.

use std::sync::atomic::Ordering;

use super::exchange::{Purpose, Unit};
use super::prepared::Found;
use super::{Role, Session, messages};
use crate::backend::Backend;
use crate::classify::{Leaves, Lookup, PinReason};
use crate::wire::{self, HEADER, TransactionStatus};

impl Session {
    /// A unit starts on a backend that was found for it. `writes`: it is not shown to be all reads.
    pub(super) fn forget_sequences(&mut self, backend: &mut Backend, writes: bool) {
        let others_ask = || self.pools.asks_sequences.load(Ordering::Relaxed);
        if self.role == Role::Primary && (self.asks_sequences || writes && others_ask()) {
            discard_others(self.handle.pid, &mut self.unit, backend);
        }
        if self.asks_sequences {
            self.pools.asks_sequences.store(true, Ordering::Relaxed);
        }
    }

    /// A unit of an open transaction begins. `leaves`: what its Query may leave, if it is one.
    pub(super) fn forget_sequences_inside(
        &mut self,
        unit: &mut Unit,
        backend: &mut Backend,
        leaves: Option<Leaves>,
    ) {
        let written_since = backend.last_writer.is_none_or(|writer| writer == self.handle.pid);
        if written_since || self.status != TransactionStatus::InTransaction || self.role != Role::Primary {
            return;
        }
        if leaves.or_else(|| self.left_by_first()).is_some_and(|leaves| leaves.pins().has(PinReason::Other)) {
            discard_others(self.handle.pid, unit, backend);
            self.pools.asks_sequences.store(true, Ordering::Relaxed);
        }
    }

    /// What the statement of the extended protocol with which the client's input begins may leave.
    fn left_by_first(&self) -> Option<Leaves> {
        let header = wire::header(&self.client.input).ok()??;
        let body = self.client.input.get(HEADER..header.len)?;
        match header.tag {
            b'P' => match self.lookup(messages::Parse::read(body)?.text, &[]) {
                Lookup::Known(class, _) => Some(class.leaves),
                Lookup::Ask(_) => None,
            },
            b'B' => match self.statements.find(messages::bind_names(body)?.1) {
                Found::Statement(statement) => self.known_class(&statement).map(|class| class.leaves),
                Found::OnBackend | Found::Nothing => None,
            },
            _ => None,
        }
    }

    /// A unit is over: whether what it has done may have drawn from a sequence. All that is known to do that not is BEGIN.
    pub(super) fn may_have_drawn(&self) -> bool {
        let only_begins = self.unit.before == TransactionStatus::Idle
            && self.status == TransactionStatus::InTransaction
            && self.unit.commands == 1;
        self.unit.writes && !only_begins
    }
}

/// Takes away what another session than that of `pid` may have drawn there.
fn discard_others(pid: u32, unit: &mut Unit, backend: &mut Backend) {
    if backend.last_writer.is_some_and(|writer| writer != pid) {
        unit.put_ahead(backend, b"DISCARD SEQUENCES", Purpose::Sequences);
        backend.last_writer = None;
    }
}
