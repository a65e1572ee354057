//! What went wrong, for people: always four parts (what, why, fix, where to read more), and the exit code.
//!
//! Every verb ends in `Result<(), Failure>`; `main` prints it once, on stderr.

use std::fmt::Write as _;
use std::io;

use optimus_common::api::v1::Problem;
use optimus_common::reason::{Code, code};

use crate::output::{Paint, Terminal};

/// How the process ends; `optimus help exit-codes` documents each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    /// Anything without a number of its own.
    Failed = 1,
    /// The command line or the project file is not valid.
    Usage = 2,
    NotFound = 3,
    /// No credential, a wrong one, or one that does not carry the permission.
    Denied = 4,
    Conflict = 5,
    /// The deployment failed or was rolled back.
    DeploymentFailed = 6,
    /// Waiting ended at `--timeout`; the work goes on.
    TimedOut = 7,
    /// Nothing answers, or there is no leader.
    Unreachable = 8,
    /// Ctrl-C.
    Interrupted = 130,
}

/// Why a verb ended without success.
#[derive(Debug, Clone)]
pub struct Failure {
    pub exit: Exit,
    /// `OPT-1104`; unset where the fault is plain usage.
    pub code: Option<String>,
    /// What could not be done: `cannot scale shop/prod/web`.
    pub what: String,
    /// Causes, outermost first.
    pub why: Vec<String>,
    /// The command or the change that mends it.
    pub hint: Option<String>,
    pub request_id: Option<String>,
    /// Lines printed as they are below the causes: a caret under a faulty line, the last lines of a log.
    pub detail: Vec<String>,
}

