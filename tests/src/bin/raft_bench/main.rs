//! What `scripts/bench raft` measures with: one process a server, one for the load.
//!
//! ```text
//! optimus-raft-bench certs DIR N                     the authority and N servers' certificates
//! optimus-raft-bench node DIR CERTS ID PEERS DOOR    one server; PEERS and DOOR are lists of addresses, one a server
//! optimus-raft-bench load ENDPOINTS IN_FLIGHT SECONDS [PID...]
//! optimus-raft-bench api  WORKLOADS_URL CREDENTIALS IN_FLIGHT SECONDS [PID...]
//! optimus-raft-bench gap  ENDPOINTS IN_FLIGHT SECONDS
//! optimus-raft-bench disk DIR SECONDS append|fallocate|written
//! ```
//! `load` and `gap` speak etcd's gRPC, and so does a node: both sides are measured by the same client with the same
//! messages. Each operation is a request of its own with an answer of its own.

mod certs;
mod disk;
mod door;
mod etcd_wire;
mod load;
mod node;

use std::path::Path;

use anyhow::bail;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match args[..] {
        ["certs", dir, n] => certs::create(Path::new(dir), n.parse()?),
        ["node", dir, certs, id, peers, doors] => runtime.block_on(node::run(dir, Path::new(certs), id.parse()?, peers, doors)),
        ["load", endpoints, in_flight, seconds, ref pids @ ..] => {
            let pids = pids.iter().map(|pid| pid.parse()).collect::<Result<Vec<u32>, _>>()?;
            runtime.block_on(load::load(endpoints, in_flight.parse()?, seconds.parse()?, &pids))
        }
        ["api", workloads, credentials, in_flight, seconds, ref pids @ ..] => {
            let pids = pids.iter().map(|pid| pid.parse()).collect::<Result<Vec<u32>, _>>()?;
            runtime.block_on(load::api(workloads, credentials, in_flight.parse()?, seconds.parse()?, &pids))
        }
        ["gap", endpoints, in_flight, seconds] => runtime.block_on(load::gap(endpoints, in_flight.parse()?, seconds.parse()?)),
        ["disk", dir, seconds, how] => disk::probe(dir, seconds.parse()?, how),
        _ => bail!(
            "usage: certs DIR N | node DIR CERTS ID PEERS DOORS | load ENDPOINTS IN_FLIGHT SECONDS [PID...] | gap ENDPOINTS IN_FLIGHT SECONDS | disk DIR SECONDS HOW"
        ),
    }
}
