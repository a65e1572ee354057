//! Hosts of a test cluster as network namespaces on one bridge, and faults between them.
//!
//! ```text
//! this process, 10.x.y.1 --veth--+            +--veth-- host 0, 10.x.y.10
//!                                +-- bridge --+
//!                                    (hub)    +--veth-- host 1, 10.x.y.11 ...
//! ```
//! The bridge has a namespace of its own, the hub: in that of this process the machine's own firewall might filter it.
//! Faults are iptables rules inside the namespaces, on what comes in from the other hosts. What this process sends and
//! receives is left alone: its clients see every host, also those that do not see each other.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::loop_image::run;

/// Names of namespaces and devices begin so, then the id of the process they belong to, in hex.
const PREFIX: &str = "opx";
/// Last byte of the first host's address.
const FIRST: u8 = 10;
/// Most hosts of one network.
pub const HOSTS_MAX: usize = 100;
/// Networks tried before it is given up: another may use the same addresses.
const ATTEMPTS: u32 = 20;

/// A network with its hosts; taken down with this value.
#[derive(Debug)]
pub struct Network {
    /// Begins all names.
    id: String,
    prefix: [u8; 3],
    /// Whether this process has a device in it.
    linked: bool,
    hosts: usize,
}

fn ip(args: &[&str]) -> io::Result<()> {
    run("ip", args).map(drop)
}

impl Network {
    /// A network of `hosts` namespaces.
    ///
    /// # Errors
    /// What the tools said; they need root.
    pub fn new(hosts: usize) -> io::Result<Self> {
        assert!(hosts <= HOSTS_MAX, "{hosts} hosts are more than {HOSTS_MAX}");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        for _ in 0..ATTEMPTS {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let spread = (pid.wrapping_mul(0x9e37_79b1) >> 8).wrapping_add(n.wrapping_mul(257));
            // 10.64.0.0 to 10.127.255.0: away from what hosts and containers usually have.
            let prefix = [10, 64 + (spread >> 8) as u8 % 64, spread as u8];
            if in_use(prefix)? {
                continue;
            }
            let mut network = Self { id: format!("{PREFIX}{pid:x}{}", letter(n)), prefix, linked: false, hosts: 0 };
            network.build(hosts)?;
            return Ok(network);
        }
        Err(io::Error::other("no free addresses for a network of namespaces"))
    }

    fn build(&mut self, hosts: usize) -> io::Result<()> {
        let (hub, client) = (self.hub(), self.link());
        ip(&["netns", "add", &hub])?;
        let in_hub = |args: &[&str]| ip(&[&["-n", &hub], args].concat());
        in_hub(&["link", "add", "name", "bridge", "type", "bridge"])?;
        in_hub(&["link", "set", "bridge", "up"])?;
        ip(&["link", "add", &client, "type", "veth", "peer", "name", "client", "netns", &hub])?;
        self.linked = true;
        in_hub(&["link", "set", "client", "master", "bridge", "up"])?;
        ip(&["address", "add", &format!("{}/24", self.client()), "dev", &client])?;
        ip(&["link", "set", &client, "up"])?;
        for host in 0..hosts {
            let (namespace, port) = (self.namespace(host), format!("host{host}"));
            ip(&["netns", "add", &namespace])?;
            self.hosts = host + 1;
            in_hub(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
            in_hub(&["link", "set", &port, "master", "bridge", "up"])?;
            let inside = |args: &[&str]| ip(&[&["-n", &namespace], args].concat());
            inside(&["address", "add", &format!("{}/24", self.address(host)), "dev", "eth0"])?;
            inside(&["link", "set", "eth0", "up"])?;
            inside(&["link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    fn link(&self) -> String {
        format!("{}c", self.id)
    }

    fn hub(&self) -> String {
        format!("{}h", self.id)
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}n{host}", self.id)
    }

    /// The address of this process in the network.
    pub fn client(&self) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, 1)
    }

    /// The address of a host.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, FIRST + host as u8)
    }

