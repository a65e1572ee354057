//! What nodes and copies use, for Prometheus: `/federate?match[]=...`.
//!
//! Values carry the time their agent measured them. A value too old is not given (Prometheus would take it for fresh),
//! and a node whose values are missing is said to be: `optimus_node_measured` is 0.

pub mod selector;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use optimus_common::{Figures, NodeId};
use optimus_core::state::State;

pub use selector::{Selector, SelectorError};

use crate::agent_calls::NodeUsage;

/// Values older than this are not given.
pub const FRESH: Duration = Duration::from_secs(35);
/// Most series of one answer.
pub const SERIES_MAX: usize = 50_000;

/// More series than [`SERIES_MAX`] are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {SERIES_MAX} series match; ask in parts, for example by match[]={{project=\"...\"}} or match[]={{node=~\"a.*\"}}")]
pub struct TooMany;

enum Kind {
    Counter,
    Gauge,
}

struct Family {
    /// After `optimus_node_` or `optimus_allocation_`.
    name: &'static str,
    help: &'static str,
    kind: Kind,
    /// What one unit of the figure is in the family's unit.
    scale: f64,
    value: fn(&Figures) -> Option<u64>,
}

const MICRO: f64 = 1e-6;

const FAMILIES: &[Family] = &[
    family("cpu_seconds_total", "CPU time used.", Kind::Counter, MICRO, |f| f.cpu_usec),
    family("cpu_throttled_seconds_total", "Time held back by the CPU limit.", Kind::Counter, MICRO, |f| f.throttled_usec),
    family("memory_bytes", "Memory charged, with the file cache.", Kind::Gauge, 1.0, |f| f.memory),
    family("memory_working_set_bytes", "Memory that cannot be taken back without harm.", Kind::Gauge, 1.0, Figures::memory_working),
    family("memory_peak_bytes", "The most memory charged at once.", Kind::Gauge, 1.0, |f| f.memory_peak),
    family("oom_kills_total", "Processes killed for want of memory.", Kind::Counter, 1.0, |f| f.oom_kills),
    family("pids", "Processes and threads.", Kind::Gauge, 1.0, |f| f.pids),
    family("open_files", "Open files.", Kind::Gauge, 1.0, |f| f.fds),
    family("io_read_bytes_total", "Bytes read from disks.", Kind::Counter, 1.0, |f| f.io_read),
    family("io_written_bytes_total", "Bytes written to disks.", Kind::Counter, 1.0, |f| f.io_write),
    family("network_received_bytes_total", "Bytes received from other hosts.", Kind::Counter, 1.0, |f| f.net_receive),
    family("network_transmitted_bytes_total", "Bytes sent to other hosts.", Kind::Counter, 1.0, |f| f.net_transmit),
    family("pressure_cpu_seconds_total", "Time some process waited for CPU.", Kind::Counter, MICRO, |f| f.pressure_cpu),
    family("pressure_memory_seconds_total", "Time some process waited for memory.", Kind::Counter, MICRO, |f| f.pressure_memory),
    family("pressure_io_seconds_total", "Time some process waited for disks.", Kind::Counter, MICRO, |f| f.pressure_io),
    family("load1", "Load average of one minute.", Kind::Gauge, 0.01, |f| f.load),
    family("disk_used_bytes", "Used on the file system of the agent's data.", Kind::Gauge, 1.0, |f| f.disk),
    family("disk_free_bytes", "Left on the file system of the agent's data.", Kind::Gauge, 1.0, |f| f.disk_free),
];

const fn family(name: &'static str, help: &'static str, kind: Kind, scale: f64, value: fn(&Figures) -> Option<u64>) -> Family {
    Family { name, help, kind, scale, value }
}

/// Labels in the order they are written.
type Labels<'a> = Vec<(&'a str, &'a str)>;

