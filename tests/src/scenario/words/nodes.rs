//! Hosts: joining, going down, coming back, leaving.

use anyhow::Context;
use optimus_common::join_token::Role;
use optimus_common::protocol::NodeFacts;
use optimus_common::{Bytes, Millicores, NodeId, Span, TokenId};
use optimus_core::scheduler;
use optimus_core::state::Command;
use uuid::Uuid;

use super::super::parse::same;
use super::super::world::World;
use super::{Kind, Setting, Vocabulary, Word, set_node};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: NODE, workload: &[] };

const WORDS: &[Word] = &[
    Word {
        pattern: "node NODE SETTINGS...",
        kind: Kind::Act,
        help: "a host joins and its agent connects: 4 cores, 8 GiB, ports 20000-20099 unless said otherwise",
        run: |world, args| add(world, args.get("NODE")?, &args.settings()?),
    },
    Word {
        pattern: "nodes PREFIX COUNT SETTINGS...",
        kind: Kind::Act,
        help: "COUNT hosts alike: PREFIX-1 to PREFIX-COUNT",
        run: |world, args| {
            for number in 1..=args.parse::<u32>("COUNT")? {
                add(world, &format!("{}-{number}", args.get("PREFIX")?), &args.settings()?)?;
            }
            Ok(())
        },
    },
    Word {
        pattern: "down NODE",
        kind: Kind::Act,
        help: "the node is lost: its lease has run out",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.ask(Command::NodeDown { node });
            Ok(())
        },
    },
    Word {
        pattern: "up NODE SETTINGS...",
        kind: Kind::Act,
        help: "its agent is connected again, perhaps with other facts",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            let mut facts = world.state.nodes.get(&node).context("no such node")?.facts.clone();
            set_node(&mut facts, &args.settings()?)?;
            world.ask(Command::NodeUp { node, facts });
            Ok(())
        },
    },
    Word {
        pattern: "remove-node NODE",
        kind: Kind::Act,
        help: "an operator revokes the node: its copies count as gone",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            world.ask(Command::RemoveNode { node });
            Ok(())
        },
    },
    Word {
        pattern: "NODE holds COUNT",
        kind: Kind::Check,
        help: "so many copies take room on the node",
        run: |world, args| {
            let node = world.node(args.get("NODE")?)?;
            same(&scheduler::taken(&world.state, node).copies.to_string(), args.get("COUNT")?)
        },
    },
    Word {
        pattern: "node NODE is PHASE",
        kind: Kind::Check,
        help: "`up`, `down` or `gone`; or `open`, `cordoned`, `draining` or `drained`",
        run: |world, args| {
            let row = world.state.nodes.get(&world.node(args.get("NODE")?)?);
            let found = match (args.get("PHASE")?, row) {
                (_, None) => "gone",
                ("up" | "down" | "gone", Some(row)) => {
                    if row.up {
                        "up"
                    } else {
                        "down"
                    }
                }
                (_, Some(row)) => match &row.drain {
                    Some(drain) if drain.done_at.is_some() => "drained",
                    Some(_) => "draining",
                    None if row.cordoned => "cordoned",
                    None => "open",
                },
            };
            same(found, args.get("PHASE")?)
        },
    },
];

const NODE: &[Setting<NodeFacts>] = &[
    Setting {
        key: "cpu",
        help: "cores: `4`, `0.5`",
        set: |facts, value| {
            facts.cpu = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "memory",
        help: "`8G`",
        set: |facts, value| {
            facts.memory = value.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "ports",
        help: "for copies: `20000-20009`",
        set: |facts, value| {
            let (first, last) = value.split_once('-').context("ports are written 20000-20009")?;
            facts.ports = (first.parse()?, last.parse()?);
            Ok(())
        },
    },
    Setting {
        key: "drivers",
        help: "`process,container` or `none`",
        set: |facts, value| {
            facts.drivers = value.split(',').filter(|d| *d != "none").map(str::to_owned).collect();
            Ok(())
        },
    },
    Setting {
        key: "labels",
        help: "`zone:a,disk:ssd`",
        set: |facts, value| {
            for label in value.split(',') {
                let (key, value) = label.split_once(':').context("labels are written zone:a,disk:ssd")?;
                facts.labels.insert(key.into(), value.into());
            }
            Ok(())
        },
    },
];

fn add(world: &mut World, name: &str, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut facts = NodeFacts {
        name: name.into(),
        cpu: Millicores(4000),
        memory: Bytes(8 << 30),
        drivers: vec!["process".into()],
        ports: (20_000, 20_099),
        address: "10.0.0.1".into(),
        ..NodeFacts::default()
    };
    set_node(&mut facts, settings)?;
    let number = world.nodes.len() as u128 + 1;
    let (node, token) = (NodeId(Uuid::from_u128(number)), TokenId(Uuid::from_u128(number)));
    let expires_at = world.now + Span::secs(60);
    world.apply(Command::CreateToken { id: token, secret_hash: vec![], expires_at, uses: 1, role: Role::Agent });
    let key_fingerprint = name.as_bytes().to_vec();
    world.apply(Command::AdmitNode { token, node, name: name.into(), key_fingerprint, certificate_expires_at: expires_at });
    world.nodes.insert(name.into(), node);
    world.ask(Command::NodeUp { node, facts });
    Ok(())
}
