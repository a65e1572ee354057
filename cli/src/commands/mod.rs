//! One module a verb: its flags, its examples, and `run`.

pub mod agent;
pub mod cluster;
pub mod completion;
pub mod console;
pub mod deploy;
pub mod deployments;
pub mod dev;
pub mod events;
pub mod explain;
pub mod help;
pub mod init;
pub mod jobs;
pub mod logs;
mod node_actions;
pub mod nodes;
pub mod plan;
pub mod pool;
pub mod ps;
pub mod quota;
pub mod rebalance;
pub mod restart;
pub mod rm;
pub mod run;
pub mod runs;
pub mod scale;
pub mod secret;
pub mod server;
pub mod status;
pub mod steer;
pub mod stop;
pub mod top;
pub mod validate;
pub mod version;
pub mod volume;

use std::path::PathBuf;
use std::time::Duration;

use optimus_common::api::v1::{ActionAnswer, Allocation, ClusterStatus};
use optimus_common::{Name, Span};

use crate::args::Global;
use crate::client::Client;
use crate::context::{self, Context, Overrides, Store};
use crate::error::{Exit, Failure};
use crate::output::Terminal;
use crate::target::Scope;
use crate::{follow, project};

/// How long verbs wait for their effect unless told otherwise.
const WAIT_DEFAULT: Duration = Duration::from_secs(30 * 60);

/// Pause between two looks at the copies.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// `--project` and `--env`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ScopeArgs {
    /// Project of the workload
    #[arg(long, short = 'p', value_name = "PROJECT")]
    pub project: Option<Name>,
    /// Environment of the workload
    #[arg(long = "env", short = 'e', value_name = "ENV")]
    pub environment: Option<Name>,
}

impl ScopeArgs {
    pub fn scope(&self) -> Scope {
        Scope { project: self.project.clone(), environment: self.environment.clone() }
    }
}

/// `--no-wait` and `--timeout`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WaitArgs {
    /// Return as soon as the server has taken the request
    #[arg(long)]
    pub no_wait: bool,
    /// Longest time to wait, such as 90s or 5m; the work goes on after it (exit code 7) [default: 30m]
    #[arg(long, value_name = "TIME", conflicts_with = "no_wait")]
    pub timeout: Option<Span>,
}

impl WaitArgs {
    /// Unset: do not wait.
    pub fn limit(&self) -> Option<Duration> {
        (!self.no_wait).then(|| self.timeout.map_or(WAIT_DEFAULT, Span::as_duration))
    }
}

/// What a verb that asks the API works with.
pub struct Session {
    pub terminal: Terminal,
    pub client: Client,
    /// `--project` and `--env`.
    pub scope: Scope,
    /// Project and environment of the project file here, else of the context: they decide between several.
    pub defaults: Scope,
}

impl Session {
    /// Reads the context; sends nothing yet.
    pub fn open(global: &Global, scope: &ScopeArgs, terminal: Terminal) -> Result<Self, Failure> {
        let store = Store::open().map_err(|error| Failure::from(anyhow::Error::from(error)).doing("cannot find the contexts"))?;
        let context = context::resolve(&store, global.context.as_deref(), Overrides::from_env())?;
        Session::with(context, scope.scope(), terminal)
    }

    /// Of a context at hand: the dev role has just made one.
    pub fn with(context: Context, scope: Scope, terminal: Terminal) -> Result<Self, Failure> {
        let client = Client::new(&context)?;
        let defaults = project::scope_here().or(&Scope { project: context.project, environment: context.environment });
        Ok(Session { terminal, client, scope, defaults })
    }

    /// For verbs that only look. Without a leader they show what the server last knew, and say so: that is when people look.
    pub async fn or_stale(self, what: &str) -> Result<(Self, ClusterStatus), Failure> {
        let (client, answer) = self.client.get_or_stale::<ClusterStatus>("/v1/status", what).await?;
        if let Some(age) = answer.staleness {
            let when = if age == "unknown" { "of an unknown age".to_owned() } else { format!("{age} old") };
            let paint = self.terminal.stderr_paint();
            self.terminal.note(&format!(
                "{} no server leads, so nothing can be changed; this is what {} knows, {when}. `optimus cluster` tells who is missing",
                paint.busy("warning:"),
                self.client.url()
            ));
        }
        Ok((Session { client, ..self }, answer.value))
    }

