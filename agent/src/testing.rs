//! What tests of this crate share: a real clock, real randomness, the runtime's spawn, small specs.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use optimus_common::env::{Clock, Entropy, Env, Spawn};
use optimus_common::ids::{AllocId, Name, WorkloadKey};
use optimus_common::protocol::{Blob, DesiredAlloc};
use optimus_common::spec::{Check, Driver, Health, Kind, Logs, Probe, Resources, Restart, Run, Stop, Update, WorkloadSpec};
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::{Bytes, Millicores};

struct Real(Instant);

impl Clock for Real {
    fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl Entropy for Real {
    fn fill(&self, bytes: &mut [u8]) {
        rand::fill(bytes);
    }
}

impl Spawn for Real {
    fn spawn(&self, _name: &'static str, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(task);
    }
}

/// An environment of the real host.
pub fn test_env() -> Env {
    let real = Arc::new(Real(Instant::now()));
    Env { clock: Arc::clone(&real) as _, entropy: Arc::clone(&real) as _, spawn: real }
}

/// A service that runs `argv`, with limits that are no hindrance and no health check.
pub fn spec(argv: &[&str]) -> WorkloadSpec {
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(argv.iter().map(|a| (*a).to_owned()).collect()),
        dir: None,
        env: BTreeMap::new(),
        user: None,
        copies: None,
        ports: vec![],
        resources: Resources { cpu: Millicores(500), memory_request: Bytes::mib(16), memory_limit: Bytes::mib(128), pids: 64 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(30), reset_after: Span::secs(60) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(5) },
        update: Update { deadline: Span::secs(300), ..Update::default() },
        logs: Logs { size: Bytes::mib(8) },
        secrets: vec![],
        secret_values: BTreeMap::new(),
        labels: BTreeMap::new(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}

/// A readiness or liveness check with short times.
pub fn probe(check: Check) -> Probe {
    let (interval, timeout, grace) = (Span::millis(200), Span::secs(1), Span::millis(0));
    Probe { check, port: None, interval, timeout, grace, healthy_after: 1, unhealthy_after: 2 }
}

/// Copy `n` of `p/dev/web` with this spec and no ports.
pub fn desired(n: u128, spec: &WorkloadSpec) -> DesiredAlloc {
    let name = |s: &str| Name::new(s).expect("a fixed, valid name");
    DesiredAlloc {
        id: AllocId(uuid::Uuid::from_u128(n)),
        key: WorkloadKey { project: name("p"), environment: name("dev"), workload: name("web") },
        index: 0,
        release: 1,
        run: true,
        ports: vec![],
        spec: Blob::of(spec),
    }
}
