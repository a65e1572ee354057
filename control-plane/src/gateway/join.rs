//! Join tokens: making them and redeeming them.
//!
//! A token is used once it has admitted a node, in the same command. A joiner that lost the answer asks
//! again with the same key and gets a certificate for the node it already is, without a second use.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use optimus_common::api::v1::JoinTokenAnswer;
use optimus_common::join_token::{JoinToken, Role, is_host_port};
use optimus_common::protocol::{Blob, JoinAnswer, JoinRequest, Message, PROTOCOL, Refused, ServerJoinAnswer, ServerJoinRequest};
use optimus_common::reason::{Code, code};
use optimus_common::{NodeId, Span, Timestamp, TokenId};
use optimus_core::state::command::Refusal;
use optimus_core::state::{Applied, Command, JoinToken as TokenRow, ServerFacts, ServerRow, State};
use optimus_host::telemetry::Chain;
use optimus_host::tls;
use optimus_host::transport::{self, FrameReader, FrameWriter, HANDSHAKE_TIMEOUT, close};
use quinn::{Connection, VarInt};
use subtle::ConstantTimeEq as _;

use super::admission::Place;
use super::{Gateway, Shared};
use crate::identity::CheckedRequest;
use crate::identity::ca::AGENT_LIFETIME;
use crate::join_tokens::{JoinTokenError, JoinTokens};

/// Longest life and most uses of a token.
pub const TTL_MAX: Span = Span(30 * 24 * 3_600_000);
pub const USES_MAX: u32 = 10_000;
const SECRET_BYTES: usize = 32;
/// Longest join request.
const REQUEST_MAX: usize = 16 << 10;
/// Longest host name.
const NAME_MAX: usize = 253;
/// Time the answer gets to arrive.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

impl JoinTokens for Gateway {
    fn create(
        &self,
        role: Role,
        ttl: Span,
        uses: u32,
    ) -> Pin<Box<dyn Future<Output = Result<JoinTokenAnswer, JoinTokenError>> + Send + '_>> {
        Box::pin(create(&self.shared, role, ttl, uses))
    }

    fn next_ca(&self, overlap: Span) -> Result<Command, JoinTokenError> {
        self.shared.identity.next_ca(overlap).map_err(|e| JoinTokenError::Refused(Chain(&e).to_string()))
    }
}

async fn create(shared: &Shared, role: Role, ttl: Span, uses: u32) -> Result<JoinTokenAnswer, JoinTokenError> {
    if ttl.0 == 0 || ttl > TTL_MAX {
        return Err(JoinTokenError::Refused(format!("a join token lives longer than nothing and at most {TTL_MAX}")));
    }
    if uses == 0 || uses > USES_MAX {
        return Err(JoinTokenError::Refused(format!("a join token has 1 to {USES_MAX} uses")));
    }
    let env = &shared.store.env;
    let mut random = [0u8; SECRET_BYTES];
    env.entropy.fill(&mut random);
    let secret = URL_SAFE_NO_PAD.encode(random);
    let (id, expires_at) = (TokenId(env.new_id()), env.clock.now() + ttl);
    let command = Command::CreateToken { id, secret_hash: tls::sha256(secret.as_bytes()).to_vec(), expires_at, uses, role };
    if let Applied::Refused(refusal) = shared.store.propose(command).await? {
        return Err(JoinTokenError::Refused(refusal.to_string()));
    }
    let servers = super::servers::addresses(shared);
    let token = JoinToken { servers, ca_sha256: shared.identity.ca_fingerprint(), role, id, secret, expires_at };
    tracing::info!(token = %id, %expires_at, uses, "join token made");
    Ok(JoinTokenAnswer { token: token.encode(), id: id.to_string(), expires_at, uses })
}

/// Why a joiner is sent away.
struct No {
    code: &'static Code,
    message: String,
}

impl No {
    fn token(message: impl Into<String>) -> Self {
        No { code: &code::TOKEN_REFUSED, message: message.into() }
    }
}

