//! The runtime openraft runs on: tokio, with two seams for the simulator.
//!
//! Outside a [`scope`] this is plain tokio. Inside one, every task started here (by openraft or by us) is reported to
//! the scope's [`Hooks`] and inherits them, so that a simulator can end exactly one node's tasks, and the only random
//! numbers openraft draws (election timeouts) come from the hooks, so that a seed repeats a run.

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use openraft::{AsyncRuntime, OptionalSend, TokioInstant, TokioRuntime};
use rand_core_06::RngCore;
use tokio::task::AbortHandle;

/// What a simulator supplies for one node.
pub trait Hooks: Debug + Send + Sync + 'static {
    /// The next random number.
    fn random(&self) -> u64;
    /// A task was started in this scope.
    fn spawned(&self, task: AbortHandle);
}

tokio::task_local! {
    static HOOKS: Arc<dyn Hooks>;
}

/// Runs `future`, and every task it starts through this module, under `hooks`.
pub async fn scope<F: Future>(hooks: Arc<dyn Hooks>, future: F) -> F::Output {
    HOOKS.scope(hooks, future).await
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
                let task = tokio::spawn(HOOKS.scope(hooks.clone(), future));
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
