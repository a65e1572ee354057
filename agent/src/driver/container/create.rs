//! From a spec to what the engine is asked to create. Pure.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{
    ContainerCreateBody, ContainerUpdateBody, DeviceMapping, HostConfig, HostConfigLogConfig, Mount as EngineMount, MountType,
    MountVolumeOptions, PortBinding, RestartPolicy, RestartPolicyNameEnum,
};
use optimus_common::protocol::DesiredAlloc;
use optimus_common::spec::{Container, Mount, Network, Resources, Run, Source, WorkloadSpec};
use optimus_common::units::{Bytes, Millicores};

use crate::devices::Share;
use crate::volumes::Used;

/// Label that says which agent a container, image or volume belongs to. Without ours, nothing is ever touched.
pub const OWNER_LABEL: &str = "optimus.owner";
pub const ALLOC_LABEL: &str = "optimus.alloc";
pub const ATTEMPT_LABEL: &str = "optimus.attempt";
/// CFS period in microseconds.
const PERIOD_USEC: i64 = 100_000;
/// The kernel's smallest quota.
const QUOTA_MIN_USEC: i64 = 1000;
/// Files the engine keeps of the output. It is a buffer for the time no agent is there; the log itself is ours.
const LOG_FILES: u32 = 2;

/// What a container is made with beside its spec.
pub struct Surroundings<'a> {
    /// This agent, for [`OWNER_LABEL`].
    pub owner: &'a str,
    pub node: &'a str,
    /// Our group the container goes below, if the engine lets us say.
    pub cgroup_parent: Option<String>,
    /// Devices it was given. The engine lets a container open no others.
    pub share: Share,
    /// Volumes it sees.
    pub volumes: Vec<Used>,
}

/// Everything the engine is asked for.
pub fn body(
    alloc: &DesiredAlloc,
    spec: &WorkloadSpec,
    container: &Container,
    attempt: u32,
    around: &Surroundings<'_>,
) -> ContainerCreateBody {
    let (entrypoint, cmd) = match &spec.run {
        // The line is the user's own; an entrypoint before it would get it as arguments.
        Run::Shell(line) => (Some(vec!["/bin/sh".to_owned(), "-c".to_owned()]), Some(vec![line.clone()])),
        Run::Argv(argv) => (container.entrypoint.clone(), (!argv.is_empty()).then(|| argv.clone())),
    };
    let mut environment = environment(alloc, spec, container, around.node);
    environment.extend(around.share.env.clone());
    environment.extend(around.volumes.iter().filter(|used| used.target.is_some()).map(Used::variable));
    ContainerCreateBody {
        image: Some(container.image.clone()),
        user: spec.user.clone(),
        working_dir: spec.dir.clone(),
        entrypoint,
        cmd,
        env: Some(environment.into_iter().map(|(k, v)| format!("{k}={v}")).collect()),
        labels: Some(labels(alloc, attempt, around)),
        stop_signal: Some(format!("SIG{}", spec.stop.signal)),
        exposed_ports: publishes(container).then(|| inner_ports(alloc, container).map(|(inner, _)| format!("{inner}/tcp")).collect()),
        host_config: Some(host_config(alloc, spec, container, around)),
        ..ContainerCreateBody::default()
    }
}

fn publishes(container: &Container) -> bool {
    matches!(container.network, Network::Bridge | Network::Named(_))
}

/// Port inside and port of the host.
fn inner_ports<'a>(alloc: &'a DesiredAlloc, container: &'a Container) -> impl Iterator<Item = (u16, u16)> + 'a {
    alloc.ports.iter().map(|(name, host)| (container.inner_port(name, *host), *host))
}

