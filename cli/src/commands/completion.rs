//! `optimus completion`

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::error::Failure;

pub const EXAMPLES: &str = "Examples:
  source <(optimus completion bash)
  optimus completion zsh > \"${fpath[1]}/_optimus\"
  optimus completion fish > ~/.config/fish/completions/optimus.fish";

#[derive(Debug, clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    // Into memory first: the generator panics on a closed pipe.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "optimus", &mut text);
    std::io::stdout().lock().write_all(&text)?;
    Ok(())
}
