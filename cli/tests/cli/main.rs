//! The verbs against a scripted API: output, exit codes, errors, retries.
#![allow(clippy::unwrap_used)]

mod deploy;
mod fake;
mod local;
mod operate;
mod placing;
mod rotation;
mod streams;
mod verbs;
mod world;
