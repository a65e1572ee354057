//! What a mock copy does, as its spec says: for tests, demos and simulated agents.
//!
//! The script is the variable `MOCK` of the spec's environment, words in any order:
//!
//! | word | meaning |
//! |---|---|
//! | `start=200ms` | takes so long to start |
//! | `ready=1s`, `ready=never` | becomes ready so long after it runs (simulated agents only; a real one asks the check) |
//! | `crash=5s` | ends so long after each start |
//! | `code=3` | with this exit code; 1 unless said |
//! | `crashes=2` | only the first so many times; then it stays up |
//! | `fail` | cannot be started on any node |
//! | `stop=500ms`, `stop=never` | ends so long after it is told to; `never`: only when killed |
//!
//! An empty script is a copy that is up at once and ends at once when told to.

use std::time::Duration;

use optimus_common::Span;
use optimus_common::spec::WorkloadSpec;

/// The variable that holds it.
pub const VARIABLE: &str = "MOCK";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    pub start: Duration,
    /// Unset: never.
    pub ready: Option<Duration>,
    pub crash: Option<Duration>,
    pub code: i32,
    /// Unset: every time.
    pub crashes: Option<u32>,
    pub fail: bool,
    /// Unset: only when killed.
    pub stop: Option<Duration>,
}

impl Default for Script {
    fn default() -> Self {
        Script {
            start: Duration::ZERO,
            ready: Some(Duration::ZERO),
            crash: None,
            code: 1,
            crashes: None,
            fail: false,
            stop: Some(Duration::ZERO),
        }
    }
}

/// A script that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is no word of a mock's script")]
pub struct ScriptError {
    pub word: String,
}

impl Script {
    pub fn parse(text: &str) -> Result<Self, ScriptError> {
        let mut script = Script::default();
        for word in text.split_whitespace() {
            let wrong = || ScriptError { word: word.to_owned() };
            let span = |value: &str| value.parse::<Span>().map(Span::as_duration).map_err(|_| wrong());
            let or_never = |value: &str| if value == "never" { Ok(None) } else { span(value).map(Some) };
            match word.split_once('=') {
                Some(("start", value)) => script.start = span(value)?,
                Some(("ready", value)) => script.ready = or_never(value)?,
                Some(("crash", value)) => script.crash = Some(span(value)?),
                Some(("code", value)) => script.code = value.parse().map_err(|_| wrong())?,
                Some(("crashes", value)) => script.crashes = Some(value.parse().map_err(|_| wrong())?),
                Some(("stop", value)) => script.stop = or_never(value)?,
                None if word == "fail" => script.fail = true,
                _ => return Err(wrong()),
            }
        }
        Ok(script)
    }

    /// The script of a spec; without one, that of a copy that behaves.
    pub fn of(spec: &WorkloadSpec) -> Result<Self, ScriptError> {
        spec.env.get(VARIABLE).map_or_else(|| Ok(Script::default()), |text| Script::parse(text))
    }

    /// How long the run of an attempt (the first is 0) lasts by itself. Unset: until it is stopped.
    pub fn lasts(&self, attempt: u32) -> Option<Duration> {
        self.crash.filter(|_| self.crashes.is_none_or(|times| attempt < times))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_understood_and_no_other() {
        let script = Script::parse("start=200ms ready=never crash=5s code=3 crashes=2 fail stop=never").unwrap();
        let expected = Script {
            start: Duration::from_millis(200),
            ready: None,
            crash: Some(Duration::from_secs(5)),
            code: 3,
            crashes: Some(2),
            fail: true,
            stop: None,
        };
        assert_eq!(script, expected);
        assert_eq!([script.lasts(1), script.lasts(2)], [Some(Duration::from_secs(5)), None]);
        assert_eq!(Script::parse("  ").unwrap(), Script::default());
        for bad in ["start", "start=soon", "fail=1", "code=x", "crash=never"] {
            assert_eq!(Script::parse(bad).unwrap_err().word, bad);
        }
    }
}
