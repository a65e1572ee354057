//! A tokio runtime with one worker thread, for tasks that wake each other and must not wait behind others.
//!
//! A write passes through a dozen tasks of consensus and QUIC, one after the other. On a runtime of several workers each
//! wakes a worker that looks for more work and finds none, which on few cores costs more than the write; and a long
//! computation on one of them holds up a heartbeat. A server has its consensus and its QUIC traffic here, and everything
//! else (the API, loops of the leader) on the runtime of the process. Blocking work goes to `spawn_blocking`, as ever.

use std::future::Future;

use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

/// The runtime. Its tasks are cancelled when this is dropped; whoever needs them to end in order joins them before.
#[derive(Debug)]
pub struct Home(Option<Runtime>);

impl Home {
    /// Starts the worker thread, called `name`.
    ///
    /// # Errors
    /// When the host gives no thread, or no epoll instance.
    pub fn new(name: &str) -> std::io::Result<Self> {
        Ok(Self(Some(Builder::new_multi_thread().worker_threads(1).thread_name(name).enable_all().build()?)))
    }

    /// To start tasks there.
    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is taken out only when dropped").handle()
    }

    /// What is made while the guard lives (sockets, timers, tasks) belongs there.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.handle().enter()
    }

    /// Runs `task` there and waits for it; when the wait is given up, the task ends.
    ///
    /// # Panics
    /// When `task` panics.
    pub async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> T {
        run_on(self.handle(), task).await
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Waiting for its threads is not allowed where this is dropped: inside another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs `task` on the runtime of `home` and waits for it; when the wait is given up, the task ends.
///
/// # Panics
/// When `task` panics, or the runtime is gone.
pub async fn run_on<T: Send + 'static>(home: &Handle, task: impl Future<Output = T> + Send + 'static) -> T {
    match tokio_util::task::AbortOnDropHandle::new(home.spawn(task)).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("the runtime has ended: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tasks_run_on_their_own_thread_and_end_with_it() {
        let home = Home::new("home-test").expect("a runtime");
        let name = home.run(async { std::thread::current().name().map(str::to_owned) }).await;
        assert_eq!(name.as_deref(), Some("home-test"));
        let inner = home.run(async { tokio::spawn(async { std::thread::current().id() }).await.expect("a task") }).await;
        assert_ne!(inner, std::thread::current().id());
        let (kept, ended) = tokio::sync::oneshot::channel::<()>();
        home.handle().spawn(async move {
            let _kept = kept;
            std::future::pending::<()>().await
        });
        drop(home);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(10), ended).await;
        assert!(ended.expect("it is cancelled").is_err());
    }
}
