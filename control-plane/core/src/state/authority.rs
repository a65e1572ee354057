//! Replacing the cluster's certificate authority while everybody keeps working.
//!
//! ```text
//!            RotateCa                 every server, and every node that is up, trusts the new CA
//!   (none) ───────────▶ announce ─────────────────────────────────────────────────────────────▶ sign
//!    ▲ ▲                │ the old CA signs                                   the new CA signs    │
//!    │ └────────────────┘ aborted by a person, or not done within an hour                        │
//!    └───────────────────────────────────────────────────────────────────────────────────────────┘
//!      retire: nobody holds a certificate of the old CA any more, and everybody trusts the new one;
//!      or the overlap is over, and those who do are away
//! ```
//! Who trusts what, and whose signature each certificate bears, is told by the holder itself: an answer that was lost on
//! its way has changed nothing at the other end. Once the new CA signs, servers also show its certificate signed by the
//! old one, and go on doing so until the next rotation: a node that was away all the time still knows its servers again,
//! and they know it by its key.

use optimus_common::{NodeId, Span, Timestamp};
use serde::{Deserialize, Serialize};

use super::tables::{Cluster, State};

/// Names of those waited for that are written out.
const NAMED_MAX: usize = 5;
/// How long the new CA may wait for servers and nodes that are up to trust it, before the rotation is given up: nothing
/// has changed for anyone by then.
pub const ANNOUNCE_MAX: Span = Span(3_600_000);
/// How long both CAs are trusted at most, unless the operator says otherwise. Within it a node that was away notices nothing.
pub const OVERLAP_DEFAULT: Span = Span(7 * 24 * 3_600_000);
/// Bounds of what the operator may say.
pub const OVERLAP: (Span, Span) = (Span(60_000), Span(90 * 24 * 3_600_000));

/// The certificate authorities of a cluster beside the one that signs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Authorities {
    /// Number of the CA that signs; the founder's is 0.
    pub signing: u32,
    /// The highest number ever given. That of a CA that was given up is not given again: somebody may have told that he
    /// trusts it.
    pub newest: u32,
    /// Grows with each change of what is trusted.
    pub steps: u64,
    /// [`Rewrap::root_key`] of the root key that seals the CA's key; empty for the first one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub root_key: Vec<u8>,
    /// Name and key of the CA that signs, certified by the one before; empty for the founder's. DER.
    pub cross: Vec<u8>,
    pub rotation: Option<Rotation>,
}

/// A change of the CA that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Number of the new CA.
    pub number: u32,
    /// Number of the old one.
    pub from: u32,
    pub phase: RotationPhase,
    /// The CA that does not sign: the new one while it is announced, the old one afterwards. DER.
    pub certificate: Vec<u8>,
    /// Private key of the new CA while it is announced, sealed with the root key; empty afterwards.
    pub key_sealed: Vec<u8>,
    /// The new CA's name and key, certified by the old one, while it is announced; empty afterwards. DER.
    pub cross: Vec<u8>,
    /// How long both are trusted at most once the new one signs.
    pub overlap: Span,
    pub started_at: Timestamp,
    /// When the phase began.
    pub phase_at: Timestamp,
    /// How long the phase has lasted, as the leaders counted it. No wall clock decides: one that is a day ahead would end
    /// an overlap, and while no server runs, no node can come back.
    #[serde(default)]
    pub waited: Span,
    /// A person has said that this phase need not wait for nodes.
    #[serde(default)]
    pub force: bool,
}

impl Rotation {
    /// How long the phase may last. What happens then, [`judge_rotation`] says.
    pub fn limit(&self) -> Span {
        match self.phase {
            RotationPhase::Announce => ANNOUNCE_MAX,
            RotationPhase::Sign => self.overlap,
        }
    }

    /// What is left of [`Self::limit`]; 0 when it is over.
    pub fn left(&self) -> Span {
        Span(self.limit().0.saturating_sub(self.waited.0))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationPhase {
    /// The new CA is made known; the old one signs.
    Announce,
    /// The new CA signs; the old one is still trusted.
    Sign,
}

/// The CA's key under another root key, which some servers hold already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewrap {
    /// [`Authorities::steps`] as of which the key was sealed.
    pub steps: u64,
    /// Tells the new root key from others; says nothing of it.
    pub root_key: Vec<u8>,
    pub ca_key_sealed: Vec<u8>,
    /// The servers that hold it on their disks.
    pub holders: Vec<u64>,
    /// The keys of all environments that have secrets: whose, which, and sealed with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vaults: Vec<(super::VaultKey, Vec<u8>, Vec<u8>)>,
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
        self.authorities.steps
    }

    /// Numbers of the oldest and the newest CA trusted at the moment.
    pub fn trusted(&self) -> (u32, u32) {
        match &self.authorities.rotation {
            None => (self.authorities.signing, self.authorities.signing),
            Some(rotation) => (rotation.from, rotation.number),
        }
    }

