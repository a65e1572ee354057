//! A command inside a container, without a terminal: for health checks.
//!
//! Interactive sessions are not here yet; they need the streams of [`bollard::exec::StartExecResults`] handed on.

use std::time::Duration;

use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::ExecConfig;
use futures_util::StreamExt;

use super::engine::{CALL_MAX, Engine};
use crate::driver::ExecOutput;
use crate::isolation::Group;

/// Most bytes of output kept.
const OUTPUT_MAX: usize = 4 << 10;

/// Runs `argv` in a container, at most `longest`; one that takes longer is killed. The error is for people.
pub async fn run(
    engine: &Engine,
    container: &str,
    group: Option<&Group>,
    argv: Vec<String>,
    longest: Duration,
) -> Result<ExecOutput, String> {
    let config = ExecConfig { cmd: Some(argv), attach_stdout: Some(true), attach_stderr: Some(true), ..ExecConfig::default() };
    let name = container.to_owned();
    let made = engine.call(CALL_MAX.min(longest), |docker| async move { docker.create_exec(&name, config).await }).await;
    let id = made.map_err(|e| e.to_string())?.id;
    let up = engine.up().map_err(|e| e.to_string())?;
    let mut output = Vec::new();
    let talk = async {
        let started = up.docker.start_exec(&id, None::<StartExecOptions>).await;
        let StartExecResults::Attached { output: mut pieces, input: _input } = started.map_err(|e| engine.judge(e).to_string())? else {
            return Err("the engine did not attach to the command".to_owned());
        };
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| engine.judge(e).to_string())?.into_bytes();
            let room = OUTPUT_MAX.saturating_sub(output.len());
            output.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        Ok(())
    };
    let ended = engine.within(longest, talk).await;
    let looked = id.clone();
    let inspected = engine.call(CALL_MAX, |docker| async move { docker.inspect_exec(&looked).await }).await.map_err(|e| e.to_string())?;
    match ended {
        Some(Ok(())) => match inspected.exit_code {
            Some(code) => Ok(ExecOutput { code, output }),
            None => Err("the engine does not say how the command ended".to_owned()),
        },
        Some(Err(why)) => Err(why),
        None => {
            // The engine has no order for it. Its number is of the host; that it is of this container its group says.
            let pid = inspected.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|_| inspected.running == Some(true));
            if let (Some(pid), Some(group)) = (pid, group)
                && group.pids().contains(&pid)
                && let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            Err(format!("no answer within {}", optimus_common::Span::from(longest)))
        }
    }
}
