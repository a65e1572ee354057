//! Types and traits every part of Optimus shares.

pub mod disk;
