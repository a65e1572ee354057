//! What workloads ask of nodes, what nodes have, and what operators set of both: quotas, pools, volumes.

use anyhow::{Context, bail};
use optimus_common::protocol::{DeviceGroup, NodeFacts};
use optimus_common::spec::{Placement, WorkloadSpec};
use optimus_common::{Name, Reason};
use optimus_core::scheduler;
use optimus_core::state::{Command, Layout, NodeChange, Pool, Quota, QuotaKey, Volume, VolumeKey};

use super::super::parse::{same, says};
use super::super::world::{World, key};
use super::{Kind, Setting, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: NODE, workload: WORKLOAD };

const WORDS: &[Word] = &[
    Word {
        pattern: "label NODE SETTINGS...",
        kind: Kind::Act,
        help: "an operator labels a node: `zone=a`; `zone=none` takes the label away",
        run: |world, args| {
            let labels = args.settings()?.into_iter().map(|(k, v)| (k.to_owned(), (v != "none").then(|| v.to_owned()))).collect();
            let node = world.node(args.get("NODE")?)?;
            world.ask(Command::ChangeNode { node, change: NodeChange::Labels(labels) });
            Ok(())
        },
    },
    Word {
        pattern: "move NODE to pool POOL",
        kind: Kind::Act,
        help: "an operator puts a node into a pool; `default` takes it out",
        run: |world, args| {
            let (node, pool) = (world.node(args.get("NODE")?)?, Name::new(args.get("POOL")?)?);
            let pool = (pool.as_str() != "default").then_some(pool);
            world.ask(Command::ChangeNode { node, change: NodeChange::Pool(pool) });
            Ok(())
        },
    },
    Word {
        pattern: "pool POOL is LAYOUT",
        kind: Kind::Act,
        help: "`packed` or `spread`: how copies are laid out over its nodes",
        run: |world, args| {
            let layout = match args.get("LAYOUT")? {
                "packed" => Layout::BinPack,
                "spread" => Layout::Spread,
                other => bail!("no layout `{other}`"),
            };
            world.ask(Command::SetPool { pool: Pool { name: Name::new(args.get("POOL")?)?, layout } });
            Ok(())
        },
    },
    Word {
        pattern: "quota of SCOPE SETTINGS...",
        kind: Kind::Act,
        help: "`project` or `environment`: `cpu=4`, `memory=8G`, `disk=`, `copies=`, `devices=`",
        run: |world, args| {
            let mut quota = Quota::default();
            for (what, value) in args.settings()? {
                match what {
                    "cpu" => quota.cpu = Some(value.parse()?),
                    "memory" => quota.memory = Some(value.parse()?),
                    "disk" => quota.disk = Some(value.parse()?),
                    "copies" => quota.copies = Some(value.parse()?),
                    "devices" => quota.devices = Some(value.parse()?),
                    other => bail!("a quota has no `{other}`"),
                }
            }
            world.ask(Command::SetQuota { key: scope(args.get("SCOPE")?)?, quota });
            Ok(())
        },
    },
    Word {
        pattern: "no quota of SCOPE",
        kind: Kind::Act,
        help: "takes the quota of the `project` or `environment` away",
        run: |world, args| {
            world.ask(Command::RemoveQuota { key: scope(args.get("SCOPE")?)? });
            Ok(())
        },
    },
    Word {
        pattern: "volume VOLUME is on NODE",
        kind: Kind::Act,
        help: "a volume exists there from now on",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.ask(Command::SetVolume { volume: Volume { key: volume(args.get("VOLUME")?)?, node } });
            Ok(())
        },
    },
    Word {
        pattern: "node NODE refuses NAME \"TEXT\"",
        kind: Kind::Check,
        help: "why one copy more could not run there",
        run: |world, args| {
            let judged = judged(world, args.get("NAME")?, args.get("NODE")?)?;
            match judged.verdict {
                Err(refusal) => says(&refusal.to_string(), args.get("TEXT")?),
                Ok(_) => bail!("it does not refuse it"),
            }
        },
    },
    Word {
        pattern: "node NODE suits NAME",
        kind: Kind::Check,
        help: "one copy more could run there",
        run: |world, args| match judged(world, args.get("NAME")?, args.get("NODE")?)?.verdict {
            Ok(_) => Ok(()),
            Err(refusal) => bail!("it refuses it: {refusal}"),
        },
    },
    Word {
        pattern: "best node for NAME is NODE",
        kind: Kind::Check,
        help: "where the next copy would go",
        run: |world, args| {
            let key = key(args.get("NAME")?)?;
            let spec = newest_spec(world, args.get("NAME")?)?;
            let first = scheduler::judge(&world.state, &key, &spec, world.now).into_iter().next().context("there are no nodes")?;
            same(&first.name, args.get("NODE")?)
        },
    },
    Word {
        pattern: "preempted COUNT of NAME",
        kind: Kind::Check,
        help: "so many records of its copies say that they gave way to something more important",
        run: |world, args| {
            let of = key(args.get("NAME")?)?;
            let gave_way = world.state.allocs_of(&of).filter(|a| matches!(a.stop_reason, Some(Reason::Preempted { .. })));
            same(&gave_way.count().to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "zone ZONE has COUNT of NAME",
        kind: Kind::Check,
        help: "copies that should run on nodes with the label `zone:ZONE`",
        run: |world, args| {
            let in_zone = |node| {
                let row = world.state.nodes.get(&node);
                row.and_then(|n| n.facts.labels.get("zone")).is_some_and(|zone| args.get("ZONE").is_ok_and(|wanted| wanted == zone))
            };
            let count = world.running(args.get("NAME")?)?.iter().filter(|a| in_zone(a.node)).count();
            same(&count.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "copy SLOT has devices IDS...",
        kind: Kind::Check,
        help: "the ids of the devices that are its own, in their order, or `none`",
        run: |world, args| {
            let alloc = world.copy_in(args.get("SLOT")?)?;
            let mut found: Vec<&str> = alloc.devices.iter().map(|d| d.1.as_str()).collect();
            found.sort_unstable();
            let wanted: Vec<&str> = args.rest().iter().map(String::as_str).filter(|w| *w != "none").collect();
            same(&found.join(" "), &wanted.join(" "))
        },
    },
];

const NODE: &[Setting<NodeFacts>] = &[
    Setting {
        key: "disk",
        help: "for workloads: `100G`",
        set: |facts, value| {
            facts.disk = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "arch",
        help: "`amd64`",
        set: |facts, value| {
            facts.arch = value.into();
            Ok(())
        },
    },
    Setting {
        key: "pool",
        help: "`gpu`: what the node itself says",
        set: |facts, value| {
            facts.pool = Some(Name::new(value)?);
            Ok(())
        },
    },
    Setting {
        key: "attr",
        help: "found out by its agent: `kernel.version:6.1;os.name:debian`",
        set: |facts, value| {
            for attribute in value.split(';') {
                let (key, value) = attribute.split_once(':').context("attributes are written os.name:debian")?;
                facts.attributes.insert(key.into(), value.into());
            }
            Ok(())
        },
    },
    Setting {
        key: "reserve-cpu",
        help: "cores kept for the host itself",
        set: |facts, value| {
            facts.reserved.cpu = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "reserve-memory",
        help: "kept for the host itself",
        set: |facts, value| {
            facts.reserved.memory = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "load",
        help: "how busy its CPUs are, in thousandths: `750`",
        set: |facts, value| {
            facts.load = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "devices",
        help: "`nvidia/gpu/a100/memory:40G/g0,g1`: vendor, type, name, one attribute, ids; more after `;`",
        set: |facts, value| {
            for group in value.split(';') {
                let parts: Vec<&str> = group.split('/').collect();
                let [vendor, kind, name, attribute, ids] = parts[..] else { bail!("`{group}` has not five parts") };
                let (key, value) = attribute.split_once(':').context("an attribute is written memory:40G")?;
                facts.devices.push(DeviceGroup {
                    vendor: vendor.into(),
                    kind: kind.into(),
                    name: name.into(),
                    ids: ids.split(',').map(str::to_owned).collect(),
                    paths: Default::default(),
                    attributes: [(key.to_owned(), value.to_owned())].into(),
                });
            }
            Ok(())
        },
    },
];

const WORKLOAD: &[Setting<WorkloadSpec>] = &[
    Setting {
        key: "constraint",
        help: "`label.zone_=_a`, with `_` for spaces; each adds one, `none` takes all away",
        set: |spec, value| add(&mut spec.placement.constraints, value),
    },
    Setting { key: "affinity", help: "`+50_label.disk_=_ssd`; likewise", set: |spec, value| add(&mut spec.placement.affinity, value) },
    Setting {
        key: "spread",
        help: "`label.zone` or `label.zone_a_70%,_b_30%`; likewise",
        set: |spec, value| add(&mut spec.placement.spread, value),
    },
    Setting {
        key: "device",
        help: "`2_nvidia/gpu_where_memory_>=_16G`; likewise",
        set: |spec, value| add(&mut spec.placement.devices, value),
    },
    Setting {
        key: "away-from",
        help: "a workload whose copies it keeps away from where it can; likewise",
        set: |spec, value| add(&mut spec.placement.anti_affinity, value),
    },
    Setting { key: "volume", help: "the name of one that exists; likewise", set: |spec, value| add(&mut spec.placement.volumes, value) },
    Setting {
        key: "distinct-hosts",
        help: "`yes`: at most one copy on a node",
        set: |spec, value| {
            spec.placement.distinct_hosts = value == "yes";
            Ok(())
        },
    },
    Setting {
        key: "pool",
        help: "the pool of nodes to run in",
        set: |spec, value| {
            spec.placement.pool = Some(Name::new(value)?);
            Ok(())
        },
    },
    Setting {
        key: "priority",
        help: "0 to 100: 50 unless said",
        set: |spec, value| {
            spec.placement.priority = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "disk",
        help: "reserved on the node",
        set: |spec, value| {
            spec.placement.disk = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "arch",
        help: "architectures it was built for, by commas",
        set: |spec, value| {
            spec.placement.arch = value.split(',').map(str::to_owned).collect();
            Ok(())
        },
    },
    Setting {
        key: "placement",
        help: "`none` forgets all that was asked of nodes",
        set: |spec, value| {
            anyhow::ensure!(value == "none", "only `none` can be said");
            spec.placement = Placement::default();
            Ok(())
        },
    },
];

/// Adds what a text says to a list, or empties the list.
fn add<T: std::str::FromStr<Err: std::fmt::Display>>(list: &mut Vec<T>, text: &str) -> anyhow::Result<()> {
    if text == "none" {
        list.clear();
        return Ok(());
    }
    list.push(text.replace('_', " ").parse().map_err(|e: T::Err| anyhow::anyhow!("{e}"))?);
    Ok(())
}

fn scope(text: &str) -> anyhow::Result<QuotaKey> {
    let of = key("any")?;
    match text {
        "project" => Ok(QuotaKey { project: of.project, environment: None }),
        "environment" => Ok(QuotaKey { project: of.project, environment: Some(of.environment) }),
        other => bail!("a quota is of the `project` or the `environment`, not of `{other}`"),
    }
}

fn volume(name: &str) -> anyhow::Result<VolumeKey> {
    let of = key("any")?;
    Ok(VolumeKey { project: of.project, environment: of.environment, name: Name::new(name)? })
}

fn newest_spec(world: &World, name: &str) -> anyhow::Result<std::sync::Arc<WorkloadSpec>> {
    let key = key(name)?;
    let row = world.state.workload(&key).context("no such workload")?;
    Ok(world.state.release(&key, row.release).context("it has no release")?.spec.clone())
}

fn judged(world: &World, name: &str, node: &str) -> anyhow::Result<scheduler::Judged> {
    let spec = newest_spec(world, name)?;
    let node = world.node(node)?;
    let all = scheduler::judge(&world.state, &key(name)?, &spec, world.now);
    all.into_iter().find(|j| j.node == node).context("nobody judged the node")
}
