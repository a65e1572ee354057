//! The cluster as its leader sees it, and who shall lead: asked on any server, answered by the leader.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use optimus_common::api::v1::{CaPhase, CaRotation, ClusterView, ServerRole, ServerView};
use optimus_common::{Timestamp, clock_skew, codec};
use optimus_core::state::{Rewrap, RotationPhase, State, explain_rotation, rotation_waits_for};
use optimus_host::telemetry::Chain;
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, pem};
use crate::raft::{Machine, PeerError, PeerRpc, RaftNode};
use crate::store::Store;

/// Longest wait for the leader's answer; a hand-over takes much less.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The same for a report, which a person waits for, and which can be made without the leader.
const REPORT_WITHIN: Duration = Duration::from_secs(2);
/// Longest wait for each server when none leads.
const SURVEY_WITHIN: Duration = Duration::from_secs(1);
/// A server that the leader heard within this is alive.
pub const ALIVE: Duration = Duration::from_secs(3);

/// Why the leader did not answer, or not as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    #[error("no server leads at the moment: {0}")]
    NoLeader(String),
    #[error("{0}")]
    Refused(String),
}

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, AdminError>> + Send + 'a>>;

/// Looks at and changes the servers. The API asks it.
pub trait ClusterAdmin: Send + Sync + 'static {
    fn report(&self) -> Answer<'_, Report>;
    /// Makes `to`, or the server with most of the log, the leader; gives who leads.
    fn transfer(&self, to: Option<u64>) -> Answer<'_, u64>;
    /// Makes another root key, gives it to every server, and gives the command that brings it into use.
    fn next_root_key(&self) -> Answer<'_, Rewrap> {
        Box::pin(async { Err(AdminError::Refused("this server holds no root key".into())) })
    }
}

/// What only the leader knows, or without one what a server finds out by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// 0: none.
    pub leader: u64,
    pub term: u64,
    pub last_log: u64,
    pub members: Vec<MemberReport>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberReport {
    pub id: u64,
    pub voter: bool,
    /// Milliseconds since it answered; 0 for the server that reports.
    pub silent_ms: Option<u64>,
    /// Entries it is behind.
    pub behind: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Report,
    Transfer {
        to: Option<u64>,
    },
    Clock,
    /// Keep this root key; it may come into use.
    HoldRootKey(Secret),
}

/// The text of a root key on its way from one server to another.
#[derive(Serialize, Deserialize)]
struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Report(Report),
    Leader(u64),
    NotLeader,
    Refused(String),
    Clock(Timestamp),
    /// Fingerprint of the root key that is held now.
    Held(Vec<u8>),
}

/// The answer to `body` if it asks this server to keep a root key.
pub fn key_answer(body: &[u8], identity: &Identity) -> Option<Bytes> {
    let Ok(Request::HoldRootKey(text)) = codec::from_msgpack(body) else { return None };
    let reply = match identity.hold_root_key(&text.0) {
        Ok(fingerprint) => Reply::Held(fingerprint),
        Err(error) => Reply::Refused(Chain(&error).to_string()),
    };
    Some(codec::to_msgpack(&reply).into())
}

/// [`RaftAdmin`] of a server with an identity.
pub struct ServerAdmin<M: Machine> {
    pub raft: RaftAdmin<M>,
    pub identity: Arc<Identity>,
    pub store: Store,
}

impl<M: Machine> ServerAdmin<M> {
    async fn give_root_key(&self) -> Result<Rewrap, AdminError> {
        let state = self.store.read().await.map_err(|e| AdminError::NoLeader(e.to_string()))?;
        let (key, mut rewrap) = self.identity.next_root_key(&state).map_err(|e| AdminError::Refused(Chain(&e).to_string()))?;
        let body = Bytes::from(codec::to_msgpack(&Request::HoldRootKey(Secret(key.to_text().as_bytes().to_vec()))));
        for row in state.servers.values().filter(|row| row.id != self.identity.server()) {
            let who = format!("server {} ({})", row.id, row.name);
            let without = |why: String| {
                AdminError::Refused(format!(
                    "{who} did not take the new root key, so the old one stays: {why}; bring it back, or remove it"
                ))
            };
            let answer = self.raft.0.ask(row.id, PeerRpc::Admin, body.clone(), ANSWER_WITHIN).await.map_err(|e| without(e.to_string()))?;
            match codec::from_msgpack(&answer) {
                Ok(Reply::Held(fingerprint)) if fingerprint == rewrap.root_key => rewrap.holders.push(row.id),
                Ok(Reply::Refused(why)) => return Err(without(why)),
                _ => return Err(without("it answered something else".into())),
            }
        }
        Ok(rewrap)
    }
}

