//! Peers that do not belong, and bytes that are no protocol. The server refuses, says why, and goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use optimus_agent::link::{LinkStatus, join};
use optimus_common::NodeId;
use optimus_common::codec;
use optimus_common::protocol::{
    ALPN_AGENT, ALPN_JOIN, Blob, Hello, JoinRequest, Message, NodeFacts, PROTOCOL, Refused, RenewRequest, Report,
};
use optimus_control_plane::identity::{Ca, CheckedRequest, Identity};
use optimus_core::state::Node;
use optimus_host::tls::{self, Key, SERVER_NAME};
use optimus_host::transport::{self, FrameReader, FrameWriter};
use quinn::{Connection, ConnectionError, Endpoint};

use crate::support::*;

/// A client that plays an agent badly.
struct Rogue {
    endpoint: Endpoint,
    address: SocketAddr,
    test: TestEnv,
}

/// A certificate, its key, and the CA its holder trusts.
struct Papers {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Key,
}

impl Rogue {
    fn new(server: &Server, test: &TestEnv) -> Self {
        Rogue { endpoint: transport::client_endpoint().unwrap(), address: server.address, test: test.clone() }
    }

    async fn dial(&self, config: rustls::ClientConfig) -> Result<Connection, ConnectionError> {
        let config = transport::client_config(config).unwrap();
        self.endpoint.connect_with(config, self.address, SERVER_NAME).unwrap().await
    }

    async fn with(&self, papers: &Papers) -> Result<Connection, ConnectionError> {
        let config = tls::member_client(&[&papers.ca], &papers.certificate, &papers.key, ALPN_AGENT, &self.test.env.clock).unwrap();
        self.dial(config).await
    }

    /// Without any certificate.
    async fn bare(&self, server: &Server, alpn: &[u8]) -> Result<Connection, ConnectionError> {
        self.dial(tls::pinned_client(server.identity.ca_fingerprint(), alpn, &self.test.env.clock).unwrap()).await
    }
}

/// What the server says to a first message, in the words of its refusal or its close.
async fn first_words(connection: Result<Connection, ConnectionError>, first: impl Into<Message>) -> String {
    let connection = match connection {
        Ok(connection) => connection,
        Err(error) => return transport::explain(&error),
    };
    let answer = async {
        let (send, receive) = connection.open_bi().await.map_err(|e| transport::explain(&e))?;
        let mut writer = FrameWriter::new(send);
        let _ = writer.send(first).await; // may be closed already: the answer says why
        match FrameReader::new(receive, 1 << 20).next().await {
            Ok(Some(Message::Refused(Refused { code, message }))) => Ok(format!("{code} {message}")),
            Ok(other) => Ok(format!("{other:?}")),
            Err(error) => Err(error.connection().map_or_else(|| error.to_string(), transport::explain)),
        }
    };
    match tokio::time::timeout(PATIENCE, answer).await.expect("the server answers") {
        Ok(text) | Err(text) => text,
    }
}

fn hello(node: NodeId) -> Hello {
    Hello { versions: PROTOCOL, node, generation: 0, facts: Blob::of(&NodeFacts { ports: (1, 2), ..NodeFacts::default() }) }
}

/// A node on record, and its papers.
fn admit(server: &Server, test: &TestEnv) -> (NodeId, Papers) {
    let (node, key) = (NodeId(test.env.new_id()), Key::generate().unwrap());
    let papers = papers(&server.identity, node, key);
    let now = test.env.clock.now();
    server.store.edit(|state| {
        let row = Node {
            id: node,
            facts: NodeFacts::default(),
            joined_at: now,
            up: false,
            changed_at: now,
            certificate_expires_at: now,
            key_fingerprint: papers.key.fingerprint().to_vec(),
            cordoned: false,
            blocked_ports: Default::default(),
            ca_trusted: 0,
            ca_signer: 0,
            clock_skew_ms: None,
            labels: Default::default(),
            pool: None,
            drain: None,
        };
        state.nodes.insert(node, Arc::new(row));
    });
    (node, papers)
}

