//! A copy is placed only into a slot without a copy of its release on a node that answers, however often a plan is proposed.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct PlacedOnce;

impl Invariant for PlacedOnce {
    fn name(&self) -> &'static str {
        "placed once"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        let Event::Applied { index, before, after, .. } = *event else { return Ok(()) };
        if before.allocs == after.allocs {
            return Ok(());
        }
        for new in after.allocs.values().filter(|a| !before.allocs.contains_key(&a.id)) {
            let answers = |node| after.nodes.get(node).is_some_and(|n| n.up);
            let rival = after
                .allocs_in(&new.key, new.index)
                .find(|a| a.id != new.id && a.run && !a.is_leaving() && a.release == new.release && answers(&a.node));
            if let Some(rival) = rival {
                return Err(format!("{} of release {} was placed at {index} beside {}", new.name(), new.release, rival.id));
            }
        }
        Ok(())
    }
}
