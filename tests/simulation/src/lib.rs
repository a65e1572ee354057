//! A deterministic simulator of the control plane.
//!
//! One seed is one run: the real core, Raft module, leader loop and the agent's decisions, on one thread under tokio's
//! paused clock, with a network, disks and clocks that fail as the seed says. First things go wrong, then everything is
//! healed, and all must settle. Invariants (one a file in [`invariants`]) look at every event.
//!
//! ```text
//! clients, readers --ask--> Server: Store, leader loop, RaftNode --PeerTransport--> Net --> other Servers
//! Host (agent) ----ask-->      |                 '--> SimDisk --> MemDisk
//! Nemesis: crash, pause, cut, damage, clock, membership      hooks, observer --Event--> Checks
//! ```
//! The simulator never sleeps in real time and never asks the operating system for time or randomness; see [`entropy`]
//! for why one process runs one seed.

pub mod agents;
pub mod client;
pub mod clock;
pub mod disk;
pub mod entropy;
pub mod faults;
pub mod history;
pub mod invariants;
pub mod model;
pub mod net;
pub mod operator;
pub mod planted;
pub mod run;
pub mod runner;
pub mod server;
pub mod trace;
pub mod world;
