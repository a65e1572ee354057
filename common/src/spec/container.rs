//! A container's own part of a workload spec: its type, how a file writes it, and its rules.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::Rules;
use super::error::{nearest, printable};
use super::node::{Node, Value};
use super::read::{Fields, Reader};
use super::types::{Port, Run};
use crate::time::Span;

/// Longest image reference; registries allow 255 for the name and 128 for the tag.
const IMAGE_MAX: usize = 512;
const MOUNTS_MAX: usize = 64;
const PULL_TIMEOUT: Span = Span::secs(300);
const PULLS: [(&str, Pull); 3] = [("missing", Pull::Missing), ("always", Pull::Always), ("never", Pull::Never)];

/// A container and how it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Container {
    /// Reference of the image: `registry/name:tag`, `name@sha256:...` or the id of one the node has.
    pub image: String,
    /// When the image is fetched.
    #[serde(default)]
    pub pull: Pull,
    /// Longest time for fetching it.
    #[serde(default = "pull_timeout")]
    pub pull_timeout: Span,
    /// Name of the registry login, kept on the node. Unset: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<String>,
    /// Replaces the image's entrypoint. Unset: the image's own; a shell line as `run` replaces it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default)]
    pub network: Network,
    /// The port inside the container for a port of the workload. Unset: the same as on the host, given as `PORT`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
}

fn pull_timeout() -> Span {
    PULL_TIMEOUT
}

impl Container {
    /// The image with everything else left out.
    pub fn of(image: impl Into<String>) -> Self {
        Container {
            image: image.into(),
            pull: Pull::default(),
            pull_timeout: PULL_TIMEOUT,
            auth: None,
            entrypoint: None,
            network: Network::default(),
            ports: BTreeMap::new(),
            mounts: Vec::new(),
        }
    }

    /// The port inside that a host port leads to.
    pub fn inner_port(&self, name: &str, host: u16) -> u16 {
        self.ports.get(name).copied().unwrap_or(host)
    }
}

/// When an image is fetched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// If the node does not have it.
    #[default]
    Missing,
    /// Before each start.
    Always,
    /// Never: the node must have it.
    Never,
}

/// What network a container is in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The engine's own, with the workload's ports published on the host.
    #[default]
    Bridge,
    /// The host's.
    Host,
    /// None but loopback.
    None,
    /// One that exists on the node under this name; ports are published.
    Named(String),
}

/// Something of the node seen inside the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mount {
    pub source: Source,
    /// Absolute path in the container.
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A path of the node, which must exist.
    Path(String),
    /// A volume of the node's engine by name, of this project and environment alone; made when first used.
    Volume(String),
}

impl Reader<'_> {
    /// `image` and the table `container`. Unset: a process, or an image that was refused.
    pub(super) fn container(&mut self, f: &Fields<'_>) -> Option<Container> {
        let Some(image) = f.get("image") else {
            if let Some(node) = f.get("container") {
                self.error(&node.span, Some("container"), "`container` says how a container is made, but there is no `image`").hint =
                    Some("add `image = \"registry/app:1.2\"`".into());
            }
            return None;
        };
        let mut container = Container::of(self.text("image", image)?);
        let below = self.nested("container", f.get("container"));
        let get = |key: &str| below.as_ref().and_then(|f| f.get(key));
        self.within("container", |r| {
            container.pull = get("pull").and_then(|n| r.pull(n)).unwrap_or_default();
            container.pull_timeout = get("pull_timeout").and_then(|n| r.span("pull_timeout", n)).unwrap_or(PULL_TIMEOUT);
            container.auth = get("auth").and_then(|n| r.text("auth", n));
            container.entrypoint = get("entrypoint").map(|n| r.list("entrypoint", n));
            container.network = match get("network").and_then(|n| r.text("network", n)).as_deref() {
                None | Some("bridge") => Network::Bridge,
                Some("host") => Network::Host,
                Some("none") => Network::None,
                Some(name) => Network::Named(name.to_owned()),
            };
            container.ports = get("ports").map(|n| r.inner_ports(n)).unwrap_or_default();
            container.mounts = get("mounts").map(|n| r.mounts(n)).unwrap_or_default();
        });
        Some(container)
    }

    fn pull(&mut self, node: &Node) -> Option<Pull> {
        let text = self.text("pull", node)?;
        let found = PULLS.iter().find(|(word, _)| *word == text).map(|(_, pull)| *pull);
        if found.is_none() {
            let near = nearest(&text, &PULLS.map(|(word, _)| word)).map(|word| format!("did you mean \"{word}\"?"));
            let message = format!("`container.pull` must be missing, always or never, not `{}`", printable(&text));
            self.error(&node.span, Some("pull"), message).hint = near;
        }
        found
    }

    fn inner_ports(&mut self, node: &Node) -> BTreeMap<String, u16> {
        let Some(entries) = self.table("ports", node) else { return BTreeMap::new() };
        let read = |r: &mut Self| {
            let ports = entries.iter().filter_map(|e| Some((e.key.clone(), r.integer(&e.key, &e.node, 1, 65_535)? as u16)));
            ports.collect()
        };
        self.within("ports", read)
    }

    /// `SOURCE:TARGET` or `SOURCE:TARGET:ro`, the source a path of the node or the name of a volume.
    fn mounts(&mut self, node: &Node) -> Vec<Mount> {
        let Value::List(items) = &node.value else {
            self.list("mounts", node); // says what is wrong
            return Vec::new();
        };
        let texts = self.list("mounts", node);
        if texts.len() != items.len() {
            return Vec::new();
        }
        let mut mounts = Vec::new();
        for (n, (text, item)) in texts.iter().zip(items).enumerate() {
            let parts: Vec<&str> = text.split(':').collect();
            let read = match parts.as_slice() {
                [source, target] => Some((*source, *target, false)),
                [source, target, "ro"] => Some((*source, *target, true)),
                [source, target, "rw"] => Some((*source, *target, false)),
                _ => None,
            };
            match read {
                Some((source, target, read_only)) => {
                    let is_path = source.starts_with(['/', '.', '~']);
                    let source = if is_path { Source::Path(source.to_owned()) } else { Source::Volume(source.to_owned()) };
                    mounts.push(Mount { source, target: target.to_owned(), read_only });
                }
                None => self.within("mounts", |r| {
                    let message = format!("a mount is written SOURCE:TARGET or SOURCE:TARGET:ro, not `{}`", printable(text));
                    r.error(&item.span, Some(&n.to_string()), message).hint = Some("for example \"/srv/data:/data:ro\"".into());
                }),
            }
        }
        mounts
    }
}

