//! Getting the cluster back: exports of the whole state, an archive of every change, and the two ways back from them.
//!
//! ```text
//! running   state --export--> file            on request (API) or every so often (schedule)
//!           log ----archiver--> segments      what was committed between two exports
//! offline   file (+ segments) --restore--> a new store, on any machine
//!           the store of a survivor --recover--> the same server as the only voter
//! ```
//! Everything that leaves a server is encrypted in the [age](crypt) format; there is no way to write it in the clear.
//! The cluster's CA key is in the state sealed with the root key, which is in neither: restore asks for it.
//!
//! A restored or recovered server goes on under a new id and with log indexes nobody has seen ([`lineage`]), so that
//! servers of before cannot take part and nothing that remembers an index or a generation takes new for old.

pub mod archive;
pub mod archiver;
mod container;
pub mod crypt;
mod exclusive;
pub mod export;
pub mod lineage;
pub mod probe;
pub mod recover;
pub mod restore;
pub mod schedule;

pub use container::ReadError;
pub use crypt::{CryptError, Key, Lock};
pub use export::{Export, ExportHead};
pub use schedule::Options;

#[cfg(test)]
mod tests;
