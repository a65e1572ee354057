//! One agent's session, from its certificate to its end.
//!
//! Three loops run side by side and the first to end ends the session: one reads (reports, pongs,
//! renewals), one writes (desired sets, pings, answers), one renews. So a slow commit never stops
//! the heartbeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use optimus_common::protocol::{
    ALLOCS_PER_NODE_MAX, Desired, Hello, Message, NodeFacts, PROTOCOL, Ping, Refused, RenewAnswer, RenewRequest, Servers, VERSION_SERVERS,
    VERSION_TRUST, VERSION_USAGE, Welcome,
};
use optimus_common::reason::{Code, code};
use optimus_common::usage::{USAGE_EVERY, UsageEvery};
use optimus_common::{NodeId, Span, Timestamp};
use optimus_core::reconciler::{desired_allocs, desired_for};
use optimus_core::state::{Applied, Command, Node, SecretKey, SecretVersion, State};
use optimus_host::telemetry::Chain;
use optimus_host::tls::{PeerIdentity, Role};
use optimus_host::transport::{self, FrameError, FrameReader, FrameWriter, GREETING_MAX, HANDSHAKE_TIMEOUT, close};
use quinn::{Connection, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::admission::Place;
use super::leases::{self, STALE};
use super::sessions::Session;
use super::trust::{self, Known};
use super::{HEARTBEAT, LEASE, Shared, log_end, servers, usage};
use crate::identity::CheckedRequest;
use crate::identity::SecretBox as _;
use crate::store::ProposeError;

/// Longest frame of an agent: a report. Agents cut theirs at 1 MiB.
const REPORT_MAX: usize = 2 << 20;
/// Heartbeats between two looks at the desired set that nothing asked for.
const LOOK_EVERY: u64 = 30;
/// Bytes a second of desired sets to one node, beyond the first: each is sent whole, and while copies are placed by the
/// thousand, a node with a hundred would be sent them a hundred times.
const PUSH_RATE: f64 = 1e6;
/// How long a greeting waits for this server to reach what the agent holds already.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Longest text in a node's facts, and most entries of its lists.
const FACT_TEXT_MAX: usize = 512;
const FACT_ENTRIES_MAX: usize = 128;

/// Why an agent is sent away.
#[derive(Debug)]
struct No {
    code: &'static Code,
    message: String,
}

impl No {
    fn new(code: &'static Code, message: impl Into<String>) -> Self {
        No { code, message: message.into() }
    }
    fn refused(&self) -> Refused {
        Refused { code: self.code.code.into(), message: self.message.clone() }
    }
}

/// The highest version both sides speak.
pub fn negotiate(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let highest = ours.1.min(theirs.1);
    (highest >= ours.0.max(theirs.0) && theirs.0 <= theirs.1).then_some(highest)
}

pub fn mismatch(theirs: (u16, u16)) -> String {
    format!("the agent speaks protocol versions {} to {}, this server {} to {}", theirs.0, theirs.1, PROTOCOL.0, PROTOCOL.1)
}

/// Serves one agent.
pub(super) async fn serve(shared: &Arc<Shared>, connection: Connection, place: Place) {
    let address = connection.remote_address();
    // Before the first byte: who is it?
    let peer = match identify(shared, &connection) {
        Ok(peer) => peer,
        Err(no) => {
            tracing::warn!(%address, code = no.code.code, reason = no.message, "agent refused");
            return transport::refuse(&connection, None, no.refused()).await;
        }
    };
    let node = peer.node;
    let greeting = async {
        let (send, receive) = connection.accept_bi().await?;
        let mut reader = FrameReader::new(receive, GREETING_MAX);
        let first = reader.next().await;
        Ok::<_, quinn::ConnectionError>((reader, FrameWriter::new(send), first))
    };
    let (reader, mut writer, first) = match tokio::time::timeout(HANDSHAKE_TIMEOUT, greeting).await {
        Ok(Ok((reader, writer, Ok(Some(first))))) => (reader, writer, first),
        Ok(Ok((_, _, Err(error)))) => {
            log_end(address, node, &error);
            return connection.close(VarInt::from_u32(close::PROTOCOL), b"a greeting was expected");
        }
        Ok(Ok((_, _, Ok(None))) | Err(_)) | Err(_) => {
            tracing::info!(%node, %address, "agent sent no greeting");
            return connection.close(VarInt::from_u32(close::PROTOCOL), b"no greeting in time");
        }
    };
    let outcome = match first {
        // Also with a certificate that holds: the agent's clock may run ahead of ours.
        Message::RenewRequest(request) => match renew(shared, &peer, &request).await {
            Ok((answer, _)) => {
                tracing::info!(%node, %address, because = peer.only_renew, "an agent renewed its certificate before it greeted");
                let _ = writer.send(answer).await; // a lost answer is asked for again
                let _ = writer.finish();
                let _ = tokio::time::timeout(HANDSHAKE_TIMEOUT, writer.stopped()).await;
                return connection.close(VarInt::from_u32(close::DONE), b"renewed");
            }
            Err(no) => Err(no),
        },
        Message::Hello(_) if let Some(why) = &peer.only_renew => {
            Err(No::new(&code::CERTIFICATE_EXPIRED, format!("{why}; only renewing it is possible")))
        }
        Message::Hello(hello) => welcome(shared, &peer, hello).await,
        _ => {
            tracing::warn!(%node, %address, "agent did not greet first");
            return connection.close(VarInt::from_u32(close::PROTOCOL), b"a greeting was expected");
        }
    };
    let (welcome, generation, facts) = match outcome {
        Ok(welcome) => welcome,
        Err(no) => {
            // No leader is a matter of moments; the rest needs a person.
            if no.code.code == code::NO_LEADER.code {
                tracing::debug!(%node, %address, reason = no.message, "agent sent on");
            } else {
                tracing::warn!(%node, %address, code = no.code.code, reason = no.message, "agent refused");
            }
            return transport::refuse(&connection, Some(&mut writer), no.refused()).await;
        }
    };
    drop(place); // it has proved itself
    let now = shared.store.env.clock.monotonic();
    let session = shared.sessions.enter(node, connection.clone(), now);
    leases::entered(shared, node, now);
    tracing::info!(%node, %address, "agent connected");
    let running = Running {
        shared,
        peer: &peer,
        session: &session,
        version: welcome.version,
        expires_at: AtomicU64::new(peer.not_after.0),
        known: Known::default(),
    };
    match writer.send(welcome).await {
        Ok(()) => Box::pin(running.run(reader, writer, generation, facts)).await,
        Err(error) => log_end(address, node, &error),
    }
    if shared.sessions.leave(node, &session) {
        shared.usages.forget(node);
    }
    leases::left(shared);
}

/// The proven holder of an agent's certificate.
struct Peer {
    node: NodeId,
    key_fingerprint: [u8; 32],
    not_after: Timestamp,
    /// The handshake lets some through that may renew and nothing else: why.
    only_renew: Option<String>,
}

/// Who the certificate speaks for. The handshake has checked that our CA signed it, or that its key is on record.
fn identify(shared: &Shared, connection: &Connection) -> Result<Peer, No> {
    let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(certificate) = chain.as_ref().and_then(|chain| chain.first()) else {
        return Err(No::new(&code::NODE_REFUSED, "a client certificate is required"));
    };
    let identity = PeerIdentity::of(certificate).map_err(|e| No::new(&code::NODE_REFUSED, Chain(&e).to_string()))?;
    if identity.cluster != shared.identity.cluster() {
        return Err(No::new(
            &code::NODE_REFUSED,
            format!("the certificate is of cluster {}, this is {}", identity.cluster, shared.identity.cluster()),
        ));
    }
    let Role::Agent(node) = identity.role else {
        return Err(No::new(&code::NODE_REFUSED, format!("the certificate is that of {}, not of an agent", identity.role)));
    };
    let only_renew = if shared.store.env.clock.now() > identity.not_after {
        Some(format!("the node's certificate expired at {}", identity.not_after))
    } else if !shared.identity.roots().vouch_for(certificate) {
        Some("the node's certificate was signed by a CA that is no longer trusted".to_owned())
    } else {
        None
    };
    Ok(Peer { node, key_fingerprint: identity.key_fingerprint, not_after: identity.not_after, only_renew })
}

/// The node's row, if the key is the one on record. A removed node has none: that is how it is revoked.
fn on_record<'a>(state: &'a State, peer: &Peer) -> Result<&'a Node, No> {
    let Some(node) = state.nodes.get(&peer.node) else {
        return Err(No::new(&code::NODE_REFUSED, format!("node {} is not in this cluster: it was removed, or never joined", peer.node)));
    };
    if node.key_fingerprint != peer.key_fingerprint {
        return Err(No::new(&code::NODE_REFUSED, format!("the certificate's key is not the one on record for node {}", peer.node)));
    }
    Ok(node)
}

