//! Join tokens: what gets in and what does not.

use std::os::unix::fs::PermissionsExt as _;

use optimus_agent::link::{AgentIdentity, JoinError, join, join_or_open};
use optimus_common::join_token::{JoinToken, JoinTokenError, Role};
use optimus_common::{Span, TokenId};
use optimus_control_plane::identity::{Identity, IdentityError, ServerNames};
use optimus_control_plane::join_tokens::JoinTokens;
use optimus_control_plane::store::Store;

use crate::support::*;

/// The code and words of a refusal.
fn refusal(result: Result<AgentIdentity, JoinError>) -> (String, String) {
    match result {
        Err(JoinError::Refused { code, message }) => (code, message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Makes a token say something else, with a good checksum.
fn changed(text: &str, change: impl FnOnce(&mut JoinToken)) -> String {
    let mut token = JoinToken::decode(text).unwrap();
    change(&mut token);
    token.encode()
}

#[tokio::test]
async fn a_good_token_admits_a_node_once_and_what_it_got_is_private() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.token(1).await;
    let identity = join(&token, "host-1", node_dir.path(), &test.env).await.unwrap();
    assert_eq!(identity.cluster, server.identity.cluster());
    let node = server.store.now().nodes[&identity.node].clone();
    assert_eq!(node.facts.name, "host-1");
    assert_eq!(node.certificate_expires_at.0 / 1000, identity.not_after.0 / 1000);
    let stored = AgentIdentity::open(node_dir.path()).unwrap().unwrap();
    assert_eq!((stored.node, stored.servers), (identity.node, vec![server.address.to_string()]));
    let mode = |name: &str| std::fs::metadata(node_dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("identity"), mode("identity/agent")), (0o700, 0o600));
    assert_eq!(std::fs::read_dir(node_dir.path().join("identity")).unwrap().count(), 1, "the pending key is gone");

    let second = tempfile::tempdir().unwrap();
    let (code, message) = refusal(join(&token, "host-2", second.path(), &test.env).await);
    assert_eq!(code, "OPT-1201");
    assert!(message.contains("used up"), "{message}");
    // A node that has joined needs no token, and a used-up one does it no harm.
    let again = join_or_open(Some(&token), "host-1", node_dir.path(), &test.env).await.unwrap();
    assert_eq!(again.node, identity.node);
    server.stop().await;
}

#[tokio::test]
async fn a_lost_answer_costs_no_second_use_and_no_second_node() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.token(1).await;
    let pending = node_dir.path().join("identity/pending-key");
    // The answer is lost after the server's commit: the key is there, the identity is not.
    let probe = join("opt_join_x", "host-1", node_dir.path(), &test.env).await;
    assert!(matches!(probe, Err(JoinError::Token(_))));
    let wrong = changed(&token, |t| t.secret = "wrong".into());
    refusal(join(&wrong, "host-1", node_dir.path(), &test.env).await);
    let key = std::fs::read(&pending).unwrap();
    let first = join(&token, "host-1", node_dir.path(), &test.env).await.unwrap();
    std::fs::remove_file(node_dir.path().join("identity/agent")).unwrap();
    optimus_host::files::write_private(&pending, &key).unwrap();
    let second = join(&token, "host-1", node_dir.path(), &test.env).await.unwrap();
    assert_eq!(second.node, first.node);
    assert_eq!(server.store.now().nodes.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_wrong_secret_and_an_unknown_token_get_the_same_answer() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.token(1).await;
    let secret = changed(&token, |t| t.secret = "d3Jvbmc".into());
    let unknown = changed(&token, |t| t.id = TokenId(uuid::Uuid::from_u128(9)));
    let a = refusal(join(&secret, "h", node_dir.path(), &test.env).await);
    let b = refusal(join(&unknown, "h", node_dir.path(), &test.env).await);
    assert_eq!(a, b);
    assert_eq!(a.0, "OPT-1201");
    assert!(server.store.now().nodes.is_empty());
    // The token itself is unharmed.
    join(&token, "h", node_dir.path(), &test.env).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn an_expired_token_is_refused_by_both_clocks() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.gateway.create(Role::Agent, Span::secs(60), 5).await.unwrap().token;
    let agent = TestEnv::new();
    agent.advance(Span::secs(61));
    let error = join(&token, "h", node_dir.path(), &agent.env).await.unwrap_err();
    assert!(matches!(error, JoinError::Token(JoinTokenError::Expired { .. })), "{error}");
    // The agent's clock is behind: the server's decides.
    test.advance(Span::secs(61));
    let (code, message) = refusal(join(&token, "h", node_dir.path(), &TestEnv::new().env).await);
    assert_eq!(code, "OPT-1201");
    assert!(message.contains("expired"), "{message}");
    // A token whose expiry was moved is still held to the one on record.
    let forged = changed(&token, |t| t.expires_at = t.expires_at + HOUR);
    let (code, _) = refusal(join(&forged, "h", node_dir.path(), &test.env).await);
    assert_eq!(code, "OPT-1201");
    server.stop().await;
}

#[tokio::test]
async fn a_tampered_text_is_refused_before_any_packet() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.token(1).await;
    let before = server.store.proposals.load(std::sync::atomic::Ordering::Relaxed);
    for bad in [token[..token.len() - 5].to_owned(), token.replace("opt_join_h", "opt_join_i"), format!("{token}0"), String::new()] {
        let error = join(&bad, "h", node_dir.path(), &test.env).await.unwrap_err();
        assert!(matches!(error, JoinError::Token(_)), "{error}");
    }
    assert_eq!(server.store.proposals.load(std::sync::atomic::Ordering::Relaxed), before);
    assert!(!node_dir.path().join("identity").exists(), "nothing was made for a token that cannot be");
    server.stop().await;
}

