//! Reads that ask for the time: a replica whose clock is behind the primary's would hide from a session what it has
//! just written with `now()`.

use super::Session;
use super::messages::{self, Parse};
use super::prepared::{Found, SqlCommand};
use crate::classify::{asks_for_time, parameters_name_the_clock};
use crate::consistency::Level;
use crate::topology::{NodeId, Topology};
use crate::wire::{self, HEADER};

impl Session {
    /// Whether the unit at the start of the input must keep off replicas whose clocks are behind. Its messages are looked
    /// at only while there is such a replica, and once.
    pub(super) fn keeps_off_late_clocks(&mut self, topology: &Topology) -> bool {
        if self.read_only || self.asked_for.level == Level::Eventual {
            return false;
        }
        let positions = &self.shared.positions;
        if !topology.serving_replicas().any(|view| positions.node(view.id).has_late_clock()) {
            return false;
        }
        match self.asks_for_time {
            Some(asks) => asks,
            None => *self.asks_for_time.insert(self.unit_asks_for_time()),
        }
    }

    /// Whether a statement that is met later in an open unit must not run on this replica.
    pub(super) fn is_kept_off_by_clock(&self, node: NodeId, text: &[u8]) -> bool {
        self.has_late_clock(node) && asks_for_time(text, &self.catalog.current())
    }

    /// Whether parameters that come later in an open unit must not be bound on this replica.
    pub(super) fn are_kept_off_by_clock(&self, node: NodeId, values: &[u8]) -> bool {
        self.has_late_clock(node) && parameters_name_the_clock(values)
    }

    fn has_late_clock(&self, node: NodeId) -> bool {
        !self.read_only
            && self.asked_for.level != Level::Eventual
            && self.shared.positions.node(node).has_late_clock()
    }

    fn unit_asks_for_time(&self) -> bool {
        let catalog = self.catalog.current();
        let asks = |text: &[u8]| asks_for_time(text, &catalog);
        let mut at = 0;
        while let Ok(Some(header)) = wire::header(&self.client.input[at..]) {
            let Some(body) = self.client.input.get(at + HEADER..at + header.len) else { return true };
            at += header.len;
            let found = match header.tag {
                b'Q' => {
                    let executed = match &self.sql {
                        Some(SqlCommand::Execute(name)) => self.names_text_that(name, asks),
                        _ => false,
                    };
                    return executed || asks(body.strip_suffix(b"\0").unwrap_or(body));
                }
                b'P' => Parse::read(body).is_none_or(|parse| asks(parse.text)),
                b'B' => messages::bind_names(body).is_none_or(|(_, name, names)| {
                    parameters_name_the_clock(&body[names..]) || self.names_text_that(name, asks)
                }),
                b'S' | b'H' => return false,
                _ => false,
            };
            if found {
                return true;
            }
        }
        true
    }

    fn names_text_that(&self, name: &[u8], asks: impl Fn(&[u8]) -> bool) -> bool {
        match self.statements.find(name) {
            Found::Statement(statement) => asks(statement.text()),
            Found::OnBackend => true,
            // Parsed by this very unit, or unknown to the server, too.
            Found::Nothing => false,
        }
    }
}
