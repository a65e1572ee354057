//! The environment of a workload: clean, then the spec's, then what Optimus says. Pure.
//!
//! Nothing of the agent's own environment leaks in, so a workload sees the same on every node.

use std::collections::BTreeMap;
use std::path::Path;

use optimus_common::protocol::{DesiredAlloc, RELEASE_SLOT};
use optimus_common::spec::WorkloadSpec;

use optimus_common::Reason;

use super::StartError;
use super::users::User;

/// Where programs are looked for unless the spec sets `PATH`.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file of a run's payload, in its tmp.
pub const PAYLOAD: &str = "payload";

/// Builds the whole environment of one run.
///
/// The spec may override the base (`PATH`, `HOME`, `LANG`, `TZ`, `TMPDIR`) but not what tells the workload where and
/// what it is: a `PORT` that is not the reserved one could never become ready.
pub fn build(
    alloc: &DesiredAlloc,
    spec: &WorkloadSpec,
    user: &User,
    tmp: &Path,
    node: &str,
    host: &BTreeMap<String, String>,
    devices: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |key: &str, value: String| env.insert(key.to_owned(), value);
    set("PATH", DEFAULT_PATH.to_owned());
    set("HOME", user.home.clone());
    set("USER", user.name.clone());
    set("LOGNAME", user.name.clone());
    set("LANG", host.get("LANG").cloned().unwrap_or_else(|| "C.UTF-8".to_owned()));
    if let Some(zone) = host.get("TZ") {
        set("TZ", zone.clone());
    }
    set("TMPDIR", tmp.display().to_string());
    for (key, value) in &spec.env {
        set(key, value.clone());
    }
    for (key, value) in &spec.secret_values {
        set(key, value.reveal().to_owned());
    }
    if let Some((_, first)) = alloc.ports.first() {
        set("PORT", first.to_string());
    }
    for (name, port) in &alloc.ports {
        set(&format!("PORT_{}", name.to_ascii_uppercase().replace('-', "_")), port.to_string());
    }
    for (key, value) in devices {
        set(key, value.clone());
    }
    set("OPTIMUS_ALLOC", alloc.id.to_string());
    if alloc.index != RELEASE_SLOT {
        set("OPTIMUS_INDEX", alloc.index.to_string());
    }
    set("OPTIMUS_PROJECT", alloc.key.project.to_string());
    set("OPTIMUS_ENVIRONMENT", alloc.key.environment.to_string());
    set("OPTIMUS_WORKLOAD", alloc.key.workload.to_string());
    set("OPTIMUS_RELEASE", alloc.release.to_string());
    set("OPTIMUS_NODE", node.to_owned());
    if let Some(input) = spec.runs.as_ref().and_then(|runs| runs.input.as_ref()) {
        set("OPTIMUS_RUN", input.run.clone());
        set("OPTIMUS_RUN_NUMBER", input.number.to_string());
        if let Some(at) = input.scheduled_for {
            set("OPTIMUS_SCHEDULED_FOR", at.to_string());
        }
        for (name, value) in &input.params {
            set(&format!("OPTIMUS_PARAM_{name}"), value.clone());
        }
        if input.payload.is_some() {
            set("OPTIMUS_PAYLOAD_FILE", tmp.join(PAYLOAD).display().to_string());
        }
    }
    env
}

/// The first secret the workload asks for and this agent was not given: nothing is started without it.
pub fn missing_secret(spec: &WorkloadSpec) -> Option<StartError> {
    let name = spec.secrets.iter().find(|name| !spec.secret_values.contains_key(*name))?;
    Some(StartError::here(Reason::Missing { what: format!("the control plane gave no value of secret {name}") }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{desired, spec};

    #[test]
    fn nothing_starts_without_a_secret_it_asks_for() {
        let mut spec = spec(&["true"]);
        assert!(missing_secret(&spec).is_none());
        spec.secrets = vec!["A".into(), "B".into()];
        spec.secret_values = BTreeMap::from([("A".into(), optimus_common::secret::SecretValue::new("x".to_owned()).unwrap())]);
        let missing = missing_secret(&spec).unwrap();
        assert!(missing.reason.to_string().contains("secret B"), "{}", missing.reason);
    }

    #[test]
    fn a_workload_learns_its_ports_and_place_and_nothing_of_the_agent() {
        let mut spec = spec(&["true"]);
        spec.secret_values = BTreeMap::from([("TOKEN".into(), optimus_common::secret::SecretValue::new("t0p".to_owned()).unwrap())]);
        spec.env = BTreeMap::from([("HOME".into(), "/srv".into()), ("PORT".into(), "1".into()), ("MINE".into(), "x".into())]);
        let mut alloc = desired(7, &spec);
        alloc.ports = vec![("http".into(), 20_001), ("admin-ui".into(), 20_002)];
        let user = User { name: "app".into(), uid: 1, gid: 1, home: "/home/app".into(), groups: vec![] };
        let host = BTreeMap::from([("TZ".to_owned(), "Europe/Rome".to_owned()), ("SECRET".to_owned(), "agent's".to_owned())]);
        let devices = BTreeMap::from([("OPTIMUS_DEVICE_GPU".to_owned(), "/dev/g0".to_owned())]);
        spec.env.insert("OPTIMUS_DEVICE_GPU".into(), "/dev/other".into());
        let env = build(&alloc, &spec, &user, Path::new("/run/tmp"), "node-1", &host, &devices);
        for (key, value) in [
            ("PORT", "20001"),
            ("TOKEN", "t0p"),
            ("PORT_HTTP", "20001"),
            ("PORT_ADMIN_UI", "20002"),
            ("HOME", "/srv"),
            ("MINE", "x"),
            ("USER", "app"),
            ("TZ", "Europe/Rome"),
            ("LANG", "C.UTF-8"),
            ("TMPDIR", "/run/tmp"),
            ("OPTIMUS_NODE", "node-1"),
            ("OPTIMUS_WORKLOAD", "web"),
            ("OPTIMUS_INDEX", "0"),
            ("OPTIMUS_RELEASE", "1"),
            ("PATH", DEFAULT_PATH),
            ("OPTIMUS_DEVICE_GPU", "/dev/g0"),
        ] {
            assert_eq!(env.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert!(!env.contains_key("SECRET"));
    }

    #[test]
    fn a_run_learns_what_it_was_given() {
        use optimus_common::Timestamp;
        use optimus_common::spec::{Kind, RunInput, Runs};
        let (params, payload) = (BTreeMap::from([("CUSTOMER".into(), "7".into())]), Some(vec![1]));
        let input = RunInput { run: "r".into(), number: 3, scheduled_for: Some(Timestamp(0)), params, payload };
        let runs = Some(Runs { input: Some(Box::new(input)), ..Runs::of(None) });
        let spec = WorkloadSpec { kind: Kind::Job, runs, ..spec(&["true"]) };
        let user = User { name: "app".into(), uid: 1, gid: 1, home: "/".into(), groups: vec![] };
        let env = build(&desired(7, &spec), &spec, &user, Path::new("/run/tmp"), "node-1", &BTreeMap::new(), &BTreeMap::new());
        for (key, value) in [
            ("OPTIMUS_RUN", "r"),
            ("OPTIMUS_RUN_NUMBER", "3"),
            ("OPTIMUS_SCHEDULED_FOR", "1970-01-01T00:00:00.000Z"),
            ("OPTIMUS_PARAM_CUSTOMER", "7"),
            ("OPTIMUS_PAYLOAD_FILE", "/run/tmp/payload"),
        ] {
            assert_eq!(env.get(key).map(String::as_str), Some(value), "{key}");
        }
    }
}
