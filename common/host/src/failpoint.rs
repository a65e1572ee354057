//! Places at which a test lets this process die, freeze or fail, exactly there.
//!
//! `OPTIMUS_FAILPOINTS="log.before_sync=kill@37;snapshot.before_rename=stop@2"`: at its 37th flush of the log the process
//! kills itself, at its second snapshot it stops itself before the rename. Only builds with debug assertions have them: in
//! a release these functions are empty and the variable is not read.
//!
//! | point | where |
//! |---|---|
//! | `log.before_sync`, `log.after_sync` | around the flush of any group of log operations |
//! | `vote.before_sync`, `vote.after_sync` | the same, for groups with a vote |
//! | `purge.before_sync`, `purge.after_sync` | the same, for groups that purge entries or delete purged ones |
//! | `snapshot.before_sync`, `snapshot.before_rename`, `snapshot.after_rename`, `snapshot.durable` | while a snapshot is saved |
//! | `compact.before_rename`, `compact.after_rename`, `compact.durable` | while the compacted log takes the place of the old one |
//! | `apply.before`, `apply.after` | around the application of committed entries |

use std::io;

/// The variable that arms failpoints.
pub const VARIABLE: &str = "OPTIMUS_FAILPOINTS";

/// Every point there is; arming another one ends the process, so that a test cannot wait for a misspelt one for ever.
pub const POINTS: [&str; 15] = [
    "log.before_sync",
    "log.after_sync",
    "vote.before_sync",
    "vote.after_sync",
    "purge.before_sync",
    "purge.after_sync",
    "snapshot.before_sync",
    "snapshot.before_rename",
    "snapshot.after_rename",
    "snapshot.durable",
    "compact.before_rename",
    "compact.after_rename",
    "compact.durable",
    "apply.before",
    "apply.after",
];

/// Passes a point: returns, unless it is armed with `kill` or `stop` and this is the time.
#[inline]
pub fn hit(point: &'static str) {
    let _ = fails(point); // `error` has no meaning where nothing can fail
}

/// Passes a point at which something may fail.
///
/// # Errors
/// When the point is armed with `error` and this is the time.
#[inline]
pub fn fails(point: &'static str) -> io::Result<()> {
    #[cfg(debug_assertions)]
    return armed::pass(point);
    #[cfg(not(debug_assertions))]
    {
        let _ = point;
        Ok(())
    }
}

#[cfg(debug_assertions)]
mod armed {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{POINTS, VARIABLE};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) enum Action {
        /// SIGKILL to this process.
        Kill,
        /// SIGSTOP to this process; it goes on when it is continued.
        Stop,
        /// An I/O error.
        Error,
    }

    #[derive(Debug)]
    pub(super) struct Armed {
        pub point: String,
        pub action: Action,
        /// The pass at which it acts, from 1.
        pub at: u64,
        passed: AtomicU64,
    }

    static ARMED: OnceLock<Vec<Armed>> = OnceLock::new();

    pub(super) fn pass(point: &str) -> io::Result<()> {
        let armed = ARMED.get_or_init(|| match std::env::var(VARIABLE).map_or(Ok(Vec::new()), |text| parse(&text)) {
            Ok(armed) => armed,
            Err(reason) => {
                eprintln!("{VARIABLE}: {reason}");
                std::process::exit(2);
            }
        });
        for armed in armed.iter().filter(|a| a.point == point) {
            if armed.passed.fetch_add(1, Ordering::Relaxed) + 1 == armed.at {
                armed.act()?;
            }
        }
        Ok(())
    }

    impl Armed {
        fn act(&self) -> io::Result<()> {
            let signal = match self.action {
                Action::Kill => libc::SIGKILL,
                Action::Stop => libc::SIGSTOP,
                Action::Error => return Err(io::Error::other(format!("failpoint {} at its pass {}", self.point, self.at))),
            };
            // To this thread, so that it goes no further. SAFETY: no memory is involved.
            unsafe { libc::raise(signal) };
            Ok(())
        }
    }

    /// `POINT=ACTION@PASS`, separated by semicolons.
    pub(super) fn parse(text: &str) -> Result<Vec<Armed>, String> {
        let one = |part: &str| {
            let (point, rest) = part.split_once('=').ok_or_else(|| format!("`{part}` is not POINT=ACTION@PASS"))?;
            let (action, at) = rest.split_once('@').ok_or_else(|| format!("`{part}` does not say at which pass"))?;
            if !POINTS.contains(&point) {
                return Err(format!("there is no failpoint `{point}`"));
            }
            let action = match action {
                "kill" => Action::Kill,
                "stop" => Action::Stop,
                "error" => Action::Error,
                other => return Err(format!("`{other}` is not kill, stop or error")),
            };
            let at = at.parse().ok().filter(|at| *at > 0).ok_or_else(|| format!("`{at}` is not a pass, counted from 1"))?;
            Ok(Armed { point: point.to_owned(), action, at, passed: AtomicU64::new(0) })
        };
        text.split(';').map(str::trim).filter(|part| !part.is_empty()).map(one).collect()
    }
}

#[cfg(all(test, debug_assertions))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::armed::{Action, parse};

    #[test]
    fn points_are_armed_by_name_action_and_pass() {
        let armed = parse("log.before_sync=kill@37; snapshot.before_rename=stop@2;").unwrap();
        let all: Vec<_> = armed.iter().map(|a| (a.point.as_str(), a.action, a.at)).collect();
        assert_eq!(all, [("log.before_sync", Action::Kill, 37), ("snapshot.before_rename", Action::Stop, 2)]);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_would_never_act_is_refused() {
        for bad in ["log.before_sink=kill@1", "log.before_sync", "log.before_sync=kill", "apply.before=kill@0", "apply.before=burn@1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unarmed_point_is_passed() {
        super::hit("apply.before");
        super::fails("log.before_sync").unwrap();
    }
}
