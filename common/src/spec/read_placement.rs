//! Reads what a workload asks of its nodes.

use std::fmt::Display;
use std::str::FromStr;

use super::error::{SpecError, nearest, parse, printable};
use super::node::{Node, Value};
use super::placement::{PRIORITY, Placement, RuleError, VolumeMount, VolumeUse, architecture};
use super::read::{Fields, Reader};
use crate::ids::Name;

/// Architectures we know the names of.
const ARCHITECTURES: [&str; 8] = ["amd64", "arm64", "arm", "386", "riscv64", "ppc64le", "s390x", "loongarch64"];

impl Reader<'_> {
    pub fn placement(&mut self, f: &Fields<'_>) -> Placement {
        let uses: Vec<VolumeUse> = self.rules("volumes", f);
        let mount = |used: &VolumeUse| Some(VolumeMount { volume: used.name.clone(), path: used.path.clone()? });
        Placement {
            constraints: self.rules("constraints", f),
            affinity: self.rules("affinity", f),
            anti_affinity: self.names("anti_affinity", f),
            spread: self.rules("spread", f),
            distinct_hosts: f.get("distinct_hosts").is_some_and(|n| self.yes("distinct_hosts", n)),
            pool: f.get("pool").and_then(|n| self.name("pool", n)),
            priority: f.get("priority").and_then(|n| self.integer("priority", n, 0, 100)).map_or(PRIORITY, |n| n as u8),
            disk: f.get("disk").and_then(|n| self.size("disk", n)).unwrap_or_default(),
            devices: self.rules("devices", f),
            given: vec![],
            mounts: uses.iter().filter_map(mount).collect(),
            volumes: uses.into_iter().map(|used| used.name).collect(),
            arch: self.architectures(f),
        }
    }

    fn yes(&mut self, key: &str, node: &Node) -> bool {
        if let Value::Bool(value) = node.value {
            return value;
        }
        let message = format!("`{key}` must be true or false, not {}", node.value.kind());
        let error = self.error(&node.span, Some(key), message);
        error.hint = matches!(&node.value, Value::Text(t) if t == "true" || t == "false").then(|| "write it without quotes".into());
        false
    }

    /// The texts of a list; one text stands for a list of it.
    fn lines<'n>(&mut self, key: &str, f: &Fields<'n>) -> Vec<(&'n Node, String, String)> {
        let Some(node) = f.get(key) else { return vec![] };
        let items: Vec<(String, &Node)> = match &node.value {
            Value::List(items) => items.iter().enumerate().map(|(n, item)| (n.to_string(), item)).collect(),
            Value::Text(_) => vec![("0".into(), node)],
            other => {
                let message = format!("`{key}` must be a list of text, not {}", other.kind());
                self.error(&node.span, Some(key), message).hint = super::values::example(key);
                return vec![];
            }
        };
        let mut found = Vec::new();
        for (at, item) in items {
            match &item.value {
                Value::Text(text) => found.push((item, at, text.clone())),
                other => {
                    let message = format!("`{key}` holds {} where text is wanted", other.kind());
                    let hint = super::values::example(key);
                    self.within(key, |r| r.error(&item.span, Some(&at), message).hint = hint);
                }
            }
        }
        found
    }

    fn refused(&mut self, key: &str, at: &str, node: &Node, message: String) -> &mut SpecError {
        self.within(key, |r| {
            r.error(&node.span, Some(at), format!("`{key}`: {message}"));
        });
        let last = self.errors.len() - 1;
        &mut self.errors[last]
    }

    fn rules<T: FromStr<Err = RuleError>>(&mut self, key: &str, f: &Fields<'_>) -> Vec<T> {
        let mut rules = Vec::new();
        for (node, at, text) in self.lines(key, f) {
            match text.parse() {
                Ok(rule) => rules.push(rule),
                Err(RuleError { message, hint }) => self.refused(key, &at, node, message).hint = hint,
            }
        }
        rules
    }

    fn names(&mut self, key: &str, f: &Fields<'_>) -> Vec<Name> {
        let mut names = Vec::new();
        for (node, at, text) in self.lines(key, f) {
            match parse::<Name>(&text) {
                Ok(name) => names.push(name),
                Err(error) => self.refused(key, &at, node, error).hint = super::values::a_name(&text),
            }
        }
        names
    }

    fn architectures(&mut self, f: &Fields<'_>) -> Vec<String> {
        let mut found = Vec::new();
        for (node, at, text) in self.lines("arch", f) {
            let name = architecture(&text);
            if ARCHITECTURES.contains(&name) {
                found.push(name.to_owned());
                continue;
            }
            let hint =
                nearest(name, &ARCHITECTURES).map_or_else(|| said(ARCHITECTURES.join(", ")), |near| format!("did you mean \"{near}\"?"));
            self.refused("arch", &at, node, format!("there is no architecture \"{}\"", printable(&text))).hint = Some(hint);
        }
        found
    }
}

fn said(known: impl Display) -> String {
    format!("known are {known}")
}