/// The text of every series that one of `selectors` asks for.
pub fn render(state: &State, usages: &[(NodeId, NodeUsage)], now: Duration, selectors: &[Selector]) -> Result<String, TooMany> {
    let usages: BTreeMap<NodeId, &NodeUsage> = usages.iter().map(|(id, usage)| (*id, usage)).collect();
    let fresh = |id: &NodeId| usages.get(id).copied().filter(|usage| now.saturating_sub(usage.came) <= FRESH);
    let mut out = Text { selectors, text: String::new(), series: 0 };
    out.family("optimus_node_measured", "Whether what the node uses is known here.", &Kind::Gauge, |put| {
        for node in state.nodes.values() {
            put(&vec![("node", node.facts.name.as_str())], f64::from(u8::from(fresh(&node.id).is_some())), None)?;
        }
        Ok(())
    })?;
    let nodes: Vec<_> = state.nodes.values().filter_map(|node| Some((node, fresh(&node.id)?))).collect();
    for family in FAMILIES {
        out.family(&format!("optimus_node_{}", family.name), family.help, &family.kind, |put| {
            for (node, usage) in &nodes {
                if let Some(value) = (family.value)(&usage.host.figures) {
                    put(&vec![("node", node.facts.name.as_str())], value as f64 * family.scale, Some(usage.at.0))?;
                }
            }
            Ok(())
        })?;
    }
    for family in FAMILIES {
        out.family(&format!("optimus_allocation_{}", family.name), family.help, &family.kind, |put| {
            for (node, usage) in &nodes {
                for (id, measured) in &usage.allocs {
                    // One the state does not know is about to be forgotten by its agent too.
                    let (Some(value), Some(alloc)) = ((family.value)(&measured.figures), state.allocs.get(id)) else { continue };
                    let name = alloc.name();
                    let labels = vec![
                        ("node", node.facts.name.as_str()),
                        ("project", alloc.key.project.as_str()),
                        ("environment", alloc.key.environment.as_str()),
                        ("workload", alloc.key.workload.as_str()),
                        ("allocation", name.as_str()),
                    ];
                    put(&labels, value as f64 * family.scale, Some(usage.at.0))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(out.text)
}

struct Text<'a> {
    selectors: &'a [Selector],
    text: String,
    series: usize,
}

impl Text<'_> {
    /// Writes a family's series, and its head before the first.
    fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: &Kind,
        fill: impl FnOnce(&mut dyn FnMut(&Labels<'_>, f64, Option<u64>) -> Result<(), TooMany>) -> Result<(), TooMany>,
    ) -> Result<(), TooMany> {
        let mut begun = false;
        let Text { selectors, text, series } = self;
        fill(&mut |labels, value, at| {
            if !selectors.iter().any(|selector| selector.matches(name, labels)) {
                return Ok(());
            }
            *series += 1;
            if *series > SERIES_MAX {
                return Err(TooMany);
            }
            if !std::mem::replace(&mut begun, true) {
                let kind = match kind {
                    Kind::Counter => "counter",
                    Kind::Gauge => "gauge",
                };
                let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}"); // a String takes everything
            }
            text.push_str(name);
            for (n, (label, value)) in labels.iter().enumerate() {
                let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _ = write!(text, "{}{label}=\"{escaped}\"", if n == 0 { '{' } else { ',' });
            }
            let _ = match at {
                Some(at) => writeln!(text, "}} {value} {at}"),
                None => writeln!(text, "}} {value}"),
            };
            Ok(())
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use optimus_common::protocol::NodeFacts;
    use optimus_common::{AllocId, Timestamp};
    use optimus_core::state::{Alloc, Node};
    use uuid::Uuid;

    use super::*;
    use crate::agent_calls::Measured;

    /// A row with what tests care for; the rest is as when a field is new.
    fn row<T: serde::de::DeserializeOwned>(fields: serde_json::Value) -> Arc<T> {
        Arc::new(serde_json::from_value(fields).unwrap())
    }

    fn node(n: u128, name: &str) -> (NodeId, Arc<Node>) {
        let id = NodeId(Uuid::from_u128(n));
        let facts = NodeFacts { name: name.into(), ..NodeFacts::default() };
        let at = Timestamp(0);
        let fields = serde_json::json!({ "id": id, "facts": facts, "joined_at": at, "up": true, "changed_at": at,
            "certificate_expires_at": at, "key_fingerprint": [] });
        (id, row(fields))
    }

    fn usage(came: u64, copies: u128) -> NodeUsage {
        let measured = |figures| Measured { figures, cpu: None };
        let host = measured(Figures { cpu_usec: Some(1_500_000), memory: Some(4096), ..Figures::default() });
        let allocs =
            (0..copies).map(|n| (AllocId(Uuid::from_u128(100 + n)), measured(Figures { pids: Some(2), ..Figures::default() }))).collect();
        NodeUsage { at: Timestamp(7000), came: Duration::from_secs(came), host, allocs }
    }

    fn state() -> State {
        let mut state = State::default();
        state.nodes = [node(1, "db-1"), node(2, "web \"2\""), node(3, "new")].into_iter().collect();
        let alloc: Arc<Alloc> = row(serde_json::json!({ "id": Uuid::from_u128(100), "node": Uuid::from_u128(1), "index": 4, "release": 1,
            "key": { "project": "shop", "environment": "prod", "workload": "web" },
            "ports": [], "run": true, "created_at": Timestamp(0) }));
        state.allocs.insert(alloc.id, alloc);
        state
    }

    fn selectors(texts: &[&str]) -> Vec<Selector> {
        texts.iter().map(|t| Selector::parse(t).unwrap()).collect()
    }

    #[test]
    fn series_carry_their_labels_and_their_time_and_the_stale_are_missing() {
        let usages = [(NodeId(Uuid::from_u128(1)), usage(95, 2)), (NodeId(Uuid::from_u128(2)), usage(10, 0))];
        let asked = selectors(&[r#"{__name__=~"optimus_node_(measured|cpu.*)"}"#, "optimus_allocation_pids"]);
        let text = render(&state(), &usages, Duration::from_secs(100), &asked).unwrap();
        insta::assert_snapshot!(text, @r##"
        # HELP optimus_node_measured Whether what the node uses is known here.
        # TYPE optimus_node_measured gauge
        optimus_node_measured{node="db-1"} 1
        optimus_node_measured{node="web \"2\""} 0
        optimus_node_measured{node="new"} 0
        # HELP optimus_node_cpu_seconds_total CPU time used.
        # TYPE optimus_node_cpu_seconds_total counter
        optimus_node_cpu_seconds_total{node="db-1"} 1.5 7000
        # HELP optimus_allocation_pids Processes and threads.
        # TYPE optimus_allocation_pids gauge
        optimus_allocation_pids{node="db-1",project="shop",environment="prod",workload="web",allocation="web-4"} 2 7000
        "##);
        let of_shop = render(&state(), &usages, Duration::from_secs(100), &selectors(&[r#"{project="shop"}"#])).unwrap();
        assert_eq!(of_shop.lines().filter(|l| !l.starts_with('#')).count(), 1);
    }

    #[test]
    fn too_many_series_are_refused() {
        let mut state = state();
        let alloc = state.allocs.values().next().unwrap().clone();
        let many = SERIES_MAX as u128 + 1;
        state.allocs = (0..many).map(|n| (AllocId(Uuid::from_u128(100 + n)), alloc.clone())).collect();
        let usages = [(NodeId(Uuid::from_u128(1)), usage(100, many))];
        assert_eq!(render(&state, &usages, Duration::from_secs(100), &selectors(&[r#"{project="shop"}"#])), Err(TooMany));
    }
}
