//! The real side of the traits in `optimus-common`: this host's clock, randomness, tasks and disk; and what
//! both shells share of files, TLS, QUIC and logging.

pub mod clock;
pub mod dial;
pub mod disk;
pub mod entropy;
pub mod env;
pub mod failpoint;
pub mod files;
pub mod home;
pub mod spawn;
pub mod telemetry;
pub mod tls;
pub mod transport;