impl Failure {
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Failure { exit, code: None, what: what.into(), why: Vec::new(), hint: None, request_id: None, detail: Vec::new() }
    }

    pub fn usage(what: impl Into<String>) -> Self {
        Failure::new(Exit::Usage, what)
    }

    /// Ends with `exit` and prints nothing: all has been said, or nobody listens.
    pub fn quiet(exit: Exit) -> Self {
        Failure::new(exit, "")
    }

    pub fn is_quiet(&self) -> bool {
        self.what.is_empty()
    }

    #[must_use]
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.why.push(why.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn with_code(mut self, code: &Code) -> Self {
        self.code = Some(code.code.to_owned());
        self
    }

    /// Says first what was being done: an API error alone does not know.
    #[must_use]
    pub fn doing(mut self, what: impl Into<String>) -> Self {
        let inner = std::mem::replace(&mut self.what, what.into());
        self.why.insert(0, inner);
        self
    }

    /// From the server's problem document.
    pub fn from_problem(problem: Problem, what: impl Into<String>) -> Self {
        let exit = match problem.status {
            401 | 403 => Exit::Denied,
            404 | 410 => Exit::NotFound,
            409 | 412 => Exit::Conflict,
            400 | 413 | 415 | 422 => Exit::Usage,
            503 => Exit::Unreachable,
            _ => Exit::Failed,
        };
        let mut failure = Failure::new(exit, what);
        failure.why.push(if problem.detail.is_empty() { problem.title } else { problem.detail });
        for fault in problem.errors {
            failure.why.push(if fault.pointer.is_empty() { fault.message } else { format!("{}: {}", fault.pointer, fault.message) });
        }
        let about = optimus_common::reason::CODES.iter().find(|known| known.code == problem.code).map(|known| known.about.to_owned());
        failure.hint = problem.hint.filter(|hint| !hint.is_empty()).or(about);
        failure.code = Some(problem.code).filter(|code| !code.is_empty());
        failure.request_id = Some(problem.request_id).filter(|id| !id.is_empty());
        failure
    }

    /// The text for stderr, with a final line break.
    pub fn render(&self, paint: Paint) -> String {
        let mut text = String::new();
        let head = match &self.code {
            Some(code) => format!("error[{code}]:"),
            None => "error:".to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {}", paint.error(&head), paint.bold(&printable(&self.what)));
        for why in &self.why {
            let _ = writeln!(text, "  {} {}", paint.dim("why:"), printable(why));
        }
        for line in &self.detail {
            let _ = writeln!(text, "  {line}");
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(text, "  {} {}", paint.good("hint:"), printable(hint));
        }
        match (&self.code, &self.request_id) {
            (Some(code), Some(id)) => {
                let _ = writeln!(text, "  {} optimus explain {code}  (request {})", paint.dim("more:"), printable(id));
            }
            (Some(code), None) => {
                let _ = writeln!(text, "  {} optimus explain {code}", paint.dim("more:"));
            }
            (None, Some(id)) => {
                let _ = writeln!(text, "  {} request {}", paint.dim("more:"), printable(id));
            }
            (None, None) => {}
        }
        text
    }

    pub fn print(&self, terminal: &Terminal) {
        if !self.is_quiet() {
            terminal.note_raw(&self.render(terminal.stderr_paint()));
        }
    }
}

/// Text from elsewhere with control characters made visible, so that it cannot steer a terminal.
pub fn printable(text: &str) -> String {
    if !text.chars().any(|c| c.is_control() && c != '\t' && c != '\n') {
        return text.to_owned();
    }
    text.chars().map(|c| if c.is_control() && c != '\t' && c != '\n' { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// The nearest of `known` to a mistyped word, if any is near enough.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let length = word.chars().count();
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        // A third of the letters may be wrong, but not all of them.
        .filter(|(distance, _)| *distance <= length.div_ceil(3) && *distance < length)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            // The reader went away (`optimus logs | head`): no error to anybody.
            return Failure::quiet(Exit::Ok);
        }
        Failure::new(Exit::Failed, "cannot write the output").because(error.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let mut chain = error.chain().map(ToString::to_string);
        let mut failure = Failure::new(Exit::Failed, chain.next().unwrap_or_default());
        failure.why = chain.collect();
        failure
    }
}

/// Nothing answered at `url`.
pub fn unreachable(url: &str, why: String) -> Failure {
    Failure::new(Exit::Unreachable, format!("cannot reach the server at {url}"))
        .because(why)
        .with_code(&code::UNREACHABLE)
        .hint("start one with `optimus dev` (one machine) or `optimus server`, or choose another with `--context NAME`")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn problem(status: u16) -> Problem {
        Problem {
            kind: String::new(),
            title: "not found".into(),
            status,
            detail: "no workload shop/prod/wbe".into(),
            code: "OPT-1104".into(),
            request_id: "r-1".into(),
            hint: None,
            errors: vec![],
            retryable: false,
        }
    }

    #[test]
    fn an_error_has_four_parts() {
        let text = Failure::from_problem(problem(404), "cannot scale shop/prod/wbe").hint("optimus status").render(Paint(false));
        assert_eq!(
            text,
            "error[OPT-1104]: cannot scale shop/prod/wbe\n  why: no workload shop/prod/wbe\n  hint: optimus status\n  more: optimus explain OPT-1104  (request r-1)\n"
        );
    }

    #[test]
    fn each_status_has_its_exit_code() {
        for (status, exit) in [
            (400, Exit::Usage),
            (401, Exit::Denied),
            (403, Exit::Denied),
            (404, Exit::NotFound),
            (409, Exit::Conflict),
            (412, Exit::Conflict),
            (422, Exit::Usage),
            (500, Exit::Failed),
            (503, Exit::Unreachable),
        ] {
            assert_eq!(Failure::from_problem(problem(status), "x").exit, exit, "{status}");
        }
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb"), "a\\u{1b}[2Jb");
    }

    #[test]
    fn typos_find_their_word() {
        assert_eq!(nearest("wbe", ["web", "worker"]), Some("web"));
        assert_eq!(nearest("zzz", ["web", "worker"]), None);
        assert_eq!(nearest("c", ["a", "b"]), None);
    }
}