#[tokio::test]
async fn a_server_of_another_cluster_is_not_given_the_secret() {
    let test = TestEnv::new();
    let (a_dir, b_dir, node_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (Server::start(&test, a_dir.path()).await, Server::start(&test, b_dir.path()).await);
    let token = changed(&a.token(1).await, |t| t.servers = vec![b.address.to_string()]);
    let error = join(&token, "h", node_dir.path(), &test.env).await.unwrap_err();
    assert!(matches!(&error, JoinError::WrongCluster { server } if *server == b.address.to_string()), "{error}");
    // The right one among the wrong ones is found.
    let token = changed(&token, |t| t.servers = vec![b.address.to_string(), a.address.to_string()]);
    let identity = join(&token, "h", node_dir.path(), &test.env).await.unwrap();
    assert_eq!(identity.cluster, a.identity.cluster());
    let other = join_or_open(Some(&b.token(1).await), "h", node_dir.path(), &test.env).await.unwrap_err();
    assert!(matches!(other, JoinError::OtherCluster { .. }), "{other}");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn guessing_is_slowed_down() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    let token = server.token(1).await;
    let wrong = changed(&token, |t| t.secret = "guess".into());
    for _ in 0..10 {
        assert_eq!(refusal(join(&wrong, "h", node_dir.path(), &test.env).await).0, "OPT-1201");
    }
    let (code, message) = refusal(join(&token, "h", node_dir.path(), &test.env).await);
    assert_eq!(code, "OPT-1113");
    assert!(message.contains("wait"), "{message}");
    assert!(server.store.now().nodes.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn tokens_have_bounds() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let server = Server::start(&test, dir.path()).await;
    for (ttl, uses) in [(Span(0), 1), (Span(31 * 24 * HOUR.0), 1), (HOUR, 0), (HOUR, 10_001)] {
        assert!(server.gateway.create(Role::Agent, ttl, uses).await.is_err(), "{ttl} {uses}");
    }
    let answer = server.gateway.create(Role::Agent, HOUR, 3).await.unwrap();
    let row = server.store.now().tokens[&answer.id.parse::<TokenId>().unwrap()].clone();
    let secret = JoinToken::decode(&answer.token).unwrap().secret;
    assert_eq!(row.secret_hash, optimus_host::tls::sha256(secret.as_bytes()));
    assert!(!format!("{:?}", server.store.now()).contains(&secret), "the state holds no secret");
    server.stop().await;
}

#[tokio::test]
async fn a_restarted_server_is_the_same_cluster_and_needs_its_root_key() {
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let store = Store::new(TestStore::new(), test.env.clone());
    let names = ServerNames { server: 1, names: vec!["optimus.example.org".into()] };
    let first = Identity::found(dir.path(), &store, &names).await.unwrap();
    let second = Identity::found(dir.path(), &store, &names).await.unwrap();
    assert_eq!((first.cluster(), first.ca_der()), (second.cluster(), second.ca_der()));
    assert!(first.ca_pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert!(!second.renew_if_due().unwrap());
    test.advance(Span(46 * 24 * HOUR.0));
    let before = second.certificate_expires_at();
    assert!(second.renew_if_due().unwrap() && second.certificate_expires_at() > before);

    let key = dir.path().join("root.key");
    let text = std::fs::read_to_string(&key).unwrap();
    assert!(!format!("{:?}", store.state()).contains(text.trim().rsplit(':').next().unwrap()), "the root key is not in the state");
    std::fs::remove_file(&key).unwrap();
    let error = Identity::found(dir.path(), &store, &names).await.err().unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
    assert!(!key.exists(), "no other key was made in its place");
    let elsewhere = tempfile::tempdir().unwrap();
    Identity::found(elsewhere.path(), &Store::new(TestStore::new(), test.env.clone()), &names).await.unwrap();
    std::fs::copy(elsewhere.path().join("root.key"), &key).unwrap();
    let error = Identity::found(dir.path(), &store, &names).await.err().unwrap();
    assert!(matches!(error, IdentityError::RootKey(_)), "{error}");
}

/// A TLS handshake in memory; the words of the first error.
fn handshake(server: std::sync::Arc<rustls::ServerConfig>, client: rustls::ClientConfig, name: &str) -> Result<(), String> {
    let name = rustls_pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(client), name).unwrap();
    let mut server = rustls::ServerConnection::new(server).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets().map_err(|e| e.to_string())?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets().map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[tokio::test]
async fn the_api_is_reached_under_the_servers_names_with_the_cluster_ca() {
    use rustls_pki_types::pem::PemObject as _;
    let (test, dir) = (TestEnv::new(), tempfile::tempdir().unwrap());
    let store = Store::new(TestStore::new(), test.env.clone());
    let names = ServerNames { server: 1, names: vec!["optimus.example.org".into(), "10.1.2.3".into()] };
    let identity = Identity::found(dir.path(), &store, &names).await.unwrap();
    let client = || {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls_pki_types::CertificateDer::from_pem_slice(identity.ca_pem().as_bytes()).unwrap()).unwrap();
        rustls::ClientConfig::builder_with_provider(optimus_host::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    };
    for name in ["localhost", "127.0.0.1", "::1", "optimus.example.org", "10.1.2.3"] {
        handshake(identity.api_tls().unwrap(), client(), name).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    assert!(handshake(identity.api_tls().unwrap(), client(), "example.org").unwrap_err().contains("not valid for name"));
}
