//! Background tasks on tokio, tracked so that a shut-down can wait for them.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use optimus_common::env::Spawn;
use tokio_util::task::TaskTracker;

/// All tasks started through an [`optimus_common::env::Env`].
#[derive(Debug, Clone, Default)]
pub struct Tasks(TaskTracker);

impl Tasks {
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until every task has ended, at most for `patience`; tells whether they have. Tasks end
    /// because their owners told them to; this ends none.
    pub async fn join(&self, patience: Duration) -> bool {
        self.0.close();
        tokio::time::timeout(patience, self.0.wait()).await.is_ok()
    }

    /// How many tasks run.
    pub fn running(&self) -> usize {
        self.0.len()
    }
}

impl Spawn for Tasks {
    /// A panic ends the task alone and is logged.
    fn spawn(&self, name: &'static str, mut task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(std::future::poll_fn(move |cx| match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx))) {
            Ok(poll) => poll,
            Err(_) => {
                tracing::error!(task = name, "background task panicked");
                Poll::Ready(())
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tasks_are_joined_and_a_panic_stays_inside() {
        let tasks = Tasks::new();
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn("boom", Box::pin(async { panic!("on purpose") }));
        tasks.spawn(
            "waits",
            Box::pin(async move {
                let _ = told.await;
            }),
        );
        assert!(!tasks.join(Duration::from_millis(20)).await, "one task still waits");
        let _ = tell.send(());
        assert!(tasks.join(Duration::from_secs(10)).await);
        assert_eq!(tasks.running(), 0);
    }
}