    /// Keeps the CAs that the cluster tells of, so that this machine still knows it when the present one is replaced.
    pub fn learn_ca(&self, ca_pem: &str) {
        if let Ok(store) = Store::open()
            && let Err(error) = store.learn_ca(|context| self.client.is_of(context), ca_pem)
        {
            tracing::warn!(%error, "the cluster's CA certificates could not be stored");
        }
    }

    /// Waits for the deployment an action started, if any, and says how it ended.
    pub async fn finish_action(&self, answer: ActionAnswer, wait: &WaitArgs, said: &str, request_id: Option<&str>) -> Result<(), Failure> {
        let ActionAnswer { index, deployment, changed } = answer;
        if !changed {
            self.terminal.note("nothing to do: it was so already");
        }
        let Some((deployment, limit)) = deployment.zip(wait.limit()) else {
            self.terminal.note(said);
            return Ok(());
        };
        let ended = follow::to_the_end(self, vec![deployment], index, Some(limit)).await?;
        for progress in ended.values() {
            if let Some(failure) = follow::failure(&self.client, progress, request_id).await {
                return Err(failure);
            }
        }
        self.terminal.note(said);
        Ok(())
    }

    /// Waits until no copy of the workload runs any more.
    pub async fn wait_until_gone(&self, path: &str, limit: Duration, resume: &str) -> Result<(), Failure> {
        let open = |copies: &[Allocation]| {
            // A copy on a node that does not answer cannot be waited for.
            let left = copies.iter().filter(|copy| !copy.phase.is_terminal() && copy.current).count();
            (left > 0).then(|| format!("{left} still running"))
        };
        self.wait_for(path, limit, resume, open).await
    }

    /// Waits until `wanted` copies are ready and no other runs.
    pub async fn wait_until_scaled(&self, path: &str, wanted: u32, limit: Duration, resume: &str) -> Result<(), Failure> {
        let open = |copies: &[Allocation]| {
            let ready = copies.iter().filter(|copy| copy.desired_run && copy.ready).count();
            let leaving = copies.iter().filter(|copy| !copy.desired_run && !copy.phase.is_terminal() && copy.current).count();
            (ready != wanted as usize || leaving > 0).then(|| format!("{ready} of {wanted} ready, {leaving} still stopping"))
        };
        self.wait_for(path, limit, resume, open).await
    }

    /// Looks at the copies until `open` says that nothing is open. Ctrl-C ends the waiting only.
    async fn wait_for(
        &self,
        path: &str,
        limit: Duration,
        resume: &str,
        open: impl Fn(&[Allocation]) -> Option<String>,
    ) -> Result<(), Failure> {
        let started = tokio::time::Instant::now();
        let interrupt = tokio::signal::ctrl_c();
        tokio::pin!(interrupt);
        loop {
            let all = [("all", "true".to_owned())];
            let copies = self.client.list::<Allocation>(&format!("{path}/allocations"), &all, "cannot list the copies").await?.items;
            let Some(left) = open(&copies) else { return Ok(()) };
            if started.elapsed() >= limit {
                let failure = Failure::new(Exit::TimedOut, format!("not finished after {} s; the work goes on", limit.as_secs()));
                return Err(failure.because(left).hint(resume));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY.min(limit)) => {}
                _ = &mut interrupt => {
                    self.terminal.note(&format!("detached; the work goes on ({left})\n  hint: {resume}"));
                    return Err(Failure::quiet(Exit::Interrupted));
                }
            }
        }
    }
}

/// The folder for data of a role: `/var/lib/optimus/ROLE` for root, else below `$XDG_DATA_HOME`.
pub(crate) fn data_dir(role: &str, for_root: bool) -> Result<PathBuf, Failure> {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if root && for_root {
        return Ok(PathBuf::from("/var/lib/optimus").join(role));
    }
    context::absolute_env("XDG_DATA_HOME")
        .or_else(|| context::absolute_env("HOME").map(|home| home.join(".local/share")))
        .map(|data| data.join("optimus").join(role))
        .ok_or_else(|| {
            Failure::new(Exit::Usage, "cannot choose a data directory")
                .because("neither XDG_DATA_HOME nor HOME is set")
                .hint("name one with --data-dir")
        })
}
