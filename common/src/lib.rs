//! What every part of Optimus shares: ids, units, the workload spec, the API types, the agent
//! protocol and the codec.
//!
//! Pure: nothing here reads a clock, draws a random number, opens a file or a socket. The real side
//! of the traits in [`env`] and [`disk`] is in `optimus-host`; a simulator may supply its own.

pub mod api;
pub mod clock_skew;
pub mod codec;
pub mod disk;
pub mod env;
pub mod figures;
pub mod ids;
pub mod join_token;
pub mod metric;
pub mod planted;
pub mod protocol;
pub mod reason;
pub mod secret;
pub mod spec;
pub mod time;
pub mod units;
pub mod usage;

pub use figures::Figures;
pub use ids::{AllocId, ClusterId, DeploymentId, Name, NodeId, RunId, TokenId, WorkloadKey};
pub use metric::Metric;
pub use reason::Reason;
pub use time::{Span, Timestamp};
pub use units::{Bytes, Millicores};
