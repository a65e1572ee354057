//! A node is believed about its own copies only.

use optimus_core::state::Command;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct OwnReports;

impl Invariant for OwnReports {
    fn name(&self) -> &'static str {
        "own reports only"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        let Event::Applied { index, proposal, before, after, .. } = *event else { return Ok(()) };
        let Command::Report { node, .. } = &proposal.command else { return Ok(()) };
        let foreign = before.allocs.values().find(|a| a.node != *node && after.allocs.get(&a.id).is_none_or(|b| b.status != a.status));
        match foreign {
            Some(alloc) => Err(format!("{node} was believed about {} of another node at {index}", alloc.name())),
            None => Ok(()),
        }
    }
}
