//! Nodes and the tokens that let them in.

use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::protocol::NodeFacts;
use optimus_common::{NodeId, Reason, Timestamp};

use super::super::command::*;
use super::super::tables::*;
use super::Step;

impl Step<'_> {
    pub(super) fn admit(
        &mut self,
        token: optimus_common::TokenId,
        node: NodeId,
        name: String,
        key: Vec<u8>,
        expires: Timestamp,
    ) -> Applied {
        let refusal = match self.state.tokens.get(&token) {
            None => Some(Refusal::TokenUnknown),
            Some(t) if t.expires_at <= self.at => Some(Refusal::TokenExpired),
            Some(t) if t.uses_left == 0 => Some(Refusal::TokenUsedUp),
            Some(_) if self.state.nodes.len() >= NODES_MAX => Some(Refusal::TooMany { what: "nodes".into(), limit: NODES_MAX as u64 }),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.event(EventKind::TokenRefused, &format!("node/{name}"), &format!("join refused: {refusal}"), None);
            return Applied::Refused(refusal);
        }
        if let Some(row) = self.state.tokens.get_mut(&token) {
            Arc::make_mut(row).uses_left -= 1;
        }
        let facts = NodeFacts { name: name.clone(), ..NodeFacts::default() };
        let row = Node {
            id: node,
            facts,
            joined_at: self.at,
            up: false,
            changed_at: self.at,
            certificate_expires_at: expires,
            key_fingerprint: key,
            cordoned: false,
            blocked_ports: OrdMap::new(),
        };
        self.state.nodes.insert(node, Arc::new(row));
        self.event(EventKind::NodeJoined, &format!("node/{name}"), "node joined the cluster", None);
        self.done()
    }

    pub(super) fn node_up(&mut self, node: NodeId, facts: NodeFacts) -> Applied {
        let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        if row.up && row.facts == facts {
            return self.unchanged();
        }
        let came_up = !row.up;
        let name = facts.name.clone();
        let row = Arc::make_mut(row);
        row.facts = facts;
        if came_up {
            row.up = true;
            row.changed_at = self.at;
            self.event(EventKind::NodeUp, &format!("node/{name}"), "node is up", None);
        }
        self.done()
    }

    pub(super) fn node_down(&mut self, node: NodeId) -> Applied {
        let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        if !row.up {
            return self.unchanged();
        }
        let row = Arc::make_mut(row);
        row.up = false;
        row.changed_at = self.at;
        let name = row.facts.name.clone();
        let reason = Reason::NodeDown { node: name.clone(), since: self.at };
        self.event(EventKind::NodeDown, &format!("node/{name}"), "node is not answering", Some(reason));
        self.done()
    }
}
