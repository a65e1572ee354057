//! Deployments: their phase and why.

use anyhow::Context;
use optimus_common::api::v1::{Deployment, DeploymentPhase};
use optimus_core::view;

use super::super::parse::{same, says};
use super::super::world::{World, key};
use super::{Kind, Vocabulary, Word};

pub const VOCABULARY: Vocabulary = Vocabulary::words(&[
    Word {
        pattern: "deployment of NAME PHASE",
        kind: Kind::Check,
        help: "of the newest one: `running`, `succeeded`, `failed`, `rolling-back`, `rolled-back`, `superseded`",
        run: |world, args| match (deployment(world, args.get("NAME")?)?.phase, args.get("PHASE")?) {
            // Any phase on its way forward.
            (phase, "running") if phase.is_forward() => Ok(()),
            (phase, wanted) => same(&phase_name(phase), wanted),
        },
    },
    Word {
        pattern: "deployment of NAME says \"TEXT\"",
        kind: Kind::Check,
        help: "why it ended so, or what it waits for",
        run: |world, args| {
            let reason = deployment(world, args.get("NAME")?)?.reason.map_or_else(String::new, |r| r.message);
            says(&reason, args.get("TEXT")?)
        },
    },
    Word {
        pattern: "deployments of NAME PHASES...",
        kind: Kind::Check,
        help: "the phases of all that are kept, oldest first",
        run: |world, args| {
            let key = key(args.get("NAME")?)?;
            let mut rows: Vec<_> = world.state.deployments.values().filter(|d| d.key == key).collect();
            rows.sort_by_key(|d| (d.created_at, d.release, d.id));
            let found: Vec<String> = rows.iter().map(|d| phase_name(d.phase)).collect();
            same(&found.join(" "), &args.rest().join(" "))
        },
    },
]);

fn deployment(world: &World, name: &str) -> anyhow::Result<Deployment> {
    let row = world.state.workload(&key(name)?).context("no such workload")?;
    let row = row.deployment.and_then(|id| world.state.deployments.get(&id)).context("it has no deployment")?;
    Ok(view::deployment(&world.state, row))
}

pub fn phase_name(phase: DeploymentPhase) -> String {
    match phase {
        DeploymentPhase::RollingBack => "rolling-back".into(),
        DeploymentPhase::Succeeded => "succeeded".into(),
        DeploymentPhase::RolledBack => "rolled-back".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}
