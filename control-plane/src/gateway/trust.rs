//! What a session tells an agent of the cluster's CAs, and what the agent tells of its own trust and clock.
//!
//! Both come back with each heartbeat until the state says the same: a lost proposal costs a second.

use std::sync::Mutex;
use std::time::Duration;

use optimus_common::clock_skew::{ClockSkew, in_words};
use optimus_common::env::Clock;
use optimus_common::protocol::{ClockPong, ROOTS_MAX, Trust, Trusting};
use optimus_core::state::{Cluster, Command, Member, Node, State};
use optimus_host::tls;

use super::Shared;

/// Longest wait for a proposal at a heartbeat; it is made again at the next.
const TELL_WITHIN: Duration = Duration::from_secs(1);
/// Heartbeats between two words about one clock.
const CLOCK_EVERY: u64 = 10;

/// What one session knows.
#[derive(Default)]
pub struct Known(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    trusting: Option<Trusting>,
    clock: ClockSkew,
    /// The ping under way: its number, and when it was sent by the monotonic clock.
    ping: Option<(u64, Duration)>,
    beats: u64,
}

impl Known {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn told(&self, trusting: Trusting) {
        // What is over the bound cannot be true: so many were never told.
        self.inner().trusting = (trusting.roots.len() <= ROOTS_MAX).then_some(trusting);
    }

    pub fn pinged(&self, n: u64, clock: &dyn Clock) {
        self.inner().ping = Some((n, clock.monotonic()));
    }

    pub fn answered(&self, pong: &ClockPong, clock: &dyn Clock) {
        let mut inner = self.inner();
        if let Some((_, sent)) = inner.ping.take_if(|(n, _)| *n == pong.n) {
            let rtt = clock.monotonic().saturating_sub(sent);
            inner.clock.sample(u64::try_from(rtt.as_millis()).unwrap_or(u64::MAX), clock.now().0, pong.at.0);
        }
    }

    /// At each heartbeat: lets the state know what has changed of `row`.
    pub async fn tell(&self, shared: &Shared, state: &State, row: &Node) {
        let Some(cluster) = state.cluster.as_ref() else { return };
        for command in self.commands(cluster, row) {
            if command.level() > cluster.version {
                continue;
            }
            if let Command::MemberClock { skew_ms, .. } = &command {
                match skew_ms {
                    Some(ms) => tracing::warn!(node = row.facts.name, "the node's clock is {}", in_words(*ms)),
                    None => tracing::info!(node = row.facts.name, "the node's clock agrees with this server's again"),
                }
            }
            match tokio::time::timeout(TELL_WITHIN, shared.store.propose(command)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(node = %row.id, %error, "not told yet what the node trusts"),
                Err(_) => tracing::debug!(node = %row.id, "not told yet what the node trusts"),
            }
        }
    }

    fn commands(&self, cluster: &Cluster, row: &Node) -> Vec<Command> {
        let mut inner = self.inner();
        let member = Member::Node(row.id);
        let mut commands = Vec::new();
        if let Some((trusted, signer)) = inner.trusting.as_ref().and_then(|t| numbers(cluster, t))
            && (trusted, signer) != (row.ca_trusted, row.ca_signer)
        {
            commands.push(Command::MemberCa { member, trusted, signer });
        }
        inner.beats += 1;
        if inner.beats.is_multiple_of(CLOCK_EVERY)
            && let Some(skew_ms) = inner.clock.news(row.clock_skew_ms)
        {
            commands.push(Command::MemberClock { member, skew_ms });
        }
        commands
    }
}

/// Numbers of the newest CA trusted and of the signer; none when it is of CAs this state does not know (yet, or any more).
fn numbers(cluster: &Cluster, told: &Trusting) -> Option<(u32, u32)> {
    let number = |hash: &[u8; 32]| cluster.number_of(|certificate| tls::sha256(certificate) == *hash);
    Some((told.roots.iter().filter_map(number).max()?, number(&told.signer)?))
}

/// What to send when `sent` was sent last.
pub fn due(shared: &Shared, sent: &[Vec<u8>]) -> Option<Trust> {
    let (progress, roots) = shared.identity.trust();
    (roots != sent).then_some(Trust { progress, roots })
}
