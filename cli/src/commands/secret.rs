//! `optimus secret`

use std::io::Read;
use std::path::PathBuf;

use optimus_common::Name;
use optimus_common::api::v1::{Page, RemoveAnswer, Secret, SecretAnswer, SecretRequest};
use optimus_common::secret::{SECRET_MAX, SecretValue};
use zeroize::Zeroizing;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::hidden;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus secret                                        list secrets, who reads them, never a value
  optimus secret set DATABASE_URL                       asks for the value
  openssl rand -hex 32 | optimus secret set SESSION_KEY --env prod
  optimus secret set TLS_KEY --file key.pem --restart   what uses it is restarted, a few copies at a time
  optimus secret rm DATABASE_URL";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List secrets and who reads them
    #[command(before_help = "Examples:\n  optimus secret ls\n  optimus secret ls --project shop --env prod")]
    Ls {
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Show one secret: its versions and who reads them
    #[command(before_help = "Examples:\n  optimus secret show DATABASE_URL\n  optimus secret show shop/prod/DATABASE_URL")]
    Show {
        /// `NAME`, or `project/env/NAME`
        secret: String,
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Set a secret, from standard input, a file, or asked for; never from the command line, which others can see
    #[command(
        before_help = "Examples:\n  optimus secret set DATABASE_URL\n  pass show shop/db | optimus secret set DATABASE_URL --env prod\n  optimus secret set TLS_KEY --file key.pem --restart"
    )]
    Set {
        /// `NAME`, or `project/env/NAME`
        secret: String,
        /// Take the value from this file, as it is
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Restart what uses it, a few copies at a time; else it has the new version with its next deployment
        #[arg(long)]
        restart: bool,
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Remove a secret that no workload uses
    #[command(before_help = "Examples:\n  optimus secret rm DATABASE_URL")]
    Rm {
        /// `NAME`, or `project/env/NAME`
        secret: String,
        #[command(flatten)]
        scope: ScopeArgs,
    },
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let none = ScopeArgs::default();
    let scope = match &args.what {
        None => &none,
        Some(What::Ls { scope } | What::Show { scope, .. } | What::Set { scope, .. } | What::Rm { scope, .. }) => scope,
    };
    let session = Session::open(global, scope, terminal)?;
    match &args.what {
        None | Some(What::Ls { .. }) => list(&session).await,
        Some(What::Show { secret, .. }) => {
            let (name, path) = address(&session, secret)?;
            let secret = session.client.get::<Secret>(&path, &[], &format!("cannot read secret {name}")).await?.value;
            show(&session, &secret)
        }
        Some(What::Set { secret, file, restart, .. }) => {
            let (name, path) = address(&session, secret)?;
            let value = value(&name, file.as_ref(), &terminal)?;
            let request = SecretRequest { value, restart: *restart };
            let answer = session.client.put::<SecretAnswer>(&path, &request, &format!("cannot set secret {name}")).await?.value;
            said(&session, &answer)
        }
        Some(What::Rm { secret, .. }) => {
            let (name, path) = address(&session, secret)?;
            let answer = session.client.delete::<RemoveAnswer>(&path, &format!("cannot remove secret {name}")).await?.value;
            if terminal.json {
                terminal.json_document(&answer)?;
                return Ok(());
            }
            terminal.note(&format!("secret {name} is removed, with all its versions"));
            Ok(())
        }
    }
}

/// The secret a word means, for people and as a path.
fn address(session: &Session, word: &str) -> Result<(String, String), Failure> {
    let scope = session.scope.or(&session.defaults);
    let parts: Vec<&str> = word.split('/').collect();
    let found = match parts.as_slice() {
        [name] => scope.project.zip(scope.environment).map(|(project, environment)| (project, environment, *name)),
        [project, environment, name] => Name::new(*project).ok().zip(Name::new(*environment).ok()).map(|(p, e)| (p, e, *name)),
        _ => None,
    };
    let Some((project, environment, name)) = found else {
        return Err(Failure::usage(format!("`{}` could be in any environment", printable(word)))
            .hint("name project and environment: `shop/prod/NAME`, or --project and --env, or go to the project's directory"));
    };
    if let Some(why) = optimus_common::spec::bad_secret_name(name) {
        return Err(Failure::usage(why));
    }
    Ok((format!("{project}/{environment}/{name}"), format!("/v1/projects/{project}/envs/{environment}/secrets/{name}")))
}

