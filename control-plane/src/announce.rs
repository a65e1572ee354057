//! Keeps what the replicated state says of this server true, and notices when this server no longer belongs.

use std::time::Duration;

use optimus_core::state::{Applied, Command, ServerFacts, ServerRow};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

const RETRY: Duration = Duration::from_millis(500);
/// A leaving server that hears nothing more for so long has lost its vote without being told.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// Who this server is.
pub struct Announcement {
    pub server: u64,
    pub facts: ServerFacts,
    pub key_fingerprint: [u8; 32],
    /// It has the only vote: it made the cluster, or goes on alone after a recovery, and the state may not know it yet.
    pub alone: bool,
}

fn says(row: &ServerRow, facts: &ServerFacts) -> bool {
    let ServerFacts { name, address, api, version, level } = facts;
    (&row.name, &row.address, &row.api, &row.version, &row.level) == (name, address, api, version, level)
}

/// Runs until `shutdown`, or until this server has left the cluster: then it tells how.
pub async fn run(store: Store, own: Announcement, shutdown: CancellationToken) -> Option<String> {
    let mut applied = store.applied();
    let mut belonged = false;
    loop {
        applied.mark_unchanged();
        let state = store.state();
        let id = own.server;
        let command = match state.servers.get(&id) {
            Some(row) if row.leaving => {
                wait_for_the_end(&store, id).await;
                return Some(format!("server {id} has left the cluster"));
            }
            Some(row) => {
                belonged = true;
                (!says(row, &own.facts)).then(|| Command::ServerUp { id, server: own.facts.clone() })
            }
            None if belonged => return Some(format!("server {id} was removed from the cluster")),
            // Otherwise the state is still on its way to where this server is in it.
            None if own.alone && state.cluster.is_some() && state.servers.is_empty() => {
                let key_fingerprint = own.key_fingerprint.to_vec();
                Some(Command::AdmitServer { token: None, server: own.facts.clone(), key_fingerprint })
            }
            None => None,
        };
        let retry = match command {
            None => Duration::MAX,
            Some(command) => match store.propose(command).await {
                Ok(Applied::Refused(refusal)) => {
                    tracing::warn!(%refusal, "the cluster did not take what this server says of itself");
                    RETRY
                }
                Ok(_) => Duration::MAX,
                Err(error) => {
                    tracing::debug!(%error, "not announced yet");
                    RETRY
                }
            },
        };
        tokio::select! {
            () = shutdown.cancelled() => return None,
            changed = applied.changed() => if changed.is_err() { return None },
            () = store.env.clock.sleep(retry), if retry != Duration::MAX => {}
        }
    }
}

/// Waits until this server has lost its vote, as far as it can know.
async fn wait_for_the_end(store: &Store, id: u64) {
    let clock = &store.env.clock;
    let mut silent_since = clock.monotonic();
    loop {
        let status = store.status();
        if !status.members.contains_key(&id) {
            return;
        }
        if status.leader.is_some_and(|leader| leader != id) {
            silent_since = clock.monotonic();
        }
        // Without a leader nobody takes the vote away, and one that leads itself must hand over first.
        if !status.is_leader && clock.monotonic().saturating_sub(silent_since) > LEAVE_PATIENCE {
            return;
        }
        clock.sleep(RETRY / 5).await;
    }
}
