//! Secrets, as far as the state knows them: sealed.

use anyhow::Context;
use optimus_common::WorkloadKey;
use optimus_core::state::{Command, SecretKey, Vault};

use super::super::parse::same;
use super::super::world::{World, key};
use super::{Kind, Setting, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary { words: WORDS, node: &[], workload: WORKLOAD };

fn secret(name: &str) -> anyhow::Result<SecretKey> {
    Ok(SecretKey::of(&key("any")?, name))
}

const WORDS: &[Word] = &[
    Word {
        pattern: "secret SECRET is set",
        kind: Kind::Act,
        help: "a new version of a secret of the environment",
        run: |world, args| {
            let vault = Vault { id: vec![1; 16], key_sealed: vec![1; 80] };
            world.ask(Command::SetSecret { key: secret(args.get("SECRET")?)?, sealed: vec![2; 100], vault });
            Ok(())
        },
    },
    Word {
        pattern: "secret SECRET is removed",
        kind: Kind::Act,
        help: "with all its versions",
        run: |world, args| {
            world.ask(Command::RemoveSecret { key: secret(args.get("SECRET")?)? });
            Ok(())
        },
    },
    Word {
        pattern: "copies of NAME have version NUMBER of SECRET",
        kind: Kind::Check,
        help: "all copies that should run were given it",
        run: |world: &mut World, args| {
            let (name, wanted): (WorkloadKey, u64) = (key(args.get("NAME")?)?, args.get("NUMBER")?.parse()?);
            let copies: Vec<_> = world.state.allocs_of(&name).filter(|a| a.run).collect();
            anyhow::ensure!(!copies.is_empty(), "no copy of {name} should run");
            for copy in copies {
                let release = world.state.release(&name, copy.release).context("no such release")?;
                let found = world.state.secret_of(release, args.get("SECRET")?).map_or(0, |(_, version)| version.number);
                same(&found.to_string(), &wanted.to_string())?;
            }
            Ok(())
        },
    },
];

const WORKLOAD: &[Setting<optimus_common::spec::WorkloadSpec>] = &[Setting {
    key: "secrets",
    help: "names of secrets, by commas, or `none` (unless said)",
    set: |spec, value| {
        spec.secrets = value.split(',').filter(|name| *name != "none").map(str::to_owned).collect();
        Ok(())
    },
}];