/// From the file, the terminal or standard input; one line end of the latter is not part of it.
fn value(name: &str, file: Option<&PathBuf>, terminal: &Terminal) -> Result<SecretValue, Failure> {
    let bad = |why: String| Failure::usage(format!("cannot set secret {name}")).because(why);
    let text = match file {
        Some(path) => read(std::fs::File::open(path).map_err(|e| bad(format!("{}: {e}", path.display())))?),
        None if terminal.stdin_tty => return given(hidden::ask(&format!("Value of {name}: "), terminal)?).map_err(bad),
        None => read(std::io::stdin().lock()).map(|mut text| {
            let end = text.trim_end_matches(['\r', '\n']).len();
            if text[end..].matches('\n').count() == 1 {
                text.truncate(end);
            }
            text
        }),
    };
    given(text.map_err(bad)?).map_err(bad)
}

fn given(text: impl Into<Zeroizing<String>>) -> Result<SecretValue, String> {
    SecretValue::new(text).map_err(|e| e.to_string())
}

fn read(from: impl Read) -> Result<Zeroizing<String>, String> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_MAX + 3)); // never grows: no copy is left behind
    from.take(SECRET_MAX as u64 + 3).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let text = std::str::from_utf8(&bytes).map_err(|_| "it is not text; encode it, with base64 for example".to_owned())?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn said(session: &Session, answer: &SecretAnswer) -> Result<(), Failure> {
    let (terminal, secret) = (session.terminal, &answer.secret);
    if terminal.json {
        terminal.json_document(answer)?;
        return Ok(());
    }
    let name = format!("{}/{}/{}", secret.project, secret.environment, secret.name);
    if answer.changed {
        terminal.note(&format!("secret {name} has version {}", secret.version));
    } else {
        terminal.note(&format!("secret {name} has this value already, as version {}", secret.version));
    }
    let names = |list: Vec<String>| list.join(", ");
    if !answer.restarted.is_empty() {
        terminal.note(&format!("restarting {}", names(answer.restarted.iter().map(Name::to_string).collect())));
    }
    let behind = secret.readers.iter().filter(|r| r.version.is_some_and(|v| v < secret.version) && !answer.restarted.contains(&r.workload));
    let behind: Vec<String> = behind.map(|reader| reader.workload.to_string()).collect();
    if let Some(first) = behind.first() {
        terminal.note(&format!(
            "{} still has an older version\n  hint: optimus restart {}/{}/{first}",
            names(behind.clone()),
            secret.project,
            secret.environment
        ));
    }
    Ok(())
}

fn readers(secret: &Secret) -> String {
    let reader = |reader: &optimus_common::api::v1::SecretReader| match reader.version {
        Some(version) if version < secret.version => format!("{} (v{version})", reader.workload),
        Some(_) => reader.workload.to_string(),
        None => format!("{} (waits)", reader.workload),
    };
    if secret.readers.is_empty() { "nobody".to_owned() } else { secret.readers.iter().map(reader).collect::<Vec<_>>().join(", ") }
}

fn show(session: &Session, secret: &Secret) -> Result<(), Failure> {
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(secret)?;
        return Ok(());
    }
    let versions: Vec<String> = secret.versions.iter().map(|v| format!("{} of {}", v.version, v.created_at)).collect();
    for (key, value) in [
        ("secret", format!("{}/{}/{}", secret.project, secret.environment, secret.name)),
        ("version", secret.version.to_string()),
        ("read by", readers(secret)),
        ("kept", versions.join(", ")),
    ] {
        terminal.line(&format!("{key:<8} {value}"))?;
    }
    Ok(())
}

async fn list(session: &Session) -> Result<(), Failure> {
    let terminal = session.terminal;
    let page: Page<Secret> = session.client.list("/v1/secrets", &session.scope.query(), "cannot list secrets").await?;
    if terminal.json {
        terminal.json_document(&page)?;
        return Ok(());
    }
    if page.items.is_empty() {
        terminal.note("no secrets yet\n  hint: optimus secret set DATABASE_URL --project shop --env prod");
        return Ok(());
    }
    let rows = page.items.iter().map(|secret| {
        let name = format!("{}/{}/{}", secret.project, secret.environment, secret.name);
        vec![name, secret.version.to_string(), secret.created_at.to_string(), readers(secret)]
    });
    terminal.table(&["SECRET", "VERSION", "SET", "READ BY"], rows.collect())?;
    Ok(())
}
