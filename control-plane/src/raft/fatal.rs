//! The one signal that says: this server must stop.
//!
//! After a failed sync, a damaged record or an undecodable command nothing this process believes about its disk or its
//! state can be trusted, and carrying on would fork history. Whoever notices raises the signal; everything refuses from
//! then on, and the owner of the process exits so that the service manager starts a fresh one.

use std::sync::Arc;

use tokio::sync::watch;

/// A cheap handle on the signal; the first reason raised is kept.
#[derive(Clone, Debug)]
pub(crate) struct Fatal(Arc<watch::Sender<Option<String>>>);

impl Fatal {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Raises the signal; logs the first reason as an error, since it needs a human.
    pub(crate) fn raise(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.0.send_if_modified(|held| {
            if held.is_some() {
                return false;
            }
            tracing::error!(%reason, "this server must stop");
            *held = Some(reason);
            true
        });
    }

    pub(crate) fn get(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Resolves with the reason once raised; never resolves otherwise.
    pub(crate) async fn wait(&self) -> String {
        let mut held = self.0.subscribe();
        let raised = held.wait_for(Option::is_some).await.map(|reason| reason.clone()).ok().flatten();
        match raised {
            Some(reason) => reason,
            // The sender lives in `self`, so the channel cannot close while we wait.
            None => std::future::pending().await,
        }
    }
}
