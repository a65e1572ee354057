//! The joiner's side: a server with a token becomes one of the cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::join_token::{JoinToken, JoinTokenError, Role};
use optimus_common::protocol::{ALPN_JOIN, Blob, Message, PROTOCOL, Refused, ServerJoinAnswer, ServerJoinRequest};
use optimus_common::reason::code;
use optimus_core::state::{Cluster, ServerFacts, ServerRow};
use optimus_host::dial::{DialError, dial};
use optimus_host::files;
use optimus_host::telemetry::Chain;
use optimus_host::tls::{self, PIN_MISMATCH, TlsError};
use optimus_host::transport::{self, FrameError, FrameReader, FrameWriter, SetupError, close};
use quinn::Connection;

use super::record::{self, Record, RecordError};
use super::root_key::{RootKey, RootKeyError};
use crate::auth::AdminToken;

/// Longest wait for the answer: the cluster commits the server before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for one server to answer the knock.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_MAX: usize = 64 << 10;
/// How long the joiner goes on asking a cluster that has no leader at the moment.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(500);

/// Why the server did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Token(#[from] JoinTokenError),
    #[error("the join token admits an {is}; make one with `optimus cluster join-token`")]
    Role { is: Role },
    #[error("{} holds the log of a server already; a server that joins starts with an empty data directory", path.display())]
    Occupied { path: PathBuf },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    RootKey(#[from] RootKeyError),
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
    #[error("failed to write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Joins the cluster of `token` as the server `facts` describe. Afterwards `data_dir` holds the record, the root key and
/// the administrator's token, all durable. Asking again after a crash burns no second use of the token.
pub async fn join(token: &str, facts: &ServerFacts, data_dir: &Path, env: &Env) -> Result<Record, JoinError> {
    let token = JoinToken::decode(token)?;
    token.check(env.clock.now())?;
    if token.role != Role::Server {
        return Err(JoinError::Role { is: token.role });
    }
    let log = data_dir.join("raft");
    if log.exists() {
        return Err(JoinError::Occupied { path: log });
    }
    let key = record::pending_key(data_dir)?;
    let request = ServerJoinRequest {
        versions: PROTOCOL,
        token_id: token.id.to_string(),
        secret: token.secret.clone(),
        csr: key.request()?,
        server: Blob::of(facts),
    };
    let (server, answer) = ask_until(&token, &request, env).await?;
    let understood = |what: &str| JoinError::Answer { server: server.clone(), what: what.to_owned() };
    let cluster: Cluster = answer.cluster.open().map_err(|_| understood("a cluster that does not decode"))?;
    let servers: Vec<ServerRow> = answer.servers.open().map_err(|_| understood("servers that do not decode"))?;
    // The pinned handshake vouches for the server; a mistake must still not be stored.
    if !cluster.roots().iter().any(|root| tls::sha256(root) == token.ca_sha256) {
        return Err(understood("a CA other than the pinned one"));
    }
    let admin = AdminToken::parse(&answer.admin_token).ok_or_else(|| understood("a malformed administrator's token"))?;
    let root = RootKey::adopt(data_dir, &answer.root_key)?;
    let path = data_dir.join(crate::auth::TOKEN_FILE);
    files::write_private(&path, format!("{}\n", admin.expose()).as_bytes()).map_err(|source| JoinError::Write { path, source })?;
    let record = Record::new(answer.server, cluster, &key, servers, &root, env);
    // Last: with it the server is a member.
    record.store(data_dir)?;
    record::forget_pending(data_dir);
    tracing::info!(cluster = %record.cluster.id, server = record.server, through = server, "joined the cluster");
    Ok(record)
}

/// Asks all servers of the token until one answers, `PATIENCE` at most.
async fn ask_until(token: &JoinToken, request: &ServerJoinRequest, env: &Env) -> Result<(String, ServerJoinAnswer), JoinError> {
    let config = transport::client_config(tls::pinned_client(token.ca_sha256, ALPN_JOIN, &env.clock)?)?;
    let endpoint = transport::client_endpoint()?;
    let deadline = env.clock.monotonic() + PATIENCE;
    loop {
        let mut tried = Vec::new();
        let mut wrong = None;
        for server in &token.servers {
            let connection = match dial(&endpoint, config.clone(), server, CONNECT_TIMEOUT).await {
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
                Ok(Ok(Message::ServerJoinAnswer(answer))) => return Ok((server.clone(), answer)),
                Ok(Ok(Message::Refused(Refused { code, message }))) if code == code::NO_LEADER.code => {
                    tried.push(format!("{server}: {message}"));
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
            Some(server) if tried.is_empty() => return Err(JoinError::WrongCluster { server }),
            _ if env.clock.monotonic() >= deadline => return Err(JoinError::Unreachable { tried }),
            _ => {
                tracing::info!(tried = tried.join("; "), "no server of the cluster answers yet; trying again");
                env.clock.sleep(RETRY).await;
            }
        }
    }
}

async fn ask(connection: &Connection, request: &ServerJoinRequest) -> Result<Message, FrameError> {
    let (send, receive) = connection.open_bi().await.map_err(quinn::ReadError::ConnectionLost)?;
    let mut writer = FrameWriter::new(send);
    writer.send(request.clone()).await?;
    writer.finish()?;
    FrameReader::new(receive, ANSWER_MAX).next().await?.ok_or(FrameError::CutOff)
}
