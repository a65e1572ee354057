//! Host ports: is one really free, who holds it, and what does a workload listen on.
//!
//! The control plane reserves ports; this proves a reservation right before a start. It can be overtaken by
//! a stranger in the moment after, which the readiness check then shows.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::{FDTarget, Process};
use rustix::net::{AddressFamily, SocketType, sockopt};

/// Most ports of a workload that are named in a reason.
pub const LISTENING_MAX: usize = 16;
/// Most processes of a workload that are looked through for sockets.
const PIDS_MAX: usize = 1024;

/// Whether a server could listen on `port` on every address now.
///
/// Binds as servers do, with `SO_REUSEADDR`: old connections in TIME_WAIT are no conflict, a listener is. Does
/// not listen, so nobody can connect to us in between.
pub fn is_free(port: u16) -> io::Result<bool> {
    let any: [SocketAddr; 2] = [(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()];
    for address in any {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = match rustix::net::socket_with(family, SocketType::STREAM, rustix::net::SocketFlags::CLOEXEC, None) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AFNOSUPPORT) if address.is_ipv6() => continue,
            Err(e) => return Err(e.into()),
        };
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?; // IPv4 has been tried on its own
        }
        match rustix::net::bind(&socket, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::ADDRINUSE) => return Ok(false),
            Err(rustix::io::Errno::ADDRNOTAVAIL) if address.is_ipv6() => {} // IPv6 is switched off
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// Who holds `port`: `python3 (pid 123)`. Unset if it cannot be seen (another user's process, or gone).
///
/// Walks every process of the host; only called after a conflict.
pub fn holder(port: u16) -> Option<String> {
    let entries: Vec<TcpNetEntry> =
        host_sockets().into_iter().filter(|e| e.local_address.port() == port && e.state != TcpState::TimeWait && e.inode != 0).collect();
    // A listener is the holder if there is one.
    let inode = entries.iter().find(|e| e.state == TcpState::Listen).or(entries.first())?.inode;
    let processes = procfs::process::all_processes().ok()?;
    let process = processes.filter_map(Result::ok).find(|p| socket_inodes(p).contains(&inode))?;
    let name = process.stat().map(|s| s.comm).unwrap_or_default();
    Some(format!("{name} (pid {})", process.pid()))
}

/// Ports on which one of these processes listens, sorted, at most [`LISTENING_MAX`].
pub fn listening(pids: &[u32]) -> Vec<u16> {
    let mut ports = BTreeSet::new();
    let mut entries = None;
    for pid in pids.iter().take(PIDS_MAX) {
        let Ok(process) = i32::try_from(*pid).map_err(drop).and_then(|pid| Process::new(pid).map_err(drop)) else { continue };
        let inodes = socket_inodes(&process);
        if inodes.is_empty() {
            continue;
        }
        // The process's own view, so that a network namespace is looked into; one for all is enough.
        let entries = entries.get_or_insert_with(|| -> Vec<TcpNetEntry> {
            [process.tcp(), process.tcp6()].into_iter().flat_map(Result::unwrap_or_default).collect()
        });
        let listeners = entries.iter().filter(|e| e.state == TcpState::Listen && inodes.contains(&e.inode));
        ports.extend(listeners.map(|e| e.local_address.port()));
    }
    ports.into_iter().take(LISTENING_MAX).collect()
}

fn host_sockets() -> Vec<TcpNetEntry> {
    [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flat_map(Result::unwrap_or_default).collect()
}

fn socket_inodes(process: &Process) -> BTreeSet<u64> {
    let Ok(fds) = process.fd() else { return BTreeSet::new() };
    let sockets = fds.filter_map(Result::ok).filter_map(|fd| match fd.target {
        FDTarget::Socket(inode) => Some(inode),
        _ => None,
    });
    sockets.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_listener_on_any_address_takes_the_port_and_is_named() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue }; // a host without IPv6
            let port = listener.local_addr().unwrap().port();
            assert!(!is_free(port).unwrap(), "{address}");
            let holder = holder(port).unwrap();
            assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
            assert!(listening(&[std::process::id()]).contains(&port));
            drop(listener);
            assert!(is_free(port).unwrap(), "{address} after it closed");
        }
    }

    #[test]
    fn old_connections_are_no_conflict() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (served, _) = listener.accept().unwrap();
        drop(served); // the server's side closes first and waits in TIME_WAIT
        drop(client);
        drop(listener);
        assert!(is_free(port).unwrap());
    }
}
