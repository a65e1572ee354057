//! I11: nothing grows without bound: the log, snapshots, tables that are windows, tasks and messages under way.

use optimus_core::state::{EVENTS_KEPT, REQUESTS_KEPT};

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Bounded;

impl Invariant for Bounded {
    fn name(&self) -> &'static str {
        "bounded (I11)"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        match *event {
            Event::Size { what, server, size, bound } if size > bound => {
                Err(format!("server {server} has {size} {what}, at most {bound} are allowed"))
            }
            Event::Applied { index, after, .. } if after.events.len() > EVENTS_KEPT || after.requests.len() > REQUESTS_KEPT => {
                Err(format!("{} events and {} requests are kept at {index}", after.events.len(), after.requests.len()))
            }
            _ => Ok(()),
        }
    }
}