/// Serves one joiner.
pub(super) async fn serve(shared: &Arc<Shared>, connection: Connection, _place: Place) {
    let address = connection.remote_address();
    let request = async {
        let (send, receive) = connection.accept_bi().await?;
        let first = FrameReader::new(receive, REQUEST_MAX).next().await;
        Ok::<_, quinn::ConnectionError>((FrameWriter::new(send), first))
    };
    let (mut writer, request) = match tokio::time::timeout(HANDSHAKE_TIMEOUT, request).await {
        Ok(Ok((writer, Ok(Some(Message::JoinRequest(request)))))) => (writer, Joiner::Agent(request)),
        Ok(Ok((writer, Ok(Some(Message::ServerJoinRequest(request)))))) => (writer, Joiner::Server(request)),
        Ok(Ok((_, other))) => {
            let got = match &other {
                Ok(_) => "another message".to_owned(),
                Err(error) => Chain(error).to_string(),
            };
            tracing::warn!(%address, got, "a joiner did not send a join request");
            return connection.close(VarInt::from_u32(close::PROTOCOL), b"a join request was expected");
        }
        Ok(Err(_)) | Err(_) => return connection.close(VarInt::from_u32(close::PROTOCOL), b"no join request in time"),
    };
    let now = shared.store.env.clock.monotonic();
    let answer = match shared.admission.must_wait(address.ip(), now) {
        Some(wait) => {
            Err(No { code: &code::OVERLOADED, message: format!("too many failed joins from this address; wait {} s", wait.as_secs() + 1) })
        }
        None => {
            let answer = match &request {
                Joiner::Agent(request) => redeem(shared, request).await.map(|a| (format!("node {}", a.node), Message::from(a))),
                Joiner::Server(request) => redeem_server(shared, request).await.map(|a| (format!("server {}", a.server), Message::from(a))),
            };
            if matches!(&answer, Err(no) if no.code.code == code::TOKEN_REFUSED.code) {
                shared.admission.failed(address.ip(), now);
            }
            answer
        }
    };
    let token = short(request.token());
    match answer {
        Ok((who, answer)) => {
            tracing::info!(%address, who, token, "joined");
            let sent = async {
                writer.send(answer).await?;
                writer.finish()?;
                writer.stopped().await;
                Ok::<_, transport::FrameError>(())
            };
            if !matches!(tokio::time::timeout(ANSWER_PATIENCE, sent).await, Ok(Ok(()))) {
                tracing::warn!(%address, "the answer to a join may not have arrived; the joiner can ask again with the same key");
            }
            connection.close(VarInt::from_u32(close::DONE), b"");
        }
        Err(No { code, message }) => {
            tracing::warn!(%address, token, code = code.code, reason = message, "join refused");
            transport::refuse(&connection, Some(&mut writer), Refused { code: code.code.into(), message }).await;
        }
    }
}

/// Who asks.
enum Joiner {
    Agent(JoinRequest),
    Server(ServerJoinRequest),
}

impl Joiner {
    fn token(&self) -> &str {
        match self {
            Joiner::Agent(request) => &request.token_id,
            Joiner::Server(request) => &request.token_id,
        }
    }
}

/// What a stranger calls a token, fit for a log.
fn short(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic()).take(40).collect()
}

/// Checks token and secret. A wrong secret and an unknown token get the same answer in the same time.
fn check<'a>(state: &'a State, id: Option<TokenId>, secret: &str) -> Option<&'a TokenRow> {
    let row = id.and_then(|id| state.tokens.get(&id));
    let stored = row.map_or([0u8; 32].as_slice(), |row| row.secret_hash.as_slice());
    let same: bool = tls::sha256(secret.as_bytes()).as_slice().ct_eq(stored).into();
    row.filter(|_| same).map(|row| &**row)
}

/// The token the joiner holds, with the state it was found in.
async fn token_of(shared: &Shared, versions: (u16, u16), token_id: &str, secret: &str, wanted: Role) -> Result<(State, TokenRow), No> {
    if super::session::negotiate(PROTOCOL, versions).is_none() {
        return Err(No { code: &code::PROTOCOL_MISMATCH, message: super::session::mismatch(versions) });
    }
    let id: Option<TokenId> = token_id.parse().ok();
    let mut state = shared.store.state();
    if check(&state, id, secret).is_none() {
        // It may have been made on another server a moment ago.
        state = shared.store.read().await.map_err(unavailable)?;
    }
    let Some(row) = check(&state, id, secret) else {
        return Err(No::token("the join token is not known: wrong, revoked, or of another cluster"));
    };
    if row.role != wanted {
        return Err(No::token(Refusal::TokenRole { is: row.role, wanted }.to_string()));
    }
    if shared.store.env.clock.now() >= row.expires_at {
        return Err(No::token(format!("the join token expired at {}", row.expires_at)));
    }
    let row = row.clone();
    Ok((state, row))
}