impl Rules {
    /// What must be true of a container, also beside the rest of its workload.
    pub(super) fn container(&mut self, container: &Container, run: &Run, ports: &[Port]) {
        let Container { image, pull: _, pull_timeout, auth, entrypoint, network, ports: inner, mounts } = container;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
        self.text("image", image);
        self.want(!image.is_empty(), "image", || "`image` is empty".into());
        self.want(image.is_empty() || (image.len() <= IMAGE_MAX && image.chars().all(plain)), "image", || {
            format!("`image` is not a reference of an image: `{}`", printable(image))
        });
        let hour = Span::secs(3600);
        self.want((Span::secs(1)..=hour).contains(pull_timeout), "container.pull_timeout", || {
            "`container.pull_timeout` must be from 1s to 1h".into()
        });
        if let Some(auth) = auth {
            self.want(is_file_name(auth), "container.auth", || {
                format!("`container.auth` must be the name of a registry login on the node, not `{}`", printable(auth))
            });
        }
        if let Some(entrypoint) = entrypoint {
            self.want(entrypoint.first().is_some_and(|p| !p.is_empty()), "container.entrypoint", || {
                "`container.entrypoint` names no program".into()
            });
            self.want(entrypoint.len() <= 1000, "container.entrypoint", || "`container.entrypoint` has more than 1000 words".into());
            entrypoint.iter().for_each(|word| self.text("container.entrypoint", word));
            self.want(matches!(run, Run::Argv(_)), "container.entrypoint", || {
                "`run` uses shell syntax, so it is the entrypoint itself; write it as a list of words, or leave `container.entrypoint` out"
                    .into()
            });
        }
        match network {
            Network::Named(name) => self.want(is_file_name(name), "container.network", || {
                format!("`container.network` must be bridge, host, none or the name of a network, not `{}`", printable(name))
            }),
            Network::None => self.want(ports.is_empty(), "container.network", || {
                "the workload has ports, but `container.network` is \"none\": nobody could reach them".into()
            }),
            Network::Host => self.want(inner.is_empty(), "container.ports", || {
                "`container.ports` maps ports into the container, but `container.network` is \"host\": there is no other network".into()
            }),
            Network::Bridge => {}
        }
        for (name, port) in inner {
            let known: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
            self.want(*port != 0, "container.ports", || "a port is from 1 to 65535".into());
            self.want(known.contains(&name.as_str()), "container.ports", || {
                let known = if known.is_empty() { "the workload has none".to_owned() } else { format!("known are {}", known.join(", ")) };
                format!("`container.ports`: there is no port `{}`; {known}", printable(name))
            });
        }
        let mut seen = std::collections::BTreeSet::new();
        let twice = inner.values().find(|port| !seen.insert(**port));
        self.want(twice.is_none(), "container.ports", || {
            format!("`container.ports` gives port {} of the container twice", twice.copied().unwrap_or(0))
        });
        self.want(mounts.len() <= MOUNTS_MAX, "container.mounts", || format!("at most {MOUNTS_MAX} mounts"));
        for (n, mount) in mounts.iter().enumerate().take(MOUNTS_MAX) {
            self.mount(mount, &mounts[..n]);
        }
    }

    fn mount(&mut self, mount: &Mount, before: &[Mount]) {
        let Mount { source, target, read_only: _ } = mount;
        let at = "container.mounts";
        match source {
            Source::Path(path) => {
                self.text(at, path);
                self.want(path.starts_with('/'), at, || {
                    format!("the source of a mount must be an absolute path on the node or the name of a volume, not `{}`", printable(path))
                });
            }
            Source::Volume(name) => self.want(is_file_name(name), at, || {
                format!("`{}` cannot be the name of a volume: letters, digits and _ . - only, 1 to 63 of them", printable(name))
            }),
        }
        self.text(at, target);
        let inside = target.starts_with('/') && !target.split('/').any(|part| part == "..") && !target.trim_matches('/').is_empty();
        self.want(inside, at, || {
            format!(
                "the target of a mount must be an absolute path in the container, not its root and without `..`: `{}`",
                printable(target)
            )
        });
        let same = |other: &Mount| other.target.trim_end_matches('/') == target.trim_end_matches('/');
        self.want(!before.iter().any(same), at, || format!("two mounts have the target `{}`", printable(target)));
    }
}

/// A name that is safe as part of a path.
fn is_file_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=63).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain)
}
