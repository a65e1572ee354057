//! The CA is replaced under agents that are connected, asleep, or new; and clocks that are hours off.

use std::path::Path;
use std::sync::Arc;

use optimus_agent::link::{AgentIdentity, JoinError, LinkStatus, join, join_or_open};
use optimus_common::Span;
use optimus_control_plane::rotation;
use optimus_control_plane::store::Store;
use optimus_core::state::{Applied, Command, RotationPhase, ServerFacts};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::*;

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
        let facts = ServerFacts { name: "s1".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: 2 };
        let key_fingerprint = rotating.server.identity.key_fingerprint().to_vec();
        rotating.done(Command::AdmitServer { token: None, server: facts, key_fingerprint }).await;
        rotating.done(Command::RaiseVersion { to: 2 }).await;
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
async fn the_ca_is_replaced_while_agents_stay_sleep_a_hundred_days_and_join() {
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

    cluster.done(cluster.server.identity.next_ca().unwrap()).await;
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
    assert!(why.ends_with("1 node still holds a certificate of the old CA: asleep"), "{why}");

    // Tokens of both CAs let nodes in.
    let new = join(&old_token, "new", new_dir.path(), &test.env).await.unwrap();
    let late = join(&cluster.server.token(1).await, "late", late_dir.path(), &test.env).await.unwrap();
    let agents = [new, late].map(|identity| Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env));
    for agent in &agents {
        agent.connected().await;
    }
    awake.stop().await;

    // A hundred days later, in the middle of the rotation, the server starts again and the sleeper wakes up.
    let server = cluster.end().await.restart_after(&test, dir.path(), Span(100 * 24 * HOUR.0)).await;
    let cluster = Rotating::follow(server, &test);
    let asleep = Agent::start(asleep, Arc::new(FakeWorkloads::default()), &test.env);
    let awake = AgentIdentity::open(awake_dir.path()).unwrap().unwrap();
    let awake = Agent::start(awake, Arc::new(FakeWorkloads::default()), &test.env);
    asleep.connected().await;
    awake.connected().await;
    until("the old CA is dropped", || cluster.phase().is_none()).await;
    assert_eq!(cluster.server.store.now().nodes[&asleep_node].ca_signer, 1);
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

/// Hours, both ways: the node works, and people are told.
#[tokio::test]
async fn a_node_whose_clock_is_hours_off_works_and_is_reported() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let cluster = Rotating::start(&test, dir.path()).await;
    for hours in [-30i64, -3, 3, 30] {
        let node_dir = tempfile::tempdir().unwrap();
        let identity = join(&cluster.server.token(1).await, "host-1", node_dir.path(), &test.env).await.unwrap();
        let (node, skewed) = (identity.node, TestEnv::new());
        skewed.shift(hours * 3_600_000);
        let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &skewed.env);
        agent.connected().await;
        until("the skew is on record", || cluster.server.store.now().nodes[&node].clock_skew_ms.is_some()).await;
        let told = cluster.server.store.now().nodes[&node].clock_skew_ms.unwrap();
        assert!((told - hours * 3_600_000).abs() < 2_000, "{hours} h: {told} ms");
        assert!(matches!(&*agent.status.borrow(), LinkStatus::Connected { .. }));
        // Set right, and the word is taken back.
        skewed.shift(-hours * 3_600_000);
        until("the skew is taken back", || cluster.server.store.now().nodes[&node].clock_skew_ms.is_none()).await;
        agent.stop().await;
    }
    cluster.end().await.stop().await;
}