impl<M: Machine> ClusterAdmin for ServerAdmin<M> {
    fn report(&self) -> Answer<'_, Report> {
        self.raft.report()
    }

    fn transfer(&self, to: Option<u64>) -> Answer<'_, u64> {
        self.raft.transfer(to)
    }

    fn next_root_key(&self) -> Answer<'_, Rewrap> {
        Box::pin(self.give_root_key())
    }
}

/// The answer to `body` if it asks for this server's wall clock, which is `now`.
pub fn clock_answer(body: &[u8], now: Timestamp) -> Option<Bytes> {
    matches!(codec::from_msgpack(body), Ok(Request::Clock)).then(|| codec::to_msgpack(&Reply::Clock(now)).into())
}

/// The answers of one server.
pub struct RaftAdmin<M: Machine>(pub RaftNode<M>);

impl<M: Machine> RaftAdmin<M> {
    async fn ask(&self, request: Request, within: Duration) -> Result<Reply, AdminError> {
        if *self.0.is_leader().borrow() {
            return Ok(self.answer(request).await);
        }
        let body = Bytes::from(codec::to_msgpack(&request));
        match self.0.ask_leader(PeerRpc::Admin, body, within).await {
            Ok(bytes) => codec::from_msgpack(&bytes).map_err(|e| AdminError::Refused(format!("the leader's answer does not decode: {e}"))),
            Err(error) => Err(AdminError::NoLeader(error.to_string())),
        }
    }

    /// Who answers this server when none leads: whoever looks at a cluster without quorum must see whom to bring back.
    async fn survey(&self) -> Report {
        let status = self.0.status();
        let body = Bytes::from(codec::to_msgpack(&Request::Clock));
        let ask = async |id: u64| {
            let me = id == status.node_id;
            // Any answer is a sign of life, also that of a server that is still starting.
            let answers = me || self.0.ask(id, PeerRpc::Admin, body.clone(), SURVEY_WITHIN).await.is_ok();
            MemberReport { id, voter: status.voters.contains(&id), silent_ms: answers.then_some(0), behind: None }
        };
        let members = futures_util::future::join_all(status.members.keys().map(|id| ask(*id))).await;
        Report { leader: 0, term: status.term, last_log: status.last_log.unwrap_or(0), members }
    }

    /// The wall clock of the leader, another server, as it answered.
    pub async fn leaders_clock(&self, within: Duration) -> Result<Timestamp, AdminError> {
        let body = Bytes::from(codec::to_msgpack(&Request::Clock));
        let bytes = self.0.ask_leader(PeerRpc::Admin, body, within).await.map_err(|e| AdminError::NoLeader(e.to_string()))?;
        match codec::from_msgpack(&bytes) {
            Ok(Reply::Clock(at)) => Ok(at),
            _ => Err(AdminError::Refused("the leader did not tell its clock".into())),
        }
    }

    /// Answers a peer that takes this server for the leader.
    pub async fn handle(&self, body: &[u8]) -> Result<Bytes, PeerError> {
        let request = codec::from_msgpack(body).map_err(|e| PeerError::Refused(format!("admin request: {e}")))?;
        Ok(codec::to_msgpack(&self.answer(request).await).into())
    }

    async fn answer(&self, request: Request) -> Reply {
        if !*self.0.is_leader().borrow() {
            return Reply::NotLeader;
        }
        match request {
            // Answered before it comes here, as every server has a clock.
            Request::Clock | Request::HoldRootKey(_) => Reply::Refused("this server is still starting".into()),
            Request::Report => Reply::Report(report(&self.0.status())),
            Request::Transfer { to } => match self.0.transfer_leader(to).await {
                Ok(leader) => Reply::Leader(leader),
                Err(error) => Reply::Refused(error.to_string()),
            },
        }
    }
}

impl<M: Machine> ClusterAdmin for RaftAdmin<M> {
    fn report(&self) -> Answer<'_, Report> {
        Box::pin(async {
            match self.ask(Request::Report, REPORT_WITHIN).await {
                Ok(Reply::Report(report)) => Ok(report),
                Ok(Reply::NotLeader) | Err(AdminError::NoLeader(_)) => Ok(self.survey().await),
                Ok(other) => Err(unexpected(other)),
                Err(error) => Err(error),
            }
        })
    }

    fn transfer(&self, to: Option<u64>) -> Answer<'_, u64> {
        Box::pin(async move {
            match self.ask(Request::Transfer { to }, ANSWER_WITHIN).await? {
                Reply::Leader(leader) => Ok(leader),
                other => Err(unexpected(other)),
            }
        })
    }
}