fn host_config(alloc: &DesiredAlloc, spec: &WorkloadSpec, container: &Container, around: &Surroundings<'_>) -> HostConfig {
    let resources = &spec.resources;
    let memory = bytes(resources.memory_limit);
    let binding = |host: u16| Some(vec![PortBinding { host_ip: None, host_port: Some(host.to_string()) }]);
    let published = inner_ports(alloc, container).map(|(inner, host)| (format!("{inner}/tcp"), binding(host)));
    let log = HashMap::from([
        ("max-size".to_owned(), (spec.logs.size.0 / u64::from(LOG_FILES)).max(1 << 20).to_string()),
        ("max-file".to_owned(), LOG_FILES.to_string()),
    ]);
    HostConfig {
        cgroup_parent: around.cgroup_parent.clone(),
        cpu_period: Some(PERIOD_USEC),
        cpu_quota: Some(quota(resources)),
        cpu_shares: Some(shares(resources)),
        memory: Some(memory),
        // As much again with swap as without: no swap.
        memory_swap: Some(memory),
        memory_reservation: (resources.memory_request < resources.memory_limit).then(|| bytes(resources.memory_request)),
        pids_limit: Some(i64::from(resources.pids)),
        // Restarting is ours: the engine does not know of deployments, back-off or leases.
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
        log_config: Some(HostConfigLogConfig { typ: Some("json-file".to_owned()), config: Some(log) }),
        network_mode: Some(match &container.network {
            Network::Bridge => "bridge".to_owned(),
            Network::Host => "host".to_owned(),
            Network::None => "none".to_owned(),
            Network::Named(name) => name.clone(),
        }),
        port_bindings: publishes(container).then(|| published.collect()),
        mounts: Some(container.mounts.iter().map(|m| mount(alloc, m, around)).chain(around.volumes.iter().filter_map(volume)).collect()),
        devices: (!around.share.paths.is_empty()).then(|| around.share.paths.iter().map(|path| device(path)).collect()),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        ..HostConfig::default()
    }
}

/// A device under the path it has on the host, to read and write but not to make more of.
fn device(path: &str) -> DeviceMapping {
    DeviceMapping {
        path_on_host: Some(path.to_owned()),
        path_in_container: Some(path.to_owned()),
        cgroup_permissions: Some("rw".to_owned()),
    }
}

/// The limits of a container as it runs.
pub fn update(resources: &Resources) -> ContainerUpdateBody {
    ContainerUpdateBody {
        cpu_period: Some(PERIOD_USEC),
        cpu_quota: Some(quota(resources)),
        cpu_shares: Some(shares(resources)),
        memory: Some(bytes(resources.memory_limit)),
        memory_swap: Some(bytes(resources.memory_limit)),
        memory_reservation: Some(bytes(resources.memory_request)),
        pids_limit: Some(i64::from(resources.pids)),
        ..ContainerUpdateBody::default()
    }
}

/// The cores a container was given, from its quota.
pub fn cores(quota: i64) -> Millicores {
    Millicores(u32::try_from(quota * 1000 / PERIOD_USEC).unwrap_or(u32::MAX))
}

fn quota(resources: &Resources) -> i64 {
    (i64::from(resources.cpu.0) * PERIOD_USEC / 1000).max(QUOTA_MIN_USEC)
}

/// As for processes: 1024 a core against its neighbours.
fn shares(resources: &Resources) -> i64 {
    (i64::from(resources.cpu.0) * 1024 / 1000).clamp(2, 262_144)
}

fn bytes(size: Bytes) -> i64 {
    i64::try_from(size.0).unwrap_or(i64::MAX)
}

fn mount(alloc: &DesiredAlloc, mount: &Mount, around: &Surroundings<'_>) -> EngineMount {
    let Mount { source, target, read_only } = mount;
    let (typ, source, volume_options) = match source {
        Source::Path(path) => (MountType::BIND, path.clone(), None),
        Source::Volume(name) => {
            let labels = HashMap::from([(OWNER_LABEL.to_owned(), around.owner.to_owned())]);
            (
                MountType::VOLUME,
                volume_name(alloc, name),
                Some(MountVolumeOptions { labels: Some(labels), ..MountVolumeOptions::default() }),
            )
        }
    };
    EngineMount {
        target: Some(target.clone()),
        source: Some(source),
        typ: Some(typ),
        read_only: Some(*read_only),
        volume_options,
        ..EngineMount::default()
    }
}

