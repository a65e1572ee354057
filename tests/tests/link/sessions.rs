//! Sessions of agents that belong here.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use optimus_agent::link::{AgentIdentity, LinkStatus, join};
use optimus_common::protocol::{ALPN_AGENT, ALPN_JOIN, Desired, Hello, LogRequest, Message, Ping, Welcome};
use optimus_common::{AllocId, Span, TokenId};
use optimus_control_plane::agent_calls::{AgentCallError, AgentCalls};
use optimus_core::state::Node;
use optimus_host::transport::{FrameReader, FrameWriter};

use crate::support::*;

async fn joined(server: &Server, test: &TestEnv, dir: &Path) -> AgentIdentity {
    join(&server.token(1).await, "host-1", dir, &test.env).await.unwrap()
}

#[tokio::test]
async fn a_desired_set_reaches_the_node_and_its_report_comes_back() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let node = identity.node;
    let first = server.store.place(node);
    let workloads = Arc::new(FakeWorkloads::default());
    workloads.full.lock().unwrap().push(status(first, 1));
    let agent = Agent::start(identity, workloads.clone(), &test.env);
    agent.connected().await;
    assert!(server.store.is_up(node));
    assert_eq!(server.store.now().nodes[&node].facts.name, "test-host");
    until("the first set is there", || workloads.ids() == [first]).await;
    until("the full report is there", || server.store.status_of(first).is_some_and(|s| s.seq == 1)).await;

    let second = server.store.place(node);
    let placed = Instant::now();
    until("the change is pushed", || workloads.ids().len() == 2).await;
    assert!(placed.elapsed() < Duration::from_secs(1), "a push waits for no timer: {:?}", placed.elapsed());
    workloads.report(status(second, 4));
    until("the change is reported", || server.store.status_of(second).is_some_and(|s| s.seq == 4)).await;

    // What does not concern the node is not pushed, and an older status changes nothing.
    let sets = workloads.sets();
    workloads.report(status(second, 3));
    workloads.report(status(first, 2));
    until("the next status is there", || server.store.status_of(first).is_some_and(|s| s.seq == 2)).await;
    assert_eq!(server.store.status_of(second).unwrap().seq, 4);
    assert_eq!(workloads.sets(), sets, "a status is no reason to push");
    assert_eq!(server.gateway.connected(), [node]);
    assert!(server.gateway.last_heard(node).unwrap() < Span::secs(3));
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_node_speaks_for_its_own_allocations_only() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let (a_dir, b_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let (a, b) = (joined(&server, &test, a_dir.path()).await, joined(&server, &test, b_dir.path()).await);
    let (of_a, of_b) = (server.store.place(a.node), server.store.place(b.node));
    let liar = Agent::start(a, Arc::new(FakeWorkloads::default()), &test.env);
    liar.workloads.report(status(of_b, 9));
    liar.workloads.report(status(of_a, 1));
    until("its own status is there", || server.store.status_of(of_a).is_some()).await;
    assert_eq!(server.store.status_of(of_b), None);
    assert_eq!(liar.workloads.ids(), [of_a], "it is told of its own only");
    liar.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn an_agent_comes_back_when_its_server_restarts() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let (node, address) = (identity.node, server.address);
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let store = server.stop().await;
    until("the agent has noticed", || !matches!(*agent.status.borrow(), LinkStatus::Connected { .. })).await;
    let alloc = store.place(node);
    let server = Server::start_on(&test, dir.path(), store, address).await;
    let back = Instant::now();
    agent.connected().await;
    until("the change made meanwhile is there", || agent.workloads.ids() == [alloc]).await;
    assert!(back.elapsed() < Duration::from_secs(5), "back after {:?}, longer than a lease", back.elapsed());
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_silent_node_is_declared_down_and_comes_back_up() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let node = identity.node;
    let agent = Agent::start(identity.clone(), Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    agent.stop().await;
    let left = Instant::now();
    until("the node is down", || !server.store.is_up(node)).await;
    let took = left.elapsed();
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(8), "declared down after {took:?}; the lease is 5 s");
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    until("the node is up", || server.store.is_up(node)).await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_removed_node_is_cut_off_and_told_why() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let node = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let row = server.store.now().nodes[&node].clone();
    server.store.edit(|state| {
        state.nodes.remove(&node);
    });
    let removed = Instant::now();
    until("the agent is refused", || matches!(&*agent.status.borrow(), LinkStatus::Refused { code, .. } if code == "OPT-1202")).await;
    assert!(removed.elapsed() < Duration::from_secs(5), "cut off after {:?}", removed.elapsed());
    // Another key on record is no better.
    server.store.edit(|state| {
        state.nodes.insert(node, Arc::new(Node { key_fingerprint: vec![0; 32], ..(*row).clone() }));
    });
    until("it is told about the key", || matches!(&*agent.status.borrow(), LinkStatus::Refused { message, .. } if message.contains("key")))
        .await;
    // It keeps trying, so putting things right is enough.
    server.store.edit(|state| {
        state.nodes.insert(node, row);
    });
    agent.connected().await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn the_newest_session_of_a_node_wins() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let first = Agent::start(identity.clone(), Arc::new(FakeWorkloads::default()), &test.env);
    first.connected().await;
    let mut status = first.status.clone();
    status.borrow_and_update();
    let second = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    second.connected().await;
    tokio::time::timeout(PATIENCE, status.changed()).await.unwrap().unwrap();
    let seen = status.borrow_and_update().clone();
    assert!(matches!(&seen, LinkStatus::Disconnected { reason } if reason.contains("newer session")), "{seen:?}");
    assert_eq!(server.gateway.connected().len(), 1);
    first.stop().await;
    second.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_does_not_lead_sends_agents_on() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    server.store.lead(false);
    until("the session is closed", || server.gateway.connected().is_empty()).await;
    until("the agent says so", || matches!(&*agent.status.borrow(), LinkStatus::Disconnected { reason } if reason.contains("lead"))).await;
    server.store.lead(true);
    agent.connected().await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn certificates_are_renewed_at_half_life_and_after_their_expiry() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let mut identity = joined(&server, &test, node_dir.path()).await;
    for (age, what) in [(13, "past half its life"), (26, "expired"), (29 * 24, "expired for weeks")] {
        test.advance(Span(age * HOUR.0));
        let before = identity.not_after;
        let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
        agent.connected().await;
        let stored = || AgentIdentity::open(node_dir.path()).unwrap().unwrap();
        until("the renewed certificate is stored", || stored().not_after > before).await;
        agent.stop().await;
        identity = stored();
        assert!(identity.not_after > test.env.clock.now(), "{what}");
        assert_eq!(server.store.now().nodes[&identity.node].certificate_expires_at, identity.not_after);
    }
    // Beyond the grace the door is shut. The server was off as well, and makes itself a certificate at its start.
    let server = server.restart_after(&test, dir.path(), Span(402 * 24 * HOUR.0)).await;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    until("the agent is refused", || matches!(&*agent.status.borrow(), LinkStatus::Refused { message, .. } if message.contains("expired")))
        .await;
    agent.stop().await;
    server.stop().await;
}

