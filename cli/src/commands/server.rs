//! `optimus server`

use std::net::SocketAddr;
use std::path::PathBuf;

use optimus_common::Span;
use optimus_control_plane::rescue::archiver::{self, ArchiveOptions};
use optimus_control_plane::rescue::schedule::{EVERY_MIN, ScheduleOptions};
use optimus_control_plane::rescue::{CryptError, Lock, Options};

use crate::commands::data_dir;
use crate::error::Failure;

pub const EXAMPLES: &str = "Examples:
  optimus server                                              for this machine only
  optimus server --agent-listen 0.0.0.0:7601 --advertise 10.0.0.5:7601
  optimus nodes join-token                                    then let agents in
  optimus cluster join-token                                  then, on another host:
  optimus server --agent-listen 0.0.0.0:7601 --advertise 10.0.0.6:7601 --join TOKEN";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the cluster's state is kept [default: /var/lib/optimus/server for root, else $XDG_DATA_HOME/optimus/server]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address of the API (HTTPS)
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7600")]
    api_listen: SocketAddr,
    /// Address agents connect to (QUIC, UDP)
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7601")]
    agent_listen: SocketAddr,
    /// host:port that agents reach --agent-listen at; goes into join tokens [default: --agent-listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    advertise: Option<String>,
    /// Further name the API may be asked under (repeatable)
    #[arg(long = "allow-host", value_name = "HOST")]
    allow_hosts: Vec<String>,
    /// Join the cluster this token of `optimus cluster join-token` is for; a server that is a member already needs none
    #[arg(long, value_name = "TOKEN")]
    join: Option<String>,
    #[command(flatten)]
    rescue: RescueArgs,
}

/// What a server writes for the day it is lost.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Exports and archive")]
struct RescueArgs {
    /// Export the whole state into this directory every so often (the leader does)
    #[arg(long, value_name = "DIR", requires = "snapshot_recipients")]
    snapshot_dir: Option<PathBuf>,
    /// Time between two exports, at least 10s
    #[arg(long, value_name = "TIME", default_value = "1h", requires = "snapshot_dir")]
    snapshot_every: Span,
    /// Exports kept
    #[arg(long, value_name = "N", default_value = "24", requires = "snapshot_dir", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    snapshot_keep: u16,
    /// age recipient (age1...) the exports are encrypted to (repeatable)
    #[arg(long = "snapshot-recipient", value_name = "AGE1", requires = "snapshot_dir")]
    snapshot_recipients: Vec<String>,
    /// Archive every change into this directory, to restore to any point between two exports
    #[arg(long, value_name = "DIR", requires = "archive_recipients")]
    archive_dir: Option<PathBuf>,
    /// How far back the archive reaches, at least 1d
    #[arg(long, value_name = "TIME", default_value = "7d", requires = "archive_dir")]
    archive_keep: Span,
    /// age recipient (age1...) the archive is encrypted to (repeatable)
    #[arg(long = "archive-recipient", value_name = "AGE1", requires = "archive_dir")]
    archive_recipients: Vec<String>,
}

/// Shortest reach of an archive: what lies between two of its bases.
const ARCHIVE_KEEP_MIN: Span = archiver::BASE_EVERY;

impl RescueArgs {
    fn options(self) -> Result<Options, Failure> {
        let refused = |what: &str, error: CryptError| Failure::usage(format!("cannot use {what}")).because(error.to_string());
        let short = |what: &str, given: Span, min: Span| Failure::usage(format!("{what} {given} is shorter than {min}"));
        let mut options = Options::default();
        if let Some(dir) = self.snapshot_dir {
            if self.snapshot_every < EVERY_MIN {
                return Err(short("--snapshot-every", self.snapshot_every, EVERY_MIN));
            }
            let lock = Lock::of(&self.snapshot_recipients, None).map_err(|e| refused("--snapshot-recipient", e))?;
            options.schedule = Some(ScheduleOptions { dir, lock, every: self.snapshot_every, keep: self.snapshot_keep.into() });
        }
        if let Some(dir) = self.archive_dir {
            if self.archive_keep < ARCHIVE_KEEP_MIN {
                return Err(short("--archive-keep", self.archive_keep, ARCHIVE_KEEP_MIN));
            }
            let lock = Lock::of(&self.archive_recipients, None).map_err(|e| refused("--archive-recipient", e))?;
            options.archive = Some(ArchiveOptions { dir, lock, keep: self.archive_keep });
        }
        Ok(options)
    }
}

/// How to run a server.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Created if missing.
    pub data_dir: PathBuf,
    pub api_listen: SocketAddr,
    /// UDP.
    pub agent_listen: SocketAddr,
    /// `host:port` for join tokens; unset: `agent_listen`.
    pub advertise: Option<String>,
    /// Host names, beside the listening address, that requests may carry.
    pub allow_hosts: Vec<String>,
    /// Token of the cluster to join.
    pub join: Option<String>,
    /// Scheduled exports and the archive.
    pub rescue: Options,
}

impl Args {
    /// The same server, joining with `token`.
    pub fn joining(self, token: String) -> Self {
        Args { join: Some(token), ..self }
    }

    pub fn config(self) -> Result<ServerConfig, Failure> {
        let Args { data_dir: dir, api_listen, agent_listen, advertise, allow_hosts, join, rescue } = self;
        if agent_listen.ip().is_unspecified() && advertise.is_none() {
            return Err(Failure::usage(format!("--agent-listen {agent_listen} is no address agents could connect to"))
                .because("it means every address of this machine, and join tokens must name one")
                .hint(format!("add `--advertise HOST:{}`", agent_listen.port())));
        }
        let data_dir = dir.map_or_else(|| data_dir("server", true), Ok)?;
        Ok(ServerConfig { data_dir, api_listen, agent_listen, advertise, allow_hosts, join, rescue: rescue.options()? })
    }
}

/// `host:port` with a host name, an IPv4 address or an IPv6 address in brackets.
fn host_port(text: &str) -> Result<String, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return if address.ip().is_unspecified() || address.port() == 0 {
            Err("not an address others can connect to".into())
        } else {
            Ok(text.to_owned())
        };
    }
    let (host, port) = text.rsplit_once(':').ok_or("write HOST:PORT")?;
    let label =
        |label: &str| !label.is_empty() && label.len() <= 63 && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if host.len() > 253 || !host.split('.').all(label) {
        return Err(format!("`{host}` is not a host name"));
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(text.to_owned()),
        _ => Err(format!("`{port}` is not a port")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_addresses_can_be_connected_to() {
        for good in ["10.0.0.5:7601", "[2001:db8::1]:7601", "server-1.example.com:7601"] {
            assert!(host_port(good).is_ok(), "{good}");
        }
        for bad in ["10.0.0.5", "0.0.0.0:7601", "[::]:1", "host:0", "host:99999", "a b:1", ":7601", "a..b:1"] {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }
}
