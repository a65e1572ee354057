//! Replacing the cluster's certificate authority while everybody keeps working.
//!
//! ```text
//!            RotateCa                 every server, and every node that is up, trusts the new CA
//!   (none) ───────────▶ announce ─────────────────────────────────────────────────────────────▶ sign
//!      ▲                the old CA signs                                     the new CA signs    │
//!      └──────────────────────────────────────────────────────────────────────────────────────────┘
//!         retire: nobody holds a certificate of the old CA any more, and everybody trusts the new one
//! ```
//! Who trusts what, and whose signature each certificate bears, is told by the holder itself: an answer that was lost on
//! its way has changed nothing at the other end. While the new CA signs, servers also show its certificate signed by the
//! old one, so a node that was away during the announcement still finds its way back.

use optimus_common::{NodeId, Timestamp};
use serde::{Deserialize, Serialize};

use super::tables::{Cluster, State};

/// Names of those waited for that are written out.
const NAMED_MAX: usize = 5;

/// The certificate authorities of a cluster beside the one that signs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities {
    /// Number of the CA that signs; the founder's is 0.
    pub signing: u32,
    #[serde(default)]
    pub rotation: Option<Rotation>,
}

/// A change of the CA that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Number of the new CA.
    pub number: u32,
    pub phase: RotationPhase,
    /// The CA that does not sign: the new one while it is announced, the old one afterwards. DER.
    pub certificate: Vec<u8>,
    /// Private key of the new CA while it is announced, sealed with the root key; empty afterwards.
    pub key_sealed: Vec<u8>,
    /// The new CA's name and key, certified by the old one. DER.
    pub cross: Vec<u8>,
    pub started_at: Timestamp,
    /// When the phase began.
    pub phase_at: Timestamp,
    /// A person has said that this phase need not wait for nodes.
    #[serde(default)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationPhase {
    /// The new CA is made known; the old one signs.
    Announce,
    /// The new CA signs; the old one is still trusted.
    Sign,
}

/// Who tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Member {
    Server(u64),
    Node(NodeId),
}

impl Cluster {
    /// Certificates of all CAs trusted at the moment, the one that signs first. DER.
    pub fn roots(&self) -> Vec<&[u8]> {
        let other = self.authorities.rotation.iter().map(|r| r.certificate.as_slice());
        std::iter::once(self.ca_certificate.as_slice()).chain(other).collect()
    }

    /// Grows with each step of each rotation. A state that is still being replayed is behind what the server knew before.
    pub fn ca_progress(&self) -> u64 {
        let within = match self.authorities.rotation.as_ref().map(|r| r.phase) {
            Some(RotationPhase::Sign) => 0,
            None => 1,
            Some(RotationPhase::Announce) => 2,
        };
        3 * u64::from(self.authorities.signing) + within
    }

    /// Numbers of the oldest and the newest CA trusted at the moment.
    pub fn trusted(&self) -> (u32, u32) {
        match &self.authorities.rotation {
            None => (self.authorities.signing, self.authorities.signing),
            Some(rotation) => (rotation.number.saturating_sub(1), rotation.number),
        }
    }

    /// Number of the CA with this certificate, if it is trusted.
    pub fn number_of(&self, same: impl Fn(&[u8]) -> bool) -> Option<u32> {
        let Authorities { signing, rotation } = &self.authorities;
        if same(&self.ca_certificate) {
            return Some(*signing);
        }
        let rotation = rotation.as_ref().filter(|r| same(&r.certificate))?;
        Some(match rotation.phase {
            RotationPhase::Announce => rotation.number,
            RotationPhase::Sign => rotation.number.saturating_sub(1),
        })
    }
}

/// What a rotation should do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationVerdict {
    /// None is under way.
    Idle,
    /// The phase is over.
    Advance(Left),
    Wait(Left),
}

/// Who has not done its part of the phase yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    pub servers: Vec<u64>,
    pub nodes: Vec<NodeId>,
}

/// Judges the rotation under way. The leader asks before it proposes a step, and `apply` asks again.
pub fn judge_rotation(state: &State) -> RotationVerdict {
    let Some(rotation) = state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref()) else { return RotationVerdict::Idle };
    let new = rotation.number;
    let servers = state.servers.values().filter(|row| match rotation.phase {
        RotationPhase::Announce => row.ca_trusted < new,
        RotationPhase::Sign => row.ca_trusted < new || row.ca_signer < new,
    });
    let nodes = state.nodes.values().filter(|row| match rotation.phase {
        RotationPhase::Announce => row.up && row.ca_trusted < new,
        // Also those that are down: without the old CA they could not come back.
        RotationPhase::Sign => row.ca_trusted < new || row.ca_signer < new,
    });
    let left = Left { servers: servers.map(|row| row.id).collect(), nodes: nodes.map(|row| row.id).collect() };
    // A server left out could not come back to its own cluster: it is waited for, or removed by a person.
    let over = left.servers.is_empty() && (left.nodes.is_empty() || rotation.force) && !state.servers.is_empty();
    if over { RotationVerdict::Advance(left) } else { RotationVerdict::Wait(left) }
}

/// Why the rotation under way has not come to its end, in a sentence.
pub fn explain_rotation(state: &State) -> Option<String> {
    let rotation = state.cluster.as_ref()?.authorities.rotation.as_ref()?;
    let left = match judge_rotation(state) {
        RotationVerdict::Idle => return None,
        RotationVerdict::Advance(_) => Left::default(),
        RotationVerdict::Wait(left) => left,
    };
    let mut why = Vec::new();
    if !left.servers.is_empty() {
        let what = match rotation.phase {
            RotationPhase::Announce => ("has not taken the new CA", "have not taken the new CA"),
            RotationPhase::Sign => ("still shows a certificate of the old CA", "still show certificates of the old CA"),
        };
        let named = left.servers.iter().map(|id| state.servers.get(id).map_or_else(|| id.to_string(), |row| row.name.clone()));
        why.push(sentence("server", what, named.collect()));
    }
    if !left.nodes.is_empty() {
        let what = match rotation.phase {
            RotationPhase::Announce => ("has not taken the new CA", "have not taken the new CA"),
            RotationPhase::Sign => ("still holds a certificate of the old CA", "still hold certificates of the old CA"),
        };
        why.push(sentence("node", what, names(state, &left.nodes)));
    }
    let phase = match rotation.phase {
        RotationPhase::Announce => "the new CA is announced, the old one signs",
        RotationPhase::Sign => "the new CA signs, the old one is still trusted",
    };
    Some(match why.is_empty() {
        true => format!("CA rotation: {phase}"),
        false => format!("CA rotation: {phase}; {}", why.join("; ")),
    })
}

/// Names of nodes, for people.
pub(crate) fn names(state: &State, nodes: &[NodeId]) -> Vec<String> {
    nodes.iter().map(|id| state.nodes.get(id).map_or_else(|| id.to_string(), |row| row.facts.name.clone())).collect()
}

/// `2 nodes still hold certificates of the old CA: host-3, host-7`
pub(crate) fn sentence(kind: &str, (one, many): (&str, &str), names: Vec<String>) -> String {
    let count = names.len();
    let more = if count > NAMED_MAX { format!(" and {} more", count - NAMED_MAX) } else { String::new() };
    let named = names.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    let (s, what) = if count == 1 { ("", one) } else { ("s", many) };
    format!("{count} {kind}{s} {what}: {named}{more}")
}
