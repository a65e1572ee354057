//! Time, and whose turn it is.

use anyhow::{Context, ensure};
use optimus_common::Span;
use optimus_core::state::{Applied, Command};

use super::super::parse::same;
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "settle",
        kind: Kind::Act,
        help: "leader and agents act in turn until nothing is left to do; no time passes",
        run: |world, _| world.settle(),
    },
    Word {
        pattern: "advance SPAN",
        kind: Kind::Act,
        help: "time passes, settled second by second: `10s`, `2m`",
        run: |world, args| {
            let span: Span = args.parse("SPAN")?;
            world.advance(span)
        },
    },
    Word {
        pattern: "pass SPAN",
        kind: Kind::Act,
        help: "time passes and nobody acts",
        run: |world, args| {
            world.now = world.now + args.parse("SPAN")?;
            Ok(())
        },
    },
    Word {
        pattern: "decide",
        kind: Kind::Act,
        help: "one look of the leader, and its plan is committed",
        run: |world, _| world.decide().map(|_| ()),
    },
    Word {
        pattern: "report",
        kind: Kind::Act,
        help: "one turn of every agent",
        run: |world, _| {
            world.report();
            Ok(())
        },
    },
    Word {
        pattern: "plan PLAN",
        kind: Kind::Act,
        help: "the leader decides, but its plan is still on the way; `commit PLAN` later",
        run: |world, args| {
            let plan = world.think().plan;
            ensure!(!plan.is_empty(), "the leader has nothing to do");
            world.plans.insert(args.get("PLAN")?.into(), plan);
            Ok(())
        },
    },
    Word {
        pattern: "commit PLAN",
        kind: Kind::Act,
        help: "a plan made earlier is applied to the state as it is now",
        run: |world, args| {
            let plan = world.plans.remove(args.get("PLAN")?).context("no such plan")?;
            let answer = world.apply(Command::Plan(plan));
            world.answer = Some(answer);
            ensure!(!matches!(world.answer, Some(Applied::Refused(_))), "a plan is never refused as a whole");
            Ok(())
        },
    },
    Word {
        pattern: "leader changes",
        kind: Kind::Act,
        help: "another server leads, with nothing but the state",
        run: |world, _| world.change_leader(),
    },
    Word {
        pattern: "leader rests",
        kind: Kind::Check,
        help: "it has nothing to do now",
        run: |world, _| {
            let plan = world.think().plan;
            ensure!(plan.is_empty(), "the leader still has something to do: {plan:?}");
            Ok(())
        },
    },
    Word {
        pattern: "leader wakes in SPAN",
        kind: Kind::Check,
        help: "when it looks again though nothing happens; `never` if it need not",
        run: |world, args| {
            world.think();
            let found = world.wake_at.map_or("never".to_owned(), |at| at.since(world.now).to_string());
            same(&found, args.get("SPAN")?)
        },
    },
    Word {
        pattern: "leader decided at most COUNT",
        kind: Kind::Check,
        help: "so many plans since the beginning",
        run: |world, args| {
            let most: usize = args.parse("COUNT")?;
            ensure!(world.decisions <= most, "it took {} decisions", world.decisions);
            Ok(())
        },
    },
]);
