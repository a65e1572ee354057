//! The sentences of the language, a file per topic.
//!
//! To add sentences: write `words/TOPIC.rs` with a `pub const VOCABULARY: Vocabulary`, and add it to [`ALL`] below. A
//! [`Word`] has a pattern, when it may be used, a line of help and a function; of several patterns that fit a line, the one
//! with the most words in common is meant. Settings (`copies=3` of a workload, `cpu=2` of a node) are added the same way.

mod agents;
mod answers;
mod copies;
mod deployments;
mod events;
mod leader;
mod nodes;
mod operations;
mod placement;
mod rollouts;
mod rules;
mod secrets;
mod workloads;

use anyhow::{bail, ensure};
use optimus_common::protocol::NodeFacts;
use optimus_common::spec::WorkloadSpec;

pub(super) use deployments::phase_name;

use super::agents::BEHAVIOURS;
use super::parse::{self, Args, Section, Token};
use super::world::World;

/// Every topic, in the order in which `scenario --words` shows them.
const ALL: &[(&str, Vocabulary)] = &[
    ("nodes", nodes::VOCABULARY),
    ("workloads", workloads::VOCABULARY),
    ("where copies go", placement::VOCABULARY),
    ("secrets", secrets::VOCABULARY),
    ("how releases take over", rollouts::VOCABULARY),
    ("daemons, jobs and drains", operations::VOCABULARY),
    ("what copies do", agents::VOCABULARY),
    ("time and turns", leader::VOCABULARY),
    ("standing rules", rules::VOCABULARY),
    ("copies", copies::VOCABULARY),
    ("deployments", deployments::VOCABULARY),
    ("answers", answers::VOCABULARY),
    ("events", events::VOCABULARY),
];

/// What a topic adds to the language.
pub struct Vocabulary {
    pub words: &'static [Word],
    /// `node host-1 KEY=VALUE`
    pub node: &'static [Setting<NodeFacts>],
    /// `deploy web KEY=VALUE`
    pub workload: &'static [Setting<WorkloadSpec>],
}

impl Vocabulary {
    pub const fn words(words: &'static [Word]) -> Self {
        Vocabulary { words, node: &[], workload: &[] }
    }
}

/// One sentence.
pub struct Word {
    /// See [`parse::matches`] for how it is read.
    pub pattern: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    pub run: fn(&mut World, &Args) -> anyhow::Result<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something is done: under `given` and `when`.
    Act,
    /// Something must be so: under `then`.
    Check,
}

/// `key=value` of a node or workload.
pub struct Setting<T> {
    pub key: &'static str,
    pub help: &'static str,
    pub set: fn(&mut T, &str) -> anyhow::Result<()>,
}

/// Does what a line says.
pub fn run(world: &mut World, section: Option<Section>, line: &str) -> anyhow::Result<()> {
    let (word, args) = find(&parse::tokens(line)?)?;
    match (word.kind, section) {
        (Kind::Act, Some(Section::Then)) => bail!("nothing is done under `then`; it belongs under `when`"),
        (Kind::Check, Some(Section::Given | Section::When)) => bail!("what must be so belongs under `then`"),
        _ => (word.run)(world, &args),
    }
}

fn find(line: &[Token]) -> anyhow::Result<(&'static Word, Args)> {
    let words = ALL.iter().flat_map(|(_, vocabulary)| vocabulary.words);
    let mut fits: Vec<(usize, &Word, Args)> =
        words.filter_map(|word| parse::matches(word.pattern, line).map(|(literal, args)| (literal, word, args))).collect();
    fits.sort_by_key(|(literal, ..)| *literal);
    let Some((literal, word, args)) = fits.pop() else { bail!("no such line{}", hint(line)) };
    if let Some((_, other, _)) = fits.last().filter(|(second, ..)| *second == literal) {
        bail!("it can mean `{}` and `{}`", word.pattern, other.pattern);
    }
    Ok((word, args))
}