    /// Number of hosts.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// `program` inside a host; arguments are added by the caller. The process is the program itself, not a wrapper.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(program);
        command
    }

    fn rule(&self, host: usize, args: &[&str]) -> io::Result<()> {
        run("ip", &[&["netns", "exec", &self.namespace(host), "iptables", "-w"], args].concat()).map(drop)
    }

    /// From now on nothing that `from` sends reaches `to`; the other direction works.
    ///
    /// # Errors
    /// What iptables said.
    pub fn cut(&self, from: usize, to: usize) -> io::Result<()> {
        self.rule(to, &["-A", "INPUT", "-s", &self.address(from).to_string(), "-j", "DROP"])
    }

    /// Nothing passes between `host` and the others, this process excepted.
    ///
    /// # Errors
    /// What iptables said.
    pub fn isolate(&self, host: usize) -> io::Result<()> {
        (0..self.hosts).filter(|other| *other != host).try_for_each(|other| {
            self.cut(other, host)?;
            self.cut(host, other)
        })
    }

    /// What `host` sends reaches none of the others, but it hears them.
    ///
    /// # Errors
    /// What iptables said.
    pub fn mute(&self, host: usize) -> io::Result<()> {
        (0..self.hosts).filter(|other| *other != host).try_for_each(|other| self.cut(host, other))
    }

    /// `host` hears none of the others, but they hear it.
    ///
    /// # Errors
    /// What iptables said.
    pub fn deafen(&self, host: usize) -> io::Result<()> {
        (0..self.hosts).filter(|other| *other != host).try_for_each(|other| self.cut(other, host))
    }

    /// Every host loses that share of what comes in from other hosts, 0.0 to 1.0.
    ///
    /// # Errors
    /// What iptables said.
    pub fn lose(&self, share: f64) -> io::Result<()> {
        let (client, share) = (self.client().to_string(), format!("{share:.4}"));
        (0..self.hosts).try_for_each(|host| {
            let random = ["-m", "statistic", "--mode", "random", "--probability", &share, "-j", "DROP"];
            self.rule(host, &[&["-A", "INPUT", "!", "-s", &client, "!", "-i", "lo"], &random[..]].concat())
        })
    }

    /// Everything passes again.
    ///
    /// # Errors
    /// What iptables said.
    pub fn heal(&self) -> io::Result<()> {
        (0..self.hosts).try_for_each(|host| self.rule(host, &["-F", "INPUT"]))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The other devices go with the namespaces they are in, a moment later.
        if self.linked
            && let Err(e) = ip(&["link", "delete", &self.link()])
        {
            eprintln!("{e}");
        }
        (0..self.hosts).map(|host| self.namespace(host)).chain([self.hub()]).for_each(|name| remove(&name));
    }
}

fn remove(namespace: &str) {
    if let Err(e) = ip(&["netns", "delete", namespace]) {
        eprintln!("{e}");
    }
}

/// Several networks of one process differ in a letter; a process has few.
fn letter(n: u32) -> char {
    char::from(b'g' + (n % 16) as u8)
}

/// Whether this host has an address or a route of that network.
fn in_use(prefix: [u8; 3]) -> io::Result<bool> {
    let [a, b, c] = prefix;
    let start = format!("{a}.{b}.{c}.");
    let said = |args: &[&str]| run("ip", args).map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let text = said(&["-o", "-4", "address"])? + &said(&["-4", "route"])?;
    Ok(text.split_whitespace().any(|word| word.starts_with(&start)))
}

/// The process that a name of ours belongs to.
fn owner(name: &str) -> Option<u32> {
    let rest = name.strip_prefix(PREFIX)?;
    let hex = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
    u32::from_str_radix(hex, 16).ok()
}

/// Takes down what a test process that was killed has left.
pub fn sweep() {
    let stale = |name: &String| owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).filter(stale).for_each(|name| remove(&name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_process_and_fit() {
        let name = format!("{PREFIX}{:x}{}c", 0x3f_ffff, letter(17));
        assert!(name.len() <= 15, "{name}");
        assert_eq!(owner(&name), Some(0x3f_ffff));
        assert_eq!(owner("eth0"), None);
    }
}
