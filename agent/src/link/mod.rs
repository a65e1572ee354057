//! The link to the control plane.
//!
//! It joins the cluster once, then keeps one session with a server: takes desired sets, hands on
//! reports, answers heartbeats and requests for logs, renews the certificate. It never starts or stops
//! a workload and never makes one wait: while there is no session, everything runs as it last was.
//!
//! ```text
//! run: dial a server -> Hello -> Welcome -> session until it breaks -> pause (full jitter, at most 1 s) -> next server
//! session: read  Desired -> accept (durable) -> empty report with the new generation
//!          write full report, then each batch of changes, pongs
//!          renew at half life    serve log streams    watch for silence
//! ```

mod calls;
mod identity;
mod join;
mod logs;
mod renewal;
mod session;
mod usage;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::reason::code;
use optimus_host::telemetry::Chain;
use optimus_host::transport;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use identity::{AgentIdentity, IdentityError};
pub use join::{JoinError, join, join_or_open};
use session::End;

use crate::workloads::Workloads;

/// First and longest pause between two tries to reach any server.
///
/// Must stay well below the lease of a node (5 s): one that is silent for longer is declared lost.
/// Full jitter, so that a thousand agents whose
/// server died do not knock at the others at once.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// First and longest wait for a server to answer.
const CONNECT_FIRST: Duration = Duration::from_millis(600);
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// The same failure is logged this often.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Where the link stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkStatus {
    /// Not connected yet.
    Connecting,
    Connected {
        server: String,
    },
    /// No session; the text says why. The link tries again by itself.
    Disconnected {
        reason: String,
    },
    /// Sent away with a code of `optimus explain`. The link tries again, but a person must act.
    Refused {
        code: String,
        message: String,
    },
}

/// Keeps the session with the control plane.
pub struct Link {
    identity: Mutex<AgentIdentity>,
    workloads: Arc<dyn Workloads>,
    env: Env,
    status: watch::Sender<LinkStatus>,
    /// Whether the next connection is for renewing.
    renewal: renewal::Renewal,
    endpoints: Endpoints,
}

/// Makes the UDP endpoint that sessions dial from.
pub type Endpoints = Box<dyn Fn() -> Result<quinn::Endpoint, transport::SetupError> + Send + Sync>;

/// Keeps the session with the control plane until `shutdown`.
pub async fn run(identity: AgentIdentity, workloads: Arc<dyn Workloads>, env: Env, shutdown: CancellationToken) {
    Link::new(identity, workloads, env).run(shutdown).await;
}

impl Link {
    pub fn new(identity: AgentIdentity, workloads: Arc<dyn Workloads>, env: Env) -> Self {
        Link {
            identity: Mutex::new(identity),
            workloads,
            env,
            status: watch::Sender::new(LinkStatus::Connecting),
            renewal: Default::default(),
            endpoints: Box::new(transport::client_endpoint),
        }
    }

    /// The same, dialling from endpoints of its own: simulated agents can be cut off so.
    pub fn with_endpoints(self, endpoints: Endpoints) -> Self {
        Link { endpoints, ..self }
    }

    /// Follows where the link stands.
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut log = Log { env: self.env.clone(), last: None };
        let mut failures = 0u32;
        let mut tries = Tries::default();
        let mut endpoint = None;
        while !shutdown.is_cancelled() {
            let order = self.identity().order();
            let address = tries.next(&order);
            let patience = patience(failures, order.len());
            let end = match endpoint.take().map_or_else(&self.endpoints, Ok) {
                Ok(open) => {
                    let end = tokio::select! {
                        () = shutdown.cancelled() => None,
                        end = Box::pin(session::run(&self, &open, &address, patience)) => Some(end),
                    };
                    let Some(end) = end else {
                        open.close(transport::close::DONE.into(), b"the agent is stopping");
                        // Lets the farewell leave, so that the server need not wait for silence.
                        let _ = tokio::time::timeout(Duration::from_millis(200), open.wait_idle()).await;
                        break;
                    };
                    endpoint = Some(open);
                    end
                }
                Err(error) => End::Failed { reason: Chain(&error).to_string() },
            };
            match &end {
                End::Renewed => {
                    tries.again(address);
                    continue;
                }
                // A session that stood. Its server comes last now: it may be gone, and the others are not.
                End::Lost { .. } => failures = 0,
                End::Failed { .. } | End::Refused { .. } => failures = failures.saturating_add(1),
            }
            if let End::Refused { code, .. } = &end {
                self.renewal.refused(code);
            }
            log.end(&address, &end);
            self.status.send_replace(match end {
                End::Refused { code, message } if !heals(&code) => LinkStatus::Refused { code, message },
                End::Refused { message: reason, .. } | End::Failed { reason } | End::Lost { reason } => LinkStatus::Disconnected { reason },
                End::Renewed => LinkStatus::Connecting,
            });
            let pause = pause(failures, self.env.fraction());
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.env.clock.sleep(pause) => {}
            }
        }
    }

    fn identity(&self) -> std::sync::MutexGuard<'_, AgentIdentity> {
        self.identity.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// How long a server gets to answer. With others to try, little at first: one that died answers never. It grows with