fn unexpected(reply: Reply) -> AdminError {
    match reply {
        Reply::NotLeader => AdminError::NoLeader("the server asked does not lead any more".into()),
        Reply::Refused(why) => AdminError::Refused(why),
        Reply::Report(_) | Reply::Leader(_) | Reply::Clock(_) | Reply::Held(_) => {
            AdminError::Refused("the leader answered another question".into())
        }
    }
}

fn report(status: &crate::raft::Status) -> Report {
    let end = status.last_log.unwrap_or(0);
    let member = |id: &u64| {
        let me = *id == status.node_id;
        MemberReport {
            id: *id,
            voter: status.voters.contains(id),
            silent_ms: if me { Some(0) } else { status.contact_age_ms.get(id).copied() },
            behind: if me { Some(0) } else { status.replicated.get(id).copied().flatten().map(|at| end.saturating_sub(at)) },
        }
    };
    Report { leader: status.node_id, term: status.term, last_log: end, members: status.members.keys().map(member).collect() }
}

/// What the leader reported beside what the state says; none before the cluster exists.
pub fn view(state: &State, report: &Report) -> Option<ClusterView> {
    let cluster = state.cluster.as_ref()?;
    let servers: Vec<ServerView> = state
        .servers
        .values()
        .map(|row| {
            let member = report.members.iter().find(|m| m.id == row.id);
            let silent_ms = member.and_then(|m| m.silent_ms);
            ServerView {
                id: row.id,
                name: row.name.clone(),
                address: row.address.clone(),
                api: row.api.clone(),
                version: row.version.clone(),
                level: row.level,
                role: match member {
                    _ if row.leaving => ServerRole::Leaving,
                    None => ServerRole::Joining,
                    Some(_) if row.id == report.leader => ServerRole::Leader,
                    Some(m) if m.voter => ServerRole::Voter,
                    Some(_) => ServerRole::Learner,
                },
                alive: silent_ms.is_some_and(|ms| ms <= ALIVE.as_millis() as u64),
                silent_ms,
                behind: member.and_then(|m| m.behind),
                joined_at: row.joined_at,
                clock_skew_ms: row.clock_skew_ms,
            }
        })
        .collect();
    let mut warnings = warnings(cluster.version, &servers, report);
    warnings.extend(clocks(state));
    Some(ClusterView {
        cluster: cluster.id,
        leader: Some(report.leader).filter(|id| *id != 0),
        term: report.term,
        last_log: report.last_log,
        version: cluster.version,
        servers,
        ca: cluster.authorities.signing,
        ca_pem: cluster.roots().into_iter().map(pem).collect(),
        rotation: rotation(state),
        warnings,
    })
}

fn rotation(state: &State) -> Option<CaRotation> {
    let held = state.cluster.as_ref()?.authorities.rotation.as_ref()?;
    Some(CaRotation {
        from: held.from,
        to: held.number,
        phase: match held.phase {
            RotationPhase::Announce => CaPhase::Announce,
            RotationPhase::Sign => CaPhase::Sign,
        },
        started_at: held.started_at,
        phase_since: held.phase_at,
        waited: held.waited,
        left: held.left(),
        overlap: held.overlap,
        waits_for: rotation_waits_for(state),
        text: explain_rotation(state)?,
    })
}

/// Most clocks that are named.
const CLOCKS_MAX: usize = 5;

/// Whose clock is off.
fn clocks(state: &State) -> Vec<String> {
    let servers = state.servers.values().filter_map(|s| Some((format!("server {} ({})", s.id, s.name), s.clock_skew_ms?)));
    let nodes = state.nodes.values().filter(|n| n.up).filter_map(|n| Some((n.facts.name.clone(), n.clock_skew_ms?)));
    let mut off: Vec<(String, i64)> = servers.chain(nodes).collect();
    off.sort_by_key(|(_, skew)| std::cmp::Reverse(skew.unsigned_abs()));
    let more = off.len().saturating_sub(CLOCKS_MAX);
    let mut out: Vec<String> =
        off.iter().take(CLOCKS_MAX).map(|(who, skew)| format!("the clock of {who} is {}", clock_skew::in_words(*skew))).collect();
    if more > 0 {
        out.push(format!("the clocks of {more} more are off; `optimus nodes` tells whose"));
    }
    out
}

