//! The command line.

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    agent, cluster, completion, console, deploy, deployments, dev, events, explain, help, init, jobs, logs, nodes, plan, pool, ps, quota,
    rebalance, restart, rm, run, runs, scale, secret, server, status, steer, stop, top, validate, version, volume,
};
use crate::output::ColorChoice;

/// Runs your software on your own hosts.
#[derive(Debug, Parser)]
#[command(
    name = "optimus",
    version,
    before_help = "Examples:\n  optimus dev                 run a one-machine cluster here\n  optimus init                write an optimus.toml\n  optimus deploy              deploy this directory and wait until it is ready\n  optimus explain web-0       why is this copy as it is",
    after_help = "Topics: optimus help exit-codes | environment | credentials",
    disable_help_subcommand = true,
    arg_required_else_help = true,
    propagate_version = false,
    max_term_width = 120
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// What every verb takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Cluster to talk to, by the name of its context (before OPTIMUS_CONTEXT)
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Print API objects as JSON; streams print one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// When to colour
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a server and an agent on this machine
    #[command(before_help = dev::EXAMPLES)]
    Dev(dev::Args),
    /// Run a server of the control plane
    #[command(before_help = server::EXAMPLES)]
    Server(server::Args),
    /// Run the agent of this host
    #[command(before_help = agent::EXAMPLES)]
    Agent(agent::Args),
    /// Write a commented optimus.toml to start from
    #[command(before_help = init::EXAMPLES)]
    Init(init::Args),
    /// Check a project file without a server
    #[command(before_help = validate::EXAMPLES)]
    Validate(validate::Args),
    /// Deploy a project file and wait until its copies are ready
    #[command(before_help = deploy::EXAMPLES)]
    Deploy(deploy::Args),
    /// Show what a deploy would do, where and why
    #[command(before_help = plan::EXAMPLES)]
    Plan(plan::Args),
    /// Show the cluster and its workloads
    #[command(before_help = status::EXAMPLES)]
    Status(status::Args),
    /// List copies
    #[command(before_help = ps::EXAMPLES)]
    Ps(ps::Args),
    /// Show what copies and hosts use, those that use most first
    #[command(before_help = top::EXAMPLES)]
    Top(top::Args),
    /// Print what workloads print
    #[command(before_help = logs::EXAMPLES)]
    Logs(logs::Args),
    /// Set how many copies of a workload run
    #[command(before_help = scale::EXAMPLES)]
    Scale(scale::Args),
    /// Replace all copies of a workload, a few at a time
    #[command(before_help = restart::EXAMPLES)]
    Restart(restart::Args),
    /// List deployments, or show one
    #[command(before_help = deployments::EXAMPLES)]
    Deployments(deployments::Args),
    /// Let canaries or a second set take over
    #[command(before_help = steer::PROMOTE)]
    Promote(steer::Args),
    /// Move nothing more of a deployment for now
    #[command(before_help = steer::PAUSE)]
    Pause(steer::Args),
    /// Go on with a paused deployment
    #[command(before_help = steer::RESUME)]
    Resume(steer::Args),
    /// Call a deployment off: the release before stays
    #[command(before_help = steer::ABORT)]
    Abort(steer::Args),
    /// Try the release once more whose deployment failed
    #[command(before_help = steer::RETRY)]
    Retry(steer::Args),
    /// Go back to the release that ran before
    #[command(before_help = steer::ROLLBACK)]
    Rollback(steer::RollbackArgs),
    /// Stop all copies of a workload; it stays known
    #[command(before_help = stop::EXAMPLES)]
    Stop(stop::Args),
    /// Stop a workload and forget it
    #[command(before_help = rm::EXAMPLES)]
    Rm(rm::Args),
    /// Start a run of a job and wait for its end
    #[command(before_help = run::EXAMPLES)]
    Run(run::Args),
    /// List the runs of a job, or cancel one
    #[command(before_help = runs::EXAMPLES)]
    Runs(runs::Args),
    /// List jobs, when they run next and how they last ended
    #[command(before_help = jobs::EXAMPLES)]
    Jobs(jobs::Args),
    /// Say why a copy or workload is as it is, or what a field or error code means
    #[command(before_help = explain::EXAMPLES)]
    Explain(explain::Args),
    /// List, label, cordon and drain hosts, or let new ones in
    #[command(before_help = nodes::EXAMPLES, visible_alias = "node")]
    Nodes(nodes::Args),
    /// List pools of hosts, and set how copies are laid out in them
    #[command(before_help = pool::EXAMPLES)]
    Pool(pool::Args),
    /// List and set what projects and environments may reserve
    #[command(before_help = quota::EXAMPLES)]
    Quota(quota::Args),
    /// Set secrets, list and remove them; nobody reads them back
    #[command(before_help = secret::EXAMPLES)]
    Secret(secret::Args),
    /// List volumes, create and remove them
    #[command(before_help = volume::EXAMPLES)]
    Volume(volume::Args),
    /// Move copies to even out the hosts, within a budget
    #[command(before_help = rebalance::EXAMPLES)]
    Rebalance(rebalance::Args),
    /// Look at the servers of the control plane, add and remove them, export, restore and recover their state
    #[command(before_help = cluster::EXAMPLES)]
    Cluster(cluster::Args),
    /// Print a link that opens the web console, logged in
    #[command(before_help = console::EXAMPLES)]
    Console(console::Args),
    /// Print what happened
    #[command(before_help = events::EXAMPLES)]
    Events(events::Args),
    /// Print the version of this program and of the server
    #[command(before_help = version::EXAMPLES)]
    Version(version::Args),
    /// Print completions for a shell
    #[command(before_help = completion::EXAMPLES)]
    Completion(completion::Args),
    /// Print help for a verb or a topic
    #[command(before_help = help::EXAMPLES)]
    Help(help::Args),
}
