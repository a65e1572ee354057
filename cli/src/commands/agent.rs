//! `optimus agent`

use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use optimus_common::Name;

use crate::commands::data_dir;
use crate::error::{Exit, Failure};

pub const EXAMPLES: &str = "Examples:
  optimus agent --join-file token.txt          join with a token of `optimus nodes join-token`
  OPTIMUS_JOIN_TOKEN=opt_join_... optimus agent
  optimus agent                                go on after the first join";

/// Longest join token read from a file.
const TOKEN_MAX: u64 = 16 * 1024;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Join token; needed the first time only. Other users of this machine see flags: prefer --join-file or the variable
    #[arg(long, value_name = "TOKEN", env = "OPTIMUS_JOIN_TOKEN", hide_env_values = true)]
    join: Option<String>,
    /// File with the join token
    #[arg(long, value_name = "FILE")]
    join_file: Option<PathBuf>,
    /// Where the agent keeps what it knows [default: /var/lib/optimus/agent for root, else $XDG_DATA_HOME/optimus/agent]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Ports given to workloads that ask for any
    #[arg(long, value_name = "FIRST-LAST", default_value = "20000-29999", value_parser = port_range)]
    ports: RangeInclusive<u16>,
    /// Address others reach this host's workloads at [default: the one used to reach the server]
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Name of this host [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// User workloads run as unless their file names one [default: nobody for root, else the agent's own]
    #[arg(long, value_name = "USER")]
    workload_user: Option<String>,
    /// Play workloads instead of running them: each does what its variable MOCK says. For demos and tests
    #[arg(long)]
    mock: bool,
}

/// How to run the agent.
#[derive(Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// Text of the join token, trimmed; not checked further.
    pub join: Option<String>,
    /// Created if missing.
    pub data_dir: PathBuf,
    /// Dynamic ports, first to last; never empty, never below 1024.
    pub ports: RangeInclusive<u16>,
    pub address: Option<IpAddr>,
    /// Unset: the host name.
    pub name: Option<Name>,
    pub workload_user: Option<String>,
    /// Play workloads instead of running them.
    pub mock: bool,
}

impl std::fmt::Debug for AgentConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token stays out of logs.
        let AgentConfig { join: _, data_dir, ports, address, name, workload_user, mock } = self;
        write!(f, "AgentConfig({data_dir:?}, ports {ports:?}, address {address:?}, name {name:?}, user {workload_user:?}, mock {mock})")
    }
}

impl Args {
    pub fn config(self) -> Result<AgentConfig, Failure> {
        let Args { join, join_file, data_dir: dir, ports, address, name, workload_user, mock } = self;
        let join = match join_file {
            // The file is named on the command line, which comes before the environment.
            Some(file) => Some(read_token(&file)?),
            None => join,
        };
        let join = join.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let data_dir = dir.map_or_else(|| data_dir("agent", true), Ok)?;
        Ok(AgentConfig { join, data_dir, ports, address, name, workload_user, mock })
    }
}

fn read_token(file: &PathBuf) -> Result<String, Failure> {
    let mut text = String::new();
    let read = fs::File::open(file).and_then(|open| open.take(TOKEN_MAX).read_to_string(&mut text));
    let fail = |why: String| Failure::new(Exit::Usage, format!("cannot read the join token in {}", file.display())).because(why);
    match read {
        Err(error) => Err(fail(error.to_string())),
        Ok(_) if text.trim().is_empty() => Err(fail("the file is empty".into())),
        Ok(_) => Ok(text),
    }
}

pub fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').ok_or("write FIRST-LAST, such as 20000-29999")?;
    let port = |text: &str| text.trim().parse::<u16>().map_err(|_| format!("`{text}` is not a port"));
    let (first, last) = (port(first)?, port(last)?);
    if first < 1024 {
        return Err("ports below 1024 are not given out".into());
    }
    if first > last {
        return Err(format!("{first} is above {last}"));
    }
    Ok(first..=last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_are_checked() {
        assert_eq!(port_range("20000-29999").unwrap(), 20000..=29999);
        for bad in ["", "20000", "3-x", "80-90", "300-200", "2000-70000"] {
            assert!(port_range(bad).is_err(), "{bad}");
        }
    }
}
