//! The CA is replaced under agents that are connected, asleep, or new; and clocks that are hours off.

use std::path::Path;
use std::sync::Arc;

use optimus_agent::link::{AgentIdentity, JoinError, LinkStatus, join, join_or_open};
use optimus_common::join_token::Role;
use optimus_common::{Span, Timestamp, TokenId};
use optimus_control_plane::rotation;
use optimus_control_plane::store::Store;
use optimus_core::state::{Applied, Command, EventKind, LEVEL, RotationPhase, ServerFacts};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::*;

const DAY: Span = Span(24 * HOUR.0);

/// A server whose identity follows the state and which moves rotations on.
struct Rotating {
    server: Server,
    store: Store,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Rotating {
    fn follow(server: Server, test: &TestEnv) -> Self {
        let (store, stop) = (Store::new(server.store.clone(), test.env.clone()), CancellationToken::new());
        let tasks = vec![
            tokio::spawn({
                let (identity, store, stop) = (server.identity.clone(), store.clone(), stop.clone());
                async move { identity.run(store, stop).await }
            }),
            tokio::spawn(rotation::run(store.clone(), stop.clone())),
        ];
        Rotating { server, store, stop, tasks }
    }

    async fn start(test: &TestEnv, dir: &Path) -> Self {
        let server = Server::start(test, dir).await;
        let rotating = Self::follow(server, test);
        let facts = ServerFacts { name: "s1".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: LEVEL };
        let key_fingerprint = rotating.server.identity.key_fingerprint().to_vec();
        rotating.done(Command::AdmitServer { token: None, server: facts, key_fingerprint }).await;
        rotating.done(Command::RaiseVersion { to: LEVEL }).await;
        rotating
    }

    async fn done(&self, command: Command) {
        let applied = self.store.propose(command).await.unwrap();
        assert!(matches!(applied, Applied::Done { .. }), "{applied:?}");
    }

    async fn end(self) -> Server {
        self.stop.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
        self.server
    }

    fn phase(&self) -> Option<RotationPhase> {
        self.server.store.now().cluster.unwrap().authorities.rotation.map(|r| r.phase)
    }

    fn signing(&self) -> u32 {
        self.server.store.now().cluster.unwrap().authorities.signing
    }
}

#[tokio::test]
async fn the_ca_is_replaced_while_agents_stay_sleep_for_weeks_and_join() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let (awake_dir, asleep_dir, new_dir, late_dir) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Rotating::start(&test, dir.path()).await;
    let old_token = cluster.server.token(5).await;
    let awake = join(&old_token, "awake", awake_dir.path(), &test.env).await.unwrap();
    let asleep = join(&old_token, "asleep", asleep_dir.path(), &test.env).await.unwrap();
    let (awake_node, asleep_node) = (awake.node, asleep.node);
    let awake = Agent::start(awake, Arc::new(FakeWorkloads::default()), &test.env);
    awake.connected().await;
    let first_ca = cluster.server.identity.ca_der();

    cluster.done(cluster.server.identity.next_ca(DAY).unwrap()).await;
    until("the new CA signs", || cluster.signing() == 1).await;
    assert_ne!(cluster.server.identity.ca_der(), first_ca);
    until("the agent that is connected has a certificate of it", || {
        let row = cluster.server.store.now().nodes[&awake_node].clone();
        (row.ca_trusted, row.ca_signer) == (1, 1)
    })
    .await;
    assert!(matches!(&*awake.status.borrow(), LinkStatus::Connected { .. }));
    assert_eq!(cluster.phase(), Some(RotationPhase::Sign), "the node that sleeps holds it up");
    let why = optimus_core::state::explain_rotation(&cluster.server.store.now()).unwrap();
    assert!(why.contains("; 1 node still holds a certificate of the old CA: asleep; "), "{why}");

