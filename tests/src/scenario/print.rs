//! A played scenario as people read it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use optimus_common::Timestamp;
use optimus_common::api::v1::DeploymentPhase;
use optimus_core::state::{Alloc, Command, Plan, State};
use optimus_core::view;

use super::parse::{self, Mismatch, Section};
use super::world::{BEGAN, World};
use super::{Played, words};

/// Most changes shown of one line; the rest are counted.
const CHANGES_SHOWN: usize = 40;

/// Seconds since the scenario began: `+12s`.
pub fn clock(now: Timestamp) -> String {
    format!("+{}", now.since(BEGAN))
}

/// What differs between two states, a line each. Copies first, then what holds them, then what was decided about them.
pub fn changes(before: &State, after: &State) -> Vec<String> {
    let mut lines = vec![];
    for (id, node) in &after.nodes {
        let name = &node.facts.name;
        match before.nodes.get(id) {
            None => lines.push(format!("node {name}: {}", if node.up { "joined" } else { "admitted" })),
            Some(old) if old.up != node.up => lines.push(format!("node {name}: {}", if node.up { "up" } else { "down" })),
            Some(old) if old.facts != node.facts || old.cordoned != node.cordoned => lines.push(format!("node {name}: changed")),
            Some(_) => {}
        }
    }
    for node in before.nodes.iter().filter(|(id, _)| !after.nodes.contains_key(*id)) {
        lines.push(format!("node {}: gone", node.1.facts.name));
    }
    for (key, workload) in &after.workloads {
        let old = before.workloads.get(key);
        let name = &key.workload;
        let wanted = format!("release {}, {} copies", workload.release, workload.copies);
        match old {
            None => lines.push(format!("workload {name}: {wanted}")),
            Some(old) if (old.release, old.copies) != (workload.release, workload.copies) => {
                lines.push(format!("workload {name}: {wanted}"))
            }
            Some(_) => {}
        }
        if workload.stopped && old.is_none_or(|o| !o.stopped) {
            lines.push(format!("workload {name}: {}", if workload.removing { "is being removed" } else { "stopped" }));
        }
    }
    for (key, _) in before.workloads.iter().filter(|(key, _)| !after.workloads.contains_key(*key)) {
        lines.push(format!("workload {}: gone", key.workload));
    }
    for (id, deployment) in &after.deployments {
        if before.deployments.get(id).is_none_or(|old| old.phase != deployment.phase) {
            let why = deployment.reason.as_ref().map_or_else(String::new, |r| format!(": {r}"));
            let phase = words::phase_name(deployment.phase);
            lines.push(format!("deployment of {} to release {}: {phase}{why}", deployment.key.workload, deployment.release));
        }
    }
    copies(before, after, &mut lines);
    lines
}

fn copies(before: &State, after: &State, lines: &mut Vec<String>) {
    for (id, alloc) in &after.allocs {
        let what = describe(after, alloc);
        match before.allocs.get(id) {
            None => lines.push(format!("  + {what}{}", if alloc.status.is_some() { format!(": {}", fate(alloc)) } else { String::new() })),
            Some(old) => {
                if old.run && !alloc.run {
                    let why = alloc.stop_reason.as_ref().map_or_else(String::new, |r| format!(": {r}"));
                    lines.push(format!("  - {what}: told to stop{why}"));
                }
                if (old.phase(), old.is_ready()) != (alloc.phase(), alloc.is_ready()) {
                    lines.push(format!("    {what}: {}", fate(alloc)));
                }
            }
        }
    }
    for (_, alloc) in before.allocs.iter().filter(|(id, _)| !after.allocs.contains_key(*id)) {
        lines.push(format!("    {}: forgotten", describe(before, alloc)));
    }
}

fn describe(state: &State, alloc: &Alloc) -> String {
    let node = state.nodes.get(&alloc.node).map_or_else(|| "a node that is gone".to_owned(), |n| n.facts.name.clone());
    format!("{} r{} on {node}", alloc.name(), alloc.release)
}

fn fate(alloc: &Alloc) -> String {
    let phase = format!("{:?}", alloc.phase()).to_lowercase();
    let ready = if alloc.is_ready() { ", ready" } else { "" };
    let why = alloc.status.as_ref().and_then(|s| s.reason.as_ref()).map_or_else(String::new, |r| format!(": {r}"));
    format!("{phase}{ready}{why}")
}

