//! I4: a copy runs at most once, on one node, and no two copies hold one port of a host.
//!
//! A spec cannot say `exclusive` yet; when it can, its lease is checked here too.

use std::collections::BTreeMap;

use optimus_common::{AllocId, NodeId};

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct OneCopy {
    runs: BTreeMap<AllocId, NodeId>,
    ports: BTreeMap<(NodeId, u16), AllocId>,
}

impl Invariant for OneCopy {
    fn name(&self) -> &'static str {
        "one copy (I4)"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        let Event::Process { node, alloc, ports, runs } = *event else { return Ok(()) };
        if !runs {
            self.runs.remove(&alloc);
            self.ports.retain(|_, holder| *holder != alloc);
            return Ok(());
        }
        if let Some(other) = self.runs.insert(alloc, node) {
            return Err(format!("copy {alloc} starts on {node} while it runs on {other}"));
        }
        for port in ports {
            if let Some(other) = self.ports.insert((node, *port), alloc) {
                return Err(format!("copies {other} and {alloc} hold port {port} of {node}"));
            }
        }
        Ok(())
    }
}