/// [`on_record`], asked again of the newest state before anyone is refused.
async fn admitted(shared: &Shared, peer: &Peer) -> Result<State, No> {
    let state = shared.store.state();
    if on_record(&state, peer).is_ok() {
        return Ok(state);
    }
    let state = shared.store.read().await.map_err(unavailable)?;
    on_record(&state, peer)?;
    Ok(state)
}

fn unavailable(error: ProposeError) -> No {
    No::new(&code::NO_LEADER, error.to_string())
}

/// What an agent said of its node, and the cluster's version it was told at.
struct Facts {
    said: NodeFacts,
    told_at: u32,
}

fn cluster_version(state: &State) -> u32 {
    state.cluster.as_ref().map_or(1, |c| c.version)
}

/// Checks the greeting and brings the node up. Gives the generation the agent holds, and its facts.
async fn welcome(shared: &Shared, peer: &Peer, hello: Hello) -> Result<(Welcome, u64, Facts), No> {
    let Hello { versions, node, generation, facts } = hello;
    let version = negotiate(PROTOCOL, versions).ok_or_else(|| No::new(&code::PROTOCOL_MISMATCH, mismatch(versions)))?;
    if node != peer.node {
        return Err(No::new(&code::NODE_REFUSED, format!("the agent calls itself node {node}, its certificate says {}", peer.node)));
    }
    open_to_agents(shared)?;
    caught_up(shared, generation).await?;
    let said: NodeFacts = facts.open().map_err(|e| No::new(&code::BAD_REQUEST, format!("the node's facts cannot be read: {e}")))?;
    check_facts(&said).map_err(|what| No::new(&code::BAD_REQUEST, what))?;
    let state = admitted(shared, peer).await?;
    let row = on_record(&state, peer)?;
    let told_at = cluster_version(&state);
    let facts = said.clone().at_version(told_at);
    if (!row.up || row.facts != facts)
        && let Applied::Refused(refusal) = shared.store.propose(Command::NodeUp { node, facts }).await.map_err(unavailable)?
    {
        return Err(No::new(&code::NODE_REFUSED, refusal.to_string()));
    }
    Ok((Welcome { version, cluster: shared.identity.cluster(), heartbeat: HEARTBEAT.into() }, generation, Facts { said, told_at }))
}

