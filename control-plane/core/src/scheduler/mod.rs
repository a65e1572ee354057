//! Where a copy may run, and where best.
//!
//! [`fits`] is the only judge of whether, [`Score`] of where best. A [`View`] holds the sums of every node and follows
//! a batch of placements as it is made.
//!
//! ```text
//!   fit ── constraint (driver, pool, architecture, rules), device, quota, volumes ──► yes, or a refusal with amounts
//!   score ── spread (even), affinity (liked), company (alone, apart), room, load ──► a number
//!   view ── batch: scores every node once for a release, then only the nodes it placed on
//!        └─ preempt: who gives way to a workload of higher priority that found no room
//! ```

mod batch;
mod constraint;
mod device;
mod explain;
mod fit;
mod preempt;
mod quota;
mod score;
mod spread;
#[cfg(test)]
mod tests;
mod view;

pub use constraint::{suits, value_of};
pub use device::{Device, allot_devices, kind_of as device_kind};
pub use explain::{judge, why_nowhere};
pub use fit::{Taken, fits, fits_resized, fits_with, taken};
pub use preempt::{PREEMPTION_DISTANCE, Room};
pub use quota::{Usage, usage};
pub use score::Score;
pub use view::{Ask, Judged, View};

pub(crate) use constraint::class_of;
pub(crate) use fit::capacity;
