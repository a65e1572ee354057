//! I1: a write that was acknowledged survives everything, with the answer that was given.

use std::collections::BTreeMap;

use optimus_common::ids::RequestId;
use optimus_core::state::{Applied, State};

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct AckedSurvives {
    acked: BTreeMap<RequestId, Applied>,
}

impl AckedSurvives {
    fn missing(&self, state: &State) -> Option<String> {
        let lost = self.acked.iter().find(|(id, answer)| state.requests.get(*id).is_none_or(|held| held.answer != **answer));
        lost.map(|(id, answer)| {
            format!("request {id} was answered {answer:?}, the state has {:?}", state.requests.get(id).map(|a| &a.answer))
        })
    }
}

impl Invariant for AckedSurvives {
    fn name(&self) -> &'static str {
        "acknowledged write survives (I1)"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        match *event {
            Event::Acked { request, answer } => {
                self.acked.insert(request, answer.clone());
                Ok(())
            }
            Event::End(end) => {
                for (server, state) in &end.states {
                    if let Some(what) = self.missing(state) {
                        return Err(format!("on server {server}: {what}"));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
