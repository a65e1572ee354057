//! Redeeming a join token.

use std::path::Path;
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::join_token::{JoinToken, JoinTokenError};
use optimus_common::protocol::{ALPN_JOIN, JoinAnswer, JoinRequest, Message, PROTOCOL, Refused};
use optimus_common::reason::code;
use optimus_host::dial::{DialError, dial};
use optimus_host::telemetry::Chain;
use optimus_host::tls::{self, Key, PIN_MISMATCH, TlsError};
use optimus_host::transport::{self, FrameError, FrameReader, FrameWriter, SetupError, close};
use quinn::{Connection, Endpoint};

use super::CONNECT_MAX;
use super::identity::{self, AgentIdentity, IdentityError};

/// Longest wait for the answer: the server commits the node before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
const ANSWER_MAX: usize = 64 << 10;

/// Why the node did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Token(#[from] JoinTokenError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("failed to set up TLS")]
    Tls(#[from] TlsError),
    #[error("failed to set up QUIC")]
    Quic(#[from] SetupError),
    #[error("no server of the join token can be reached: {}", tried.join("; "))]
    Unreachable { tried: Vec<String> },
    #[error("{server}: {PIN_MISMATCH} (its CA has another fingerprint)")]
    WrongCluster { server: String },
    #[error("{code} {message}")]
    Refused { code: String, message: String },
    #[error("{server} answered what cannot be understood: {what}")]
    Answer { server: String, what: String },
    #[error(
        "this node belongs to cluster {has} already, the join token is for another (or that cluster's CA was replaced while this node was away); to join with it, remove its data directory"
    )]
    OtherCluster { has: optimus_common::ClusterId },
    #[error("this node has not joined a cluster yet; pass a token of `optimus nodes join-token`")]
    TokenNeeded,
}

/// The identity of an earlier join, or a new one with the token. A token is not needed, and not used,
/// by a node that has joined; one for another cluster is an error.
pub async fn join_or_open(token: Option<&str>, name: &str, data_dir: &Path, env: &Env) -> Result<AgentIdentity, JoinError> {
    match (AgentIdentity::open(data_dir)?, token) {
        (Some(identity), Some(text)) if !identity.knows(&JoinToken::decode(text)?.ca_sha256) => {
            Err(JoinError::OtherCluster { has: identity.cluster })
        }
        (Some(identity), _) => Ok(identity),
        (None, Some(text)) => join(text, name, data_dir, env).await,
        (None, None) => Err(JoinError::TokenNeeded),
    }
}

/// Joins the cluster of `token` under the host name `name` and stores who we are in `data_dir`.
/// Tries each server once; whether to try again is the caller's choice, and costs no second use.
pub async fn join(token: &str, name: &str, data_dir: &Path, env: &Env) -> Result<AgentIdentity, JoinError> {
    let token = JoinToken::decode(token)?;
    token.check(env.clock.now())?;
    let key = identity::pending_key(data_dir)?;
    let config = transport::client_config(tls::pinned_client(token.ca_sha256, ALPN_JOIN, &env.clock)?)?;
    let endpoint = transport::client_endpoint()?;
    let request = JoinRequest {
        versions: PROTOCOL,
        token_id: token.id.to_string(),
        secret: token.secret.clone(),
        csr: key.request()?,
        name: name.to_owned(),
    };
    let result = try_servers(&endpoint, &config, &token, &request).await;
    if let Err(error) = &result {
        tracing::warn!(token = %token.id, error = %Chain(error), "failed to join");
    }
    let (server, answer) = result?;
    let identity = take(data_dir, &token, &server, answer, key)?;
    tracing::info!(cluster = %identity.cluster, node = %identity.node, server, "joined the cluster");
    Ok(identity)
}

async fn try_servers(
    endpoint: &Endpoint,
    config: &quinn::ClientConfig,
    token: &JoinToken,
    request: &JoinRequest,
) -> Result<(String, JoinAnswer), JoinError> {
    let mut tried = Vec::new();
    let mut wrong = None;
    for server in &token.servers {
        let connection = match dial(endpoint, config.clone(), server, CONNECT_MAX).await {
            Ok(connection) => connection,
            Err(DialError::NotTrusted(reason)) if reason.contains(PIN_MISMATCH) => {
                wrong = Some(server.clone());
                continue;
            }
            Err(error) => {
                tried.push(format!("{server}: {error}"));
                continue;
            }
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, ask(&connection, request)).await;
        connection.close(close::DONE.into(), b"");
        match answer {
            Ok(Ok(Message::JoinAnswer(answer))) => return Ok((server.clone(), answer)),
            // Another server may know a leader.
            Ok(Ok(Message::Refused(Refused { code, message }))) if code == code::NO_LEADER.code => {
                tried.push(format!("{server}: {message}"))
            }
            Ok(Ok(Message::Refused(Refused { code, message }))) => return Err(JoinError::Refused { code, message }),
            Ok(Ok(_)) => return Err(JoinError::Answer { server: server.clone(), what: "another message than an answer".into() }),
            Ok(Err(error)) if error.is_violation() => {
                return Err(JoinError::Answer { server: server.clone(), what: Chain(&error).to_string() });
            }
            Ok(Err(error)) => {
                let why = error.connection().map_or_else(|| Chain(&error).to_string(), transport::explain);
                tried.push(format!("{server}: {why}"));
            }
            Err(_) => tried.push(format!("{server}: no answer for {} s", ANSWER_TIMEOUT.as_secs())),
        }
    }
    match wrong {
        // Silence elsewhere explains less than an impostor, or a reused address.
        Some(server) => Err(JoinError::WrongCluster { server }),
        None => Err(JoinError::Unreachable { tried }),
    }
}

async fn ask(connection: &Connection, request: &JoinRequest) -> Result<Message, FrameError> {
    let (send, receive) = connection.open_bi().await.map_err(quinn::ReadError::ConnectionLost)?;
    let mut writer = FrameWriter::new(send);
    writer.send(request.clone()).await?;
    writer.finish()?;
    FrameReader::new(receive, ANSWER_MAX).next().await?.ok_or(FrameError::CutOff)
}

/// Checks and stores the answer. The pinned handshake vouches for the server; a mistake must still not be stored.
fn take(data_dir: &Path, token: &JoinToken, server: &str, answer: JoinAnswer, key: Key) -> Result<AgentIdentity, JoinError> {
    // Another CA than the pinned one, too: it may be the next one, which the pinned one vouches for.
    if !tls::issued_by(&answer.certificate, &answer.ca) {
        return Err(JoinError::Answer { server: server.to_owned(), what: "a certificate that its CA did not sign".into() });
    }
    Ok(AgentIdentity::create(data_dir, token, answer, key)?)
}
