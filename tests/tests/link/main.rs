//! Agents and servers over real QUIC on loopback: joining, identity, sessions, reports, logs, and what
//! strangers and broken peers get.
#![allow(clippy::unwrap_used)]

mod hostile;
mod joining;
mod moving;
mod rotation;
mod sessions;
mod support;

use optimus_common::spec::*;
use optimus_common::{Bytes, Millicores, Span};

/// Some valid workload.
pub fn spec() -> WorkloadSpec {
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec!["sleep".into(), "1".into()]),
        dir: None,
        env: Default::default(),
        user: None,
        copies: None,
        ports: vec![],
        resources: Resources { cpu: Millicores(100), memory_request: Bytes::mib(16), memory_limit: Bytes::mib(32), pids: 64 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(60), reset_after: Span::secs(60) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(10) },
        update: Update { deadline: Span::secs(60), ..Update::default() },
        logs: Logs { size: Bytes::mib(1) },
        secrets: vec![],
        secret_values: Default::default(),
        labels: Default::default(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}
