//! From `host:port` to a QUIC connection.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use quinn::{Connection, ConnectionError, Endpoint};

use crate::tls::SERVER_NAME;
use crate::transport;

/// Longest wait for a name to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Addresses tried of one name, and the head start of each over the next.
const ADDRESSES_MAX: usize = 8;
const HEAD_START: Duration = Duration::from_millis(200);

/// Why there is no connection.
#[derive(Debug)]
pub enum DialError {
    /// Nobody answers there, or not as QUIC.
    Unreachable(String),
    /// Whoever answers failed our check of its certificate.
    NotTrusted(String),
    /// It answered and closed.
    Closed(ConnectionError),
}

impl std::fmt::Display for DialError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DialError::Unreachable(text) | DialError::NotTrusted(text) => f.write_str(text),
            DialError::Closed(error) => f.write_str(&transport::explain(error)),
        }
    }
}

/// Connects to a server at `address`, whichever of its addresses answers first, each within `patience`.
pub async fn dial(endpoint: &Endpoint, config: quinn::ClientConfig, address: &str, patience: Duration) -> Result<Connection, DialError> {
    let resolved = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(address)).await;
    let addresses: Vec<SocketAddr> = match resolved {
        Ok(Ok(found)) => found.take(ADDRESSES_MAX).collect(),
        Ok(Err(error)) => return Err(DialError::Unreachable(format!("failed to resolve {address}: {error}"))),
        Err(_) => {
            return Err(DialError::Unreachable(format!("failed to resolve {address}: no answer for {} s", RESOLVE_TIMEOUT.as_secs())));
        }
    };
    let mut tries: FuturesUnordered<_> = addresses
        .iter()
        .enumerate()
        .map(|(n, &to)| {
            let config = config.clone();
            async move {
                tokio::time::sleep(HEAD_START * u32::try_from(n).unwrap_or(0)).await;
                let connecting = endpoint.connect_with(config, to, SERVER_NAME).map_err(|e| DialError::Unreachable(e.to_string()))?;
                match tokio::time::timeout(patience, connecting).await {
                    Ok(Ok(connection)) => Ok(connection),
                    Ok(Err(error)) => Err(failed(error)),
                    Err(_) => Err(DialError::Unreachable(format!("nothing answers at {to} (UDP)"))),
                }
            }
        })
        .collect();
    let mut worst = None;
    while let Some(result) = tries.next().await {
        match result {
            Ok(connection) => return Ok(connection),
            // Someone who answered wrongly is better to report than silence.
            Err(error @ (DialError::NotTrusted(_) | DialError::Closed(_))) => worst = Some(error),
            Err(error) => worst = worst.or(Some(error)),
        }
    }
    Err(worst.unwrap_or_else(|| DialError::Unreachable(format!("{address} resolves to no address"))))
}

fn failed(error: ConnectionError) -> DialError {
    match error {
        // A code from 0x100 on is a TLS alert; raised on this side it is our verdict on the server.
        ConnectionError::TransportError(e) if (0x100..0x200).contains(&u64::from(e.code)) => DialError::NotTrusted(e.reason),
        ConnectionError::TimedOut => DialError::Unreachable("nothing answers (UDP)".into()),
        other => DialError::Closed(other),
    }
}