/// Servers and agents were off for a hundred days: all of them come back by themselves, but for the revoked one.
#[tokio::test]
async fn after_a_hundred_days_off_agents_come_back_and_a_revoked_one_does_not() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let (node_dir, revoked_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let revoked = joined(&server, &test, revoked_dir.path()).await;
    let server = server.restart_after(&test, dir.path(), Span(100 * 24 * HOUR.0)).await;
    server.store.edit(|state| {
        state.nodes.remove(&revoked.node);
    });
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let refused = Agent::start(revoked, Arc::new(FakeWorkloads::default()), &test.env);
    until("the revoked agent is refused", || matches!(&*refused.status.borrow(), LinkStatus::Refused { .. })).await;
    agent.stop().await;
    refused.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_node_that_is_removed_loses_its_session() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let node = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    server.store.edit(|state| {
        state.nodes.remove(&node);
    });
    until("the session is closed", || server.gateway.connected().is_empty()).await;
    until("the agent is refused", || matches!(&*agent.status.borrow(), LinkStatus::Refused { .. })).await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn logs_stream_with_back_pressure_and_end_when_nobody_listens() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let node = identity.node;
    let alloc = AllocId(test.env.new_id());
    let ask = |alloc, follow| LogRequest { alloc, since: None, tail: None, follow };
    assert_eq!(server.gateway.logs(node, ask(alloc, false)).await.unwrap_err(), AgentCallError::NotConnected);
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let error = server.gateway.logs(node, ask(alloc, false)).await.unwrap_err();
    assert!(matches!(&error, AgentCallError::Refused(text) if text.contains(&alloc.to_string())), "{error}");

    // 5 MB, read slowly: the agent must not read ahead more than the windows hold.
    const LINES: u32 = 5000;
    *agent.workloads.lines.lock().unwrap() = Some((alloc, LINES));
    let mut lines = server.gateway.logs(node, ask(alloc, false)).await.unwrap();
    let sent = || agent.workloads.lines_sent.load(Ordering::Relaxed);
    let mut before = u64::MAX;
    let mut still = 0;
    while still < 20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        still = if sent() == before { still + 1 } else { 0 };
        before = sent();
    }
    assert!(before < 2000, "{before} lines were read ahead of a reader that reads none");
    // A stuck log stops neither the heartbeat nor reports.
    let placed = server.store.place(node);
    until("a push arrives beside a stuck log", || agent.workloads.ids() == [placed]).await;
    let mut seen = 0u32;
    while let Some(chunk) = tokio::time::timeout(PATIENCE, lines.recv()).await.unwrap() {
        for line in chunk.lines {
            assert!(line.text.starts_with(&format!("line {seen} ")));
            seen += 1;
        }
    }
    assert_eq!(seen, LINES);

    // A quiet log is accepted at once; dropping it ends it at the agent.
    *agent.workloads.lines.lock().unwrap() = Some((alloc, 0));
    let weak = Arc::downgrade(&agent.workloads);
    let strong = || weak.strong_count();
    let at_rest = strong();
    let following = server.gateway.logs(node, ask(alloc, true)).await.unwrap();
    assert!(strong() > at_rest, "the agent follows");
    drop(following);
    until("the agent has stopped following", || strong() == at_rest).await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn an_older_generation_is_not_sent_and_not_taken() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = joined(&server, &test, node_dir.path()).await;
    let alloc = server.store.place(identity.node);
    // The agent holds a set this server has not reached yet.
    let workloads = Arc::new(FakeWorkloads::default());
    let held = server.store.now().index + 5;
    workloads.generation.store(held, Ordering::Relaxed);
    let agent = Agent::start(identity.clone(), workloads.clone(), &test.env);
    agent.connected().await;
    while server.store.now().index < held {
        assert_eq!(workloads.sets(), 0, "index {} against {held}", server.store.now().index);
        server.store.edit(|state| {
            state.tokens.remove(&TokenId(uuid::Uuid::nil()));
        });
    }
    until("the set comes once the server has caught up", || workloads.ids() == [alloc]).await;
    assert_eq!(workloads.refused.load(Ordering::Relaxed), 0);
    agent.stop().await;

    // A server that sends one all the same: the agent keeps what it has, and the session stands.
    let config = server.identity.quic_server(Arc::new(optimus_host::tls::NoPins)).unwrap();
    let address = server.address;
    let cluster = server.identity.cluster();
    let _ = server.stop().await;
    let endpoint = loop {
        match quinn::Endpoint::server(config.clone(), address) {
            Ok(endpoint) => break endpoint,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let workloads = Arc::new(FakeWorkloads::default());
    let agent = Agent::start(identity, workloads.clone(), &test.env);
    let connection = endpoint.accept().await.unwrap().await.unwrap();
    let (send, receive) = connection.accept_bi().await.unwrap();
    let (mut reader, mut writer) = (FrameReader::new(receive, 1 << 20), FrameWriter::new(send));
    let hello: Hello = match reader.next().await.unwrap() {
        Some(Message::Hello(hello)) => hello,
        other => panic!("{other:?}"),
    };
    assert_eq!(hello.generation, 0);
    writer.send(Welcome { version: 1, cluster, heartbeat: Span::secs(1) }).await.unwrap();
    writer.send(Desired { generation: 50, allocs: vec![] }).await.unwrap();
    until("the newer is taken", || workloads.sets() == 1).await;
    writer.send(Desired { generation: 49, allocs: vec![] }).await.unwrap();
    until("the older is refused", || workloads.refused.load(Ordering::Relaxed) == 1).await;
    assert_eq!(workloads.generation.load(Ordering::Relaxed), 50);
    writer.send(Ping { n: 77 }).await.unwrap();
    loop {
        match tokio::time::timeout(PATIENCE, reader.next()).await.unwrap().unwrap() {
            Some(Message::Pong(pong)) if pong.n == 77 => break,
            Some(Message::Report(report)) => assert!(report.generation == 0 || report.generation == 50),
            other => panic!("{other:?}"),
        }
    }
    agent.stop().await;
}

#[test]
fn the_protocols_have_names_of_their_own() {
    assert_ne!(ALPN_AGENT, ALPN_JOIN);
}
