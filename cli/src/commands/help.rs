//! `optimus help`

use clap::CommandFactory;

use crate::args::Cli;
use crate::error::{Failure, nearest};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus help deploy
  optimus help nodes join-token
  optimus help exit-codes          topics: exit-codes, environment, credentials";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A verb, or one of the topics exit-codes, environment, credentials
    #[arg(value_name = "VERB|TOPIC")]
    path: Vec<String>,
}

/// What is to be read that belongs to no verb.
const TOPICS: [(&str, &str); 3] = [("exit-codes", EXIT_CODES), ("environment", ENVIRONMENT), ("credentials", CREDENTIALS)];

const EXIT_CODES: &str = "\
Exit codes

  0    done
  1    failed
  2    the command line or the project file is not valid
  3    not found
  4    no credential, a wrong one, or one without the permission
  5    conflict: the state changed or does not allow it, a newer deploy took over, or a file is in the way
  6    the deployment failed or was rolled back
  7    waiting ended at --timeout; the work goes on
  8    the server cannot be reached, or there is no leader
  130  interrupted by Ctrl-C; a deployment goes on";

const ENVIRONMENT: &str = "\
Environment

  OPTIMUS_CONTEXT      name of the context to use
  OPTIMUS_URL          https://host:port of the API
  OPTIMUS_TOKEN        token for the API
  OPTIMUS_CA_FILE      file with the cluster's CA certificate
  OPTIMUS_JOIN_TOKEN   join token, for `optimus agent`
  XDG_CONFIG_HOME      contexts are in optimus/ below it [~/.config]
  XDG_DATA_HOME        state of `optimus dev` is in optimus/ below it [~/.local/share]
  NO_COLOR             no colour, if set and not empty
  CLICOLOR_FORCE       colour also in a pipe, if set and not 0

Flags come before the environment, the environment before files: --context NAME uses that context
and none of OPTIMUS_CONTEXT, OPTIMUS_URL, OPTIMUS_TOKEN, OPTIMUS_CA_FILE. --color comes before
NO_COLOR, which comes before CLICOLOR_FORCE. Proxies (HTTPS_PROXY) are not used.";

const CREDENTIALS: &str = "\
Credentials

`optimus server` and `optimus dev` write a context at their start: a file with the address of the
API, the cluster's CA certificate and a token, readable by you only.

  $XDG_CONFIG_HOME/optimus/contexts/NAME.json   {\"url\", \"ca_pem\", \"token\", \"project\"?, \"environment\"?}
  $XDG_CONFIG_HOME/optimus/current              name of the one in use

What counts, highest first:
  1. --context NAME
  2. OPTIMUS_URL, OPTIMUS_TOKEN and OPTIMUS_CA_FILE, each for its part
  3. the context named by OPTIMUS_CONTEXT, else by `current`, else the only one there is

For another machine, copy the file there (mode 0600) and set the url, or set the three variables.
The server is trusted only if the CA certificate vouches for it; a stored token is not sent to a
server of another CA.

Which workload a short name such as `web` means: among all workloads of that name, those of
--project and --env; if several remain, those of the optimus.toml in this folder; then those of the
context's project and environment. If several remain still, they are listed and nothing is done.";

pub fn run(args: &Args, terminal: &Terminal) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    if let [topic] = args.path.as_slice()
        && let Some((_, text)) = TOPICS.iter().find(|(name, _)| name == topic)
    {
        return Ok(terminal.line(text)?);
    }
    let mut found = &mut command;
    for word in &args.path {
        let known: Vec<String> = found.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        if !known.contains(word) {
            let failure = Failure::usage(format!("there is no verb or topic `{word}`"));
            let all = known.iter().map(String::as_str).chain(TOPICS.map(|(name, _)| name));
            return Err(match nearest(word, all) {
                Some(near) => failure.hint(format!("did you mean `optimus help {near}`?")),
                None => failure.hint("optimus help"),
            });
        }
        found = found.find_subcommand_mut(word).ok_or_else(|| Failure::usage(format!("there is no verb `{word}`")))?;
    }
    let help = found.render_help();
    let text = if terminal.stdout_paint().0 { help.ansi().to_string() } else { help.to_string() };
    Ok(terminal.line(text.trim_end())?)
}
