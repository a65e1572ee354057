//! The network between servers, and between servers and everybody else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use optimus_control_plane::consensus::CoreMachine;
use optimus_control_plane::raft::runtime::spawn_in;
use optimus_control_plane::raft::{Peer, PeerError, PeerRpc, PeerTransport, RaftNode};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::entropy::Rng;
use crate::server::NodeHooks;
use crate::world::World;

/// A connection to a peer that is silent for so long is given up, and every call on it: `PEER_IDLE_TIMEOUT` of the real one.
const GIVEN_UP: Duration = Duration::from_secs(3);
/// Messages that may be under way at once.
const IN_FLIGHT_MAX: usize = 4096;

/// All wires.
pub struct Net {
    world: Weak<World>,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    /// From, to.
    cut: BTreeSet<(u64, u64)>,
    reachable: BTreeMap<u64, (RaftNode<CoreMachine>, Arc<NodeHooks>)>,
    in_flight: usize,
    /// Percent of messages lost, doubled, and slow.
    drop: f64,
    duplicate: f64,
    slow: f64,
}

impl Net {
    pub fn new(world: Weak<World>, mut rng: Rng) -> Self {
        // Some runs have a good network, some a bad one.
        let bad = *rng.pick(&[0.2, 1.0, 3.0]).unwrap_or(&1.0);
        let inner =
            Inner { rng, cut: BTreeSet::new(), reachable: BTreeMap::new(), in_flight: 0, drop: bad, duplicate: bad, slow: 1.0 + bad };
        Self { world, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transport of a server.
    pub fn transport(&self, from: u64) -> Arc<dyn PeerTransport> {
        Arc::new(Wire { from, world: self.world.clone() })
    }

    pub fn connect(&self, node: RaftNode<CoreMachine>, hooks: Arc<NodeHooks>) {
        self.lock().reachable.insert(node.id(), (node, hooks));
    }

    pub fn disconnect(&self, server: u64) {
        self.lock().reachable.remove(&server);
    }

    pub fn cut(&self, from: u64, to: u64) {
        self.lock().cut.insert((from, to));
    }

    pub fn mend(&self) {
        self.lock().cut.clear();
    }

    pub fn is_cut(&self, from: u64, to: u64) -> bool {
        self.lock().cut.contains(&(from, to))
    }

    pub fn in_flight(&self) -> usize {
        self.lock().in_flight
    }

    /// No loss, no slow messages from now on.
    pub fn calm(&self) {
        let mut inner = self.lock();
        inner.cut.clear();
        (inner.drop, inner.duplicate, inner.slow) = (0.0, 0.0, 0.0);
    }

    /// Whether the next message is lost, and how long it takes.
    pub fn roll(&self) -> (bool, Duration) {
        let mut inner = self.lock();
        let (drop, slow) = (inner.drop, inner.slow);
        let lost = inner.rng.chance(drop);
        let micros = if inner.rng.chance(slow) { inner.rng.range(10_000..120_000) } else { inner.rng.range(100..3_000) };
        (lost, Duration::from_micros(micros))
    }

    fn doubled(&self) -> bool {
        let mut inner = self.lock();
        let percent = inner.duplicate;
        inner.rng.chance(percent)
    }

    /// Takes one request over and lets the answer come back; dropping `answer` is silence.
    async fn carry(&self, from: u64, to: u64, kind: PeerRpc, body: Bytes, answer: oneshot::Sender<Result<Bytes, PeerError>>) {
        let Some(world) = self.world.upgrade() else { return };
        let (lost, delay) = self.roll();
        let again = self.doubled();
        sleep(delay).await;
        if lost || self.is_cut(from, to) {
            world.count(if lost { "message lost" } else { "message cut" });
            return;
        }
        let Some((node, hooks)) = self.lock().reachable.get(&to).cloned() else {
            let _ = answer.send(Err(PeerError::Unreachable(format!("server {to} is down"))));
            return;
        };
        world.say(format!("net {from}>{to} {kind:?} {}", body.len()));
        let (done, result) = oneshot::channel();
        let (handler, request) = (node.clone(), body.clone());
        spawn_in(hooks.clone(), async move {
            let _ = done.send(handler.handle_peer_rpc(from, kind, request).await);
        });
        if again {
            world.count("message doubled");
            let late = self.roll().1;
            tokio::spawn(async move {
                sleep(late).await;
                spawn_in(hooks, async move {
                    let _ = node.handle_peer_rpc(from, kind, body).await;
                });
            });
        }
        let Ok(result) = result.await else { return };
        let (lost, delay) = self.roll();
        sleep(delay).await;
        if lost || self.is_cut(to, from) {
            world.count("answer lost");
            return;
        }
        let _ = answer.send(result);
    }
}

struct Wire {
    from: u64,
    world: Weak<World>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wire({})", self.from)
    }
}

impl PeerTransport for Wire {
    fn call(&self, to: Peer, kind: PeerRpc, body: Bytes, ttl: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (from, world) = (self.from, self.world.clone());
        Box::pin(async move {
            let world = world.upgrade().ok_or_else(|| PeerError::Unreachable("the world is gone".to_owned()))?;
            let (answer, answered) = oneshot::channel();
            {
                let mut inner = world.net.lock();
                if inner.in_flight >= IN_FLIGHT_MAX {
                    drop(inner);
                    world.checks(|c| c.add(format!("bounded (I11): more than {IN_FLIGHT_MAX} messages between servers under way")));
                    return Err(PeerError::Unreachable("too many messages under way".to_owned()));
                }
                inner.in_flight += 1;
            }
            let carrier = world.clone();
            // A message that was sent arrives also when its sender has died since.
            tokio::spawn(async move {
                carrier.net.carry(from, to.id, kind, body, answer).await;
                carrier.net.lock().in_flight -= 1;
            });
            match tokio::time::timeout(ttl, answered).await {
                Ok(Ok(result)) => result,
                // Lost, or its receiver died. QUIC sends again what is lost and gives a silent peer up.
                Ok(Err(_)) => {
                    sleep(ttl.min(GIVEN_UP)).await;
                    Err(PeerError::Timeout)
                }
                Err(_) => Err(PeerError::Timeout),
            }
        })
    }
}
