//! What copies do, and what agents say of them.

use anyhow::Context;
use optimus_core::state::Command;

use super::super::agents::Behaviour;
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "copies of RELEASE HOW",
        kind: Kind::Act,
        help: "all copies of a release (`web@2`), now and later",
        run: |world, args| {
            let release = release(args.get("RELEASE")?)?;
            world.agents.of_release.insert(release, Behaviour::named(args.get("HOW")?)?);
            Ok(())
        },
    },
    Word {
        pattern: "copies of RELEASE on NODE HOW",
        kind: Kind::Act,
        help: "those of them on one node; goes before the sentence without a node",
        run: |world, args| {
            let (name, number) = release(args.get("RELEASE")?)?;
            let key = (name, number, world.node(args.get("NODE")?)?);
            world.agents.of_release_on.insert(key, Behaviour::named(args.get("HOW")?)?);
            Ok(())
        },
    },
    Word {
        pattern: "copies on NODE HOW",
        kind: Kind::Act,
        help: "whatever runs on a node, unless something more special is said",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.agents.of_node.insert(node, Behaviour::named(args.get("HOW")?)?);
            Ok(())
        },
    },
    Word {
        pattern: "copy SLOT HOW",
        kind: Kind::Act,
        help: "the copies that slot `web-0` has now, not its later ones",
        run: |world, args| {
            let how = Behaviour::named(args.get("HOW")?)?;
            for alloc in world.copies_in(args.get("SLOT")?)? {
                world.agents.of_copy.insert(alloc.id, how);
            }
            Ok(())
        },
    },
    Word {
        pattern: "copy SLOT is-gone",
        kind: Kind::Act,
        help: "its agent says it has no trace of the newest copy of the slot",
        run: |world, args| {
            let alloc = world.copies_in(args.get("SLOT")?)?.pop().context("it has no copy")?;
            world.apply(Command::Report { node: alloc.node, statuses: vec![], gone: vec![alloc.id] });
            Ok(())
        },
    },
    Word {
        pattern: "agent NODE is-mute",
        kind: Kind::Act,
        help: "connected, but says nothing of its copies until it `answers`",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.agents.mute.insert(node);
            Ok(())
        },
    },
    Word {
        pattern: "agent NODE answers",
        kind: Kind::Act,
        help: "the end of `is-mute`",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.agents.mute.remove(&node);
            Ok(())
        },
    },
]);

/// `web@2`
fn release(text: &str) -> anyhow::Result<(String, u64)> {
    let (name, number) = text.split_once('@').context("a release is written web@2")?;
    Ok((name.to_owned(), number.parse().context("a release is written web@2")?))
}
