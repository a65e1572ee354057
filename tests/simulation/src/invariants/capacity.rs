//! I6: ports and memory promised on a node never exceed what it has.

use std::collections::BTreeSet;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Capacity;

impl Invariant for Capacity {
    fn name(&self) -> &'static str {
        "capacity (I6)"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        let Event::Applied { index, before, after, .. } = *event else { return Ok(()) };
        if before.allocs == after.allocs {
            return Ok(());
        }
        for node in after.nodes.values() {
            let (mut ports, mut memory, mut cpu) = (BTreeSet::new(), 0, 0);
            for alloc in after.allocs_on(node.id).filter(|a| !a.has_ended()) {
                let Some(release) = after.release(&alloc.key, alloc.release) else {
                    return Err(format!("copy {} at {index} has no release", alloc.name()));
                };
                memory += release.spec.resources.memory_request.0;
                cpu += u64::from(release.spec.resources.cpu.0);
                for (_, port) in &alloc.ports {
                    if !ports.insert(*port) {
                        return Err(format!("port {port} of {} is promised twice at {index}", node.facts.name));
                    }
                }
            }
            if memory > node.facts.memory.0 || cpu > u64::from(node.facts.cpu.0) {
                return Err(format!("{} has promised {memory} bytes and {cpu} millicores at {index}", node.facts.name));
            }
        }
        Ok(())
    }
}
