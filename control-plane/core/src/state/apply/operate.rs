//! What operators set of nodes, and the moves that follow from it.

use super::*;

impl Step<'_> {
    pub(super) fn change_node(&mut self, node: NodeId, change: NodeChange) -> Applied {
        let Some(row) = self.state.nodes.get(&node).map(|n| Node::clone(n)) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        let mut new = row.clone();
        let mut unflag = false;
        let message = match change {
            NodeChange::Labels(labels) => {
                for (key, value) in labels {
                    match value {
                        Some(value) => drop(new.labels.insert(key, value)),
                        None => drop(new.labels.remove(&key)),
                    }
                }
                if new.labels.len() > NODE_LABELS_MAX {
                    return too_many("labels of a node", NODE_LABELS_MAX as u64);
                }
                "its labels were set".to_owned()
            }
            NodeChange::Pool(pool) => {
                new.pool = pool.filter(|p| p.as_str() != DEFAULT_POOL);
                format!("it is in pool {}", new.pool())
            }
            NodeChange::Cordon => {
                new.cordoned = true;
                "cordoned: it takes no new copies".to_owned()
            }
            NodeChange::Uncordon => {
                unflag = new.drain.take().is_some();
                new.cordoned = false;
                "it takes copies again".to_owned()
            }
            NodeChange::CancelDrain => {
                if let Some(drain) = new.drain.take() {
                    new.cordoned = drain.was_cordoned;
                    unflag = true;
                }
                "its drain was cancelled".to_owned()
            }
            NodeChange::Drain { deadline, keep_daemons } => {
                // Asked again, it goes on with the new deadline.
                let was_cordoned = row.drain.as_ref().map_or(row.cordoned, |d| d.was_cordoned);
                let started_at = row.drain.as_ref().filter(|d| d.done_at.is_none()).map_or(self.at, |d| d.started_at);
                new.drain = Some(Drain { started_at, deadline, keep_daemons, was_cordoned, done_at: None });
                new.cordoned = true;
                match deadline {
                    Some(at) if at <= self.at => "draining at once: its copies are stopped".to_owned(),
                    Some(at) => format!("draining; what is left at {at} is stopped"),
                    None => "draining".to_owned(),
                }
            }
        };
        if new == row {
            return self.unchanged();
        }
        let kind = if new.is_draining() && !row.is_draining() { EventKind::NodeDraining } else { EventKind::NodeChanged };
        let subject = format!("node/{}", row.facts.name);
        self.state.insert_node(new);
        if unflag {
            self.unflag(node);
        }
        self.event(kind, &subject, &message, None);
        self.done()
    }

    /// Copies that were to leave the node and still run may stay.
    fn unflag(&mut self, node: NodeId) {
        let flagged: Vec<_> = self.state.allocs_on(node).filter(|a| a.migrate && a.run).map(|a| a.id).collect();
        for id in flagged {
            self.state.change_alloc(id, |row| row.migrate = false);
        }
    }

    pub(super) fn node_drained(&mut self, node: NodeId) -> Applied {
        let at = self.at;
        let Some(row) = self.state.nodes.get_mut(&node).filter(|n| n.is_draining()) else { return self.unchanged() };
        let row = Arc::make_mut(row);
        let Some(drain) = &mut row.drain else { return self.unchanged() };
        drain.done_at = Some(at);
        let (subject, took) = (format!("node/{}", row.facts.name), at.since(drain.started_at));
        self.event(EventKind::NodeDrained, &subject, &format!("drained in {took}"), None);
        self.done()
    }

    pub(super) fn set_rebalance(&mut self, automatic: bool, moves: u32, every: Span) -> Applied {
        let row = self.state.rebalance.unwrap_or_default();
        let new = RebalanceRow { automatic, moves, every, ..row };
        if self.state.rebalance == Some(new) {
            return self.unchanged();
        }
        self.state.rebalance = Some(new);
        let how = if automatic { "by itself" } else { "only when asked" };
        self.event(EventKind::Rebalanced, "cluster", &format!("rebalancing moves at most {moves} copies each {every}, {how}"), None);
        self.done()
    }

    /// Within the budget of the interval, which begins with its first move.
    pub(super) fn flag_for_balance(&mut self, moves: Vec<AllocId>) -> Applied {
        let mut row = self.state.rebalance.unwrap_or_default();
        let begins = self.at >= row.since + row.every;
        if begins {
            row.since = self.at;
            row.moved = 0;
        }
        let left = row.moves.saturating_sub(row.moved) as usize;
        let mut moved = 0;
        for id in moves.into_iter().take(left) {
            moved += u32::from(self.migrate(id));
        }
        if moved == 0 && !(begins && row.automatic) {
            return self.unchanged();
        }
        row.moved += moved;
        self.state.rebalance = Some(row);
        if moved == 0 {
            return self.done();
        }
        self.event(EventKind::Rebalanced, "cluster", &format!("moves {moved} copies to even out the nodes"), None);
        self.done()
    }
}
