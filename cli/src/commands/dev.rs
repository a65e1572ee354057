//! `optimus dev`

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::commands::data_dir;
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus dev                     a one-machine cluster; deploy to it from another terminal
  optimus dev .                   and deploy this directory
  optimus dev --keep web api      deploy two, and leave them running at the end";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directories or project files to deploy after the start
    #[arg(value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Where the cluster's state is kept [default: $XDG_DATA_HOME/optimus/dev]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address of the API (HTTPS)
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7600")]
    api_listen: SocketAddr,
    /// Leave workloads running at the end
    #[arg(long)]
    keep: bool,
}

/// How to run a one-machine cluster.
#[derive(Debug, Clone)]
pub struct DevConfig {
    /// What to deploy after the start, with [`crate::commands::deploy::deploy_paths`]; may be empty.
    pub dirs: Vec<PathBuf>,
    /// Created if missing.
    pub data_dir: PathBuf,
    pub api_listen: SocketAddr,
    /// Leave workloads running at the end.
    pub keep: bool,
    /// For progress and results.
    pub terminal: Terminal,
}

impl Args {
    pub fn config(self, terminal: Terminal) -> Result<DevConfig, Failure> {
        let Args { dirs, data_dir: dir, api_listen, keep } = self;
        Ok(DevConfig { dirs, data_dir: dir.map_or_else(|| data_dir("dev", false), Ok)?, api_listen, keep, terminal })
    }
}