/// A volume of the node, where the spec says it is seen; elsewhere a container cannot see it.
fn volume(used: &Used) -> Option<EngineMount> {
    Some(EngineMount {
        target: Some(used.target.as_ref()?.display().to_string()),
        source: Some(used.dir.display().to_string()),
        typ: Some(MountType::BIND),
        ..EngineMount::default()
    })
}

/// The engine's name of a volume: its own for each project and environment, so that no stranger's is met by chance.
pub fn volume_name(alloc: &DesiredAlloc, name: &str) -> String {
    format!("optimus.{}.{}.{name}", alloc.key.project, alloc.key.environment)
}

fn labels(alloc: &DesiredAlloc, attempt: u32, around: &Surroundings<'_>) -> HashMap<String, String> {
    let labels = [
        (OWNER_LABEL, around.owner.to_owned()),
        (ALLOC_LABEL, alloc.id.to_string()),
        (ATTEMPT_LABEL, attempt.to_string()),
        ("optimus.node", around.node.to_owned()),
        ("optimus.project", alloc.key.project.to_string()),
        ("optimus.environment", alloc.key.environment.to_string()),
        ("optimus.workload", alloc.key.workload.to_string()),
        ("optimus.release", alloc.release.to_string()),
    ];
    labels.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// What a process gets too, but for what the image decides (`PATH`, `HOME`, `USER`). `PORT` is where it is to listen.
fn environment(alloc: &DesiredAlloc, spec: &WorkloadSpec, container: &Container, node: &str) -> BTreeMap<String, String> {
    let mut env = spec.env.clone();
    env.extend(spec.secret_values.iter().map(|(key, value)| (key.clone(), value.reveal().to_owned())));
    for (n, (name, host)) in alloc.ports.iter().enumerate() {
        let port = container.inner_port(name, *host).to_string();
        if n == 0 {
            env.insert("PORT".to_owned(), port.clone());
        }
        env.insert(format!("PORT_{}", name.to_ascii_uppercase().replace('-', "_")), port);
    }
    let ours = [
        ("OPTIMUS_ALLOC", alloc.id.to_string()),
        ("OPTIMUS_INDEX", alloc.index.to_string()),
        ("OPTIMUS_PROJECT", alloc.key.project.to_string()),
        ("OPTIMUS_ENVIRONMENT", alloc.key.environment.to_string()),
        ("OPTIMUS_WORKLOAD", alloc.key.workload.to_string()),
        ("OPTIMUS_RELEASE", alloc.release.to_string()),
        ("OPTIMUS_NODE", node.to_owned()),
    ];
    env.extend(ours.map(|(k, v)| (k.to_owned(), v)));
    env
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{desired, spec};

    fn made(change: impl FnOnce(&mut WorkloadSpec, &mut Container)) -> ContainerCreateBody {
        let (mut spec, mut container) = (spec(&["serve", "--fast"]), Container::of("app:1"));
        change(&mut spec, &mut container);
        let mut alloc = desired(7, &spec);
        alloc.ports = vec![("http".into(), 20_001), ("admin-ui".into(), 20_002)];
        let share = Share {
            paths: spec.placement.given.iter().map(|given| format!("/dev/{}", given.id)).collect(),
            env: BTreeMap::from([("OPTIMUS_DEVICE_GPU".to_owned(), "/dev/g0".to_owned())]),
            ..Share::default()
        };
        let volumes = crate::volumes::of(std::path::Path::new("/volumes"), &alloc, &spec);
        let around = Surroundings { owner: "me", node: "n1", cgroup_parent: Some("/optimus-containers/a.1".into()), share, volumes };
        body(&alloc, &spec, &container, 3, &around)
    }

    #[test]
    fn a_volume_of_the_node_is_seen_where_the_spec_says() {
        let body = made(|spec, _| {
            spec.placement.volumes = vec!["data".parse().unwrap(), "unseen".parse().unwrap()];
            spec.placement.mounts = vec![optimus_common::spec::VolumeMount { volume: "data".parse().unwrap(), path: "/d".into() }];
        });
        let mounts = body.host_config.unwrap().mounts.unwrap();
        assert_eq!((mounts.len(), mounts[0].source.as_deref(), mounts[0].target.as_deref()), (1, Some("/volumes/p/dev/data"), Some("/d")));
        assert!(body.env.unwrap().contains(&"OPTIMUS_VOLUME_DATA=/d".to_owned()));
    }

    #[test]
    fn a_container_gets_the_values_of_its_secrets() {
        let value = optimus_common::secret::SecretValue::new("t0p".to_owned()).unwrap();
        let body = made(|spec, _| spec.secret_values = BTreeMap::from([("TOKEN".to_owned(), value)]));
        assert!(body.env.unwrap().contains(&"TOKEN=t0p".to_owned()));
    }

    #[test]
    fn a_container_gets_its_devices_and_no_others() {
        assert_eq!(made(|_, _| {}).host_config.unwrap().devices, None);
        let given = optimus_common::spec::GivenDevice { kind: "acme/gpu/x".into(), id: "g0".into() };
        let body = made(|spec, _| spec.placement.given = vec![given]);
        let device = body.host_config.unwrap().devices.unwrap().remove(0);
        assert_eq!((device.path_on_host.as_deref(), device.path_in_container.as_deref()), (Some("/dev/g0"), Some("/dev/g0")));
        assert!(body.env.unwrap().contains(&"OPTIMUS_DEVICE_GPU=/dev/g0".to_owned()));
    }

    #[test]
    fn ports_are_published_where_the_workload_was_told_to_listen() {
        let body = made(|_, container| {
            container.ports.insert("http".into(), 80);
        });
        let env = body.env.unwrap();
        for wanted in ["PORT=80", "PORT_HTTP=80", "PORT_ADMIN_UI=20002", "OPTIMUS_NODE=n1"] {
            assert!(env.iter().any(|e| e == wanted), "{wanted}: {env:?}");
        }
        let bindings = body.host_config.unwrap().port_bindings.unwrap();
        let host = |inner: &str| bindings[inner].as_ref().unwrap()[0].host_port.clone().unwrap();
        assert_eq!((host("80/tcp"), host("20002/tcp")), ("20001".to_owned(), "20002".to_owned()));
        let host = made(|_, container| container.network = Network::Host).host_config.unwrap();
        assert_eq!((host.port_bindings, host.network_mode.as_deref()), (None, Some("host")));
    }

    #[test]
    fn limits_are_hard_and_nothing_restarts_behind_our_back() {
        let host = made(|_, _| {}).host_config.unwrap();
        assert_eq!((host.cpu_quota, host.cpu_period, host.pids_limit), (Some(50_000), Some(100_000), Some(64)));
        assert_eq!((host.memory, host.memory_swap, host.memory_reservation), (Some(128 << 20), Some(128 << 20), Some(16 << 20)));
        assert_eq!(host.restart_policy.unwrap().name, Some(RestartPolicyNameEnum::NO));
        assert_eq!(host.security_opt, Some(vec!["no-new-privileges".to_owned()]));
        assert_eq!(host.privileged, None);
    }

    #[test]
    fn a_shell_line_takes_the_place_of_the_entrypoint() {
        let body = made(|spec, _| spec.run = Run::Shell("echo $HOME".into()));
        assert_eq!(body.entrypoint.unwrap(), ["/bin/sh", "-c"]);
        assert_eq!(body.cmd.unwrap(), ["echo $HOME"]);
        let body = made(|spec, container| {
            spec.run = Run::Argv(vec![]);
            container.entrypoint = Some(vec!["/app".into()]);
        });
        assert_eq!((body.entrypoint.unwrap(), body.cmd), (vec!["/app".to_owned()], None));
    }

    #[test]
    fn a_volume_is_of_its_project_alone() {
        let body = made(|_, container| {
            let source = Source::Volume("data".into());
            container.mounts = vec![Mount { source, target: "/data".into(), read_only: true }];
        });
        let mount = body.host_config.unwrap().mounts.unwrap().remove(0);
        assert_eq!((mount.source.as_deref(), mount.read_only), (Some("optimus.p.dev.data"), Some(true)));
        assert_eq!(body.labels.unwrap()[ATTEMPT_LABEL], "3");
    }
}
