//! Thousands of simulated agents in one process; see `tests/src/sim_agents`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use optimus_common::{Bytes, Millicores, Span};
use optimus_host::env::HostEnv;
use optimus_tests::sim_agents::{Fleet, FleetConfig, Replaced, Totals, raise_file_limit};
use serde_json::json;
use tokio::sync::mpsc;

const USAGE: &str = "usage: agents-sim --join TOKEN [OPTIONS]

  --agents N        how many (100)
  --dir DIR         where their identities are kept (a temporary directory, removed at the end)
  --prefix NAME     hosts are called NAME-0 and so on (sim)
  --cpu CORES       of each host (8)
  --memory SIZE     of each host (32G)
  --zones N         label hosts zone=z0 to zone=zN-1 in turn (0: no label)
  --at-once N       how many join at the same time (32)
  --play FILE       commands, a line each, before those of standard input

Copies do what the variable MOCK of their spec says: `start=200ms ready=1s crash=5s code=3 crashes=2 fail stop=never`.

Commands, on standard input; HOST is a name or a number:
  status                     counts, as one line of JSON
  wait N running|connected   waits until there are so many, then says after how long
  lose HOST                  kills it and says when its copies ran elsewhere
  kill|restart HOST          without power; back with nothing but its identity
  disconnect|reconnect HOST  no packet gets through; its copies run on
  freeze|thaw HOST           nothing happens on it
  sleep SPAN                 before the next command
  quit                       says goodbye to the servers; so does the end of the input
Every answer is one line of JSON.";

/// Longest wait of `wait` and `lose`.
const PATIENCE: Duration = Duration::from_secs(900);

struct Options {
    fleet: FleetConfig,
    play: Option<PathBuf>,
    /// Kept so that it is removed at the end.
    _temporary: Option<tempfile::TempDir>,
}

fn options(args: &[String]) -> anyhow::Result<Options> {
    let mut dir = None;
    let mut play = None;
    let mut fleet = FleetConfig {
        token: String::new(),
        agents: 100,
        prefix: "sim".into(),
        dir: PathBuf::new(),
        at_once: 32,
        cpu: Millicores(8000),
        memory: Bytes(32 << 30),
        zones: 0,
    };
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        let value = args.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--join" => fleet.token = value.clone(),
            "--agents" => fleet.agents = value.parse()?,
            "--dir" => dir = Some(PathBuf::from(value)),
            "--prefix" => fleet.prefix = value.clone(),
            "--cpu" => fleet.cpu = value.parse()?,
            "--memory" => fleet.memory = value.parse()?,
            "--zones" => fleet.zones = value.parse()?,
            "--at-once" => fleet.at_once = value.parse()?,
            "--play" => play = Some(PathBuf::from(value)),
            other => bail!("there is no `{other}`"),
        }
    }
    if fleet.token.is_empty() {
        bail!("--join is needed");
    }
    let temporary = if dir.is_none() { Some(tempfile::tempdir()?) } else { None };
    fleet.dir = dir.or_else(|| temporary.as_ref().map(|t| t.path().to_owned())).context("a directory")?;
    Ok(Options { fleet, play, _temporary: temporary })
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() || args.iter().any(|a| a == "--help") {
        println!("{USAGE}");
        return Ok(());
    }
    let options = match options(&args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("agents-sim: {error:#}\n\n{USAGE}");
            std::process::exit(2);
        }
    };
    raise_file_limit().context("failed to raise the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut fleet = Fleet::start(&options.fleet, &HostEnv::new()).await?;
    say(&json!({ "joined": fleet.agents.len(), "ms": millis(began.elapsed()) }));
    if let Some(file) = &options.play {
        let text = std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
        for line in text.lines() {
            obey(&mut fleet, line).await;
        }
    }
    let mut lines = input();
    while let Some(line) = lines.recv().await {
        if line.trim() == "quit" {
            break;
        }
        obey(&mut fleet, &line).await;
    }
    fleet.stop().await;
    Ok(())
}

/// Standard input, line by line, from a thread of its own.
fn input() -> mpsc::Receiver<String> {
    let (lines, received) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    received
}

async fn obey(fleet: &mut Fleet, line: &str) {
    let line = line.split('#').next().unwrap_or_default().trim();
    if line.is_empty() {
        return;
    }
    match command(fleet, line).await {
        Ok(answer) => say(&answer),
        Err(error) => say(&json!({ "error": format!("{line}: {error:#}") })),
    }
}

async fn command(fleet: &mut Fleet, line: &str) -> anyhow::Result<serde_json::Value> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let began = Instant::now();
    match words[..] {
        ["status"] => return Ok(status(&fleet.totals())),
        ["sleep", span] => tokio::time::sleep(span.parse::<Span>()?.as_duration()).await,
        ["wait", count, what] => {
            let count: usize = count.parse()?;
            match what {
                "running" => fleet.wait(PATIENCE, |t| t.running == count).await?,
                "connected" => fleet.wait(PATIENCE, |t| t.connected == count).await?,
                other => bail!("nobody waits for `{other}`"),
            }
        }
        ["lose", host] => {
            let host = fleet.find(host)?;
            let name = fleet.agents[host].name.clone();
            let missing = fleet.kill_noting(host);
            let since = Instant::now();
            say(&json!({ "killed": name, "copies": missing.len() }));
            let Replaced { copies, first, last } = fleet.replaced(host, missing, since, PATIENCE).await?;
            return Ok(json!({ "lost": name, "copies": copies, "first_ms": millis(first), "last_ms": millis(last) }));
        }
        [verb, host] => {
            let host = fleet.find(host)?;
            match verb {
                "kill" => fleet.kill(host),
                "restart" => fleet.restart(host),
                "disconnect" => fleet.disconnect(host),
                "reconnect" => fleet.reconnect(host),
                "freeze" => fleet.freeze(host),
                "thaw" => fleet.thaw(host),
                _ => bail!("no such command"),
            }
        }
        _ => bail!("no such command"),
    }
    Ok(json!({ "done": line, "ms": millis(began.elapsed()) }))
}

fn status(totals: &Totals) -> serde_json::Value {
    let Totals { agents, connected, held, running, ready, starts, sets, set_copies } = totals;
    json!({
        "agents": agents, "connected": connected, "held": held, "running": running, "ready": ready,
        "starts": starts, "sets": sets, "set_copies": set_copies,
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn say(value: &serde_json::Value) {
    println!("{value}");
    let _ = std::io::stdout().flush(); // a reader that went away hears nothing anyway
}