/// each round of failures, for a slow network or servers busy with a thousand of us.
fn patience(failures: u32, servers: usize) -> Duration {
    let rounds = failures / u32::try_from(servers.max(1)).unwrap_or(u32::MAX);
    if servers <= 1 { CONNECT_MAX } else { CONNECT_FIRST.saturating_mul(1 << rounds.min(10)).min(CONNECT_MAX) }
}

/// Which server comes next: round and round in the node's own order, even when the list changes on the way.
#[derive(Debug, Default)]
struct Tries {
    last: Option<String>,
    again: bool,
}

impl Tries {
    /// `order`: at least one address.
    fn next(&mut self, order: &[String]) -> String {
        let after = self.last.as_ref().and_then(|last| order.iter().position(|a| a == last));
        let next = match after {
            Some(at) if std::mem::take(&mut self.again) => at,
            Some(at) => (at + 1) % order.len(),
            None => 0,
        };
        let address = order[next].clone();
        self.last = Some(address.clone());
        address
    }

    fn again(&mut self, address: String) {
        self.last = Some(address);
        self.again = true;
    }
}

/// Full jitter: anything from nothing to twice the pause before, up to [`PAUSE_MAX`].
fn pause(failures: u32, fraction: f64) -> Duration {
    let limit = PAUSE_FIRST.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
    limit.mul_f64(fraction.clamp(0.0, 1.0))
}

/// True for refusals that end by themselves.
fn heals(refusal: &str) -> bool {
    [code::NO_LEADER, code::OVERLOADED, code::TIMED_OUT, code::INTERNAL].iter().any(|c| c.code == refusal)
}

/// Logs the ends of sessions: each new kind at once, the same again every [`LOG_EVERY`].
struct Log {
    env: Env,
    last: Option<(String, Duration)>,
}

impl Log {
    fn end(&mut self, server: &str, end: &End) {
        let (kind, text) = match end {
            End::Renewed => return,
            End::Refused { code, message } => (code.as_str(), message),
            End::Failed { reason } => ("failed", reason),
            End::Lost { reason } => ("lost", reason),
        };
        let key = format!("{server} {kind} {text}");
        let now = self.env.clock.monotonic();
        if self.last.as_ref().is_some_and(|(last, at)| *last == key && now.saturating_sub(*at) < LOG_EVERY) {
            return;
        }
        self.last = Some((key, now));
        match end {
            End::Refused { code, .. } if !heals(code) => {
                tracing::error!(
                    server,
                    code,
                    reason = text,
                    "the control plane refuses this node; what runs keeps running, and the link keeps trying"
                );
            }
            End::Refused { .. } | End::Failed { .. } => {
                tracing::warn!(server, reason = text, "no session with the control plane; trying again")
            }
            End::Lost { .. } => tracing::warn!(server, reason = text, "lost the session with the control plane; connecting again"),
            End::Renewed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_tried_in_turn_also_when_the_list_changes() {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let (three, two) = (list(&["a", "b", "c"]), list(&["b", "d"]));
        let mut tries = Tries::default();
        assert_eq!([tries.next(&three), tries.next(&three), tries.next(&two)], ["a", "b", "d"]);
        assert_eq!([tries.next(&two), tries.next(&three), tries.next(&three)], ["b", "c", "a"]);
        tries.again("a".into());
        assert_eq!([tries.next(&three), tries.next(&three)], ["a", "b"], "once more, then on");
        assert_eq!([tries.next(&list(&["d"])), tries.next(&list(&["d"]))], ["d", "d"]);
    }

    #[test]
    fn a_dead_server_costs_little_when_there_are_others() {
        assert_eq!(patience(0, 1), CONNECT_MAX);
        assert_eq!([patience(0, 3), patience(2, 3), patience(3, 3)], [CONNECT_FIRST, CONNECT_FIRST, 2 * CONNECT_FIRST]);
        assert_eq!(patience(u32::MAX, 2), CONNECT_MAX);
    }

    #[test]
    fn the_pause_grows_and_stays_below_a_second() {
        assert_eq!(pause(0, 1.0), PAUSE_FIRST);
        assert_eq!(pause(1, 0.5), PAUSE_FIRST);
        assert_eq!(pause(5, 1.0), PAUSE_MAX);
        assert_eq!(pause(u32::MAX, 1.0), PAUSE_MAX);
        assert_eq!(pause(7, 0.0), Duration::ZERO);
    }
}
