//! What a spec asks of a node whatever runs there: its driver, architecture, pool and rules.

use std::borrow::Cow;
use std::collections::BTreeMap;

use optimus_common::codec;
use optimus_common::protocol::NodeFacts;
use optimus_common::reason::Refusal;
use optimus_common::spec::placement::architecture;
use optimus_common::spec::{Affinity, Attribute, Constraint, Driver, NodeField, Placement, WorkloadSpec};

use crate::state::{DEFAULT_POOL, Node};

/// The value a node has for an attribute.
pub fn value_of<'n>(node: &'n Node, attribute: &Attribute) -> Option<Cow<'n, str>> {
    let facts = &node.facts;
    let text = |text: &'n str| Some(Cow::Borrowed(text));
    match attribute {
        Attribute::Label(name) => node.labels.get(name).or_else(|| facts.labels.get(name)).map(|v| Cow::Borrowed(v.as_str())),
        Attribute::Attr(name) => match facts.attributes.get(name) {
            Some(value) => text(value),
            // Agents of before say these in fields of their own.
            None if name == "hostname" => text(&facts.name),
            None if name == "kernel.version" && !facts.kernel.is_empty() => text(&facts.kernel),
            None => None,
        },
        Attribute::Node(field) => match field {
            NodeField::Arch => (!facts.arch.is_empty()).then(|| Cow::Borrowed(architecture(&facts.arch))),
            NodeField::Name => text(&facts.name),
            NodeField::Id => Some(Cow::Owned(node.id.to_string())),
            NodeField::Pool => text(node.pool()),
            NodeField::Cgroup => text(&facts.cgroup),
            NodeField::Address => text(&facts.address),
            NodeField::Cpu => Some(Cow::Owned(facts.cpu.to_string())),
            NodeField::Memory => Some(Cow::Owned(facts.memory.0.to_string())),
            NodeField::Disk => Some(Cow::Owned(facts.disk.0.to_string())),
        },
    }
}

/// Whether a node meets a rule.
pub(crate) fn meets(node: &Node, rule: &Constraint) -> bool {
    let value = value_of(node, &rule.attribute);
    match &rule.test {
        // `arch = x86_64` means what `arch = amd64` does.
        optimus_common::spec::placement::Test::Equal(wanted) if rule.attribute == Attribute::Node(NodeField::Arch) => {
            value.as_deref() == Some(architecture(wanted))
        }
        test => test.holds(value.as_deref()),
    }
}

/// Everything about a node that no copy on it changes: one answer for a whole class of nodes, unless
/// [`looks_at_names`].
pub fn suits(node: &Node, spec: &WorkloadSpec) -> Result<(), Refusal> {
    let driver = match &spec.driver {
        Driver::Process => "process",
        Driver::Container { .. } => "container",
    };
    if !node.facts.drivers.iter().any(|d| d == driver) {
        return Err(Refusal::DriverMissing { driver: driver.into() });
    }
    let Placement { constraints, pool, arch, .. } = &spec.placement;
    let wanted = pool.as_ref().map_or(DEFAULT_POOL, |p| p.as_str());
    let found = node.pool();
    if wanted != found {
        return Err(Refusal::Pool { wanted: wanted.into(), found: found.into() });
    }
    let found = architecture(&node.facts.arch);
    if !arch.is_empty() && !arch.iter().any(|a| a == found) {
        return Err(Refusal::Architecture { wanted: arch.join(" or "), found: found.into() });
    }
    match constraints.iter().find(|rule| !meets(node, rule)) {
        Some(rule) => {
            let found = value_of(node, &rule.attribute).map(Cow::into_owned);
            Err(Refusal::Constraint { rule: rule.to_string(), found })
        }
        None => Ok(()),
    }
}

/// The sum of the weights of the wishes a node meets.
pub(crate) fn liking(node: &Node, wishes: &[Affinity]) -> i32 {
    wishes.iter().filter(|wish| meets(node, &wish.rule)).map(|wish| i32::from(wish.weight)).sum()
}

/// Whether a spec looks at what differs between the nodes of one class.
pub(crate) fn looks_at_names(spec: &WorkloadSpec) -> bool {
    let Placement { constraints, affinity, spread, .. } = &spec.placement;
    let own = |attribute: &Attribute| attribute.is_own();
    constraints.iter().any(|c| own(&c.attribute))
        || affinity.iter().any(|a| own(&a.rule.attribute))
        || spread.iter().any(|s| own(&s.attribute))
}

/// Nodes of one class give the same answers to everything in this file, but for their own names.
pub(crate) fn class_of(node: &Node) -> u128 {
    let NodeFacts { cpu, memory, arch, kernel, cgroup, drivers, attributes, disk, .. } = &node.facts;
    let attributes: BTreeMap<&String, &String> = attributes.iter().filter(|(name, _)| *name != "hostname").collect();
    let told_apart_by = (cpu, memory, arch, kernel, cgroup, drivers, node.labels(), attributes, node.pool(), disk);
    let hash = blake3::hash(&codec::to_msgpack(&told_apart_by));
    let mut first = [0; 16];
    first.copy_from_slice(&hash.as_bytes()[..16]);
    u128::from_be_bytes(first)
}