/// The sentences that share most words with a line nobody understands.
fn hint(line: &[Token]) -> String {
    let shared = |word: &&Word| word.pattern.split_whitespace().filter(|p| line.iter().any(|t| t.text == *p)).count();
    let words = || ALL.iter().flat_map(|(_, vocabulary)| vocabulary.words);
    let most = words().map(|w| shared(&w)).max().unwrap_or(0);
    if most == 0 {
        return "; `scenario --words` lists all".into();
    }
    let near: Vec<String> = words().filter(|w| shared(w) == most).take(3).map(|w| format!("`{}`", w.pattern)).collect();
    format!("; the nearest: {}", near.join(", "))
}

/// Applies settings that are found in the tables of any topic.
fn set<T: 'static>(
    what: &str,
    target: &mut T,
    tables: impl Iterator<Item = &'static Setting<T>> + Clone,
    settings: &[(&str, &str)],
) -> anyhow::Result<()> {
    for (key, value) in settings {
        let Some(setting) = tables.clone().find(|s| s.key == *key) else { bail!("a {what} has no `{key}`") };
        (setting.set)(target, value).map_err(|e| e.context(format!("{key}={value}")))?;
    }
    Ok(())
}

pub(super) fn set_node(facts: &mut NodeFacts, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    set("node", facts, ALL.iter().flat_map(|(_, v)| v.node), settings)
}

pub(super) fn set_workload(spec: &mut WorkloadSpec, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    set("workload", spec, ALL.iter().flat_map(|(_, v)| v.workload), settings)
}

/// The whole language as text.
pub fn list() -> String {
    let mut text = String::new();
    let mut row = |left: &str, right: &str| {
        text.push_str(&if left.chars().count() > 42 {
            format!("  {left}\n  {:42}  {right}\n", "")
        } else {
            format!("  {left:42}  {right}\n")
        });
    };
    for (kind, heading) in [(Kind::Act, "given, when: what is done"), (Kind::Check, "then: what must be so")] {
        row("", "");
        row(&heading.to_uppercase(), "");
        for (topic, vocabulary) in ALL {
            let words: Vec<&Word> = vocabulary.words.iter().filter(|w| w.kind == kind).collect();
            if !words.is_empty() {
                row("", "");
                row(&format!("[{topic}]"), "");
            }
            for word in words {
                row(word.pattern, word.help);
            }
        }
    }
    row("", "");
    row("SETTINGS OF A NODE", "");
    for setting in ALL.iter().flat_map(|(_, v)| v.node) {
        row(&format!("{}=", setting.key), setting.help);
    }
    row("", "");
    row("SETTINGS OF A WORKLOAD", "");
    for setting in ALL.iter().flat_map(|(_, v)| v.workload) {
        row(&format!("{}=", setting.key), setting.help);
    }
    row("", "");
    row("WHAT COPIES DO (HOW)", "");
    for (many, one, _, help) in BEHAVIOURS {
        row(&format!("{many} | {one}"), help);
    }
    text.trim_start().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A slot list: `all`, `3`, `0,2`, `2-9`.
fn slots(text: &str, of: u32) -> anyhow::Result<Vec<u32>> {
    if text == "all" {
        return Ok((0..of).collect());
    }
    let mut slots = vec![];
    for part in text.split(',') {
        match part.split_once('-') {
            Some((first, last)) => {
                let (first, last): (u32, u32) = (first.parse()?, last.parse()?);
                ensure!(first <= last && last < 100_000, "`{part}` is no range of slots");
                slots.extend(first..=last);
            }
            None => slots.push(part.parse()?),
        }
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_has_its_own_pattern_and_help() {
        let words: Vec<&Word> = ALL.iter().flat_map(|(_, v)| v.words).collect();
        for (at, word) in words.iter().enumerate() {
            assert!(!word.help.is_empty(), "{} has no help", word.pattern);
            let shape = |p: &str| p.split_whitespace().map(|w| if w == w.to_uppercase() { "*" } else { w }).collect::<Vec<_>>().join(" ");
            let twin = words[at + 1..].iter().find(|w| shape(w.pattern) == shape(word.pattern));
            assert!(twin.is_none(), "`{}` and `{}` cannot be told apart", word.pattern, twin.map_or("", |w| w.pattern));
        }
    }

    #[test]
    fn settings_have_their_own_keys() {
        let mut keys: Vec<&str> = ALL.iter().flat_map(|(_, v)| v.workload).map(|s| s.key).collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), all);
    }
}
