//! Which copies there are, where, and what became of them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use optimus_core::{reconciler, view};

use super::super::parse::{same, says};
use super::super::world::{key, slot_of};
use super::{Kind, Vocabulary, Word, slots};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "slots NAME COPIES...",
        kind: Kind::Check,
        help: "exactly the copies that should run, each `INDEX@NODE:rRELEASE`, or `none`",
        run: |world, args| {
            let running = world.running(args.get("NAME")?)?;
            let mut found: Vec<String> =
                running.iter().map(|a| format!("{}@{}:r{}", a.index, world.node_name(a.node), a.release)).collect();
            let mut expected: Vec<String> = args.rest().iter().filter(|w| *w != "none").cloned().collect();
            found.sort();
            expected.sort();
            same(&found.join(" "), &expected.join(" "))
        },
    },
    Word {
        pattern: "releases NAME RELEASES...",
        kind: Kind::Check,
        help: "copies that should run by release, without their places: `r1=6 r2=4`, or `none`",
        run: |world, args| {
            let mut count: BTreeMap<u64, usize> = BTreeMap::new();
            for alloc in world.running(args.get("NAME")?)? {
                *count.entry(alloc.release).or_default() += 1;
            }
            let found: Vec<String> = count.iter().map(|(release, n)| format!("r{release}={n}")).collect();
            let expected: Vec<&str> = args.rest().iter().map(String::as_str).filter(|w| *w != "none").collect();
            same(&found.join(" "), &expected.join(" "))
        },
    },
    Word {
        pattern: "NAME per node COUNTS...",
        kind: Kind::Check,
        help: "copies that should run on each node, most first, in any order of nodes: `3 3 2`",
        run: |world, args| {
            let running = world.running(args.get("NAME")?)?;
            let mut found: Vec<usize> = world.state.nodes.keys().map(|n| running.iter().filter(|a| a.node == *n).count()).collect();
            found.sort_unstable_by(|a, b| b.cmp(a));
            let found: Vec<String> = found.iter().map(usize::to_string).collect();
            same(&found.join(" "), &args.rest().join(" "))
        },
    },
    Word {
        pattern: "NAME keeps SLOTS",
        kind: Kind::Check,
        help: "the very copies these slots (`all`, `3`, `0,2`, `2-9`) had before the last `when` still should run",
        run: |world, args| {
            let key = key(args.get("NAME")?)?;
            let copies = world.marked.workload(&key).context("no such workload before the last `when`")?.copies;
            for slot in slots(args.get("SLOTS")?, copies)? {
                let before: BTreeSet<_> = world.marked.allocs_in(&key, slot).filter(|a| a.run).map(|a| a.id).collect();
                ensure!(!before.is_empty(), "slot {slot} had no copy before");
                let now: BTreeSet<_> = world.state.allocs_in(&key, slot).filter(|a| a.run).map(|a| a.id).collect();
                ensure!(before == now, "slot {slot} had {before:?} and has {now:?}");
            }
            Ok(())
        },
    },
    Word {
        pattern: "placed COUNT of NAME",
        kind: Kind::Check,
        help: "copies placed since the last `when`",
        run: |world, args| same(&world.placed.get(args.get("NAME")?).copied().unwrap_or(0).to_string(), args.get("COUNT")?),
    },
    Word {
        pattern: "stopped COUNT of NAME",
        kind: Kind::Check,
        help: "copies told to stop since the last `when`",
        run: |world, args| same(&world.stopped.get(args.get("NAME")?).copied().unwrap_or(0).to_string(), args.get("COUNT")?),
    },
    Word {
        pattern: "ended copies of NAME COUNT",
        kind: Kind::Check,
        help: "records kept of copies that are over",
        run: |world, args| {
            let ended = world.state.allocs_of(&key(args.get("NAME")?)?).filter(|a| a.has_ended()).count();
            same(&ended.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "slot SLOT says \"TEXT\"",
        kind: Kind::Check,
        help: "why `web-0` has no copy",
        run: |world, args| {
            let (key, index) = slot_of(args.get("SLOT")?)?;
            let row = world.state.workload(&key).context("no such workload")?;
            let reason = reconciler::unplaced(&world.state, row, index, world.now).context("it has a copy, or needs none")?;
            says(&reason.to_string(), args.get("TEXT")?)
        },
    },
    Word {
        pattern: "copy SLOT says \"TEXT\"",
        kind: Kind::Check,
        help: "why the newest copy of `web-0` is not running and ready",
        run: |world, args| {
            let alloc = world.copies_in(args.get("SLOT")?)?.pop().context("it has no copy")?;
            let reason = view::allocation(&world.state, &alloc).reason;
            says(&reason.map_or_else(|| "nothing".to_owned(), |r| r.message), args.get("TEXT")?)
        },
    },
    Word {
        pattern: "copy SLOT is PHASE",
        kind: Kind::Check,
        help: "of the newest copy: `pending`, `starting`, `running`, `backoff`, `stopping`, `stopped`, `failed`",
        run: |world, args| {
            let alloc = world.copies_in(args.get("SLOT")?)?.pop().context("it has no copy")?;
            same(&format!("{:?}", alloc.phase()).to_lowercase(), args.get("PHASE")?)
        },
    },
    Word {
        pattern: "copy SLOT runs on NODE",
        kind: Kind::Check,
        help: "where the one that should run is",
        run: |world, args| {
            let alloc = world.copy_in(args.get("SLOT")?)?;
            same(world.node_name(alloc.node), args.get("NODE")?)
        },
    },
    Word {
        pattern: "copy SLOT has restarted COUNT",
        kind: Kind::Check,
        help: "times, on its node",
        run: |world, args| {
            let alloc = world.copy_in(args.get("SLOT")?)?;
            same(&alloc.status.as_ref().map_or(0, |s| s.restarts).to_string(), args.get("COUNT")?)
        },
    },
]);