async fn redeem(shared: &Shared, request: &JoinRequest) -> Result<JoinAnswer, No> {
    let JoinRequest { versions, token_id, secret, csr, name } = request;
    let (state, row) = token_of(shared, *versions, token_id, secret, Role::Agent).await?;
    let now = shared.store.env.clock.now();
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(No { code: &code::BAD_REQUEST, message: format!("the host name must have 1 to {NAME_MAX} printable characters") });
    }
    let key = CheckedRequest::parse(csr).map_err(|e| No { code: &code::BAD_REQUEST, message: Chain(&e).to_string() })?;
    let known = state.nodes.values().find(|n| n.key_fingerprint == key.key_fingerprint).map(|n| n.id);
    let expires_at: Timestamp = now + AGENT_LIFETIME;
    let (node, command) = match known {
        Some(node) => (node, Command::NodeCertificate { node, key_fingerprint: key.key_fingerprint.to_vec(), expires_at }),
        None if row.uses_left == 0 => return Err(No::token("the join token has been used up")),
        None => {
            let node = NodeId(shared.store.env.new_id());
            let key_fingerprint = key.key_fingerprint.to_vec();
            (node, Command::AdmitNode { token: row.id, node, name: name.clone(), key_fingerprint, certificate_expires_at: expires_at })
        }
    };
    // Signed before it is committed: a signature that fails must not use up the token.
    let issued = shared.identity.issue_agent(&key, node).map_err(|e| {
        tracing::error!(error = %Chain(&e), "failed to issue a certificate");
        No { code: &code::INTERNAL, message: "the server failed to issue a certificate; its log says why".into() }
    })?;
    match shared.store.propose(command).await.map_err(unavailable)? {
        // Another joiner was faster, or the clock moved on.
        Applied::Refused(refusal @ (Refusal::TokenUnknown | Refusal::TokenExpired | Refusal::TokenUsedUp | Refusal::TokenRole { .. })) => {
            Err(No::token(refusal.to_string()))
        }
        Applied::Refused(refusal) => Err(No { code: &code::CONFLICT, message: refusal.to_string() }),
        _ => Ok(JoinAnswer { cluster: shared.identity.cluster(), node, certificate: issued.certificate, ca: issued.issuer }),
    }
}

/// Admits a server and hands it what makes it one.
async fn redeem_server(shared: &Shared, request: &ServerJoinRequest) -> Result<ServerJoinAnswer, No> {
    let ServerJoinRequest { versions, token_id, secret, csr, server } = request;
    let (state, row) = token_of(shared, *versions, token_id, secret, Role::Server).await?;
    let bad = |message: String| No { code: &code::BAD_REQUEST, message };
    let server: ServerFacts = server.open().map_err(|_| bad("what the server says of itself does not decode".into()))?;
    let printable = |text: &str| !text.is_empty() && text.len() <= NAME_MAX && !text.chars().any(char::is_control);
    if !printable(&server.name) || !printable(&server.version) {
        return Err(bad(format!("the host name and the version must have 1 to {NAME_MAX} printable characters")));
    }
    if let Some(address) = [&server.address, &server.api].into_iter().find(|a| !is_host_port(a)) {
        return Err(bad(format!("`{}` is not an address of the form host:port", short(address))));
    }
    let key = CheckedRequest::parse(csr).map_err(|e| bad(Chain(&e).to_string()))?;
    let known = |state: &State| state.servers.values().find(|s| s.key_fingerprint == key.key_fingerprint).map(|s| s.id);
    if known(&state).is_none() && row.uses_left == 0 {
        return Err(No::token("the join token has been used up"));
    }
    let command = Command::AdmitServer { token: Some(row.id), server, key_fingerprint: key.key_fingerprint.to_vec() };
    match shared.store.propose(command).await.map_err(unavailable)? {
        Applied::Refused(refusal @ (Refusal::TokenUnknown | Refusal::TokenExpired | Refusal::TokenUsedUp | Refusal::TokenRole { .. })) => {
            return Err(No::token(refusal.to_string()));
        }
        Applied::Refused(refusal) => return Err(No { code: &code::CONFLICT, message: refusal.to_string() }),
        _ => {}
    }
    let mut state = shared.store.state();
    if known(&state).is_none() {
        // Committed through another server, and not applied here yet.
        state = shared.store.read().await.map_err(unavailable)?;
    }
    let internal = |message: &str| No { code: &code::INTERNAL, message: message.into() };
    let id = known(&state).ok_or_else(|| internal("the server was admitted and is not in the state"))?;
    let cluster = state.cluster.as_ref().ok_or_else(|| internal("the cluster has not been created yet"))?;
    let servers: Vec<&ServerRow> = state.servers.values().map(|row| &**row).collect();
    let replaced = || No { code: &code::NO_LEADER, message: "the root key is being replaced at this moment; try again".into() };
    let root_key = shared.identity.root_key_text(cluster).ok_or_else(replaced)?;
    Ok(ServerJoinAnswer {
        server: id,
        cluster: Blob::of(cluster),
        root_key: root_key.as_bytes().to_vec(),
        admin_token: shared.admin.expose().to_owned(),
        servers: Blob::of(&servers),
    })
}

fn unavailable(error: crate::store::ProposeError) -> No {
    No { code: &code::NO_LEADER, message: error.to_string() }
}
