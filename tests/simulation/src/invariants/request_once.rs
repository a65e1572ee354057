//! I2: a request id has its effect at most once, and every retry gets the first answer.

use std::collections::BTreeMap;

use optimus_common::ids::RequestId;
use optimus_core::state::Applied;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct RequestOnce {
    /// Where each request was first applied.
    first: BTreeMap<RequestId, (u64, usize)>,
    answers: BTreeMap<RequestId, Applied>,
}

impl Invariant for RequestOnce {
    fn name(&self) -> &'static str {
        "request at most once (I2)"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        match *event {
            Event::Applied { server, index, n, proposal, before, after } => {
                let Some((id, _)) = &proposal.request else { return Ok(()) };
                let first = *self.first.entry(*id).or_insert((index, n));
                if (index, n) > first && (before.requests != after.requests || before.workloads != after.workloads) {
                    return Err(format!("request {id}, applied at {first:?}, has an effect again at {:?} on server {server}", (index, n)));
                }
                Ok(())
            }
            Event::Acked { request, answer } => {
                let first = self.answers.entry(request).or_insert_with(|| answer.clone());
                if first != answer {
                    return Err(format!("request {request} was answered {first:?}, then {answer:?}"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
