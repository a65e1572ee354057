//! How releases take over, and what people ask of a deployment.

use anyhow::{Context, bail};
use optimus_common::spec::{Amount, CanaryStep, Disconnect, Keep, Strategy, WorkloadSpec};
use optimus_common::{DeploymentId, Span};
use optimus_core::state::{Command, Steering};

use super::super::parse::{Args, same};
use super::super::world::{World, key};
use super::{Kind, Setting, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: &[], workload: SETTINGS };

const WORDS: &[Word] = &[
    Word {
        pattern: "promote NAME",
        kind: Kind::Act,
        help: "what proved itself takes over",
        run: |world, args| steer(world, args, Steering::Promote),
    },
    Word { pattern: "pause NAME", kind: Kind::Act, help: "nothing more is moved", run: |world, args| steer(world, args, Steering::Pause) },
    Word { pattern: "resume NAME", kind: Kind::Act, help: "after `pause`", run: |world, args| steer(world, args, Steering::Resume) },
    Word { pattern: "abort NAME", kind: Kind::Act, help: "calls it off", run: |world, args| steer(world, args, Steering::Abort) },
    Word {
        pattern: "retry NAME",
        kind: Kind::Act,
        help: "once more the release that failed",
        run: |world, args| steer(world, args, Steering::Retry),
    },
    Word {
        pattern: "rollback NAME",
        kind: Kind::Act,
        help: "to the release that ran before",
        run: |world, args| steer(world, args, Steering::RollBack { to: None }),
    },
    Word {
        pattern: "rollback NAME to NUMBER",
        kind: Kind::Act,
        help: "to a release",
        run: |world, args| steer(world, args, Steering::RollBack { to: Some(args.parse("NUMBER")?) }),
    },
    Word {
        pattern: "router ROUTER knows",
        kind: Kind::Act,
        help: "a router has taken on all endpoints as they are now",
        run: |world, args| {
            let (router, generation) = (args.get("ROUTER")?.to_owned(), world.state.index);
            world.apply(Command::AckEndpoints { router, generation });
            Ok(())
        },
    },
    Word {
        pattern: "weight of NAME is PERCENT",
        kind: Kind::Check,
        help: "of the traffic that the newer release is given; `unset` when none is set",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            let newest = row.deployment.and_then(|id| world.state.deployments.get(&id)).context("it has no deployment")?;
            same(&newest.weight.map_or("unset".into(), |w| w.to_string()), args.get("PERCENT")?)
        },
    },
    Word {
        pattern: "NAME stays at release NUMBER",
        kind: Kind::Check,
        help: "the release it wants, whatever still runs",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            same(&row.release.to_string(), args.get("NUMBER")?)
        },
    },
];

const SETTINGS: &[Setting<WorkloadSpec>] = &[
    Setting {
        key: "strategy",
        help: "`rolling` (unless said), `blue-green` or `canary`",
        set: |spec, value| {
            let all = [Strategy::Rolling, Strategy::BlueGreen, Strategy::Canary];
            spec.update.strategy = all.into_iter().find(|s| s.word() == value).context("no such strategy")?;
            Ok(())
        },
    },
    Setting {
        key: "canary",
        help: "copies that try a release first: `2` or `20%`; 1 unless said",
        set: |spec, value| {
            spec.update.canary = amount(value)?;
            Ok(())
        },
    },
    Setting {
        key: "steps",
        help: "of a canary: `10%@5s,50%@10s`; one of 10 % and a minute unless said",
        set: |spec, value| {
            let step = |text: &str| {
                let (weight, bake) = text.split_once("%@").context("a step is written 10%@5s")?;
                anyhow::Ok(CanaryStep { weight: weight.parse()?, bake: bake.parse()? })
            };
            spec.update.steps = value.split(',').map(step).collect::<Result<_, _>>()?;
            Ok(())
        },
    },
    Setting {
        key: "hold",
        help: "how long the old set stays after a blue-green switch",
        set: |spec, value| {
            spec.update.hold = value.parse::<Span>()?;
            Ok(())
        },
    },
    Setting {
        key: "surge",
        help: "copies there may be beyond the wanted number: `2`, `50%`",
        set: |spec, value| {
            spec.update.max_surge = Some(amount(value)?);
            Ok(())
        },
    },
    Setting {
        key: "unavailable",
        help: "copies that may be missing: `1`, `25%`",
        set: |spec, value| {
            spec.update.max_unavailable = Some(amount(value)?);
            Ok(())
        },
    },
    Setting { key: "auto-promote", help: "`no`: a person promotes", set: |spec, value| yes(&mut spec.update.auto_promote, value) },
    Setting {
        key: "auto-rollback",
        help: "`no`: a release that fails stays",
        set: |spec, value| yes(&mut spec.update.auto_rollback, value),
    },
    Setting {
        key: "lost-after",
        help: "a copy on a silent node is given up only then; meanwhile another stands in for it",
        set: |spec, value| {
            spec.disconnect = Some(Disconnect { lost_after: value.parse()?, keep: Keep::Original });
            Ok(())
        },
    },
    Setting {
        key: "keep",
        help: "after `lost-after`: `original` (unless said) or `newest` when the silent node is back",
        set: |spec, value| {
            let disconnect = spec.disconnect.as_mut().context("`lost-after` comes first")?;
            disconnect.keep = match value {
                "original" => Keep::Original,
                "newest" => Keep::Newest,
                other => bail!("`{other}` cannot be kept"),
            };
            Ok(())
        },
    },
];

fn steer(world: &mut World, args: &Args, act: Steering) -> anyhow::Result<()> {
    let deployment = DeploymentId(world.next_id());
    world.ask(Command::Steer { key: key(args.get("NAME")?)?, act, why: None, deployment });
    Ok(())
}

fn amount(text: &str) -> anyhow::Result<Amount> {
    Ok(match text.strip_suffix('%') {
        Some(percent) => Amount::Percent(percent.parse()?),
        None => Amount::Count(text.parse()?),
    })
}

fn yes(flag: &mut bool, value: &str) -> anyhow::Result<()> {
    *flag = match value {
        "yes" => true,
        "no" => false,
        other => bail!("`yes` or `no`, not `{other}`"),
    };
    Ok(())
}