/// A server that hears no leader holds no sessions: what its agents say would reach nobody.
fn open_to_agents(shared: &Shared) -> Result<(), No> {
    let now = shared.store.env.clock.monotonic();
    match shared.leases.serving_since(now, &shared.store.status()) {
        Some(_) => Ok(()),
        None => Err(No::new(&code::NO_LEADER, format!("this server has heard no leader for {} s", STALE.as_secs()))),
    }
}

/// A desired set never goes back, so a follower that is behind what the agent holds would have nothing to tell it. The
/// leader is never behind: if it seems so, the cluster was restored from a backup, and the agent waits there.
async fn caught_up(shared: &Shared, generation: u64) -> Result<(), No> {
    let mut applied = shared.store.applied();
    let reached = async {
        while shared.store.state().index < generation {
            if applied.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = reached => Ok(()),
        () = shared.store.env.clock.sleep(CATCH_UP) => match shared.store.status().is_leader {
            true => Ok(()),
            false => Err(No::new(&code::NO_LEADER, "this server is behind the desired set the agent holds")),
        },
    }
}

/// Bounds what a node may put into the replicated state about itself.
fn check_facts(facts: &NodeFacts) -> Result<(), String> {
    let NodeFacts {
        name,
        version,
        cpu: _,
        memory: _,
        arch,
        kernel,
        cgroup,
        unenforced,
        drivers,
        ports,
        address,
        boot_id,
        labels,
        attributes,
        pool: _,
        disk: _,
        disk_free: _,
        reserved: _,
        devices,
        load: _,
    } = facts;
    let texts = [name, version, arch, kernel, cgroup, address, boot_id]
        .into_iter()
        .chain(unenforced)
        .chain(drivers)
        .chain(labels.keys())
        .chain(labels.values())
        .chain(attributes.keys())
        .chain(attributes.values())
        .chain(devices.iter().flat_map(|d| [&d.vendor, &d.kind, &d.name].into_iter().chain(&d.ids)))
        .chain(devices.iter().flat_map(|d| d.paths.keys().chain(d.paths.values().flatten())))
        .chain(devices.iter().flat_map(|d| d.attributes.keys().chain(d.attributes.values())));
    for text in texts {
        if text.len() > FACT_TEXT_MAX || text.chars().any(char::is_control) {
            return Err(format!("a text in the node's facts is longer than {FACT_TEXT_MAX} bytes or not printable"));
        }
    }
    for (what, count) in [
        ("limits not enforced", unenforced.len()),
        ("drivers", drivers.len()),
        ("labels", labels.len()),
        ("attributes", attributes.len()),
        ("kinds of devices", devices.len()),
    ] {
        if count > FACT_ENTRIES_MAX {
            return Err(format!("the node's facts list {count} {what}; {FACT_ENTRIES_MAX} are possible"));
        }
    }
    for group in devices {
        let (ids, more) = (group.ids.len(), group.attributes.len().max(group.paths.values().map(Vec::len).sum()));
        if ids > FACT_ENTRIES_MAX || more > FACT_ENTRIES_MAX {
            return Err(format!("the node's facts list {ids} devices of one kind; {FACT_ENTRIES_MAX} are possible"));
        }
    }
    if ports.0 > ports.1 {
        return Err(format!("the node's port range {} to {} is empty", ports.0, ports.1));
    }
    Ok(())
}

/// Issues a fresh certificate for the same node and key. A new key would lock out an agent that lost
/// the answer; whoever wants one joins again.
async fn renew(shared: &Shared, peer: &Peer, request: &RenewRequest) -> Result<(RenewAnswer, Timestamp), No> {
    admitted(shared, peer).await?;
    let key = CheckedRequest::parse(&request.csr).map_err(|e| No::new(&code::BAD_REQUEST, Chain(&e).to_string()))?;
    if key.key_fingerprint != peer.key_fingerprint {
        return Err(No::new(&code::NODE_REFUSED, "a certificate is renewed with its own key only"));
    }
    let issued = shared.identity.issue_agent(&key, peer.node).map_err(|e| {
        tracing::error!(node = %peer.node, error = %Chain(&e), "failed to issue a certificate");
        No::new(&code::INTERNAL, "the server failed to issue a certificate; its log says why")
    })?;
    let command =
        Command::NodeCertificate { node: peer.node, key_fingerprint: key.key_fingerprint.to_vec(), expires_at: issued.expires_at };
    match shared.store.propose(command).await.map_err(unavailable)? {
        Applied::Refused(refusal) => Err(No::new(&code::NODE_REFUSED, refusal.to_string())),
        _ => Ok((RenewAnswer { certificate: issued.certificate, ca: issued.issuer }, issued.expires_at)),
    }
}

/// A welcomed session.
struct Running<'a> {
    shared: &'a Arc<Shared>,
    peer: &'a Peer,
    session: &'a Session,
    /// Of the protocol.
    version: u16,
    /// Of the newest certificate issued in this session, in milliseconds.
    expires_at: AtomicU64,
    known: Known,
}

