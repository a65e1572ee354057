//! What a user's command was answered.

use anyhow::{Context, bail};
use optimus_core::state::Applied;

use super::super::parse::{same, says};
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "answer is WHAT",
        kind: Kind::Check,
        help: "to the newest command: `done`, `unchanged`, `deployed` or `refused`",
        run: |world, args| {
            let found = match world.answer.as_ref().context("nothing was asked")? {
                Applied::Done { .. } => "done",
                Applied::Unchanged { .. } => "unchanged",
                Applied::Deployed { deployments, .. } if deployments.is_empty() => "unchanged",
                Applied::Deployed { .. } => "deployed",
                Applied::Refused(_) => "refused",
            };
            same(found, args.get("WHAT")?)
        },
    },
    Word {
        pattern: "answer says \"TEXT\"",
        kind: Kind::Check,
        help: "why it was refused",
        run: |world, args| match &world.answer {
            Some(Applied::Refused(refusal)) => says(&refusal.to_string(), args.get("TEXT")?),
            other => bail!("it was not refused: {other:?}"),
        },
    },
]);
