//! The addresses agents reach this cluster's servers at.

use std::net::SocketAddr;

use optimus_common::join_token::{SERVERS_MAX, is_host_port};

use super::Shared;

/// `host:port` of every server, this one first; at most [`SERVERS_MAX`].
pub fn addresses(shared: &Shared) -> Vec<String> {
    let status = shared.store.status();
    let mut servers = shared.advertise.clone();
    // An address like 0.0.0.0:7443 says where a server listens, not where it is found.
    let found = |address: &String| {
        is_host_port(address) && address.parse::<SocketAddr>().map_or(true, |a| !a.ip().is_unspecified() && a.port() != 0)
    };
    for (_, address) in status.members.iter().filter(|(id, address)| **id != status.server && found(address)) {
        if !servers.contains(address) {
            servers.push(address.clone());
        }
    }
    servers.truncate(SERVERS_MAX);
    servers
}