    // Tokens of both CAs let nodes in.
    let new = join(&old_token, "new", new_dir.path(), &test.env).await.unwrap();
    let late = join(&cluster.server.token(1).await, "late", late_dir.path(), &test.env).await.unwrap();
    let agents = [new, late].map(|identity| Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env));
    for agent in &agents {
        agent.connected().await;
    }
    awake.stop().await;

    // Eighty days later, in the middle of the rotation, the server starts again and the sleeper wakes up.
    let server = cluster.end().await.restart_after(&test, dir.path(), Span(80 * DAY.0)).await;
    let cluster = Rotating::follow(server, &test);
    let asleep = Agent::start(asleep, Arc::new(FakeWorkloads::default()), &test.env);
    let awake = AgentIdentity::open(awake_dir.path()).unwrap().unwrap();
    let awake = Agent::start(awake, Arc::new(FakeWorkloads::default()), &test.env);
    asleep.connected().await;
    awake.connected().await;
    until("the old CA is dropped", || cluster.phase().is_none()).await;
    assert_eq!(cluster.server.store.now().nodes[&asleep_node].ca_signer, 1);
    until("the server trusts the new CA alone", || cluster.server.identity.trusted().len() == 1).await;
    assert_eq!(cluster.server.identity.trusted().len(), 1);

    // From disk, with the token of long ago still on the command line: the same node of the same cluster.
    asleep.stop().await;
    let again = join_or_open(Some(&old_token), "asleep", asleep_dir.path(), &test.env).await.unwrap();
    assert_eq!(again.node, asleep_node);
    let again = Agent::start(again, Arc::new(FakeWorkloads::default()), &test.env);
    again.connected().await;
    // But it lets nobody in any more: its CA is gone (and so is its time).
    let stranger = tempfile::tempdir().unwrap();
    assert!(matches!(
        join(&old_token, "stranger", stranger.path(), &test.env).await,
        Err(JoinError::Token(_) | JoinError::WrongCluster { .. })
    ));
    for agent in [again, awake].into_iter().chain(agents) {
        agent.stop().await;
    }
    cluster.end().await.stop().await;
}

