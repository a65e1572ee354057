//! `optimus explain`

use optimus_common::api::v1::Explanation;
use optimus_common::reason::{CODES, Code};
use optimus_common::spec;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure, nearest, printable};
use crate::live::stage;
use crate::output::{Terminal, age, now};
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus explain web-0          why is this copy as it is
  optimus explain prod/web       why is this workload not ready
  optimus explain memory         what a field of optimus.toml means
  optimus explain OPT-2201       what an error code means and what to do";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A copy, a workload, a field of optimus.toml, or an error code
    #[arg(value_name = "COPY|WORKLOAD|FIELD|CODE")]
    what: String,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let what = args.what.trim();
    if what.to_ascii_uppercase().starts_with("OPT-") {
        return explain_code(what, &terminal);
    }
    // Fields are known without a server; a workload of the same name is reached by its full address.
    if let Some(text) = spec::explain_field(what) {
        if terminal.json {
            terminal.json_document(&serde_json::json!({ "field": what, "about": text }))?;
        } else {
            terminal.line(text.trim_end())?;
        }
        return Ok(());
    }
    let asked = explain_copy_or_workload(args, what, global, terminal).await;
    asked.map_err(|failure| {
        // The word may have been meant as a field.
        let fields = spec::field_names();
        let near = nearest(what, fields.iter().map(AsRef::as_ref)).filter(|_| !what.contains('/'));
        match (near, failure.exit) {
            (Some(near), Exit::NotFound | Exit::Usage) if failure.hint.as_ref().is_none_or(|hint| !hint.starts_with("did you mean")) => {
                failure.hint(format!("did you mean the field `{near}`? `optimus explain {near}`"))
            }
            (Some(near), Exit::Unreachable | Exit::Denied) => {
                failure.because(format!("`{what}` is no field or code either; the nearest field is `{near}`"))
            }
            _ => failure,
        }
    })
}

fn explain_code(what: &str, terminal: &Terminal) -> Result<(), Failure> {
    let Some(Code { code, title, about }) = CODES.iter().find(|known| known.code.eq_ignore_ascii_case(what)) else {
        let failure = Failure::new(Exit::NotFound, format!("there is no code `{}`", printable(what)));
        let upper = what.to_ascii_uppercase();
        return Err(match nearest(&upper, CODES.iter().map(|known| known.code)) {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => failure,
        });
    };
    if terminal.json {
        terminal.json_document(&serde_json::json!({ "code": code, "title": title, "about": about }))?;
    } else {
        terminal.line(&format!("{}\n\n{about}", terminal.stdout_paint().bold(&format!("{code}: {title}"))))?;
    }
    Ok(())
}

async fn explain_copy_or_workload(args: &Args, what: &str, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let found = target::resolve(&session.client, what, &session.scope, &session.defaults).await?;
    let workload = target::path(&found.key);
    let path = match &found.copy {
        Some(copy) => format!("{workload}/allocations/{copy}:explain"),
        None => format!("{workload}:explain"),
    };
    let explanation = session.client.get::<Explanation>(&path, &[], &format!("cannot explain {what}")).await?.value;
    if terminal.json {
        terminal.json_document(&explanation)?;
        return Ok(());
    }
    for line in render(&explanation, terminal) {
        terminal.line(&line)?;
    }
    Ok(())
}

fn render(explanation: &Explanation, terminal: Terminal) -> Vec<String> {
    let paint = terminal.stdout_paint();
    let Explanation { summary, allocation, workload, evidence, events, hint } = explanation;
    let now = now();
    let mut lines = vec![paint.bold(&printable(summary))];
    if let Some(copy) = allocation {
        let node = copy.node_name.as_deref().map(|node| format!(" on {node}")).unwrap_or_default();
        lines.push(format!("{} of {}, release {}: {}{node}, restarts {}", copy.name, copy.key, copy.release, stage(copy), copy.restarts));
        if !copy.unenforced.is_empty() {
            lines.push(format!("not enforced: {}", copy.unenforced.join(", ")));
        }
    } else {
        lines.push(format!("{}, release {}: {}/{} ready", workload.key, workload.release, workload.copies_ready, workload.copies_wanted));
    }
    let mut section = |title: &str, body: Vec<String>| {
        if !body.is_empty() {
            lines.push(String::new());
            lines.push(paint.bold(title));
            lines.extend(body.into_iter().map(|line| format!("  {line}")));
        }
    };
    section("Evidence", evidence.iter().map(|text| printable(text)).collect());
    section("Events", events.iter().map(|event| format!("{:>4} ago  {}", age(now.since(event.at)), printable(&event.message))).collect());
    let last_lines = allocation.as_ref().map(|copy| copy.last_lines.iter().map(|line| printable(line)).collect()).unwrap_or_default();
    section("Last lines", last_lines);
    section("What to do", hint.iter().map(|hint| printable(hint)).collect());
    let code = allocation.as_ref().map_or(&workload.reason, |copy| &copy.reason).as_ref();
    if let Some(reason) = code.filter(|reason| !reason.detail.is_calm()) {
        lines.push(String::new());
        lines.push(paint.dim(&format!("more: optimus explain {}", reason.code)));
    }
    lines
}