fn papers(identity: &Identity, node: NodeId, key: Key) -> Papers {
    let request = CheckedRequest::parse(&key.request().unwrap()).unwrap();
    let certificate = identity.issue_agent(&request, node).unwrap().certificate;
    Papers { ca: identity.ca_der().to_vec(), certificate, key }
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused_on_both_sides() {
    let test = TestEnv::new();
    let (a_dir, b_dir, node_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (Server::start(&test, a_dir.path()).await, Server::start(&test, b_dir.path()).await);
    let (node, good) = admit(&a, &test);
    let rogue = Rogue::new(&a, &test);
    // Its certificate is B's, for the very node id; it trusts A.
    let mut forged = papers(&b.identity, node, Key::generate().unwrap());
    forged.ca = a.identity.ca_der().to_vec();
    let words = first_words(rogue.with(&forged).await, hello(node)).await;
    assert!(words.contains("refused the handshake"), "{words}");
    // A CA that calls itself A's, with another key.
    let (fake, _) = Ca::create(a.identity.cluster(), &test.env).unwrap();
    let key = Key::generate().unwrap();
    let request = CheckedRequest::parse(&key.request().unwrap()).unwrap();
    let certificate = fake.issue_agent(&request, node, &test.env).unwrap().certificate;
    let words = first_words(rogue.with(&Papers { ca: a.identity.ca_der().to_vec(), certificate, key }).await, hello(node)).await;
    assert!(words.contains("refused the handshake"), "{words}");
    assert!(!a.store.is_up(node));
    let words = first_words(rogue.with(&good).await, hello(node)).await;
    assert!(words.contains("Welcome"), "{words}");

    // An honest agent of B whose server's address now belongs to A does not trust A.
    let token = b.token(1).await;
    let identity = join(&token, "h", node_dir.path(), &test.env).await.unwrap();
    let (address, _) = (b.address, b.stop().await);
    let taken = Server::start_on(&test, a_dir.path(), a.store.clone(), address).await;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    until("the agent refuses the server", || {
        matches!(&*agent.status.borrow(), LinkStatus::Refused { message, .. } if message.contains("not a server of this node's cluster"))
    })
    .await;
    agent.stop().await;
    taken.stop().await;
    a.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_renews_and_does_nothing_else() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let (node, papers) = admit(&server, &test);
    let rogue = Rogue::new(&server, &test);
    test.advance(optimus_common::Span(25 * HOUR.0));
    let words = first_words(rogue.with(&papers).await, hello(node)).await;
    assert!(words.starts_with("OPT-1203"), "{words}");
    assert!(!server.store.is_up(node));
    // Nor with another key than its own.
    let other = RenewRequest { csr: Key::generate().unwrap().request().unwrap() };
    let words = first_words(rogue.with(&papers).await, other).await;
    assert!(words.starts_with("OPT-1202"), "{words}");
    let same = RenewRequest { csr: papers.key.request().unwrap() };
    let words = first_words(rogue.with(&papers).await, same.clone()).await;
    assert!(words.contains("RenewAnswer"), "{words}");
    // A removed node does not renew.
    server.store.edit(|state| {
        state.nodes.remove(&node);
    });
    let words = first_words(rogue.with(&papers).await, same).await;
    assert!(words.starts_with("OPT-1202"), "{words}");
    test.advance(optimus_common::Span(402 * 24 * HOUR.0));
    // By its own clock it is long expired; the handshake ends it.
    let words = first_words(rogue.with(&papers).await, hello(node)).await;
    assert!(words.contains("expired"), "{words}");
    server.stop().await;
}

#[tokio::test]
async fn only_the_holder_of_a_nodes_certificate_is_that_node() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let ((a, papers_a), (b, _)) = (admit(&server, &test), admit(&server, &test));
    let rogue = Rogue::new(&server, &test);
    // A's certificate, B's name.
    let words = first_words(rogue.with(&papers_a).await, hello(b)).await;
    assert!(words.starts_with("OPT-1202"), "{words}");
    // A certificate of ours for a node that is not on record, and for one whose key is another.
    let ghost = NodeId(test.env.new_id());
    let words = first_words(rogue.with(&papers(&server.identity, ghost, Key::generate().unwrap())).await, hello(ghost)).await;
    assert!(words.starts_with("OPT-1202"), "{words}");
    let words = first_words(rogue.with(&papers(&server.identity, b, Key::generate().unwrap())).await, hello(b)).await;
    assert!(words.starts_with("OPT-1202") && words.contains("key"), "{words}");
    // No certificate at all.
    let words = first_words(rogue.bare(&server, ALPN_AGENT).await, hello(a)).await;
    assert!(words.contains("certificate is required"), "{words}");
    // An agent's greeting where joins are served, with and without papers.
    let words = first_words(rogue.bare(&server, ALPN_JOIN).await, hello(a)).await;
    assert!(words.contains("join request was expected"), "{words}");
    // A protocol nobody serves, and the one only servers speak among themselves.
    for alpn in [b"optimus-raft/1".as_slice(), b"h3"] {
        assert!(rogue.bare(&server, alpn).await.is_err());
    }
    // A version nobody speaks.
    let words = first_words(rogue.with(&papers_a).await, Hello { versions: (7, 9), ..hello(a) }).await;
    assert!(words.starts_with("OPT-1204"), "{words}");
    assert!(!server.store.is_up(a) && !server.store.is_up(b));
    server.stop().await;
}

/// A small generator of our own, so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_changes_nothing_and_the_server_goes_on() {
    const SEED: u64 = 0x0971_3005;
    const DATAGRAMS: usize = 2000;
    const STREAMS: usize = 150;
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let identity = join(&server.token(1).await, "host-1", node_dir.path(), &test.env).await.unwrap();
    let honest = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    agent.connected().await;
    let mut random = Random(SEED);

    // Datagrams that are no QUIC, and some that begin like it.
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..DATAGRAMS {
        let length = 1 + random.below(1400);
        let mut packet = random.bytes(length);
        if n % 2 == 0 && packet.len() > 5 {
            packet[0] = 0xc0 | (packet[0] & 0x0f);
            packet[1..5].copy_from_slice(&1u32.to_be_bytes());
        }
        let _ = socket.send_to(&packet, server.address).await;
    }

    // Frames: random, mutated, cut off, too long, out of place; on both protocols.
    let (node, papers) = admit(&server, &test);
    let rogue = Rogue::new(&server, &test);
    let request = JoinRequest {
        versions: PROTOCOL,
        token_id: "x".into(),
        secret: "y".into(),
        csr: Key::generate().unwrap().request().unwrap(),
        name: "h".into(),
    };
    let greeting = Message::from(hello(node)).encode();
    let report = Message::from(Report { generation: 1, statuses: vec![Blob(vec![0xc1; 40])], gone: vec![] }).encode();
    let valid = [greeting.clone(), Message::from(request).encode(), report.clone()];
    for n in 0..STREAMS {
        let mut bytes = match n % 4 {
            0 => {
                let length = random.below(300);
                random.bytes(length)
            }
            1 => {
                let mut head = codec::frame(1, 1, &0u8);
                head[..4].copy_from_slice(&(random.next() as u32).to_le_bytes());
                head
            }
            _ => valid[random.below(valid.len())].clone(),
        };
        for _ in 0..random.below(6) {
            if !bytes.is_empty() {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(random.below(2) * random.below(20)));
        let connection = match n % 3 {
            0 => rogue.bare(&server, ALPN_JOIN).await,
            _ => rogue.with(&papers).await,
        };
        let connection = connection.unwrap_or_else(|e| panic!("stream {n}, seed {SEED:#x}: {e}"));
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        if n % 3 == 2 {
            let _ = send.write_all(&greeting).await; // behind a good greeting too
        }
        let _ = send.write_all(&bytes).await;
        let _ = send.finish();
        if n % 5 == 0 {
            let _ = tokio::time::timeout(Duration::from_millis(50), receive.read_to_end(1 << 16)).await;
        }
        connection.close(0u32.into(), b"");
    }

    // The honest agent never lost its session, work still flows, and others still join.
    assert!(matches!(*agent.status.borrow(), LinkStatus::Connected { .. }));
    let alloc = server.store.place(honest);
    until("a set is pushed after all that", || agent.workloads.ids() == [alloc]).await;
    agent.workloads.report(status(alloc, 1));
    until("a report is taken after all that", || server.store.status_of(alloc).is_some()).await;
    assert_eq!(server.gateway.connected().iter().filter(|n| **n == honest).count(), 1);
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_peer_that_says_nothing_loses_its_place() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let (node, papers) = admit(&server, &test);
    let rogue = Rogue::new(&server, &test);
    // More than one address may have; those beyond are turned away at once, not queued.
    let mut mute = Vec::new();
    let mut refused = 0;
    for _ in 0..80 {
        match rogue.bare(&server, ALPN_JOIN).await {
            Ok(connection) => mute.push(connection),
            Err(ConnectionError::ConnectionClosed(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0 && mute.len() <= 64, "{refused} refused, {} let in", mute.len());
    // They are dropped after a while, and the places are free for those who speak.
    for connection in &mute {
        tokio::time::timeout(PATIENCE, connection.closed()).await.expect("a mute peer is dropped");
    }
    let words = first_words(rogue.with(&papers).await, hello(node)).await;
    assert!(words.contains("Welcome"), "{words}");
    server.stop().await;
}
