//! The REST API as its users meet it: over TLS, through a client that knows nothing of the server.
#![allow(clippy::unwrap_used)]

mod access;
mod bounds;
mod changes;
mod cluster;
mod errors;
mod operate;
mod placing;
mod reads;
mod secrets;
mod steering;
mod streams;
mod support;