    /// Number of the CA with this certificate, if it is trusted.
    pub fn number_of(&self, same: impl Fn(&[u8]) -> bool) -> Option<u32> {
        let Authorities { signing, rotation, .. } = &self.authorities;
        if same(&self.ca_certificate) {
            return Some(*signing);
        }
        let rotation = rotation.as_ref().filter(|r| same(&r.certificate))?;
        Some(match rotation.phase {
            RotationPhase::Announce => rotation.number,
            RotationPhase::Sign => rotation.from,
        })
    }
}

/// What a rotation should do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationVerdict {
    /// None is under way.
    Idle,
    /// The phase is over, also for those left out.
    Advance(Left),
    /// The announcement has taken too long because of these; all stays as it was.
    GiveUp(Left),
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
    let late = rotation.left() == Span(0);
    let servers = state.servers.values().filter(|row| match rotation.phase {
        RotationPhase::Announce => row.ca_trusted < new,
        RotationPhase::Sign => row.ca_trusted < new || row.ca_signer < new,
    });
    let nodes = state.nodes.values().filter(|row| match rotation.phase {
        RotationPhase::Announce => row.up && row.ca_trusted < new,
        // Also those that are down, but for the ones a rotation before this has left out: they are past waiting for.
        RotationPhase::Sign => (row.ca_trusted < new || row.ca_signer < new) && (row.up || row.ca_trusted >= rotation.from),
    });
    let left = Left { servers: servers.map(|row| row.id).collect(), nodes: nodes.map(|row| row.id).collect() };
    let is_up = |id: &NodeId| state.nodes.get(id).is_some_and(|row| row.up);
    let nodes_hold = match rotation.phase {
        _ if rotation.force => false,
        // Whoever is here is not shut out by a date: it has a reason that a person should know.
        RotationPhase::Sign if late => left.nodes.iter().any(is_up),
        _ => !left.nodes.is_empty(),
    };
    // A server left out could not come back to its own cluster: it is waited for, or removed by a person.
    if left.servers.is_empty() && !nodes_hold && !state.servers.is_empty() {
        return RotationVerdict::Advance(left);
    }
    match rotation.phase {
        RotationPhase::Announce if late => RotationVerdict::GiveUp(left),
        RotationPhase::Sign if late => RotationVerdict::Wait(Left { nodes: left.nodes.into_iter().filter(is_up).collect(), ..left }),
        _ => RotationVerdict::Wait(left),
    }
}

/// Whom the rotation under way waits for, in sentences.
pub fn rotation_waits_for(state: &State) -> Vec<String> {
    let Some(rotation) = state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref()) else { return vec![] };
    match judge_rotation(state) {
        RotationVerdict::Idle | RotationVerdict::Advance(_) => vec![],
        RotationVerdict::Wait(left) | RotationVerdict::GiveUp(left) => sentences(state, rotation.phase, &left),
    }
}

fn sentences(state: &State, phase: RotationPhase, left: &Left) -> Vec<String> {
    let what = match phase {
        RotationPhase::Announce => ("has not taken the new CA", "have not taken the new CA"),
        RotationPhase::Sign => ("still holds a certificate of the old CA", "still hold certificates of the old CA"),
    };
    let mut out = Vec::new();
    if !left.servers.is_empty() {
        let named =
            left.servers.iter().map(|id| state.servers.get(id).map_or_else(|| id.to_string(), |row| format!("{id} ({})", row.name)));
        out.push(sentence("server", what, named.collect()));
    }
    if !left.nodes.is_empty() {
        out.push(sentence("node", what, names(state, &left.nodes)));
    }
    out
}

/// How far the rotation under way is, what it waits for and until when, in a sentence.
pub fn explain_rotation(state: &State) -> Option<String> {
    let rotation = state.cluster.as_ref()?.authorities.rotation.as_ref()?;
    // To the minute: the leader counts no finer.
    let left = match rotation.left() {
        Span(0) => None,
        Span(left) => Some(Span(left.div_ceil(60_000) * 60_000)),
    };
    let (phase, until) = match (rotation.phase, left) {
        (RotationPhase::Announce, Some(left)) => ("the new CA is announced, the old one signs", format!("given up in {left}")),
        (RotationPhase::Announce, None) => ("the new CA is announced, the old one signs", "given up now".to_owned()),
        (RotationPhase::Sign, Some(left)) => {
            ("the new CA signs, the old one is still trusted", format!("in {left} dropped without those who are away"))
        }
        (RotationPhase::Sign, None) => ("the new CA signs, the old one is still trusted", format!("overdue after {}", rotation.limit())),
    };
    let why = rotation_waits_for(state);
    Some(match why.is_empty() {
        true => format!("CA rotation: {phase}"),
        false => format!("CA rotation: {phase}; {}; {until}", why.join("; ")),
    })
}

/// Why the announcement was given up.
pub(crate) fn explain_giving_up(state: &State, left: &Left) -> String {
    sentences(state, RotationPhase::Announce, left).join("; ")
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
