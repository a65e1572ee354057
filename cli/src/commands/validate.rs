//! `optimus validate`

use std::path::PathBuf;

use optimus_common::Name;
use optimus_common::spec::Driver;

use crate::error::Failure;
use crate::output::{Terminal, count};
use crate::project::Source;

pub const EXAMPLES: &str = "Examples:
  optimus validate                     every environment of ./optimus.toml
  optimus validate shop --env prod     one, of another directory
  optimus validate --json              what it means, every default filled in";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory with an optimus.toml, or a project file
    #[arg(value_name = "FILE|DIR", default_value = ".")]
    path: PathBuf,
    /// Check this environment only
    #[arg(long = "env", short = 'e', value_name = "ENV")]
    environment: Option<Name>,
}

pub fn run(args: &Args, terminal: &Terminal) -> Result<(), Failure> {
    let source = Source::read(&args.path)?;
    let first = source.parse(args.environment.as_ref(), None)?;
    let mut all = vec![first];
    if args.environment.is_none() {
        for environment in all[0].environments.clone() {
            if environment != all[0].spec.environment {
                all.push(source.parse(Some(&environment), None)?);
            }
        }
    }
    let mut warned: Vec<String> = Vec::new();
    for warning in all.iter().flat_map(|parsed| &parsed.warnings).map(ToString::to_string) {
        if !warned.contains(&warning) {
            terminal.note(&format!("{} {warning}", terminal.stderr_paint().busy("warning:")));
            warned.push(warning);
        }
    }
    if terminal.json {
        match all.as_slice() {
            [one] => terminal.json_document(&one.spec)?,
            several => {
                terminal.json_document(&serde_json::json!({ "items": several.iter().map(|parsed| &parsed.spec).collect::<Vec<_>>() }))?
            }
        }
        return Ok(());
    }
    let mut rows = Vec::new();
    for parsed in &all {
        for (workload, spec) in &parsed.spec.workloads {
            let resources = &spec.resources;
            rows.push(vec![
                format!("{}/{}/{workload}", parsed.spec.project, parsed.spec.environment),
                spec.copies.map_or_else(|| "as is".to_owned(), |copies| copies.to_string()),
                resources.cpu.to_string(),
                if resources.memory_request == resources.memory_limit {
                    resources.memory_limit.to_string()
                } else {
                    format!("{}..{}", resources.memory_request, resources.memory_limit)
                },
                match &spec.driver {
                    Driver::Process => spec.run.argv().join(" "),
                    Driver::Container(container) => container.image.clone(),
                },
            ]);
        }
    }
    let workloads = count(rows.len() as u64, "workload", "workloads");
    terminal.table(&["WORKLOAD", "COPIES", "CPU", "MEMORY", "RUNS"], rows)?;
    terminal.note(&format!("{} {} is valid: {workloads}", terminal.stderr_paint().good("ok:"), source.shown));
    Ok(())
}
