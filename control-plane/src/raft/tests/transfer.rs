//! Handing leadership over, and elections that need not be.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use optimus_common::disk::sim::MemDisk;

use super::super::network::{Peer, PeerTransport};
use super::super::transfer::Message;
use super::super::types::Vote;
use super::super::{IoMode, MemoryNetwork, PeerError, PeerRpc, ProposeError, Role, TransferError};
use super::*;

struct Cluster {
    network: MemoryNetwork,
    nodes: BTreeMap<u64, (Node, Seen)>,
}

impl Cluster {
    async fn found(voters: u64, tuning: Tuning) -> Self {
        Self::over(voters, tuning, |end| end).await
    }

    /// Founds a cluster whose servers reach each other through what `wrap` makes of their ends of the network.
    async fn over(voters: u64, tuning: Tuning, wrap: impl Fn(Arc<dyn PeerTransport>) -> Arc<dyn PeerTransport>) -> Self {
        let network = MemoryNetwork::new();
        let mut nodes = BTreeMap::new();
        for id in 1..=voters {
            let (node, seen) = start(id, MemDisk::new(), tuning.clone(), wrap(network.transport(id))).await.unwrap();
            network.connect(&node);
            nodes.insert(id, (node, seen));
        }
        nodes[&1].0.initialize((1..=voters).map(|id| (id, format!("s{id}:1"))).collect()).await.unwrap();
        let cluster = Self { network, nodes };
        cluster.leader().await;
        cluster
    }

    fn node(&self, id: u64) -> &Node {
        &self.nodes[&id].0
    }

    /// Who leads and is followed by everyone the network still reaches.
    async fn leader(&self) -> u64 {
        let mut found = None;
        eventually("a leader", || {
            found = self.nodes.iter().find(|(_, (n, _))| *n.is_leader().borrow()).map(|(id, _)| *id);
            found.is_some_and(|l| self.nodes.values().filter(|(n, _)| n.status().leader == Some(l)).count() > self.nodes.len() / 2)
        })
        .await;
        found.unwrap()
    }

    fn term(&self) -> u64 {
        self.nodes.values().map(|(n, _)| n.status().term).max().unwrap()
    }

    async fn stop(self) {
        for (id, (node, _)) in &self.nodes {
            self.network.disconnect(*id);
            node.shutdown().await;
        }
    }

    /// Waits until all servers hold the same and gives it.
    async fn converged(&self) -> State {
        eventually("all servers hold the same", || {
            let states: Vec<_> = self.nodes.values().map(|(_, s)| s.lock().unwrap().clone()).collect();
            states.windows(2).all(|w| w[0] == w[1])
        })
        .await;
        self.nodes.values().next().unwrap().1.lock().unwrap().1.clone()
    }
}

/// Writers that go wherever the leader is and remember what was acknowledged.
struct Load {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(nodes: &BTreeMap<u64, (Node, Seen)>) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let nodes: BTreeMap<u64, Node> = nodes.iter().map(|(id, (n, _))| (*id, n.clone())).collect();
        let writers = (0..4).map(|w| tokio::spawn(Self::write(w, nodes.clone(), stop.clone(), count.clone()))).collect();
        Self { stop, count, writers }
    }

    async fn write(writer: u64, nodes: BTreeMap<u64, Node>, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) -> Vec<String> {
        let (mut acknowledged, mut at) = (Vec::new(), 1);
        for n in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let key = format!("w{writer}-{n}");
            match nodes[&at].propose(set(&key, n)).await {
                Ok(_) => {
                    acknowledged.push(key);
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Err(ProposeError::NoLeader { leader: Some(leader) }) if leader != at => at = leader,
                Err(_) => {
                    at = at % nodes.len() as u64 + 1;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        }
        acknowledged
    }

    /// Waits for this many more acknowledged writes.
    async fn more(&self, n: u64) {
        let from = self.count.load(Ordering::Relaxed);
        eventually("writes go on", || self.count.load(Ordering::Relaxed) >= from + n).await;
    }

    async fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for writer in self.writers {
            all.extend(soon(writer).await.unwrap());
        }
        all
    }
}

