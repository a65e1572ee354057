//! One allocation: the pure machine that decides, and the worker that acts.
//!
//! [`machine`] holds every decision and knows no clock, file or process. [`worker`] owns one task per
//! allocation: it feeds events to the machine and performs the actions it answers with. [`status`]
//! turns what the worker knows into what the control plane is told.

pub mod backoff;
pub mod machine;
pub mod status;
pub mod worker;
