//! The seam between the link to the control plane and the part that runs workloads.

use std::future::Future;
use std::pin::Pin;

use optimus_common::protocol::{Desired, LogChunk, LogRequest, NodeFacts, Report};
use tokio::sync::mpsc;

use crate::metrics::collector::{Answer, Unavailable};
use crate::metrics::history::{Query, Subject};
use crate::metrics::rates::Reading;

/// A desired set older than the one held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("desired set of generation {offered} is older than the one held, {held}")]
pub struct OlderGeneration {
    pub offered: u64,
    pub held: u64,
}

/// Why the output of an allocation cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("this node holds no allocation {0}")]
    NoSuchAlloc(optimus_common::AllocId),
    #[error("failed to read the log")]
    Read(#[source] std::io::Error),
}

pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Runs workloads. The link drives it; it works the same while the link is down.
pub trait Workloads: Send + Sync + 'static {
    fn facts(&self) -> NodeFacts;
    /// Resolves when the facts are others than [`Workloads::facts`] last gave. Cancel-safe.
    fn facts_changed(&self) -> Boxed<'_, ()> {
        Box::pin(std::future::pending())
    }
    /// Generation of the desired set held (from the ledger after a restart); 0: none yet.
    fn generation(&self) -> u64;
    /// Takes a new desired set: durable in the ledger before it returns.
    fn accept(&self, desired: Desired) -> Boxed<'_, Result<(), OlderGeneration>>;
    /// Everything known, for the first report of a session.
    fn full_report(&self) -> Report;
    /// Waits for changes since the last call (or since `full_report`) and gives them as one batch.
    /// Cancel-safe: a change is handed over or kept.
    fn next_report(&self) -> Boxed<'_, Report>;
    /// Newest readings of the host and of the copies that run; nothing where nothing is measured.
    fn readings(&self) -> Vec<(Subject, Reading)> {
        vec![]
    }
    /// The history of a subject.
    fn history(&self, _query: Query) -> Boxed<'_, Result<Answer, Unavailable>> {
        Box::pin(async { Err(Unavailable) })
    }
    /// Streams the output of an allocation into `out` until it ends (or, following, until `out` closes).
    fn logs(&self, request: LogRequest, out: mpsc::Sender<LogChunk>) -> Boxed<'_, Result<(), LogError>>;
}
