//! The real [`Env`].

use std::sync::Arc;

use optimus_common::env::Env;

use crate::clock::HostClock;
use crate::entropy::HostEntropy;
use crate::spawn::Tasks;

/// Makes the [`Env`] of this host.
pub struct HostEnv;

impl HostEnv {
    /// For those who wait for no task at their end, such as tests and short commands.
    #[allow(clippy::new_ret_no_self)] // `Env` is the trait side; there is nothing else to hold
    pub fn new() -> Env {
        Self::with_tasks().0
    }

    /// Also gives the set of all tasks started through it, to be joined at shut-down.
    pub fn with_tasks() -> (Env, Tasks) {
        let tasks = Tasks::new();
        (Env { clock: Arc::new(HostClock), entropy: Arc::new(HostEntropy), spawn: Arc::new(tasks.clone()) }, tasks)
    }
}
