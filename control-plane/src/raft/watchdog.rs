//! Notices a Raft core that has died without saying so, or that hangs: nothing else would, and a server that neither
//! leads nor follows nor exits is worse than one that is gone.
//!
//! Once a second it asks the core a question any living core answers at once. A core that waits for the disk is not stuck:
//! openraft 0.9 waits for each flush, and a disk may take its time.

use std::future::Future;
use std::time::Duration;

use openraft::AsyncRuntime;
use tokio::sync::watch;

use super::fatal::Fatal;
use super::runtime::Runtime;

/// Pause between two questions; also the unit of the bounds below. A pause of the whole process counts as one.
const TICK: Duration = Duration::from_secs(1);
/// Ticks without an answer, and without the log store being at work, after which the core is stuck.
const SILENT: u32 = 5;
/// Ticks without an answer after which a disk that does not come back is taken for dead.
const SLOW: u32 = 60;
/// Ticks in which nothing that is committed gets applied. Far longer: restoring a large snapshot takes its time.
const UNAPPLIED: u32 = 300;

/// Watches until told to stop, or until it has raised the signal.
///
/// `ask` gives the committed index, `busy` says whether the core waits for the log store, `each` runs once a tick.
pub(crate) async fn watch<A, E>(
    ask: impl Fn() -> A,
    busy: impl Fn() -> bool,
    applied: watch::Receiver<u64>,
    each: impl Fn() -> E,
    mut stop: watch::Receiver<bool>,
    fatal: Fatal,
) where
    A: Future<Output = Result<u64, String>>,
    E: Future<Output = ()>,
{
    let (mut seen, mut unapplied) = (0, 0);
    while fatal.get().is_none() {
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => return,
            () = Runtime::sleep(TICK) => {}
        }
        each().await;
        let mut answer = std::pin::pin!(ask());
        let (mut silent, mut waited) = (0, 0);
        let committed = loop {
            tokio::select! {
                biased;
                _ = stop.wait_for(|s| *s) => return,
                committed = &mut answer => break committed,
                () = Runtime::sleep(TICK) => {}
            }
            waited += 1;
            silent = if busy() { 0 } else { silent + 1 };
            if silent == SILENT {
                return fatal.raise(format!("the raft core has not answered for {SILENT} s although it does not wait for the disk"));
            }
            if waited == SLOW {
                return fatal.raise(format!("the raft core has not answered for {SLOW} s: the disk does not finish a write or a flush"));
            }
        };
        let at = *applied.borrow();
        match committed {
            Err(reason) => return fatal.raise(format!("the raft core has ended: {reason}")),
            Ok(committed) if committed > at && at == seen => unapplied += 1,
            Ok(_) => unapplied = 0,
        }
        seen = at;
        if unapplied == UNAPPLIED {
            return fatal.raise(format!("the state machine has applied nothing for {UNAPPLIED} s and stands at log entry {at}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// What the core does in each of its first seconds, and for ever after the last one given.
    async fn after(core: impl Fn(u64) -> Option<Result<u64, String>>, busy: impl Fn(u64) -> bool, applied: u64) -> (u64, Option<String>) {
        let (fatal, began) = (Fatal::new(), tokio::time::Instant::now());
        let second = || began.elapsed().as_secs();
        let (_stop, stopping) = watch::channel(false);
        let (_applied, applied) = watch::channel(applied);
        let ticks = Cell::new(0u64);
        let ask = || async {
            loop {
                match core(second()) {
                    Some(answer) => return answer,
                    None => Runtime::sleep(Duration::from_millis(100)).await,
                }
            }
        };
        let each = || async { ticks.set(ticks.get() + 1) };
        let watching = watch(ask, || busy(second()), applied, each, stopping, fatal.clone());
        let _ = tokio::time::timeout(Duration::from_secs(1000), watching).await;
        assert!(ticks.get() > 0);
        (second(), fatal.get())
    }

    #[tokio::test(start_paused = true)]
    async fn a_living_core_and_a_slow_flush_are_left_alone() {
        assert_eq!(after(|_| Some(Ok(7)), |_| false, 7).await, (1000, None));
        // A flush of 30 seconds, then all is well.
        assert_eq!(after(|s| (!(10..40).contains(&s)).then_some(Ok(7)), |s| (10..40).contains(&s), 7).await, (1000, None));
        // Pauses of four seconds without a reason the watchdog knows.
        assert_eq!(after(|s| (s % 10 > 4).then_some(Ok(7)), |_| false, 7).await, (1000, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_core_a_dead_disk_a_dead_core_and_a_stuck_machine_end_the_server() {
        let (at, reason) = after(|s| (s < 10).then_some(Ok(7)), |_| false, 7).await;
        assert!((15..=16).contains(&at) && reason.as_ref().is_some_and(|r| r.contains("does not wait for the disk")), "{at} {reason:?}");
        let (at, reason) = after(|s| (s < 10).then_some(Ok(7)), |_| true, 7).await;
        assert!((70..=71).contains(&at) && reason.as_ref().is_some_and(|r| r.contains("flush")), "{at} {reason:?}");
        let (at, reason) = after(|s| Some(if s < 10 { Ok(7) } else { Err("panicked".to_owned()) }), |_| true, 7).await;
        assert!(at == 10 && reason.as_ref().is_some_and(|r| r.contains("panicked")), "{at} {reason:?}");
        let (at, reason) = after(|_| Some(Ok(8)), |_| false, 7).await;
        assert!((300..=302).contains(&at) && reason.as_ref().is_some_and(|r| r.contains("log entry 7")), "{at} {reason:?}");
    }
}
