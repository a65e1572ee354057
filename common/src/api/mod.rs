//! Types of the REST API, shared by the server and its clients.

pub mod usage;
pub mod v1;
