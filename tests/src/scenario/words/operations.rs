//! Daemons, runs of jobs, and nodes that are emptied.

use std::collections::BTreeMap;

use anyhow::Context;
use optimus_common::protocol::RELEASE_SLOT;
use optimus_common::spec::job::{Runs, Schedule};
use optimus_common::spec::{Kind as WorkloadKind, WorkloadSpec};
use optimus_common::{DeploymentId, RunId};
use optimus_core::state::{Command, NewLimits, NodeChange, RunOrder};

use super::super::parse::{Args, same};
use super::super::world::{World, key};
use super::workloads::{deploy, set_spec};
use super::{Kind, Setting, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: &[], workload: SETTINGS };

const WORDS: &[Word] = &[
    Word {
        pattern: "deploy-daemon NAME SETTINGS...",
        kind: Kind::Act,
        help: "one copy on every node that matches; settings as those of `deploy`, and `percent`",
        run: |world, args| {
            let name = args.get("NAME")?;
            set_spec(world, name, &args.settings()?)?;
            let spec = spec_of(world, name)?;
            (spec.kind, spec.copies) = (WorkloadKind::Daemon, None);
            ask_deploy(world, name)
        },
    },
    Word {
        pattern: "deploy-job NAME SETTINGS...",
        kind: Kind::Act,
        help: "a job; without `cron` each release runs once",
        run: |world, args| {
            let name = args.get("NAME")?;
            set_spec(world, name, &args.settings()?)?;
            let spec = spec_of(world, name)?;
            spec.kind = WorkloadKind::Job;
            let runs = spec.job_runs();
            spec.runs = Some(runs);
            ask_deploy(world, name)
        },
    },
    Word {
        pattern: "run NAME",
        kind: Kind::Act,
        help: "somebody asks for a run of a job",
        run: |world, args| {
            let (key, id) = (key(args.get("NAME")?)?, RunId(world.next_id()));
            world.ask(Command::StartRun(RunOrder { key, id, params: BTreeMap::new(), payload: None }));
            Ok(())
        },
    },
    Word {
        pattern: "cancel NAME NUMBER",
        kind: Kind::Act,
        help: "calls a run of a job off",
        run: |world, args| {
            world.ask(Command::CancelRun { key: key(args.get("NAME")?)?, number: args.parse("NUMBER")? });
            Ok(())
        },
    },
    Word {
        pattern: "copies of NAME take SPAN",
        kind: Kind::Act,
        help: "so long the copies of a job work (5s unless said); then they end well",
        run: |world, args| takes(world, args, 0),
    },
    Word {
        pattern: "copies of NAME take SPAN exit CODE",
        kind: Kind::Act,
        help: "likewise, and then they end with this status",
        run: |world, args| takes(world, args, args.parse("CODE")?),
    },
    Word {
        pattern: "release command of NAME takes SPAN exit CODE",
        kind: Kind::Act,
        help: "how long it works, and its exit status",
        run: |world, args| {
            world.agents.work.insert(format!("{}-release", args.get("NAME")?), (args.parse("SPAN")?, args.parse("CODE")?));
            Ok(())
        },
    },
    Word {
        pattern: "release command of NAME ran COUNT times",
        kind: Kind::Check,
        help: "since the workload is there, as far as records are kept",
        run: |world, args| {
            let of = key(args.get("NAME")?)?;
            let ran = world.state.allocs_in(&of, RELEASE_SLOT).count();
            same(&ran.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "resize NAME SETTINGS...",
        kind: Kind::Act,
        help: "`optimus scale --cpu --memory`: `cpu=`, `memory=` (reserved), `memory-limit=`, taken on by what runs",
        run: |world, args| {
            let mut limits = NewLimits::default();
            for (name, value) in args.settings()? {
                match name {
                    "cpu" => limits.cpu = Some(value.parse()?),
                    "memory" => limits.memory_request = Some(value.parse()?),
                    "memory-limit" => limits.memory_limit = Some(value.parse()?),
                    other => anyhow::bail!("there is no setting `{other}`"),
                }
            }
            let deployment = DeploymentId(world.next_id());
            world.ask(Command::Resize { key: key(args.get("NAME")?)?, limits, copies: None, deployment });
            Ok(())
        },
    },
    Word {
        pattern: "cordon NODE",
        kind: Kind::Act,
        help: "nothing more is placed there",
        run: |world, args| change(world, args, NodeChange::Cordon),
    },
    Word { pattern: "uncordon NODE", kind: Kind::Act, help: "open again", run: |world, args| change(world, args, NodeChange::Uncordon) },
    Word {
        pattern: "cancel-drain NODE",
        kind: Kind::Act,
        help: "what is still there stays",
        run: |world, args| change(world, args, NodeChange::CancelDrain),
    },
    Word {
        pattern: "drain NODE SETTINGS...",
        kind: Kind::Act,
        help: "empties a node: `deadline=30s`, `keep=daemons`",
        run: |world, args| {
            let (mut deadline, mut keep_daemons) = (None, false);
            for (key, value) in args.settings()? {
                match (key, value) {
                    ("deadline", after) => deadline = Some(world.now + after.parse()?),
                    ("keep", "daemons") => keep_daemons = true,
                    _ => anyhow::bail!("a drain has no setting `{key}={value}`"),
                }
            }
            change(world, args, NodeChange::Drain { deadline, keep_daemons })
        },
    },
    Word {
        pattern: "leader leaves",
        kind: Kind::Act,
        help: "nobody leads until `leader returns`",
        run: |world, _| {
            world.leader_away = true;
            Ok(())
        },
    },
    Word {
        pattern: "leader returns",
        kind: Kind::Act,
        help: "after `leader leaves`",
        run: |world, _| {
            world.leader_away = false;
            Ok(())
        },
    },
    Word {
        pattern: "runs of NAME are PHASES...",
        kind: Kind::Check,
        help: "the phases of a job's runs, by number",
        run: |world, args| {
            let found: Vec<String> =
                world.state.runs_of(&key(args.get("NAME")?)?).map(|run| format!("{:?}", run.phase).to_lowercase()).collect();
            same(&found.join(" "), &args.rest().join(" "))
        },
    },
    Word {
        pattern: "NODE holds COUNT of NAME",
        kind: Kind::Check,
        help: "copies that should run there and have not ended",
        run: |world, args| {
            let of = key(args.get("NAME")?)?;
            let on = world.state.allocs_on(world.node(args.get("NODE")?)?);
            let count = on.filter(|a| a.key == of && a.run && !a.phase().is_terminal()).count();
            same(&count.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "NODE moves COUNT of NAME",
        kind: Kind::Check,
        help: "copies there that are being replaced elsewhere",
        run: |world, args| {
            let of = key(args.get("NAME")?)?;
            let count = world.state.allocs_on(world.node(args.get("NODE")?)?).filter(|a| a.key == of && a.run && a.migrate).count();
            same(&count.to_string(), args.get("COUNT")?)
        },
    },
];

const SETTINGS: &[Setting<WorkloadSpec>] = &[
    Setting {
        key: "percent",
        help: "of a daemon: how many of its nodes move at a time",
        set: |spec, value| {
            spec.update.percent = Some(value.parse()?);
            Ok(())
        },
    },
    Setting {
        key: "cron",
        help: "of a job: its schedule, with `_` for spaces",
        set: |spec, value| {
            let mut schedule = Schedule::of(value.replace('_', " "));
            schedule.timezone = "UTC".into();
            spec.schedule = Some(schedule);
            Ok(())
        },
    },
    Setting {
        key: "timezone",
        help: "of the schedule; after `cron`",
        set: |spec, value| {
            schedule(spec)?.timezone = value.into();
            Ok(())
        },
    },
    Setting {
        key: "overlap",
        help: "`forbid`, `replace` or `allow`; after `cron`",
        set: |spec, value| {
            schedule(spec)?.overlap = word(value)?;
            Ok(())
        },
    },
    Setting {
        key: "missed",
        help: "`skip`, `run_once` or `run_all`; after `cron`",
        set: |spec, value| {
            schedule(spec)?.missed = word(value)?;
            Ok(())
        },
    },
    Setting {
        key: "retries",
        help: "of a job's run",
        set: |spec, value| runs(spec, |runs| runs.retries = value.parse().unwrap_or_default()),
    },
    Setting {
        key: "active",
        help: "runs at a time",
        set: |spec, value| runs(spec, |runs| runs.active = value.parse().unwrap_or_default()),
    },
    Setting {
        key: "waiting",
        help: "runs that may wait",
        set: |spec, value| runs(spec, |runs| runs.waiting = value.parse().unwrap_or_default()),
    },
];

fn schedule(spec: &mut WorkloadSpec) -> anyhow::Result<&mut Schedule> {
    spec.schedule.as_mut().context("`cron` comes first")
}

fn runs(spec: &mut WorkloadSpec, set: impl FnOnce(&mut Runs)) -> anyhow::Result<()> {
    let mut runs = spec.job_runs();
    set(&mut runs);
    spec.runs = Some(runs);
    Ok(())
}

fn word<T: serde::de::DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    Ok(serde_json::from_value(serde_json::Value::String(text.to_owned()))?)
}

fn spec_of<'w>(world: &'w mut World, name: &str) -> anyhow::Result<&'w mut WorkloadSpec> {
    world.specs.get_mut(name).context("no such workload")
}

fn ask_deploy(world: &mut World, name: &str) -> anyhow::Result<()> {
    let command = deploy(world, &[name])?;
    world.ask(command);
    Ok(())
}

fn takes(world: &mut World, args: &Args, code: i32) -> anyhow::Result<()> {
    world.agents.work.insert(args.get("NAME")?.to_owned(), (args.parse("SPAN")?, code));
    Ok(())
}

fn change(world: &mut World, args: &Args, change: NodeChange) -> anyhow::Result<()> {
    let node = world.node(args.get("NODE")?)?;
    world.ask(Command::ChangeNode { node, change });
    Ok(())
}
