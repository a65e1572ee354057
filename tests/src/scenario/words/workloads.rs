//! What users ask for.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, bail};
use optimus_common::ids::RequestId;
use optimus_common::spec::*;
use optimus_common::{Bytes, DeploymentId, Millicores, Name, Span};
use optimus_core::state::{Command, DeployItem, Proposal};
use optimus_core::{reconciler, view};
use uuid::Uuid;

use super::super::parse::{same, says};
use super::super::world::{World, key};
use super::{Kind, Setting, Vocabulary, Word, set_workload};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: &[], workload: SETTINGS };

const WORDS: &[Word] = &[
    Word {
        pattern: "workload NAME SETTINGS...",
        kind: Kind::Act,
        help: "writes a spec without deploying it",
        run: |world, args| set_spec(world, args.get("NAME")?, &args.settings()?),
    },
    Word {
        pattern: "deploy NAME SETTINGS...",
        kind: Kind::Act,
        help: "changes the spec and deploys it; settings stay from deploy to deploy",
        run: |world, args| {
            set_spec(world, args.get("NAME")?, &args.settings()?)?;
            let command = deploy(world, &[args.get("NAME")?])?;
            world.ask(command);
            Ok(())
        },
    },
    Word {
        pattern: "deploy-together NAMES...",
        kind: Kind::Act,
        help: "one request for several workloads, all or none; write their specs with `workload` first",
        run: |world, args| {
            let names: Vec<&str> = args.rest().iter().map(String::as_str).collect();
            let command = deploy(world, &names)?;
            world.ask(command);
            Ok(())
        },
    },
    Word {
        pattern: "request ID VERB NAME SETTINGS...",
        kind: Kind::Act,
        help: "`deploy` or `restart` with a request id, which a retry repeats",
        run: |world, args| {
            let (verb, name, settings) = (args.get("VERB")?, args.get("NAME")?, args.settings()?);
            set_spec(world, name, &settings)?;
            let command = match verb {
                "deploy" => deploy(world, &[name])?,
                "restart" => Command::Restart { key: key(name)?, deployment: DeploymentId(world.next_id()) },
                other => bail!("no request `{other}`"),
            };
            // As the API does it: the digest is that of the body, which a retry repeats.
            let digest = format!("{verb} {name} {settings:?}").into_bytes();
            let id = RequestId(Uuid::from_u128(number_of(args.get("ID")?)));
            world.answer = Some(world.propose(Proposal { at: world.now, request: Some((id, digest)), command }));
            Ok(())
        },
    },
    Word {
        pattern: "scale NAME COPIES",
        kind: Kind::Act,
        help: "changes how many copies there should be",
        run: |world, args| {
            let deployment = DeploymentId(world.next_id());
            world.ask(Command::Scale { key: key(args.get("NAME")?)?, copies: args.parse("COPIES")?, deployment });
            Ok(())
        },
    },
    Word {
        pattern: "restart NAME",
        kind: Kind::Act,
        help: "a rolling restart: a new release with the same spec",
        run: |world, args| {
            let deployment = DeploymentId(world.next_id());
            world.ask(Command::Restart { key: key(args.get("NAME")?)?, deployment });
            Ok(())
        },
    },
    Word {
        pattern: "stop NAME",
        kind: Kind::Act,
        help: "stops all copies; a later deploy or restart starts them again",
        run: |world, args| {
            world.ask(Command::StopWorkload { key: key(args.get("NAME")?)? });
            Ok(())
        },
    },
    Word {
        pattern: "remove NAME",
        kind: Kind::Act,
        help: "stops all copies, then forgets the workload",
        run: |world, args| {
            world.ask(Command::RemoveWorkload { key: key(args.get("NAME")?)? });
            Ok(())
        },
    },
    Word {
        pattern: "NAME has READY of WANTED ready",
        kind: Kind::Check,
        help: "its copies as `optimus status` counts them",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            let shown = view::workload(&world.state, row, world.now);
            let expected = format!("{} of {}", args.get("READY")?, args.get("WANTED")?);
            same(&format!("{} of {}", shown.copies_ready, shown.copies_wanted), &expected)
        },
    },
    Word {
        pattern: "NAME is PHASE",
        kind: Kind::Check,
        help: "`ready`, `deploying`, `degraded`, `stopped` or `gone`",
        run: |world, args| {
            let shown = world.state.workload(&key(args.get("NAME")?)?).map(|row| view::workload(&world.state, row, world.now).phase);
            same(&shown.map_or("gone".into(), |phase| format!("{phase:?}").to_lowercase()), args.get("PHASE")?)
        },
    },
    Word {
        pattern: "workload NAME says \"TEXT\"",
        kind: Kind::Check,
        help: "why it has not all its copies ready",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            let reason = view::workload(&world.state, row, world.now).reason;
            says(&reason.map_or_else(|| "nothing".to_owned(), |r| r.message), args.get("TEXT")?)
        },
    },
    Word {
        pattern: "explain NAME says \"TEXT\"",
        kind: Kind::Check,
        help: "`optimus explain`: its summary and evidence, in one text",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            let shown = view::explain_workload(&world.state, row, world.now);
            says(&format!("{}; {}", shown.summary, shown.evidence.join("; ")), args.get("TEXT")?)
        },
    },
    Word {
        pattern: "NAME runs release NUMBER",
        kind: Kind::Check,
        help: "it wants this release, and no copy of another one should run",
        run: |world, args| {
            let name = args.get("NAME")?;
            let row = world.state.workload(&key(name)?).context("no such workload")?;
            same(&row.release.to_string(), args.get("NUMBER")?)?;
            let others: Vec<u64> = world.running(name)?.into_iter().map(|a| a.release).filter(|r| *r != row.release).collect();
            if !others.is_empty() {
                bail!("copies of other releases run: {others:?}");
            }
            Ok(())
        },
    },
    Word {
        pattern: "NAME waits for COUNT",
        kind: Kind::Check,
        help: "so many of its slots have no copy because there is no place or no time yet",
        run: |world, args| {
            let row = world.state.workload(&key(args.get("NAME")?)?).context("no such workload")?;
            let waiting = reconciler::unplaced_slots(&world.state, row, world.now, usize::MAX).len();
            same(&waiting.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "status says \"TEXT\"",
        kind: Kind::Check,
        help: "the one line about the whole cluster",
        run: |world, args| says(&view::status(&world.state, None, 0, 1).context("no cluster")?.summary, args.get("TEXT")?),
    },
];

const SETTINGS: &[Setting<WorkloadSpec>] = &[
    Setting {
        key: "v",
        help: "another value is another release",
        set: |spec, value| {
            spec.run = Run::Argv(vec!["app".into(), value.into()]);
            Ok(())
        },
    },
    Setting {
        key: "copies",
        help: "1 unless said; `unset` leaves the number to `scale`",
        set: |spec, value| {
            spec.copies = if value == "unset" { None } else { Some(value.parse()?) };
            Ok(())
        },
    },
    Setting {
        key: "cpu",
        help: "cores it asks for: 0.5 unless said",
        set: |spec, value| {
            spec.resources.cpu = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "memory",
        help: "it asks for: `64M` unless said",
        set: |spec, value| {
            spec.resources.memory_request = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "memory-limit",
        help: "it may use at most: `1G` unless said",
        set: |spec, value| {
            spec.resources.memory_limit = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "port",
        help: "`auto`, a fixed one like `8080`, or `none` (unless said)",
        set: |spec, value| {
            let fixed = if value == "auto" || value == "none" { None } else { Some(value.parse()?) };
            spec.ports = if value == "none" { vec![] } else { vec![Port { name: Name::new("http")?, fixed }] };
            Ok(())
        },
    },
    Setting {
        key: "parallel",
        help: "slots between two releases at once: 1 unless said",
        set: |spec, value| {
            spec.update.parallel = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "deadline",
        help: "longest time without progress: `60s` unless said",
        set: |spec, value| {
            spec.update.deadline = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "min-ready",
        help: "a copy counts once ready for so long: `0s` unless said",
        set: |spec, value| {
            spec.update.min_ready = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "after",
        help: "workloads that must be ready before, by commas, or `none` (unless said)",
        set: |spec, value| {
            let names = value.split(',').filter(|name| *name != "none").map(Name::new);
            spec.update.after = names.collect::<Result<_, _>>()?;
            Ok(())
        },
    },
    Setting {
        key: "release-command",
        help: "the timeout of a command that runs once in each deployment, or `none` (unless said)",
        set: |spec, value| {
            let step = |timeout| ReleaseStep { run: Run::Argv(vec!["migrate".into()]), timeout };
            spec.update.release = if value == "none" { None } else { Some(step(value.parse()?)) };
            Ok(())
        },
    },
    Setting {
        key: "image",
        help: "of a container",
        set: |spec, value| {
            spec.driver = Driver::Container(Box::new(Container::of(value)));
            Ok(())
        },
    },
];

/// What a workload is unless the scenario says otherwise.
fn spec() -> WorkloadSpec {
    WorkloadSpec {
        kind: optimus_common::spec::Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec!["app".into()]),
        dir: None,
        env: BTreeMap::new(),
        user: None,
        copies: Some(1),
        ports: vec![],
        resources: Resources { cpu: Millicores(500), memory_request: Bytes(64 << 20), memory_limit: Bytes(1 << 30), pids: 100 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(60), reset_after: Span::secs(60) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(10) },
        update: Update { deadline: Span::secs(60), ..Update::default() },
        logs: Logs { size: Bytes(1 << 20) },
        secrets: vec![],
        secret_values: BTreeMap::new(),
        labels: BTreeMap::new(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}

pub(super) fn set_spec(world: &mut World, name: &str, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    set_workload(world.specs.entry(name.into()).or_insert_with(spec), settings)
}

pub(super) fn deploy(world: &mut World, names: &[&str]) -> anyhow::Result<Command> {
    let mut items = vec![];
    for name in names {
        let spec = Arc::new(world.specs.get(*name).with_context(|| format!("no spec of {name}"))?.clone());
        items.push(DeployItem { key: key(name)?, spec, source: None, deployment: DeploymentId(world.next_id()) });
    }
    Ok(Command::Deploy { items })
}

fn number_of(text: &str) -> u128 {
    text.bytes().fold(7, |sum: u128, b| sum.wrapping_mul(131).wrapping_add(u128::from(b)))
}