impl Running<'_> {
    async fn run(&self, reader: FrameReader, writer: FrameWriter, generation: u64, facts: Facts) {
        // One renewal waits while one runs; a node needs one a day.
        let (ask, asked) = mpsc::channel(1);
        let (answer, answers) = mpsc::channel(1);
        let address = self.session.connection.remote_address();
        tokio::select! {
            end = self.read(reader, ask) => match end {
                Ok(()) => tracing::info!(node = %self.peer.node, %address, "agent ended its session"),
                Err(error) => {
                    if error.is_violation() {
                        let text = Chain(&error).to_string();
                        self.session.connection.close(VarInt::from_u32(close::PROTOCOL), text.as_bytes());
                    }
                    log_end(address, self.peer.node, &error);
                }
            },
            end = self.write(writer, generation, answers) => match end {
                Err(End::Stream(error)) => log_end(address, self.peer.node, &error),
                Err(End::No(code, no)) => {
                    tracing::warn!(node = %self.peer.node, %address, code = no.code.code, reason = no.message, "agent session closed");
                    self.session.connection.close(VarInt::from_u32(code), format!("{} {}", no.code.code, no.message).as_bytes());
                }
                Ok(never) => match never {},
            },
            () = self.renew_all(asked, answer) => {}
            () = self.complete_facts(facts) => {}
            end = usage::read(self.shared, &self.session.connection, self.peer.node, self.version) => if let Err(error) = end {
                if error.is_violation() {
                    self.session.connection.close(VarInt::from_u32(close::PROTOCOL), Chain(&error).to_string().as_bytes());
                }
                log_end(address, self.peer.node, &error);
            },
        }
        self.session.connection.close(VarInt::from_u32(close::DONE), b""); // a no-op where a reason was given
    }

    fn touch(&self) {
        self.session.heard.touch(self.shared.store.env.clock.monotonic());
    }

    async fn read(&self, mut reader: FrameReader, renewals: mpsc::Sender<RenewRequest>) -> Result<(), FrameError> {
        reader.set_limit(REPORT_MAX);
        while let Some(message) = reader.next().await? {
            self.touch();
            match message {
                Message::Pong(_) => {}
                Message::ClockPong(pong) => self.known.answered(&pong, &*self.shared.store.env.clock),
                Message::Trusting(trusting) => self.known.told(trusting),
                Message::Report(report) => {
                    if report.statuses.len() > 2 * ALLOCS_PER_NODE_MAX || report.gone.len() > 2 * ALLOCS_PER_NODE_MAX {
                        return Err(FrameError::TooLong {
                            length: report.statuses.len().max(report.gone.len()),
                            limit: 2 * ALLOCS_PER_NODE_MAX,
                        });
                    }
                    self.shared.reports.submit(self.peer.node, report, &self.shared.store.state());
                }
                Message::RenewRequest(request) => {
                    if renewals.try_send(request).is_err() {
                        tracing::warn!(node = %self.peer.node, "agent asks for certificates faster than they are made; ignored");
                    }
                }
                other => {
                    let kind = u16::from_le_bytes(other.encode()[4..6].try_into().expect("a frame has a head of eight bytes"));
                    return Err(optimus_common::codec::DecodeError::Unknown { kind, version: 0 }.into());
                }
            }
        }
        Ok(())
    }

    /// Tells the state what was left out of the node's facts, once every server can read it. A cluster that has just
    /// been made begins with the lowest version, and its agents are quick. Ends with the session.
    async fn complete_facts(&self, facts: Facts) {
        let Facts { said, mut told_at } = facts;
        let store = &self.shared.store;
        let mut applied = store.applied();
        while said.clone().at_version(told_at) != said {
            let version = cluster_version(&store.state());
            if version == told_at {
                if applied.changed().await.is_err() {
                    break;
                }
                continue;
            }
            let facts = said.clone().at_version(version);
            match store.propose(Command::NodeUp { node: self.peer.node, facts }).await {
                Ok(Applied::Refused(refusal)) => {
                    tracing::warn!(node = %self.peer.node, %refusal, "the node's facts were not taken");
                    break;
                }
                Ok(_) => told_at = version,
                Err(error) => {
                    tracing::debug!(node = %self.peer.node, %error, "the node's facts are told again");
                    store.env.clock.sleep(HEARTBEAT).await;
                }
            }
        }
        std::future::pending().await
    }

    /// Serves renewals; ends never, or with the session.
    async fn renew_all(&self, mut asked: mpsc::Receiver<RenewRequest>, answers: mpsc::Sender<RenewAnswer>) {
        while let Some(request) = asked.recv().await {
            match renew(self.shared, self.peer, &request).await {
                Ok((answer, expires_at)) => {
                    self.expires_at.store(expires_at.0, Ordering::Relaxed);
                    tracing::debug!(node = %self.peer.node, %expires_at, "certificate renewed");
                    if answers.send(answer).await.is_err() {
                        return;
                    }
                }
                Err(no) => tracing::warn!(node = %self.peer.node, code = no.code.code, reason = no.message, "certificate not renewed"),
            }
        }
        std::future::pending().await // the reader has ended and says why
    }

    async fn write(
        &self,
        mut writer: FrameWriter,
        generation: u64,
        mut answers: mpsc::Receiver<RenewAnswer>,
    ) -> Result<std::convert::Infallible, End> {
        let clock = &self.shared.store.env.clock;
        let mut sent = Sent::default();
        let (mut servers, mut pace, mut trusted) = (Vec::new(), USAGE_EVERY, Vec::new());
        self.tell_servers(&mut writer, &mut servers).await?;
        self.tell_trust(&mut writer, &mut trusted).await?;
        self.push(&mut writer, generation, &mut sent).await?;
        let mut n = 0u64;
        let mut next_ping = clock.monotonic();
        // The set may have changed, and it is not yet time for the next one.
        let mut asked = false;
        loop {
            let now = clock.monotonic();
            let wait = next_ping.saturating_sub(now);
            let next_push = sent.next_at.saturating_sub(now);
            tokio::select! {
                () = self.session.wake.notified(), if !asked => asked = true,
                () = clock.sleep(next_push), if asked => {
                    asked = false;
                    self.push(&mut writer, generation, &mut sent).await?;
                }
                Some(answer) = answers.recv() => writer.send(answer).await?,
                () = clock.sleep(wait) => {
                    next_ping = clock.monotonic() + HEARTBEAT;
                    self.check().await?;
                    n += 1;
                    self.known.pinged(n, &**clock);
                    writer.send(Ping { n }).await?;
                    self.tell_servers(&mut writer, &mut servers).await?;
                    self.tell_pace(&mut writer, &mut pace).await?;
                    self.tell_trust(&mut writer, &mut trusted).await?;
                    // The first set waits for our state to reach the agent's generation.
                    if sent.digest.is_none() || n.is_multiple_of(LOOK_EVERY) {
                        self.push(&mut writer, generation, &mut sent).await?;
                    }
                }
            }
        }
    }

    /// Sends the addresses of all servers if they are others than the ones sent last.
    async fn tell_servers(&self, writer: &mut FrameWriter, sent: &mut Vec<String>) -> Result<(), End> {
        if self.version < VERSION_SERVERS {
            return Ok(());
        }
        let addresses = servers::addresses(self.shared);
        if *sent != addresses {
            writer.send(Servers { addresses: addresses.clone() }).await?;
            *sent = addresses;
        }
        Ok(())
    }

    /// Says how often to tell what is used, if that has changed.
    async fn tell_pace(&self, writer: &mut FrameWriter, told: &mut Span) -> Result<(), End> {
        let every = self.shared.usages.pace(self.shared.store.env.clock.monotonic());
        if self.version >= VERSION_USAGE && every != *told {
            writer.send(UsageEvery { every }).await?;
            *told = every;
        }
        Ok(())
    }

    /// Sends the CAs to trust if they are others than the ones sent last.
    async fn tell_trust(&self, writer: &mut FrameWriter, sent: &mut Vec<Vec<u8>>) -> Result<(), End> {
        if self.version >= VERSION_TRUST
            && let Some(trust) = trust::due(self.shared, sent)
        {
            *sent = trust.roots.clone();
            writer.send(trust).await?;
        }
        Ok(())
    }

    /// Sends the desired set if it is another than the one sent last.
    async fn push(&self, writer: &mut FrameWriter, generation: u64, sent: &mut Sent) -> Result<(), End> {
        let frame = {
            let state = self.shared.store.state();
            if state.index < generation {
                // It would be refused. We are behind; if this lasts, the cluster was restored from a backup.
                tracing::debug!(node = %self.peer.node, held = generation, index = state.index, "the agent holds a newer desired set");
                return Ok(());
            }
            let digest = digest_of_desired(&state, self.peer.node);
            if sent.digest == Some(digest) {
                return Ok(());
            }
            let open = |key: &SecretKey, version: &SecretVersion| {
                let opened = self.shared.identity.open(&state, key, version);
                opened.inspect_err(|error| tracing::error!(secret = %key, error = %Chain(error), "a secret cannot be opened")).ok()
            };
            // Without one, the node keeps the set it has; at the next change it is tried again.
            let Some(allocs) = desired_for(&state, self.peer.node, &open) else { return Ok(()) };
            sent.digest = Some(digest);
            Message::from(Desired { generation: state.index, allocs }).encode()
        };
        let pause = Duration::from_secs_f64(frame.len() as f64 / PUSH_RATE);
        sent.next_at = self.shared.store.env.clock.monotonic() + pause;
        match writer.send_encoded(&frame).await {
            Err(error @ FrameError::TooLong { .. }) => {
                // Half a set would stop the other half: the node keeps the set it has.
                tracing::error!(node = %self.peer.node, error = %Chain(&error), "the desired set of a node is too large to be sent");
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// What may have changed since the session began. At each heartbeat, so revocation takes effect within one.
    async fn check(&self) -> Result<(), End> {
        let env = &self.shared.store.env;
        let silent = env.clock.monotonic().saturating_sub(self.session.heard.at());
        if silent > LEASE {
            let message = format!("not heard for {} s", silent.as_secs());
            return Err(End::No(close::SILENT, No::new(&code::TIMED_OUT, message)));
        }
        open_to_agents(self.shared).map_err(|no| End::No(close::GOING_AWAY, no))?;
        let now = env.clock.now();
        let expires_at = Timestamp(self.expires_at.load(Ordering::Relaxed));
        if now > expires_at {
            let message = format!("the node's certificate expired at {expires_at}; only renewing it is possible");
            return Err(End::No(close::REFUSED, No::new(&code::CERTIFICATE_EXPIRED, message)));
        }
        let state = self.shared.store.state();
        let row = on_record(&state, self.peer).map_err(|no| End::No(close::REFUSED, no))?;
        if !row.up {
            // Declared down just as it came back.
            let command = Command::NodeUp { node: row.id, facts: row.facts.clone() };
            match tokio::time::timeout(Duration::from_secs(1), self.shared.store.propose(command)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(node = %row.id, %error, "node not brought up; trying again"),
                Err(_) => tracing::debug!(node = %row.id, "node not brought up yet; trying again"),
            }
        }
        self.known.tell(self.shared, &state, row).await;
        Ok(())
    }
}

/// The desired set sent last.
#[derive(Default)]
struct Sent {
    digest: Option<blake3::Hash>,
    /// The next one waits until then: a change right after another goes out with those that follow it.
    next_at: Duration,
}

/// What tells one desired set from another. The spec of a copy is that of its release, and its key never changes.
fn digest_of_desired(state: &State, node: NodeId) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for alloc in desired_allocs(state, node) {
        hasher.update(alloc.id.0.as_bytes());
        hasher.update(&[u8::from(alloc.run)]);
        hasher.update(&alloc.release.to_le_bytes());
        hasher.update(&alloc.index.to_le_bytes());
        for (_, port) in &alloc.ports {
            hasher.update(&port.to_le_bytes());
        }
    }
    hasher.finalize()
}

/// Why the writing loop ended.
enum End {
    Stream(FrameError),
    /// Closed by us with this code.
    No(u32, No),
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> Self {
        End::Stream(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_use_the_highest_version_they_share() {
        for (ours, theirs, agreed) in [
            ((1, 1), (1, 1), Some(1)),
            ((1, 3), (2, 5), Some(3)),
            ((3, 4), (1, 3), Some(3)),
            ((2, 3), (1, 1), None),
            ((1, 1), (2, 3), None),
            ((1, 3), (3, 1), None),
        ] {
            assert_eq!(negotiate(ours, theirs), agreed, "{ours:?} {theirs:?}");
        }
    }

    #[test]
    fn facts_are_bounded() {
        let good = NodeFacts { ports: (20000, 30000), ..NodeFacts::default() };
        assert!(check_facts(&good).is_ok());
        assert!(check_facts(&NodeFacts { name: "x".repeat(FACT_TEXT_MAX + 1), ..good.clone() }).is_err());
        assert!(check_facts(&NodeFacts { kernel: "a\u{1b}[31m".into(), ..good.clone() }).is_err());
        assert!(check_facts(&NodeFacts { drivers: vec![String::new(); FACT_ENTRIES_MAX + 1], ..good.clone() }).is_err());
        assert!(check_facts(&NodeFacts { ports: (2, 1), ..good }).is_err());
    }
}
