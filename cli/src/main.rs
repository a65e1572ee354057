//! The `optimus` binary: server, agent, dev, and every client verb.
//!
//! This crate parses the command line, asks the API and shows the answer. It decides nothing about
//! workloads; the roles it starts live in their own crates.

#![allow(clippy::result_large_err, reason = "a verb fails once, at its end: the size of its error costs nothing")]

mod args;
mod client;
mod commands;
mod context;
mod error;
mod follow;
mod hidden;
mod live;
mod output;
mod project;
mod roles;
mod target;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Verb};
use commands::steer::Ask;
use error::{Exit, Failure};
use output::Terminal;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // TLS without a provider panics; it is installed once, before anything connects.
    let installed = rustls::crypto::ring::default_provider().install_default();
    debug_assert!(installed.is_ok(), "nothing else installs a TLS provider");
    let terminal = Terminal::detect(cli.global.color, cli.global.json);
    let exit = match run(cli, terminal) {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            failure.print(&terminal);
            failure.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn run(cli: Cli, terminal: Terminal) -> Result<(), Failure> {
    let Cli { global, verb } = cli;
    match verb {
        Verb::Dev(args) => block_on_role(roles::dev(args.config(terminal)?)),
        Verb::Server(args) => block_on_role(roles::server(args.config()?)),
        Verb::Cluster(args) => match commands::cluster::server_to_join(args) {
            Ok(server) => block_on_role(roles::server(server.config()?)),
            Err(args) => block_on(commands::cluster::run(args, &global, terminal)),
        },
        Verb::Agent(args) => block_on_role(roles::agent(args.config()?)),
        Verb::Init(args) => commands::init::run(&args, &terminal),
        Verb::Validate(args) => commands::validate::run(&args, &terminal),
        Verb::Completion(args) => commands::completion::run(&args),
        Verb::Help(args) => commands::help::run(&args, &terminal),
        verb => block_on(client_verb(global, verb, terminal)),
    }
}

/// The verbs that may ask a server.
async fn client_verb(global: args::Global, verb: Verb, terminal: Terminal) -> Result<(), Failure> {
    match verb {
        Verb::Deploy(args) => commands::deploy::run(&args, &global, terminal).await,
        Verb::Plan(args) => commands::plan::run(&args, &global, terminal).await,
        Verb::Status(args) => commands::status::run(&args, &global, terminal).await,
        Verb::Ps(args) => commands::ps::run(&args, &global, terminal).await,
        Verb::Logs(args) => commands::logs::run(&args, &global, terminal).await,
        Verb::Scale(args) => commands::scale::run(&args, &global, terminal).await,
        Verb::Restart(args) => commands::restart::run(&args, &global, terminal).await,
        Verb::Deployments(args) => commands::deployments::run(&args, &global, terminal).await,
        Verb::Promote(args) => commands::steer::run(Ask::Promote, &args, &global, terminal).await,
        Verb::Pause(args) => commands::steer::run(Ask::Pause, &args, &global, terminal).await,
        Verb::Resume(args) => commands::steer::run(Ask::Resume, &args, &global, terminal).await,
        Verb::Abort(args) => commands::steer::run(Ask::Abort, &args, &global, terminal).await,
        Verb::Retry(args) => commands::steer::run(Ask::Retry, &args, &global, terminal).await,
        Verb::Rollback(args) => commands::steer::rollback(&args, &global, terminal).await,
        Verb::Stop(args) => commands::stop::run(&args, &global, terminal).await,
        Verb::Rm(args) => commands::rm::run(&args, &global, terminal).await,
        Verb::Run(args) => commands::run::run(&args, &global, terminal).await,
        Verb::Runs(args) => commands::runs::run(&args, &global, terminal).await,
        Verb::Jobs(args) => commands::jobs::run(&args, &global, terminal).await,
        Verb::Rebalance(args) => commands::rebalance::run(&args, &global, terminal).await,
        Verb::Explain(args) => commands::explain::run(&args, &global, terminal).await,
        Verb::Top(args) => commands::top::run(&args, &global, terminal).await,
        Verb::Nodes(args) => commands::nodes::run(&args, &global, terminal).await,
        Verb::Pool(args) => commands::pool::run(&args, &global, terminal).await,
        Verb::Quota(args) => commands::quota::run(&args, &global, terminal).await,
        Verb::Secret(args) => commands::secret::run(&args, &global, terminal).await,
        Verb::Volume(args) => commands::volume::run(&args, &global, terminal).await,
        Verb::Events(args) => commands::events::run(&args, &global, terminal).await,
        Verb::Console(args) => commands::console::run(&args, &global, terminal).await,
        Verb::Version(args) => commands::version::run(&args, &global, terminal).await,
        Verb::Dev(_)
        | Verb::Server(_)
        | Verb::Cluster(_)
        | Verb::Agent(_)
        | Verb::Init(_)
        | Verb::Validate(_)
        | Verb::Completion(_)
        | Verb::Help(_) => {
            unreachable!("run() keeps the verbs that ask no server")
        }
    }
}

/// A client verb needs one thread.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::from(anyhow::Error::from(error)).doing("cannot start"))?.block_on(work)
}

fn block_on_role(work: impl Future<Output = anyhow::Result<()>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::from(anyhow::Error::from(error)).doing("cannot start"))?;
    Ok(runtime.block_on(work)?)
}
