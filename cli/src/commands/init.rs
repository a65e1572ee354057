//! `optimus init`

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use optimus_common::spec;

use crate::error::{Exit, Failure};
use crate::output::Terminal;
use crate::project::FILE_NAME;

pub const EXAMPLES: &str = "Examples:
  optimus init              write ./optimus.toml
  optimus init shop         write shop/optimus.toml";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory to write it to
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

pub fn run(args: &Args, terminal: &Terminal) -> Result<(), Failure> {
    let file = args.dir.join(FILE_NAME);
    let shown = file.strip_prefix("./").unwrap_or(&file).display();
    let fail = |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot write {shown}")).because(error.to_string());
    // Never overwrites: creating is the check.
    let mut open = fs::OpenOptions::new().write(true).create_new(true).open(&file).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(Exit::Conflict, format!("cannot write {shown}"))
            .because("it is there already, and is not overwritten")
            .hint("edit it, or move it away first"),
        _ => fail(error),
    })?;
    open.write_all(spec::template().as_bytes()).map_err(fail)?;
    if terminal.json {
        terminal.json_document(&serde_json::json!({ "file": file }))?;
    } else {
        terminal.line(&shown.to_string())?;
    }
    terminal.note("next: edit it, then `optimus validate` and `optimus deploy`");
    Ok(())
}
