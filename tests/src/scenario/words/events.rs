//! What was recorded for people.

use anyhow::ensure;
use optimus_core::view;

use super::super::parse::same;
use super::super::world::World;
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "event KIND SUBJECT",
        kind: Kind::Check,
        help: "there was one: `event copy_failed web-0`",
        run: |world, args| {
            ensure!(count(world, args.get("KIND")?, args.get("SUBJECT")?) > 0, "no such event among {:?}", all(world));
            Ok(())
        },
    },
    Word {
        pattern: "events KIND SUBJECT COUNT",
        kind: Kind::Check,
        help: "so many of them, over all",
        run: |world, args| same(&count(world, args.get("KIND")?, args.get("SUBJECT")?).to_string(), args.get("COUNT")?),
    },
    Word {
        pattern: "event KIND SUBJECT says \"TEXT\"",
        kind: Kind::Check,
        help: "one of them says so",
        run: |world, args| {
            let (kind, subject, text) = (args.get("KIND")?, args.get("SUBJECT")?, args.get("TEXT")?);
            let found: Vec<String> = world
                .state
                .events
                .values()
                .map(|e| view::event(e))
                .filter(|e| e.kind == kind && e.subject.ends_with(subject))
                .map(|e| format!("{}: {}", e.message, e.reason.map_or_else(String::new, |r| r.message)))
                .collect();
            ensure!(found.iter().any(|m| m.contains(text)), "none of them says `{text}`: {found:?}");
            Ok(())
        },
    },
]);

fn count(world: &World, kind: &str, subject: &str) -> usize {
    world.state.events.values().filter(|e| view::event(e).kind == kind && e.subject.ends_with(subject)).count()
}

fn all(world: &World) -> Vec<(String, String)> {
    world.state.events.values().map(|e| (view::event(e).kind, e.subject.clone())).collect()
}