fn warnings(version: u32, servers: &[ServerView], report: &Report) -> Vec<String> {
    let voters: Vec<u64> = report.members.iter().filter(|m| m.voter).map(|m| m.id).collect();
    let dead: Vec<&ServerView> = servers.iter().filter(|s| voters.contains(&s.id) && !s.alive).collect();
    let mut out = Vec::new();
    let (spare, needed) = (voters.len().saturating_sub(1) / 2, voters.len() / 2 + 1);
    let (with_vote, answer) = (voters.len(), voters.len() - dead.len().min(voters.len()));
    if answer < needed {
        out.push(format!(
            "no quorum: {answer} of {with_vote} servers with a vote can be reached and {needed} are needed, so nothing can be changed; \
             bring one back, or if they are lost for good: `optimus cluster recover`"
        ));
    } else if report.leader == 0 {
        out.push("no server leads at the moment; an election takes seconds".to_owned());
    }
    match voters.len() {
        2 => out.push("2 servers have a vote: the loss of either stops all changes; join a third".to_owned()),
        4 => out.push("4 servers have a vote and bear the loss of one, as 3 do; join a fifth or remove one".to_owned()),
        _ => {}
    }
    for server in &dead {
        out.push(format!("server {} ({}) does not answer", server.id, server.name));
    }
    if !dead.is_empty() && answer >= needed && dead.len() >= spare {
        let more = spare.saturating_sub(dead.len());
        out.push(match more {
            0 => "the loss of one more server stops all changes".to_owned(),
            n => format!("{n} more servers may be lost"),
        });
    }
    for server in servers.iter().filter(|s| s.level > version) {
        out.push(format!(
            "server {} ({}) understands version {}, the cluster is held at {version} by older servers",
            server.id, server.name, server.level
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use optimus_common::ClusterId;
    use optimus_core::state::{Cluster, ServerRow};

    use super::*;

    fn row(id: u64, leaving: bool) -> (u64, Arc<ServerRow>) {
        let text = || format!("s{id}");
        let row = ServerRow {
            id,
            name: text(),
            address: text(),
            api: text(),
            key_fingerprint: vec![],
            version: text(),
            level: 2,
            joined_at: Timestamp(id),
            leaving,
            ca_trusted: 0,
            ca_signer: 0,
            clock_skew_ms: None,
        };
        (id, Arc::new(row))
    }

    #[test]
    fn roles_life_and_warnings_come_from_state_and_leader_together() {
        let cluster = Cluster {
            id: ClusterId(uuid::Uuid::nil()),
            created_at: Timestamp(0),
            ca_certificate: vec![],
            ca_key_sealed: vec![],
            version: 2,
            authorities: Default::default(),
        };
        let mut state = State::default();
        state.cluster = Some(cluster);
        state.servers = [row(1, false), row(2, false), row(3, true), row(9, false)].into_iter().collect();
        let member = |id, voter, silent_ms| MemberReport { id, voter, silent_ms, behind: Some(0) };
        let members = vec![member(1, true, Some(0)), member(2, true, Some(60_000)), member(3, true, Some(10))];
        let shown = view(&state, &Report { leader: 1, term: 4, last_log: 10, members }).unwrap_or_else(|| panic!("a cluster"));
        let roles: Vec<_> = shown.servers.iter().map(|s| (s.id, s.role, s.alive)).collect();
        use ServerRole::*;
        assert_eq!(roles, [(1, Leader, true), (2, Voter, false), (3, Leaving, true), (9, Joining, false)]);
        assert_eq!(shown.warnings, ["server 2 (s2) does not answer", "the loss of one more server stops all changes"]);
        let alone = vec![member(1, true, Some(0)), member(2, true, None), member(3, true, None)];
        let shown = view(&state, &Report { leader: 0, term: 4, last_log: 10, members: alone }).unwrap_or_else(|| panic!("a cluster"));
        assert_eq!((shown.leader, shown.servers[0].role), (None, Voter));
        assert!(
            shown.warnings[0].starts_with("no quorum: 1 of 3 servers with a vote can be reached and 2 are needed"),
            "{:?}",
            shown.warnings
        );
        assert_eq!(shown.warnings.len(), 3, "nothing about one more loss");
        let electing = vec![member(1, true, Some(0)), member(2, true, Some(0)), member(3, true, None)];
        let shown = view(&state, &Report { leader: 0, term: 4, last_log: 10, members: electing }).unwrap_or_else(|| panic!("a cluster"));
        assert!(shown.warnings.iter().any(|w| w.starts_with("no server leads at the moment")), "{:?}", shown.warnings);
        let two = vec![member(1, true, Some(0)), member(2, true, Some(0))];
        let shown = view(&state, &Report { leader: 1, term: 4, last_log: 10, members: two }).unwrap_or_else(|| panic!("a cluster"));
        assert!(shown.warnings[0].contains("join a third"), "{:?}", shown.warnings);
    }
}
