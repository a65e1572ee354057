//! Three servers with the real state on real directories; two are destroyed, the third is recovered.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use optimus_common::{Span, TokenId};
use optimus_core::state::Command;
use optimus_host::env::HostEnv;

use super::*;
use crate::consensus::{CoreMachine, RaftConsensus};
use crate::identity::{Identity, ServerNames};
use crate::raft::{MemoryNetwork, RaftConfig, RaftNode, Role, Tuning};
use crate::store::Store;

/// Says of every server what the test wants.
struct Answers(Vec<u64>);

impl Reach for Answers {
    fn reaches(&self, peer: &Peer) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        let answers = self.0.contains(&peer.id);
        Box::pin(async move { answers })
    }
}

struct Server {
    raft: RaftNode<CoreMachine>,
    store: Store,
}

async fn server(dir: &Path, id: u64, network: &MemoryNetwork) -> Server {
    let disk = HostDisk::open(dir.join(RAFT_DIR)).unwrap();
    let (machine, consensus) = RaftConsensus::machine();
    let config = RaftConfig { node_id: id, disk: Arc::new(disk), machine, tuning: Tuning::fast(), network: network.transport(id) };
    let raft = RaftNode::start(config).await.unwrap();
    network.connect(&raft);
    let store = Store::new(Arc::new(consensus(raft.clone())), HostEnv::new());
    Server { raft, store }
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn token(store: &Store) -> TokenId {
    let id = TokenId(store.env.new_id());
    let expires_at = store.env.clock.now() + Span::secs(3600);
    let command = Command::CreateToken { id, secret_hash: vec![1; 32], expires_at, uses: 1, role: Default::default() };
    assert!(matches!(store.propose(command).await.unwrap(), Applied::Done { .. }));
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_survivor_goes_on_alone_with_all_it_held_and_the_dead_cannot_come_back() {
    let env = HostEnv::new();
    let temp = tempfile::tempdir().unwrap();
    let dirs: BTreeMap<u64, PathBuf> = (1..=3).map(|id| (id, temp.path().join(format!("s{id}")))).collect();
    let network = MemoryNetwork::new();
    let mut servers = BTreeMap::new();
    for (id, dir) in &dirs {
        std::fs::create_dir(dir).unwrap();
        servers.insert(*id, server(dir, *id, &network).await);
    }
    servers[&1].raft.initialize(dirs.keys().map(|id| (*id, format!("s{id}:1"))).collect()).await.unwrap();
    let mut leader = 0;
    eventually("a leader", || {
        let found = servers.iter().find(|(_, s)| s.raft.status().role == Role::Leader);
        found.inspect(|(id, _)| leader = **id).is_some()
    })
    .await;
    let names = ServerNames { server: leader, names: vec![] };
    let identity = Identity::found(&dirs[&leader], &servers[&leader].store, &names).await.unwrap();
    let mut tokens = Vec::new();
    for _ in 0..20 {
        tokens.push(token(&servers[&leader].store).await);
    }
    // A follower survives: what was acknowledged must have come to it, as to any quorum of two it was part of.
    let survivor = *dirs.keys().find(|id| **id != leader).unwrap();
    let last = *servers[&leader].raft.applied().borrow();
    servers[&survivor].raft.wait_applied(last).await.unwrap();
    std::fs::copy(dirs[&leader].join("root.key"), dirs[&survivor].join("root.key")).unwrap();

    // While it runs, nothing can be recovered.
    assert!(matches!(inspect(&dirs[&survivor]), Err(RecoverError::Open { .. })));
    for id in [1, 2, 3] {
        network.disconnect(id);
    }
    let old: Vec<u64> = dirs.keys().copied().filter(|id| *id != survivor).collect();
    for (_, server) in servers {
        server.raft.shutdown().await;
    }

    let found = inspect(&dirs[&survivor]).unwrap();
    assert_eq!((found.found.node_id, found.addr()), (survivor, Some(format!("s{survivor}:1").as_str())));
    // Not while a majority is there: one other server is enough, with this one.
    for reachable in [vec![old[0]], vec![old[1]], old.clone()] {
        let refused = refuse_reachable_majority(&found.found, &Answers(reachable.clone())).await.unwrap_err();
        assert!(refused.to_string().contains("start this server instead"), "{refused}");
    }
    let reached = refuse_reachable_majority(&found.found, &Answers(vec![])).await.unwrap();
    assert_eq!(reached, Reached { answering: vec![], silent: old.clone() });
    let stranger = RootKey::create(temp.path(), &env).unwrap();
    assert!(matches!(found.root_key(Some(stranger)), Err(RecoverError::RootKey(_))));
    let key = found.root_key(None).unwrap();
    let held = found.found.last.1;
    let recovered = found.write(&key, "new:1", &env).unwrap();
    assert!(recovered.aside.join("raft.redb").exists(), "the old store is kept");

    // It leads alone, under its new id, with everything.
    let (network, id) = (MemoryNetwork::new(), recovered.beginning.server);
    assert!(id > held + lineage::GAP - 1);
    let alone = server(&dirs[&survivor], id, &network).await;
    eventually("the survivor leads", || alone.raft.status().role == Role::Leader).await;
    assert_eq!(alone.raft.status().voters, [id]);
    let state = alone.store.state();
    assert_eq!(state.cluster.as_ref().unwrap().id, identity.cluster());
    assert!(tokens.iter().all(|t| state.tokens.contains_key(t)), "an acknowledged write is missing");
    assert!(state.index >= held + lineage::GAP);
    let names = ServerNames { server: id, names: vec![] };
    let again = Identity::found(&dirs[&survivor], &alone.store, &names).await.unwrap();
    assert_eq!(again.ca_der(), identity.ca_der());

    // A server of before comes back with its old store: neither takes the other for one of its own.
    let ghost = server(&dirs[&old[0]], old[0], &network).await;
    let term = alone.raft.status().term;
    token(&alone.store).await;
    assert_eq!(ghost.raft.status().leader, None);
    assert_eq!(alone.raft.status().term, term, "the ghost made it stand for election");
    assert!(!ghost.store.state().tokens.keys().eq(alone.store.state().tokens.keys()));
    ghost.raft.shutdown().await;

    // New servers join: learner first.
    let fresh = temp.path().join("fresh");
    std::fs::create_dir(&fresh).unwrap();
    let joined = *alone.raft.applied().borrow() + 1;
    let second = server(&fresh, joined, &network).await;
    alone.raft.add_learner(joined, "second:1").await.unwrap();
    alone.raft.change_voters([id, joined].into()).await.unwrap();
    let last = token(&alone.store).await;
    eventually("the new server holds everything", || {
        let state = second.store.state();
        state.tokens.contains_key(&last) && tokens.iter().all(|t| state.tokens.contains_key(t))
    })
    .await;
    alone.raft.shutdown().await;
    second.raft.shutdown().await;
}

#[tokio::test]
async fn a_majority_of_five_is_three_and_a_joint_one_needs_both_sets() {
    let found = |voters: Vec<BTreeSet<u64>>| Salvaged {
        machine: (),
        node_id: 1,
        term: 1,
        last: (1, 1),
        committed: 1,
        members: voters.iter().flatten().map(|id| (*id, String::new())).collect(),
        voters,
    };
    let ask = |found: Salvaged<()>, up: Vec<u64>| async move { refuse_reachable_majority(&found, &Answers(up)).await };
    let five = || found(vec![[1, 2, 3, 4, 5].into()]);
    assert!(ask(five(), vec![2]).await.is_ok());
    assert!(matches!(ask(five(), vec![2, 5]).await, Err(RecoverError::MajorityReachable { voters: 5, .. })));
    let joint = || found(vec![[1, 2, 3].into(), [1, 4, 5].into()]);
    assert!(ask(joint(), vec![2]).await.is_ok(), "the second set has no majority");
    assert!(ask(joint(), vec![2, 4]).await.is_err());
    assert!(matches!(ask(found(vec![[2, 3].into()]), vec![]).await, Err(RecoverError::NoVoter)));
    assert!(matches!(ask(found(vec![[1].into()]), vec![]).await, Err(RecoverError::Alone)));
}
