//! The addresses agents reach this cluster's servers at.

use std::net::SocketAddr;

use optimus_common::join_token::{SERVERS_MAX, is_host_port};

use super::Shared;

/// `host:port` of every server, this one first; at most [`SERVERS_MAX`].
pub fn addresses(shared: &Shared) -> Vec<String> {
    let (status, state) = (shared.store.status(), shared.store.state());
    let mut servers = shared.advertise.clone();
    // An address like 0.0.0.0:7443 says where a server listens, not where it is found.
    let found = |address: &String| {
        is_host_port(address) && address.parse::<SocketAddr>().map_or(true, |a| !a.ip().is_unspecified() && a.port() != 0)
    };
    // A server that is still joining is listed as well: who knocks too early goes on to the next.
    for row in state.servers.values().filter(|row| row.id != status.server && !row.leaving && found(&row.address)) {
        if !servers.contains(&row.address) {
            servers.push(row.address.clone());
        }
    }
    servers.truncate(SERVERS_MAX);
    servers
}
