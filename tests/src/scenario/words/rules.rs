//! Rules that hold after every single command from here to the end.

use super::super::world::Rule;
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "never more than COUNT copies of NAME",
        kind: Kind::Act,
        help: "copies that should run, on nodes that answer",
        run: |world, args| {
            world.rules.push(Rule::NeverMore { most: args.parse("COUNT")?, of: args.get("NAME")?.into() });
            Ok(())
        },
    },
    Word {
        pattern: "never fewer than COUNT ready copies of NAME",
        kind: Kind::Act,
        help: "say it once there are so many",
        run: |world, args| {
            world.rules.push(Rule::NeverFewer { least: args.parse("COUNT")?, of: args.get("NAME")?.into() });
            Ok(())
        },
    },
    Word {
        pattern: "no more rules",
        kind: Kind::Act,
        help: "ends all standing rules",
        run: |world, _| {
            world.rules.clear();
            Ok(())
        },
    },
]);
