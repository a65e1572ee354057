//! Replication: one ordered log of commands, the same on every server.
//!
//! A thin module over openraft 0.9.25. What the rest of the control plane sees is [`RaftNode`], which takes commands of a
//! [`Machine`] and answers them once they are durable on a quorum and applied; openraft's own types stay inside.
//!
//! ```text
//! propose --> forward: to the leader, if another server is it (read_index: the same for reads)
//!               |
//!            batcher: many commands, one entry --> openraft --> log_store: one writer, one flush
//!                                                      |             (redb on a Disk)
//!             peers <-- network (PeerTransport) <------+
//!                                                      +--> state_machine --> Machine --> answers, `applied`
//!                                                                 +--> snapshots (files on the same Disk)
//! ```
//! It never acknowledges what is not flushed, never retries a failed flush, and never skips a record it does not
//! understand: in those cases [`RaftNode::fatal`] resolves and the process must exit.

mod batcher;
mod clock;
mod election;
mod error;
mod fatal;
mod forward;
mod log_store;
mod machine;
mod network;
mod node;
mod read_index;
mod receiving;
mod record;
mod route;
pub mod runtime;
mod seed;
mod snapshots;
mod state_machine;
mod status;
mod stored;
mod transfer;
mod tuning;
mod types;
mod watchdog;

pub use self::batcher::{MAX_BATCH_BYTES, MAX_BATCH_COMMANDS};
pub use self::error::{AdminError, ProposeError, ReadError, StartError, StoreError, TransferError};
pub use self::machine::{Capture, Machine};
pub use self::network::{MemoryNetwork, NoPeers, Peer, PeerError, PeerHandler, PeerRpc, PeerTransport, Refusal, check_append};
pub use self::node::{RaftConfig, RaftNode};
pub use self::route::Traffic;
pub use self::seed::{LogEntry, SalvageError, Salvaged, Seed, owner, salvage, seed};
pub use self::status::{Role, Status};
pub use self::tuning::{IoMode, Tuning};

#[cfg(test)]
mod tests;