/// A command in a few words.
pub fn command(command: &Command) -> String {
    match command {
        Command::Plan(Plan { place, stop, forget, .. }) => {
            format!("the leader plans: {} to place, {} to stop, {} to forget", place.len(), stop.len(), forget.len())
        }
        Command::Report { statuses, gone, .. } => format!("an agent reports: {} changed, {} gone", statuses.len(), gone.len()),
        other => {
            let text = format!("{other:?}");
            text.chars().take_while(|c| c.is_alphanumeric()).collect()
        }
    }
}

/// The state as a table: nodes, workloads and every copy.
pub fn table(world: &World) -> String {
    let (state, mut text) = (&world.state, String::new());
    let _ = writeln!(text, "  the state at {} (index {}):", clock(world.now), state.index);
    for node in state.nodes.values() {
        let shown = view::node(state, node, world.now);
        let _ = writeln!(
            text,
            "    node {:12} {:5} cpu {} of {}, memory {} of {}, {} copies",
            shown.name,
            format!("{:?}", shown.phase).to_lowercase(),
            shown.cpu_reserved,
            shown.cpu,
            shown.memory_reserved.human(),
            shown.memory.human(),
            shown.copies
        );
    }
    for workload in state.workloads.values() {
        let shown = view::workload(state, workload, world.now);
        let why = shown.reason.map_or_else(String::new, |r| format!(": {}", r.message));
        let phase = format!("{:?}", shown.phase).to_lowercase();
        let _ = writeln!(
            text,
            "    workload {}: release {}, {} of {} ready, {phase}{why}",
            workload.key.workload, workload.release, shown.copies_ready, shown.copies_wanted
        );
        let deployment = workload.deployment.and_then(|id| state.deployments.get(&id));
        if let Some(deployment) = deployment.filter(|d| d.phase != DeploymentPhase::Succeeded) {
            let why = view::deployment(state, deployment).reason.map_or_else(String::new, |r| format!(": {}", r.message));
            let _ = writeln!(text, "      deployment to release {}: {}{why}", deployment.release, words::phase_name(deployment.phase));
        }
        let mut slots: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for alloc in state.allocs_of(&workload.key) {
            let wish = if alloc.run { "should run" } else { "should not run" };
            slots.entry(alloc.index).or_default().push(format!("{}: {wish}, {}", describe(state, alloc), fate(alloc)));
        }
        for copy in slots.into_values().flatten() {
            let _ = writeln!(text, "      {copy}");
        }
    }
    text
}

/// The whole run: each line with what it changed; of a failure what was expected, what was found, and the state.
pub fn print(name: &str, text: &str, played: &Played) -> String {
    let mut out = String::new();
    let title = parse::title(text).map_or_else(String::new, |t| format!(": {t}"));
    let _ = writeln!(out, "{name}{title}");
    let mut section = None;
    let failed_at = played.failure.as_ref().and_then(|f| f.line.as_ref()).map(|(number, _)| *number);
    for step in &played.steps {
        if step.section != section {
            section = step.section;
            if let Some(section) = section {
                let _ = writeln!(out, "{section}");
            }
        }
        let mark = match (failed_at == Some(step.line), step.section) {
            (true, _) => "FAILED",
            (false, Some(Section::Then)) => "    ok",
            _ => "      ",
        };
        let _ = writeln!(out, "{mark} {:4}  {}", step.line, step.text);
        let shown = if step.trace.is_empty() { &step.changes } else { &step.trace };
        let most = if step.trace.is_empty() { CHANGES_SHOWN } else { usize::MAX };
        for change in shown.iter().take(most) {
            let _ = writeln!(out, "                {change}");
        }
        if shown.len() > most {
            let _ = writeln!(out, "                and {} more (--trace shows all)", shown.len() - most);
        }
    }
    match &played.failure {
        None => {
            let _ = writeln!(out, "passed: {} lines, {} decisions of the leader", played.steps.len(), played.world.decisions);
        }
        Some(failure) => {
            match &failure.line {
                Some((number, line)) => writeln!(out, "\nfailed at line {number}: {line}"),
                None => writeln!(out, "\nfailed as a whole"),
            }
            .unwrap_or_default();
            match failure.error.downcast_ref::<Mismatch>() {
                Some(Mismatch { found, expected, contained }) => {
                    let how = if *contained { "expected it to say" } else { "expected" };
                    let _ = writeln!(out, "  {how:18}  {expected}\n  {:18}  {found}", "found");
                }
                None => {
                    let _ = writeln!(out, "  {:#}", failure.error);
                }
            }
            out.push_str(&table(&played.world));
        }
    }
    out
}
