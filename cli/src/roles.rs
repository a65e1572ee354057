//! The long-running roles of the binary. Each takes its parsed flags and runs until it is told to stop.

use anyhow::bail;

use crate::commands::agent::AgentConfig;
use crate::commands::dev::DevConfig;
use crate::commands::server::ServerConfig;

/// `optimus dev`: one server and one agent in this process.
///
/// # Errors
/// When it cannot start, or ends other than on request.
pub async fn dev(config: DevConfig) -> anyhow::Result<()> {
    bail!("role not wired: dev in {}", config.data_dir.display())
}

/// `optimus server`: one server of the control plane.
///
/// # Errors
/// When it cannot start, or ends other than on request.
pub async fn server(config: ServerConfig) -> anyhow::Result<()> {
    bail!("role not wired: server in {}", config.data_dir.display())
}

/// `optimus agent`: the agent of this host.
///
/// # Errors
/// When it cannot start or join, or ends other than on request.
pub async fn agent(config: AgentConfig) -> anyhow::Result<()> {
    bail!("role not wired: agent in {}", config.data_dir.display())
}
