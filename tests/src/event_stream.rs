//! Do the event streams that clients saw fit together?
//!
//! An event has a position, `(index, n)`: the place in the log and the number among the events of that entry. A stream is
//! what one client saw of one server, in order; a reconnect with resume continues it. Rules: the position never goes back
//! and never repeats; at one position every server tells the same; what another stream saw in between was either seen here
//! as well or announced as missing by a marker.

use std::collections::BTreeMap;
use std::fmt;

/// Where an event stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Index of the log entry.
    pub index: u64,
    /// Number among the events of that entry, from 0.
    pub n: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.n)
    }
}

/// What a stream carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An event and all that it says.
    Event { at: Position, body: String },
    /// The server said that it left something out here, or the client started over from here.
    Gap,
}

/// What one client saw of one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// Name for messages.
    pub source: String,
    /// In order of arrival.
    pub items: Vec<Item>,
}

/// Why streams are not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{stream}: {at} came twice")]
    Repeat { stream: String, at: Position },
    #[error("{stream}: {at} came after {after}")]
    GoesBack { stream: String, after: Position, at: Position },
    #[error("{stream}: {at} is missing before {before}, without a marker; {seen_by} has it")]
    Missing { stream: String, at: Position, before: Position, seen_by: String },
    #[error("{stream}: entry {index} starts with event {n}, without a marker")]
    StartsLate { stream: String, index: u64, n: u32 },
    #[error("at {at} {one} says {said_one}, {other} says {said_other}")]
    Disagree { at: Position, one: String, said_one: String, other: String, said_other: String },
}

/// Judges streams of one cluster together.
///
/// # Errors
/// The first [`Fault`]: of a stream alone before those between streams.
pub fn check(streams: &[Stream]) -> Result<(), Fault> {
    streams.iter().try_for_each(check_order)?;
    let mut all: BTreeMap<Position, (&str, &str)> = BTreeMap::new();
    for stream in streams {
        for item in &stream.items {
            let Item::Event { at, body } = item else { continue };
            let (one, said) = *all.entry(*at).or_insert((&stream.source, body));
            if said != body {
                let (one, said_one) = (one.to_owned(), said.to_owned());
                return Err(Fault::Disagree { at: *at, one, said_one, other: stream.source.clone(), said_other: body.clone() });
            }
        }
    }
    streams.iter().try_for_each(|stream| check_gaps(stream, &all))
}

/// Positions rise, and inside an entry by one.
fn check_order(stream: &Stream) -> Result<(), Fault> {
    let name = || stream.source.clone();
    let mut last: Option<Position> = None;
    let mut marked = true; // A stream may begin anywhere.
    for item in &stream.items {
        let Item::Event { at, .. } = item else {
            marked = true;
            continue;
        };
        match last {
            Some(last) if *at == last => return Err(Fault::Repeat { stream: name(), at: *at }),
            Some(last) if *at < last => return Err(Fault::GoesBack { stream: name(), after: last, at: *at }),
            _ => {}
        }
        let follows = at.n == 0 || last.is_some_and(|l| l.index == at.index && l.n + 1 == at.n);
        if !marked && !follows {
            return Err(Fault::StartsLate { stream: name(), index: at.index, n: at.n });
        }
        (last, marked) = (Some(*at), false);
    }
    Ok(())
}

/// Between two events of a stream lies nothing that another one saw, unless a marker says so.
fn check_gaps(stream: &Stream, all: &BTreeMap<Position, (&str, &str)>) -> Result<(), Fault> {
    let mut last: Option<Position> = None;
    for item in &stream.items {
        let Item::Event { at, .. } = item else {
            last = None;
            continue;
        };
        if let Some(from) = last {
            use std::ops::Bound::Excluded;
            if let Some((missing, (seen_by, _))) = all.range((Excluded(from), Excluded(*at))).next() {
                let (stream, seen_by) = (stream.source.clone(), (*seen_by).to_owned());
                return Err(Fault::Missing { stream, at: *missing, before: *at, seen_by });
            }
        }
        last = Some(*at);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64, n: u32) -> Position {
        Position { index, n }
    }

    fn event(index: u64, n: u32) -> Item {
        Item::Event { at: at(index, n), body: format!("event {index}.{n}") }
    }

    fn stream(source: &str, items: &[Item]) -> Stream {
        Stream { source: source.to_owned(), items: items.to_vec() }
    }

    #[test]
    fn whole_streams_later_starts_and_marked_gaps_are_good() {
        let all = [event(3, 0), event(3, 1), event(5, 0), event(9, 0)];
        let late = [event(3, 1), event(5, 0), event(9, 0)];
        let marked = [event(3, 0), Item::Gap, event(9, 0)];
        assert_eq!(check(&[stream("a", &all), stream("b", &late), stream("c", &marked), stream("d", &[])]), Ok(()));
    }

    #[test]
    fn repeats_and_going_back_are_faults_also_over_a_marker() {
        let repeat = stream("a", &[event(3, 0), event(3, 0)]);
        assert_eq!(check(&[repeat]), Err(Fault::Repeat { stream: "a".to_owned(), at: at(3, 0) }));
        let back = stream("a", &[event(3, 0), event(5, 0), Item::Gap, event(4, 0)]);
        assert_eq!(check(&[back]), Err(Fault::GoesBack { stream: "a".to_owned(), after: at(5, 0), at: at(4, 0) }));
    }

    #[test]
    fn a_gap_without_a_marker_shows_inside_an_entry_and_beside_another_stream() {
        let inside = stream("a", &[event(3, 0), event(5, 1)]);
        assert_eq!(check(&[inside]), Err(Fault::StartsLate { stream: "a".to_owned(), index: 5, n: 1 }));
        let skipped = stream("a", &[event(3, 0), event(3, 2)]);
        assert_eq!(check(&[skipped]), Err(Fault::StartsLate { stream: "a".to_owned(), index: 3, n: 2 }));
        let (whole, holed) = (stream("a", &[event(3, 0), event(4, 0), event(5, 0)]), stream("b", &[event(3, 0), event(5, 0)]));
        let missing = Fault::Missing { stream: "b".to_owned(), at: at(4, 0), before: at(5, 0), seen_by: "a".to_owned() };
        assert_eq!(check(&[whole, holed]), Err(missing));
    }

    #[test]
    fn servers_that_tell_different_histories_are_caught() {
        let other = Item::Event { at: at(3, 0), body: "something else".to_owned() };
        let found = check(&[stream("a", &[event(3, 0)]), stream("b", &[other])]);
        assert!(matches!(found, Err(Fault::Disagree { at: Position { index: 3, n: 0 }, .. })), "{found:?}");
    }
}
