//! Structured logs on stderr. stdout belongs to data.

use std::error::Error;
use std::fmt;

use tracing_subscriber::EnvFilter;

/// Environment variable with a filter such as `info,optimus_agent=debug`; it wins over the option.
pub const FILTER_VARIABLE: &str = "OPTIMUS_LOG";

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What to log and how.
#[derive(Debug, Clone)]
pub struct Options {
    pub format: Format,
    /// A level or filter, for example `info`.
    pub filter: String,
}

impl Default for Options {
    fn default() -> Self {
        Options { format: Format::Text, filter: "info".into() }
    }
}

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("invalid log filter `{filter}`")]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("failed to start logging")]
    Start(#[source] Box<dyn Error + Send + Sync>),
}

/// Starts logging for the whole process; once.
pub fn init(options: &Options) -> Result<(), TelemetryError> {
    let filter = std::env::var(FILTER_VARIABLE).ok().filter(|f| !f.is_empty()).unwrap_or_else(|| options.filter.clone());
    let env = EnvFilter::try_new(&filter).map_err(|source| TelemetryError::Filter { filter, source })?;
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt().with_env_filter(env).with_writer(std::io::stderr).with_ansi(colour).with_target(false);
    match options.format {
        Format::Text => builder.try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(TelemetryError::Start)
}

/// Shows an error with its causes: `failed to write X: permission denied`.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("failed to open the ledger")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("disk on fire"));
        assert_eq!(Chain(&error).to_string(), "failed to open the ledger: disk on fire");
    }
}
