//! Tests of the module as a whole, with a small key-value machine in place of the core.
#![allow(clippy::unwrap_used)]

mod cluster;
mod forward;
mod forward_faults;
mod forward_property;
mod seed;
mod single;
mod suite;
mod transfer;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Capture, Machine, RaftConfig, RaftNode, Tuning};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Command {
    Set {
        key: String,
        value: u64,
    },
    Add {
        key: String,
        by: u64,
    },
    /// Adds once, however often it is applied.
    AddOnce {
        client: u64,
        seq: u64,
        key: String,
        by: u64,
    },
}

/// The value before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    before: Option<u64>,
    after: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    values: BTreeMap<String, u64>,
    /// Every command applied, so that a lost, doubled or reordered one shows.
    history: Vec<(u64, String)>,
    /// Answers to [`Command::AddOnce`].
    #[serde(default)]
    answered: Vec<((u64, u64), Answer)>,
}

/// The machine, and the state its readers see.
#[derive(Default)]
struct Kv {
    state: State,
    seen: Arc<Mutex<(u64, State)>>,
}

impl Machine for Kv {
    type Command = Command;
    type Answer = Answer;

    fn retry_safe(command: &Command) -> bool {
        matches!(command, Command::AddOnce { .. })
    }

    fn apply(&mut self, index: u64, command: Command) -> Answer {
        let request = match &command {
            Command::AddOnce { client, seq, .. } => Some((*client, *seq)),
            _ => None,
        };
        if let Some((_, answer)) = self.state.answered.iter().find(|(id, _)| Some(*id) == request) {
            return answer.clone();
        }
        self.state.history.push((index, format!("{command:?}")));
        let (key, after): (String, Box<dyn Fn(u64) -> u64>) = match command {
            Command::Set { key, value } => (key, Box::new(move |_| value)),
            Command::Add { key, by } | Command::AddOnce { key, by, .. } => (key, Box::new(move |old| old + by)),
        };
        let before = self.state.values.get(&key).copied();
        let after = after(before.unwrap_or(0));
        self.state.values.insert(key, after);
        let answer = Answer { before, after };
        self.state.answered.extend(request.map(|id| (id, answer.clone())));
        answer
    }

    fn snapshot(&self) -> Capture {
        let state = self.state.clone();
        Box::new(move || rmp_serde::to_vec_named(&state).unwrap())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.state = rmp_serde::from_slice(bytes).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn published(&mut self, index: u64) {
        *self.seen.lock().unwrap() = (index, self.state.clone());
    }
}

type Seen = Arc<Mutex<(u64, State)>>;
type Node = RaftNode<Kv>;

fn set(key: &str, value: u64) -> Command {
    Command::Set { key: key.to_owned(), value }
}

fn add(key: &str, by: u64) -> Command {
    Command::Add { key: key.to_owned(), by }
}

fn add_once(client: u64, seq: u64, key: &str, by: u64) -> Command {
    Command::AddOnce { client, seq, key: key.to_owned(), by }
}

async fn start(
    node_id: u64,
    disk: impl optimus_common::disk::Disk,
    tuning: Tuning,
    network: Arc<dyn super::PeerTransport>,
) -> Result<(Node, Seen), super::StartError> {
    let machine = Kv::default();
    let seen = machine.seen.clone();
    let node = RaftNode::start(RaftConfig { node_id, disk: Arc::new(disk), machine, tuning, network }).await?;
    Ok((node, seen))
}

/// Polls until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Awaits what must happen within moments.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("within 20 s")
}