fn all_there(state: &State, acknowledged: &[String]) {
    for key in acknowledged {
        assert!(state.values.contains_key(key), "{key} was acknowledged and is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_round_under_load_and_no_acknowledged_write_is_lost() {
    for servers in [3, 5] {
        let cluster = Cluster::found(servers, Tuning::fast()).await;
        let load = Load::start(&cluster.nodes);
        for _ in 0..3 {
            for to in 1..=servers {
                let from = cluster.leader().await;
                if from == to {
                    continue;
                }
                load.more(5).await;
                let term = cluster.term();
                assert_eq!(cluster.node(from).transfer_leader(Some(to)).await, Ok(to));
                assert_eq!(cluster.term(), term + 1, "one election, not several");
            }
        }
        load.more(5).await;
        let acknowledged = load.end().await;
        all_there(&cluster.converged().await, &acknowledged);
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_shuts_down_hands_over_first() {
    // Timers so long that an election by timeout cannot be what brings the next leader.
    let tuning = Tuning {
        heartbeat: Duration::from_secs(1),
        election_min: Duration::from_secs(60),
        election_max: Duration::from_secs(90),
        ..Tuning::fast()
    };
    let cluster = Cluster::found(3, tuning).await;
    let load = Load::start(&cluster.nodes);
    load.more(20).await;
    let old = cluster.leader().await;
    cluster.node(old).shutdown().await;
    load.more(20).await;
    assert_ne!(cluster.leader().await, old);
    let acknowledged = load.end().await;
    let mut cluster = cluster;
    cluster.network.disconnect(old);
    cluster.nodes.remove(&old);
    all_there(&cluster.converged().await, &acknowledged);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn targets_that_cannot_lead_are_refused_and_nothing_changes() {
    let mut cluster = Cluster::found(3, Tuning::fast()).await;
    let leader = cluster.leader().await;
    let (learner, seen) = start(4, MemDisk::new(), Tuning::fast(), cluster.network.transport(4)).await.unwrap();
    cluster.network.connect(&learner);
    cluster.nodes.insert(4, (learner, seen));
    cluster.node(leader).add_learner(4, "s4:1").await.unwrap();
    let term = cluster.term();
    let other = (1..=3).find(|id| *id != leader).unwrap();
    let node = cluster.node(leader);
    assert_eq!(node.transfer_leader(Some(4)).await, Err(TransferError::NotVoter(4)), "a learner");
    assert_eq!(node.transfer_leader(Some(9)).await, Err(TransferError::NotVoter(9)), "nobody");
    assert_eq!(node.transfer_leader(Some(leader)).await, Err(TransferError::NotVoter(leader)), "itself");
    assert_eq!(cluster.node(other).transfer_leader(None).await, Err(TransferError::NoLeader { leader: Some(leader) }));

    // Dead: level, as far as the leader knows, but silent.
    cluster.network.disconnect(other);
    let dead = node.transfer_leader(Some(other)).await;
    assert!(matches!(dead, Err(TransferError::Refused { target, .. }) if target == other), "{dead:?}");
    // Behind: it misses what is written now.
    for n in 0..400 {
        node.propose(set("n", n)).await.unwrap();
    }
    let behind = node.transfer_leader(Some(other)).await;
    assert!(matches!(behind, Err(TransferError::Behind { target, .. }) if target == other), "{behind:?}");
    // Without a name it goes to the one that is up to date.
    assert_eq!((cluster.leader().await, cluster.term()), (leader, term), "nothing has changed");
    let third = (1..=3).find(|id| *id != leader && *id != other).unwrap();
    assert_eq!(node.transfer_leader(None).await, Ok(third));
    cluster.network.connect(cluster.node(other));
    cluster.node(third).propose(set("after", 1)).await.unwrap();
    assert_eq!(cluster.converged().await.values["after"], 1);
    cluster.stop().await;
}

#[tokio::test]
async fn a_single_server_has_nobody_to_hand_over_to() {
    let (node, _) = start(1, MemDisk::new(), Tuning::fast(), Arc::new(super::super::NoPeers)).await.unwrap();
    node.initialize_single("here:1").await.unwrap();
    eventually("leads", || *node.is_leader().borrow()).await;
    assert_eq!(node.transfer_leader(None).await, Err(TransferError::NoOther));
    node.propose(set("a", 1)).await.unwrap();
    node.shutdown().await;
}

/// Loses requests of one kind, to one server or to all (0), while the switch is on.
#[derive(Debug)]
struct Lossy {
    end: Arc<dyn PeerTransport>,
    kind: PeerRpc,
    to: Arc<AtomicU64>,
    on: Arc<AtomicBool>,
    /// Pre-votes asked for while the switch is on.
    asked: Arc<AtomicU64>,
}

impl PeerTransport for Lossy {
    fn call(&self, to: Peer, kind: PeerRpc, body: bytes::Bytes, ttl: Duration) -> BoxFuture<'static, Result<bytes::Bytes, PeerError>> {
        let only = self.to.load(Ordering::Relaxed);
        if kind == PeerRpc::Transfer && self.on.load(Ordering::Relaxed) {
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
        if kind == self.kind && self.on.load(Ordering::Relaxed) && (only == 0 || only == to.id) {
            return Box::pin(async { Err(PeerError::Unreachable("lost".to_owned())) });
        }
        self.end.call(to, kind, body, ttl)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_fails_in_the_middle_leaves_somebody_leading_and_proposals_go_on() {
    // As if the target died right after it was told to lead: its requests for votes are lost.
    let mute = Arc::new(AtomicBool::new(false));
    let lossy = |end| -> Arc<dyn PeerTransport> {
        Arc::new(Lossy { end, kind: PeerRpc::Vote, to: Arc::default(), on: mute.clone(), asked: Arc::default() })
    };
    let cluster = Cluster::over(3, Tuning::fast(), lossy).await;
    let load = Load::start(&cluster.nodes);
    load.more(10).await;
    let old = cluster.leader().await;
    let target = (1..=3).find(|id| *id != old).unwrap();
    mute.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let failed = cluster.node(old).transfer_leader(Some(target)).await;
    assert!(failed.is_err(), "{failed:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    mute.store(false, Ordering::Relaxed);
    load.more(20).await;
    let acknowledged = load.end().await;
    all_there(&cluster.converged().await, &acknowledged);
    cluster.stop().await;
}

/// The permission is the leader's to give, for the term it leads in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_leader_opens_the_lease() {
    let cluster = Cluster::found(3, Tuning::fast()).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    let (voter, forger) = (others[0], others[1]);
    let term = cluster.term();
    let allow = |vote: Vote| Message::Allow { leader: vote.into(), target: forger, ttl_ms: 1000 }.encode(voter);
    // In the leader's name, from another server.
    let forged = cluster.node(voter).handle_peer_rpc(forger, PeerRpc::Transfer, allow(Vote::new_committed(term, leader))).await;
    assert!(matches!(forged, Err(PeerError::Refused(_))), "{forged:?}");
    // In its own name, although the voter follows another.
    for vote in [Vote::new_committed(term + 1, forger), Vote::new_committed(term, forger)] {
        let own = cluster.node(voter).handle_peer_rpc(forger, PeerRpc::Transfer, allow(vote)).await.unwrap();
        assert!(!super::super::transfer::Consent::decode(&own).unwrap().agreed);
    }
    // And without a permission the lease holds, whatever the term.
    let last = None;
    let request = openraft::raft::VoteRequest::new(Vote::new(term + 7, forger), last);
    let body = super::super::network::Request::encode_vote(voter, &request);
    let answer = cluster.node(voter).handle_peer_rpc(forger, PeerRpc::Vote, body).await.unwrap();
    assert!(!super::super::network::Reply::decode_vote(&answer).unwrap().vote_granted);
    assert_eq!((cluster.leader().await, cluster.term()), (leader, term));
    cluster.stop().await;
}

/// A server that misses its leader alone must not depose it: neither cut off, nor when it comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_cut_off_does_not_disturb_the_leader() {
    let cluster = Cluster::found(3, Tuning::fast()).await;
    let leader = cluster.leader().await;
    let away = (1..=3).find(|id| *id != leader).unwrap();
    let (term, node) = (cluster.term(), cluster.node(leader));
    // One way first: it hears nobody, and everybody hears it.
    for peer in (1..=3).filter(|id| *id != away) {
        cluster.network.cut(peer, away);
    }
    let quiet = Instant::now();
    let mut n = 0;
    while quiet.elapsed() < Duration::from_millis(1500) {
        n += 1;
        node.propose(set("n", n)).await.unwrap();
    }
    cluster.network.heal();
    eventually("it is back", || cluster.nodes[&away].1.lock().unwrap().1.values.get("n") == Some(&n)).await;
    assert_eq!((cluster.leader().await, cluster.term()), (leader, term), "no election");
    cluster.stop().await;
}

/// The others hear the leader and say so when they are asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_alone_misses_the_leader_gets_no_pre_vote() {
    let (on, to, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let lossy = |end| -> Arc<dyn PeerTransport> {
        Arc::new(Lossy { end, kind: PeerRpc::Append, to: to.clone(), on: on.clone(), asked: asked.clone() })
    };
    let cluster = Cluster::over(3, Tuning::fast(), lossy).await;
    let (leader, term) = (cluster.leader().await, cluster.term());
    cluster.node(leader).propose(set("a", 1)).await.unwrap();
    // All logs are alike, so that a log that is behind cannot be what the others object to.
    cluster.converged().await;
    to.store((1..=3).find(|id| *id != leader).unwrap(), Ordering::Relaxed);
    on.store(true, Ordering::Relaxed);
    eventually("it has asked several times", || asked.load(Ordering::Relaxed) >= 10).await;
    on.store(false, Ordering::Relaxed);
    cluster.node(leader).propose(set("b", 1)).await.unwrap();
    assert_eq!(cluster.converged().await.values["b"], 1);
    assert_eq!((cluster.leader().await, cluster.term()), (leader, term), "no election");
    cluster.stop().await;
}

/// The answers of the others are lost, the leader's messages are not: without a step-down nobody could commit anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_heard_but_does_not_hear_steps_down() {
    let cluster = Cluster::found(3, Tuning::fast()).await;
    let old = cluster.leader().await;
    for peer in (1..=3).filter(|id| *id != old) {
        cluster.network.cut(peer, old);
    }
    eventually("it no longer counts as leader", || !*cluster.node(old).is_leader().borrow()).await;
    eventually("another one leads", || cluster.nodes.iter().any(|(id, (n, _))| *id != old && *n.is_leader().borrow())).await;
    eventually("it knows", || cluster.node(old).status().role != Role::Leader).await;
    cluster.network.heal();
    let leader = cluster.leader().await;
    cluster.node(leader).propose(set("a", 1)).await.unwrap();
    cluster.converged().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_stops_counting_as_one_before_long() {
    let cluster = Cluster::found(3, Tuning::fast()).await;
    let old = cluster.leader().await;
    cluster.network.disconnect(old);
    for peer in (1..=3).filter(|id| *id != old) {
        cluster.network.cut(old, peer);
    }
    eventually("another one leads", || cluster.nodes.iter().any(|(id, (n, _))| *id != old && *n.is_leader().borrow())).await;
    let both = Instant::now();
    eventually("the old one does not", || !*cluster.node(old).is_leader().borrow()).await;
    assert!(both.elapsed() < Duration::from_secs(2), "two leaders for {:?}", both.elapsed());
    cluster.stop().await;
}

#[derive(Debug)]
struct Seeded(Mutex<u64>);

impl super::super::runtime::Hooks for Seeded {
    fn random(&self) -> u64 {
        let mut x = self.0.lock().unwrap();
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
        *x
    }

    fn spawned(&self, _: tokio::task::AbortHandle) {}
}

/// Calls to a server that is gone never end, as with a host that lost its power.
#[derive(Debug)]
struct Silent(Arc<dyn PeerTransport>, Arc<AtomicU64>);

impl PeerTransport for Silent {
    fn call(&self, to: Peer, kind: PeerRpc, body: bytes::Bytes, ttl: Duration) -> BoxFuture<'static, Result<bytes::Bytes, PeerError>> {
        if self.1.load(Ordering::Relaxed) == to.id {
            return Box::pin(std::future::pending());
        }
        self.0.call(to, kind, body, ttl)
    }
}

/// Under a virtual clock: who leads after the leader's death and has written, in which term and after how long.
async fn death_under_a_virtual_clock(seed: u64) -> (u64, u64, Duration) {
    let gone = Arc::new(AtomicU64::new(0));
    let hooks = Arc::new(Seeded(Mutex::new(seed)));
    super::super::runtime::scope(hooks, async {
        let tuning = Tuning { io: IoMode::Inline, ..Tuning::fast() };
        let silent = |end| -> Arc<dyn PeerTransport> { Arc::new(Silent(end, gone.clone())) };
        let cluster = Cluster::over(5, tuning, silent).await;
        let old = cluster.leader().await;
        cluster.node(old).propose(set("a", 1)).await.unwrap();
        let died = tokio::time::Instant::now();
        gone.store(old, Ordering::Relaxed);
        for peer in (1..=5).filter(|id| *id != old) {
            cluster.network.cut(old, peer);
        }
        let mut leader = None;
        while leader.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            leader = cluster.nodes.iter().find(|(id, (n, _))| **id != old && *n.is_leader().borrow()).map(|(id, _)| *id);
        }
        let leader = leader.unwrap();
        cluster.node(leader).propose(set("b", 1)).await.unwrap();
        let result = (leader, cluster.node(leader).status().term, died.elapsed());
        cluster.stop().await;
        result
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn one_round_elects_the_next_leader_and_a_seed_repeats_it() {
    for seed in 1..=20 {
        let first = death_under_a_virtual_clock(seed).await;
        assert_eq!(first.1, 2, "seed {seed}: {first:?} took more than one round");
        assert!(first.2 >= Duration::from_millis(120) && first.2 <= Duration::from_millis(460), "seed {seed}: {first:?}");
        assert_eq!(first, death_under_a_virtual_clock(seed).await, "seed {seed} does not repeat");
    }
}
