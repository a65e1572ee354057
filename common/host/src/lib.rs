//! The real side of the traits in `optimus-common`: this host's disk, clock and network.

pub mod disk;
