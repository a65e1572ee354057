//! What the operator says of this node for placement, in `node.toml` of the agent's data directory:
//!
//! ```toml
//! pool = "gpu"
//! labels = { zone = "a", disk = "ssd" }
//! reserved = { cpu = 0.5, memory = "1G", disk = "10G" }
//! devices = [["/usr/local/lib/optimus/nvidia-devices"]]   # commands that print a JSON list of groups of devices
//! ```
//!
//! GPUs of NVIDIA are found without a command, by the driver's own library; `nvidia = false` leaves them out, and
//! `nvidia = "/path/libnvidia-ml.so.1"` says where it is.
//!
//! A command that fails, hangs or prints something else costs its devices, never the agent's start.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use optimus_common::protocol::{DeviceGroup, HostReserve};
use optimus_common::{Bytes, Millicores, Name};
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use crate::nvml::{self, NvmlError};

const FILE_MAX: usize = 64 << 10;
const COMMANDS_MAX: usize = 8;
const OUTPUT_MAX: u64 = 256 << 10;
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Placing {
    pub pool: Option<Name>,
    pub labels: BTreeMap<String, String>,
    pub reserved: HostReserve,
    pub devices: Vec<DeviceGroup>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    pool: Option<Name>,
    labels: BTreeMap<String, String>,
    reserved: Reserved,
    devices: Vec<Vec<String>>,
    nvidia: Nvidia,
}

/// Whether GPUs of NVIDIA are offered, and by which library they are found.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Nvidia {
    On(bool),
    Library(String),
}

impl Default for Nvidia {
    fn default() -> Self {
        Nvidia::On(true)
    }
}

/// [`HostReserve`] as people write it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Reserved {
    cpu: Millicores,
    #[serde(deserialize_with = "size")]
    memory: Bytes,
    #[serde(deserialize_with = "size")]
    disk: Bytes,
}

fn size<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Bytes, D::Error> {
    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
}

/// Reads the file and asks its commands. Without a file nothing is said.
pub async fn read(data_dir: &Path) -> io::Result<Placing> {
    let text = match std::fs::read_to_string(data_dir.join("node.toml")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other?,
    };
    if text.len() > FILE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {FILE_MAX} bytes")));
    }
    let File { pool, labels, reserved, devices: commands, nvidia } =
        toml::from_str(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.message().to_owned()))?;
    if commands.len() > COMMANDS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {COMMANDS_MAX} commands for devices")));
    }
    let mut devices = Vec::new();
    for command in commands {
        match ask(&command).await {
            Ok(groups) => devices.extend(groups),
            Err(error) => tracing::warn!(?command, %error, "a command for devices failed; its devices are not offered"),
        }
    }
    devices.extend(gpus(nvidia).await);
    let Reserved { cpu, memory, disk } = reserved;
    Ok(Placing { pool, labels, reserved: HostReserve { cpu, memory, disk }, devices })
}

/// What the driver's library tells. A driver that hangs costs its devices, and a thread.
async fn gpus(nvidia: Nvidia) -> Vec<DeviceGroup> {
    let (library, asked_for) = match nvidia {
        Nvidia::On(false) => return vec![],
        Nvidia::On(true) => (nvml::LIBRARY.to_owned(), false),
        Nvidia::Library(path) => (path, true),
    };
    match tokio::time::timeout(TIMEOUT, tokio::task::spawn_blocking(move || nvml::devices(&library))).await {
        Ok(Ok(Ok(groups))) => return groups,
        Ok(Ok(Err(NvmlError::NotThere { .. }))) if !asked_for => {}
        Ok(Ok(Err(error))) => tracing::warn!(%error, "NVIDIA's devices are not offered"),
        Ok(Err(error)) => tracing::warn!(%error, "NVIDIA's devices are not offered"),
        Err(_) => tracing::warn!("NVIDIA's driver does not answer; its devices are not offered"),
    }
    vec![]
}

/// Runs one command and reads its answer.
async fn ask(command: &[String]) -> io::Result<Vec<DeviceGroup>> {
    let (program, args) = command.split_first().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"))?;
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no output"))?;
    let answer = async {
        let mut bytes = Vec::new();
        stdout.take(OUTPUT_MAX + 1).read_to_end(&mut bytes).await?;
        let status = child.wait().await?;
        match (bytes.len() as u64 > OUTPUT_MAX, status.success()) {
            (true, _) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it prints more than {OUTPUT_MAX} bytes"))),
            (_, false) => Err(io::Error::other(format!("it ended with {status}"))),
            _ => serde_json::from_slice(&bytes).map_err(io::Error::from),
        }
    };
    match tokio::time::timeout(TIMEOUT, answer).await {
        Ok(groups) => groups,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {} s", TIMEOUT.as_secs()))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_is_read_and_its_commands_are_asked() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).await.unwrap(), Placing::default());
        let groups =
            r#"[{"vendor":"acme","type":"fpga","name":"x1","ids":["0"],"paths":{"0":["/dev/fpga0"]},"attributes":{"memory":"8G"}}]"#;
        std::fs::write(dir.path().join("groups.json"), groups).unwrap();
        let path = dir.path().join("groups.json");
        let file = format!(
            "pool = \"gpu\"\nlabels = {{ zone = \"a\" }}\nreserved = {{ cpu = 0.5, memory = \"1G\" }}\ndevices = [[\"cat\", {path:?}], [\"false\"], [\"echo\", \"no json\"]]\n"
        );
        std::fs::write(dir.path().join("node.toml"), file).unwrap();
        let placing = read(dir.path()).await.unwrap();
        assert_eq!(placing.pool.as_ref().map(Name::as_str), Some("gpu"));
        assert_eq!((placing.reserved.cpu.0, placing.reserved.memory.0), (500, 1 << 30));
        assert_eq!(placing.devices.len(), 1);
        assert_eq!(placing.devices[0].paths["0"], ["/dev/fpga0"]);
        std::fs::write(dir.path().join("node.toml"), "pol = \"gpu\"").unwrap();
        assert!(read(dir.path()).await.unwrap_err().to_string().contains("unknown field `pol`"));
    }
}
