//! The runtime openraft runs on: tokio, with two seams for the simulator.
//!
//! Outside a [`scope`] this is plain tokio. Inside one, every task started here (by openraft or by us) is reported to
//! the scope's [`Hooks`] and inherits them, so that a simulator can end, hold up and watch exactly one node's tasks, and the
//! only random numbers openraft draws (election timeouts) come from the hooks, so that a seed repeats a run.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use openraft::{AsyncRuntime, EntryPayload, OptionalSend, TokioInstant, TokioRuntime};
use rand_core_06::RngCore;
use tokio::task::AbortHandle;

use super::types::{Entry, LogId};

/// What a simulator supplies for one node.
pub trait Hooks: Debug + Send + Sync + 'static {
    /// The next random number.
    fn random(&self) -> u64;
    /// A task was started in this scope.
    fn spawned(&self, task: AbortHandle);
    /// Asked before each step of each task of this scope. A node that is paused answers `Pending` and wakes the task later.
    fn may_run(&self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
    /// How long the next piece of disk work of [`IoMode::Inline`](super::IoMode::Inline) takes.
    fn disk_delay(&self) -> Duration {
        Duration::ZERO
    }
    /// The store did something, or is about to.
    fn stored(&self, _what: Stored) {}
}

/// One entry of a log, without its commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its place in the log.
    pub index: u64,
    /// Term and id of the leader that made it.
    pub leader: (u64, u64),
    /// The sets of voters, when the entry changes the membership: two while a change is under way.
    pub voters: Option<Vec<BTreeSet<u64>>>,
}

impl From<LogId> for Mark {
    fn from(id: LogId) -> Self {
        Self { index: id.index, leader: (id.leader_id.term, id.leader_id.node_id), voters: None }
    }
}

impl From<&Entry> for Mark {
    fn from(entry: &Entry) -> Self {
        let voters = match &entry.payload {
            EntryPayload::Membership(m) => Some(m.get_joint_config().clone()),
            _ => None,
        };
        Self { voters, ..entry.log_id.into() }
    }
}

/// What the store of a node did, told once it is durable, or is about to do. For [`Hooks::stored`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The log was opened and holds this.
    Opened {
        /// Term, server and whether a quorum granted it.
        vote: Option<(u64, u64, bool)>,
        /// Last entry purged.
        purged: Option<Mark>,
        /// The entries behind it.
        entries: Vec<Mark>,
        /// Up to where the log is known to be committed.
        committed: Option<Mark>,
        /// Last entry of the newest snapshot.
        snapshot: Option<Mark>,
    },
    /// A vote was saved: term, server and whether a quorum granted it.
    Vote(u64, u64, bool),
    /// Entries were appended.
    Appended(Vec<Mark>),
    /// All entries from this index on are about to be removed.
    Truncating(u64),
    /// All entries up to this one are about to be purged.
    Purging(Mark),
    /// openraft knows that everything up to here is committed, and is about to apply it.
    Committed(Mark),
    /// A snapshot up to here was saved; `installed` when it came from the leader.
    Snapshot {
        /// Its last entry, with the membership it carries.
        last: Mark,
        /// Whether the leader sent it.
        installed: bool,
    },
}

tokio::task_local! {
    static HOOKS: Arc<dyn Hooks>;
}

/// Starts a task in the scope of `hooks`.
pub fn spawn_in<F>(hooks: Arc<dyn Hooks>, future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    HOOKS.sync_scope(hooks, || Runtime::spawn(future))
}

/// Runs `future`, and every task it starts through this module, under `hooks`.
pub async fn scope<F: Future>(hooks: Arc<dyn Hooks>, future: F) -> F::Output {
    HOOKS.scope(hooks, future).await
}

/// Whether somebody watches, so that what is only for them need not be made.
pub(crate) fn watched() -> bool {
    HOOKS.try_with(|_| ()).is_ok()
}

/// Tells the scope's hooks; `what` is not even made outside a scope.
pub(crate) fn stored(what: impl FnOnce() -> Stored) {
    if let Ok(hooks) = HOOKS.try_with(Arc::clone) {
        hooks.stored(what());
    }
}

/// Waits as long as the scope's hooks say that disk work takes.
pub(crate) async fn disk_delay() {
    let delay = HOOKS.try_with(|hooks| hooks.disk_delay()).unwrap_or_default();
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}

/// A task that its hooks can hold up.
struct Gated<F> {
    hooks: Arc<dyn Hooks>,
    task: Pin<Box<F>>,
}

impl<F: Future> Future for Gated<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match self.hooks.may_run(cx) {
            Poll::Ready(()) => self.task.as_mut().poll(cx),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// openraft's view of tokio.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Runtime;

/// Random numbers from the scope's hooks, or from the operating system outside a scope.
pub struct Random(Source);

enum Source {
    Hooks(Arc<dyn Hooks>),
    System(<TokioRuntime as AsyncRuntime>::ThreadLocalRng),
}

impl RngCore for Random {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }

    fn next_u64(&mut self) -> u64 {
        match &mut self.0 {
            Source::Hooks(hooks) => hooks.random(),
            Source::System(rng) => rng.next_u64(),
        }
    }

    fn fill_bytes(&mut self, dest: &mut [u8]) {
        rand_core_06::impls::fill_bytes_via_next(self, dest);
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand_core_06::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}

impl AsyncRuntime for Runtime {
    type JoinError = tokio::task::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = tokio::task::JoinHandle<T>;
    type Sleep = tokio::time::Sleep;
    type Instant = TokioInstant;
    type TimeoutError = tokio::time::error::Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = tokio::time::Timeout<T>;
    type ThreadLocalRng = Random;
    type OneshotSender<T: OptionalSend> = <TokioRuntime as AsyncRuntime>::OneshotSender<T>;
    type OneshotReceiver<T: OptionalSend> = tokio::sync::oneshot::Receiver<T>;
    type OneshotReceiverError = tokio::sync::oneshot::error::RecvError;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        match HOOKS.try_with(Arc::clone) {
            Ok(hooks) => {
                let task = Gated { hooks: hooks.clone(), task: Box::pin(HOOKS.scope(hooks.clone(), future)) };
                let task = tokio::spawn(task);
                hooks.spawned(task.abort_handle());
                task
            }
            Err(_) => tokio::spawn(future),
        }
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        tokio::time::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        tokio::time::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        tokio::time::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        tokio::time::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        join_error.is_panic()
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        match HOOKS.try_with(Arc::clone) {
            Ok(hooks) => Random(Source::Hooks(hooks)),
            Err(_) => Random(Source::System(TokioRuntime::thread_rng())),
        }
    }

    fn oneshot<T>() -> (Self::OneshotSender<T>, Self::OneshotReceiver<T>)
    where
        T: OptionalSend,
    {
        TokioRuntime::oneshot()
    }
}
