//! `optimus run`

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use optimus_common::Name;
use optimus_common::api::v1::{JobRun, RunAnswer, RunPhase, RunRequest};
use optimus_common::spec::job::PAYLOAD_MAX;

use crate::args::Global;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::{Exit, Failure, printable};
use crate::output::{Terminal, now, took};
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus run migrate                          start a run and wait for its end
  optimus run encode --payload order.json -p CUSTOMER=7
  optimus run prod/report --no-wait";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `report`, `env/report` or `project/env/report`
    job: String,
    /// A parameter the job asks for
    #[arg(long = "param", short = 'p', value_name = "NAME=VALUE", value_parser = param)]
    params: Vec<(String, String)>,
    /// File given to the run, at most 16 KiB; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,
    /// Project of the job
    #[arg(long, value_name = "PROJECT")]
    project: Option<Name>,
    /// Environment of the job
    #[arg(long = "env", short = 'e', value_name = "ENV")]
    environment: Option<Name>,
    #[command(flatten)]
    wait: WaitArgs,
}

fn param(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "write NAME=VALUE".to_owned())
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let scope = ScopeArgs { project: args.project.clone(), environment: args.environment.clone() };
    let session = Session::open(global, &scope, terminal)?;
    let key = workload_only(&session, &args.job, "run").await?;
    let params: BTreeMap<String, String> = args.params.iter().cloned().collect();
    let payload = args.payload.as_ref().map(read_payload).transpose()?;
    let path = target::path(&key);
    let request = RunRequest { params, payload };
    let answer = session.client.post::<RunAnswer>(&format!("{path}:run"), &request, &format!("cannot run {key}")).await?;
    let RunAnswer { run, index, .. } = answer.value;
    let Some(limit) = args.wait.limit() else {
        if terminal.json {
            terminal.json_document(&run)?;
        }
        terminal.note(&format!("run {} of {key} is {}", run.number, word(run.phase)));
        return Ok(());
    };
    terminal.note(&format!("run {} of {key}; ctrl-c stops waiting, not the run", run.number));
    let run = wait(&session, &path, run, index, limit).await?;
    if terminal.json {
        terminal.json_document(&run)?;
    }
    let ended = format!("run {} of {key} {}", run.number, said(&run));
    match run.phase {
        RunPhase::Succeeded => {
            terminal.note(&ended);
            Ok(())
        }
        _ => {
            let failure = Failure::new(Exit::Failed, ended);
            let why = run.reason.as_ref().map(|r| printable(&r.message)).unwrap_or_default();
            Err(failure.because(why).hint(format!("optimus logs {key}")))
        }
    }
}

fn read_payload(path: &PathBuf) -> Result<String, Failure> {
    let failed = |why: String| Failure::new(Exit::Usage, format!("cannot read the payload {}", path.display())).because(why);
    let reader: Box<dyn std::io::Read> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(|e| failed(e.to_string()))?)
    };
    let mut bytes = Vec::new();
    reader.take(PAYLOAD_MAX as u64 + 1).read_to_end(&mut bytes).map_err(|e| failed(e.to_string()))?;
    if bytes.len() > PAYLOAD_MAX {
        return Err(failed(format!("it is longer than {PAYLOAD_MAX} bytes"))
            .hint("put large data where the job can fetch it, and pass its address"));
    }
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// Follows a run to its end. Ctrl-C ends the waiting only.
async fn wait(session: &Session, path: &str, mut run: JobRun, mut index: u64, limit: Duration) -> Result<JobRun, Failure> {
    let resume = format!("optimus runs {}", run.key);
    let until = tokio::time::Instant::now() + limit;
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    let mut told = None;
    while !run.phase.is_final() {
        let why = run.reason.as_ref().map(|r| printable(&r.message));
        if why.is_some() && why != told {
            session.terminal.note(&format!("{}: {}", word(run.phase), why.clone().unwrap_or_default()));
            told = why;
        }
        let at = format!("{path}/runs/{}", run.number);
        tokio::select! {
            answer = session.client.get_changed::<JobRun>(&at, index, "cannot follow the run") => {
                let answer = answer?;
                index = answer.index.unwrap_or(index);
                run = answer.value;
            }
            () = tokio::time::sleep_until(until) => {
                let failure = Failure::new(Exit::TimedOut, format!("run {} has not ended after {} s; it goes on", run.number, limit.as_secs()));
                return Err(failure.hint(resume));
            }
            _ = &mut interrupt => {
                session.terminal.note(&format!("detached; the run goes on\n  hint: {resume}"));
                return Err(Failure::quiet(Exit::Interrupted));
            }
        }
    }
    Ok(run)
}

pub(super) fn word(phase: RunPhase) -> &'static str {
    match phase {
        RunPhase::Waiting => "waiting",
        RunPhase::Active => "active",
        RunPhase::Succeeded => "succeeded",
        RunPhase::Failed => "failed",
        RunPhase::Cancelled => "cancelled",
    }
}

fn said(run: &JobRun) -> String {
    let took = took(run.ended_at.unwrap_or_else(now).since(run.started_at.unwrap_or(run.created_at)));
    match run.phase {
        RunPhase::Succeeded => format!("succeeded in {took}"),
        RunPhase::Failed => format!("failed after {took}"),
        other => format!("is {}", word(other)),
    }
}