#[tokio::test]
async fn a_node_that_was_away_all_the_time_renews_with_its_key_and_after_two_rotations_it_is_told_to_join() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let cluster = Rotating::start(&test, dir.path()).await;
    let token = cluster.server.token(3).await;
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let mut nodes = vec![];
    for (n, dir) in dirs.iter().enumerate() {
        nodes.push(join(&token, &format!("host-{n}"), dir.path(), &test.env).await.unwrap());
    }
    let [once, twice, removed] = <[AgentIdentity; 3]>::try_from(nodes).unwrap();
    cluster.done(Command::RemoveNode { node: removed.node }).await;
    let rotate = async |to: u32| {
        cluster.done(cluster.server.identity.next_ca(DAY).unwrap()).await;
        until("the new CA signs", || cluster.signing() == to).await;
        assert_eq!(cluster.phase(), Some(RotationPhase::Sign), "nodes are away");
        test.advance(DAY);
        cluster.done(Command::RotationWaited { number: to, phase: RotationPhase::Sign, waited: DAY }).await;
        until("the overlap is over", || cluster.phase().is_none()).await;
        until("the server trusts the new CA alone", || cluster.server.identity.trusted().len() == 1).await;
    };
    rotate(1).await;
    assert_eq!(cluster.server.store.now().nodes[&once.node].ca_signer, 0);

    // Its certificate is of a CA nobody trusts, and it trusts that CA alone.
    let node = once.node;
    let agent = Agent::start(once, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    until("its certificate is of the new CA", || cluster.server.store.now().nodes[&node].ca_signer == 1).await;
    let stranger = Agent::start(removed, Arc::new(FakeWorkloads::default()), &test.env);
    let why = stranger.refused().await;
    assert!(why.contains("its CA is not known here"), "{why}");
    stranger.stop().await;

    agent.stop().await;
    rotate(2).await;
    let agent = Agent::start(AgentIdentity::open(dirs[0].path()).unwrap().unwrap(), Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let lost = Agent::start(twice, Arc::new(FakeWorkloads::default()), &test.env);
    let why = lost.refused().await;
    assert!(why.contains("replaced more than once while this node was away"), "{why}");
    for agent in [agent, lost] {
        agent.stop().await;
    }
    cluster.end().await.stop().await;
}

#[tokio::test]
async fn a_rotation_that_is_taken_back_changes_nothing_for_an_agent() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Rotating::start(&test, dir.path()).await;
    // A server that is admitted and never comes holds the announcement up.
    let id = TokenId(test.env.new_id());
    let expires_at = Timestamp(u64::MAX);
    cluster.done(Command::CreateToken { id, secret_hash: vec![1; 32], expires_at, uses: 1, role: Role::Server }).await;
    let facts = ServerFacts { name: "s2".into(), address: "h:3".into(), api: "h:4".into(), version: "1".into(), level: LEVEL };
    cluster.done(Command::AdmitServer { token: Some(id), server: facts, key_fingerprint: vec![2; 32] }).await;
    let identity = join(&cluster.server.token(1).await, "host-1", node_dir.path(), &test.env).await.unwrap();
    let node = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    cluster.done(cluster.server.identity.next_ca(DAY).unwrap()).await;
    until("the agent trusts the new CA", || cluster.server.store.now().nodes[&node].ca_trusted == 1).await;
    assert_eq!(cluster.phase(), Some(RotationPhase::Announce));
    let why = optimus_core::state::explain_rotation(&cluster.server.store.now()).unwrap();
    assert!(why.contains("; 1 server has not taken the new CA: ") && why.contains(" (s2); given up in 1h"), "{why}");
    cluster.done(Command::AbortRotation { number: 1 }).await;
    until("the agent trusts the old CA alone", || cluster.server.store.now().nodes[&node].ca_trusted == 0).await;
    assert_eq!(cluster.server.identity.trusted().len(), 1);
    // The announcement that nobody takes back is given up by itself.
    cluster.done(cluster.server.identity.next_ca(DAY).unwrap()).await;
    test.advance(Span(50 * DAY.0)); // says nothing: clocks are set
    cluster.done(Command::RotationWaited { number: 2, phase: RotationPhase::Announce, waited: HOUR }).await;
    until("it is given up", || cluster.phase().is_none()).await;
    assert!(matches!(&*agent.status.borrow(), LinkStatus::Connected { .. }));
    agent.stop().await;
    cluster.end().await.stop().await;
}

/// Hours, both ways: the node works, and people are told.
#[tokio::test]
async fn a_node_whose_clock_is_hours_off_works_and_is_reported() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let cluster = Rotating::start(&test, dir.path()).await;
    let mut agents = vec![];
    for (n, hours) in [-30i64, -3, 3, 30].into_iter().enumerate() {
        let node_dir = tempfile::tempdir().unwrap();
        let identity = join(&cluster.server.token(1).await, &format!("host-{n}"), node_dir.path(), &test.env).await.unwrap();
        let (node, skewed) = (identity.node, TestEnv::new());
        skewed.shift(hours * 3_600_000);
        let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &skewed.env);
        agents.push((node, hours, skewed, agent, node_dir));
    }
    for (node, hours, skewed, agent, _) in &agents {
        agent.connected().await;
        until("the skew is on record", || cluster.server.store.now().nodes[node].clock_skew_ms.is_some()).await;
        let told = cluster.server.store.now().nodes[node].clock_skew_ms.unwrap();
        assert!((told - hours * 3_600_000).abs() < 2_000, "{hours} h: {told} ms");
        assert!(matches!(&*agent.status.borrow(), LinkStatus::Connected { .. }));
        // Set right, and the word is taken back.
        skewed.shift(-hours * 3_600_000);
    }
    for (node, _, _, agent, _dir) in agents {
        until("the skew is taken back", || cluster.server.store.now().nodes[&node].clock_skew_ms.is_none()).await;
        agent.stop().await;
    }
    let said = cluster.server.store.now().events.iter().filter(|(_, e)| e.kind == EventKind::ClockSkew).count();
    assert_eq!(said, 8, "each is said once, and taken back once");
    cluster.end().await.stop().await;
}
