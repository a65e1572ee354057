//! `optimus quota`

use optimus_common::api::v1::{Page, Quota, QuotaLimits, QuotaUsed, RemoveAnswer};
use optimus_common::{Bytes, Millicores, Name};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus quota                                    list quotas with what is used of them
  optimus quota set shop --copies 50               over all environments of shop
  optimus quota set shop/prod --cpu 8 --memory 16G
  optimus quota rm shop/prod";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List quotas with what is used of them
    #[command(before_help = "Examples:\n  optimus quota ls\n  optimus quota ls shop")]
    Ls {
        /// Only this project
        project: Option<Name>,
    },
    /// Show one quota
    #[command(before_help = "Examples:\n  optimus quota show shop/prod")]
    Show {
        /// `project` or `project/env`
        scope: String,
    },
    /// Limit what may be reserved together; what is not named has no limit. Copies that run stay
    #[command(
        before_help = "Examples:\n  optimus quota set shop/prod --cpu 8 --memory 16G\n  optimus quota set shop --copies 50 --devices 2"
    )]
    Set(Set),
    /// Remove a quota
    #[command(before_help = "Examples:\n  optimus quota rm shop/prod")]
    Rm {
        /// `project` or `project/env`
        scope: String,
    },
}

#[derive(Debug, clap::Args)]
struct Set {
    /// `project` or `project/env`
    scope: String,
    /// Cores, such as 8 or 0.5
    #[arg(long, value_name = "CORES")]
    cpu: Option<Millicores>,
    /// Memory requests together, such as 16G
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// Disk, such as 200G
    #[arg(long, value_name = "SIZE")]
    disk: Option<Bytes>,
    /// Copies
    #[arg(long, value_name = "N")]
    copies: Option<u32>,
    /// Devices
    #[arg(long, value_name = "N")]
    devices: Option<u32>,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    match &args.what {
        None => list(&session, None).await,
        Some(What::Ls { project }) => list(&session, project.as_ref()).await,
        Some(What::Show { scope }) => {
            let quota = session.client.get::<Quota>(&path(scope)?, &[], "cannot read the quota").await?.value;
            show(&session, &quota)
        }
        Some(What::Set(Set { scope, cpu, memory, disk, copies, devices })) => {
            if cpu.is_none() && memory.is_none() && disk.is_none() && copies.is_none() && devices.is_none() {
                return Err(
                    Failure::new(Exit::Usage, "the quota limits nothing").hint(format!("optimus quota set {scope} --cpu 8 --memory 16G"))
                );
            }
            let limits = QuotaLimits { cpu: *cpu, memory: *memory, disk: *disk, copies: *copies, devices: *devices };
            let quota = session.client.put::<Quota>(&path(scope)?, &limits, "cannot set the quota").await?.value;
            show(&session, &quota)
        }
        Some(What::Rm { scope }) => {
            let answer = session.client.delete::<RemoveAnswer>(&path(scope)?, "cannot remove the quota").await?.value;
            if terminal.json {
                terminal.json_document(&answer)?;
                return Ok(());
            }
            terminal.note(&format!("{scope} has no quota of its own any more"));
            Ok(())
        }
    }
}

/// `shop` or `shop/prod`
fn path(scope: &str) -> Result<String, Failure> {
    let parts: Vec<Option<Name>> = scope.split('/').map(|part| Name::new(part).ok()).collect();
    match parts.as_slice() {
        [Some(project)] => Ok(format!("/v1/projects/{project}/quota")),
        [Some(project), Some(environment)] => Ok(format!("/v1/projects/{project}/envs/{environment}/quota")),
        _ => Err(Failure::new(Exit::Usage, format!("`{scope}` is neither a project nor an environment of one"))
            .hint("write `shop` or `shop/prod`")),
    }
}

/// What is reserved, the limit, and whether it is above.
type Held = (String, String, bool);

/// `2 of 8`, for each limit.
fn columns(quota: &Quota) -> [(&'static str, Option<Held>); 5] {
    let QuotaLimits { cpu, memory, disk, copies, devices } = quota.limits;
    let QuotaUsed { cpu: cpu_used, memory: memory_used, disk: disk_used, copies: copies_used, devices: devices_used } = quota.used;
    let size = |limit: Option<Bytes>, used: Bytes| limit.map(|limit| (used.human(), limit.human(), used > limit));
    let number = |limit: Option<u32>, used: u64| limit.map(|limit| (used.to_string(), limit.to_string(), used > u64::from(limit)));
    [
        ("cpu", cpu.map(|limit| (cpu_used.to_string(), limit.to_string(), cpu_used > limit))),
        ("memory", size(memory, memory_used)),
        ("disk", size(disk, disk_used)),
        ("copies", number(copies, copies_used)),
        ("devices", number(devices, devices_used)),
    ]
}

fn scope(quota: &Quota) -> String {
    quota.environment.as_ref().map_or_else(|| quota.project.to_string(), |environment| format!("{}/{environment}", quota.project))
}

fn show(session: &Session, quota: &Quota) -> Result<(), Failure> {
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(quota)?;
        return Ok(());
    }
    terminal.line(&format!("{:<8} {}", "quota", scope(quota)))?;
    for (what, limit) in columns(quota) {
        let said = match limit {
            Some((used, limit, over)) => format!("{used} of {limit} reserved{}", if over { ", more than it may" } else { "" }),
            None => continue,
        };
        terminal.line(&format!("{what:<8} {said}"))?;
    }
    Ok(())
}

async fn list(session: &Session, project: Option<&Name>) -> Result<(), Failure> {
    let terminal = session.terminal;
    let query: Vec<(&str, String)> = project.map(|project| ("project", project.to_string())).into_iter().collect();
    let quotas: Page<Quota> = session.client.list("/v1/quotas", &query, "cannot list the quotas").await?;
    if terminal.json {
        terminal.json_document(&quotas)?;
        return Ok(());
    }
    if quotas.items.is_empty() {
        terminal.note("no quotas: every project may reserve what there is\n  hint: optimus quota set PROJECT/ENV --cpu 8 --memory 16G");
        return Ok(());
    }
    let paint = terminal.stdout_paint();
    let cell = |limit: Option<Held>| match limit {
        None => "-".to_owned(),
        Some((used, limit, true)) => paint.bad(&format!("{used}/{limit} over")),
        Some((used, limit, false)) => format!("{used}/{limit}"),
    };
    let rows = quotas.items.iter().map(|quota| {
        let mut row = vec![scope(quota)];
        row.extend(columns(quota).into_iter().map(|(_, limit)| cell(limit)));
        row
    });
    terminal.table(&["QUOTA", "CPU", "MEMORY", "DISK", "COPIES", "DEVICES"], rows.collect())?;
    Ok(())
}
