//! I7: the event stream has no gap, no duplicate, and never goes back, whichever servers a reader is given it by; and an
//! event once written is never another one.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct EventsContiguous {
    /// Where each reader stands.
    readers: BTreeMap<u64, (u64, u32)>,
}

impl Invariant for EventsContiguous {
    fn name(&self) -> &'static str {
        "event stream (I7)"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        match *event {
            Event::Applied { index, before, after, .. } => {
                let kept = after.events.get_min().map(|(place, _)| *place);
                let from = before.events.get_max().map_or(index, |((at, _), _)| (*at).min(index));
                for (place, old) in before.events.range((from, 0)..).filter(|(place, _)| Some(**place) >= kept) {
                    if after.events.get(place) != Some(old) {
                        return Err(format!("event {place:?} was written anew at {index}"));
                    }
                }
                let newest = before.events.get_max().map(|(place, _)| *place);
                let first = newest.filter(|(at, _)| *at == index).map_or(0, |(_, n)| n + 1);
                let fresh = after.events.range((newest.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
                for (expected, (place, _)) in (first..).zip(fresh) {
                    if *place != (index, expected) {
                        return Err(format!("event {place:?} was written where {:?} should be", (index, expected)));
                    }
                }
                Ok(())
            }
            Event::Streamed { reader, after, places, upto } => {
                let at = self.readers.entry(reader).or_default();
                if *at != after {
                    return Err(format!("reader {reader} stood at {at:?} and was given what follows {after:?}"));
                }
                let Some(truth) = model.canon.range(..=upto).next_back().and_then(|(_, c)| c.states.last()) else { return Ok(()) };
                let window = (Bound::Excluded(after), Bound::Included((upto, u32::MAX)));
                let expected: Vec<(u64, u32)> =
                    if after.0 > upto { Vec::new() } else { truth.events.range(window).map(|(p, _)| *p).collect() };
                if expected != places {
                    return Err(format!("reader {reader} after {after:?} was given {places:?}, should be {expected:?}"));
                }
                if let Some(last) = places.last() {
                    *at = *last;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
