//! Nodes and the tokens that admit them.

use optimus_common::TokenId;
use optimus_common::join_token::Role;

use super::*;

impl Step<'_> {
    pub(super) fn create_token(&mut self, id: TokenId, secret_hash: Vec<u8>, expires_at: Timestamp, uses: u32, role: Role) -> Applied {
        let at = self.at;
        retain(&mut self.state.tokens, |_, t| t.expires_at > at && t.uses_left > 0);
        if self.state.tokens.contains_key(&id) {
            return self.unchanged(); // proposed twice; its uses may have been burnt since
        }
        if self.state.tokens.len() >= TOKENS_MAX {
            return too_many("join tokens", TOKENS_MAX as u64);
        }
        self.state.tokens.insert(id, Arc::new(JoinToken { id, secret_hash, created_at: at, expires_at, uses_left: uses, role }));
        let message = format!("join token for {uses} {role}{}, good until {expires_at}", if uses == 1 { "" } else { "s" });
        self.event(EventKind::TokenCreated, &format!("token/{id}"), &message, None);
        self.done()
    }

    /// Takes one use of a token, or says why not.
    pub(super) fn use_token(&mut self, token: TokenId, wanted: Role) -> Result<(), Refusal> {
        let at = self.at;
        let row = self.state.tokens.get_mut(&token).ok_or(Refusal::TokenUnknown)?;
        match row {
            t if t.role != wanted => Err(Refusal::TokenRole { is: t.role, wanted }),
            t if t.expires_at <= at => Err(Refusal::TokenExpired),
            t if t.uses_left == 0 => Err(Refusal::TokenUsedUp),
            t => {
                Arc::make_mut(t).uses_left -= 1;
                Ok(())
            }
        }
    }

    pub(super) fn admit(&mut self, token: TokenId, node: NodeId, name: String, key: Vec<u8>, expires: Timestamp) -> Applied {
        if self.state.nodes.get(&node).is_some_and(|known| known.key_fingerprint == key) {
            return self.unchanged(); // proposed twice: it burns one use only
        }
        let full = self.state.nodes.len() >= NODES_MAX;
        let room = if full { Err(Refusal::TooMany { what: "nodes".into(), limit: NODES_MAX as u64 }) } else { Ok(()) };
        if let Err(refusal) = room.and_then(|()| self.use_token(token, Role::Agent)) {
            self.event(EventKind::TokenRefused, &format!("node/{name}"), &format!("join refused: {refusal}"), None);
            return Applied::Refused(refusal);
        }
        let facts = NodeFacts { name: name.clone(), ..NodeFacts::default() };
        // The least its answer can have held; the agent tells what it is.
        let ca = self.state.cluster.as_ref().map_or(0, |c| c.trusted().0);
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
            ca_trusted: ca,
            ca_signer: ca,
            clock_skew_ms: None,
            labels: OrdMap::new(),
            pool: None,
            drain: None,
        };
        self.state.insert_node(row);
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
        }
        self.state.reclass(node);
        if came_up {
            self.event(EventKind::NodeUp, &format!("node/{name}"), "node is up", None);
            self.rerouted_on(node);
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
        self.rerouted_on(node);
        self.done()
    }

    /// The row is what a node is known by, so without it nobody lets the node in.
    pub(super) fn remove_node(&mut self, node: NodeId) -> Applied {
        self.rerouted_on(node);
        let Some(row) = self.state.remove_node(node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        let copies: Vec<_> = self.state.allocs_on(node).map(|a| a.id).collect();
        let message = format!("node removed; {} of its copies count as gone", copies.len());
        for id in copies {
            self.state.remove_alloc(id);
        }
        self.event(EventKind::NodeRemoved, &format!("node/{}", row.facts.name), &message, None);
        self.done()
    }

    pub(super) fn node_certificate(&mut self, node: NodeId, key_fingerprint: Vec<u8>, expires_at: Timestamp) -> Applied {
        let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        if row.key_fingerprint == key_fingerprint && row.certificate_expires_at == expires_at {
            return self.unchanged();
        }
        let row = Arc::make_mut(row);
        row.key_fingerprint = key_fingerprint;
        row.certificate_expires_at = expires_at;
        self.done()
    }
}
