//! Sending a snapshot: the bytes of its file in parts, one at a time, no faster than the pace.
//!
//! ```text
//! head of the file (offset 0) --> receiver says which byte it wants --> parts of 1 MiB --> ... --> done
//! ```
//! The receiver's answers steer: after an interruption it wants more than 0 at once, after a restart 0 again. So a lost,
//! doubled or late part costs a part, and nothing is kept here between two transfers.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use openraft::AsyncRuntime;
use openraft::storage::Snapshot;

use super::super::error::{StoreError, chain};
use super::super::runtime::Runtime;
use super::super::types::{Types, Vote};
use super::client::{PeerClient, RETRY};
use super::wire::{Reply, Request, SnapshotKey, SnapshotPart};
use super::{PeerError, PeerRpc};

/// Most bytes of a snapshot in one request.
pub(crate) const PART: usize = 1 << 20;
/// Longest wait for the answer to a part that does not end the snapshot.
const PART_TTL: Duration = Duration::from_secs(10);
/// Failed requests in a row before openraft is told, which then starts anew with its newest snapshot.
const TRIES: usize = 5;

type Moment = <Runtime as AsyncRuntime>::Instant;

/// Spreads bytes over time, so that snapshots leave room for everything else on the disk and the wire.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    /// When the bytes allowed so far have left.
    free: Mutex<Option<Moment>>,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free: Mutex::new(None) }
    }

    /// Waits for the turn of the next `bytes`.
    pub(crate) async fn turn(&self, bytes: usize) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let turn = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = free.map_or_else(Moment::now, |f| f.max(Moment::now()));
            *free = Some(turn + cost);
            turn
        };
        Runtime::sleep_until(turn).await;
    }
}

impl PeerClient {
    /// Sends a snapshot until the peer has installed it. Gives the peer's vote; one above `vote` means that this server
    /// leads no more.
    pub(super) async fn send_snapshot(&self, vote: Vote, snapshot: Snapshot<Types>) -> Result<Vote, PeerError> {
        let Some(held) = snapshot.snapshot.0 else {
            return Err(PeerError::Refused("the snapshot to send has no file".to_owned()));
        };
        // Decay of our own file must not look like a fault of the peer, which could only refuse it again and again.
        let file = held.clone();
        self.io.run(move || file.verify()).await.map_err(|e| self.failed(&e))?;
        let head = held.head();
        let key = SnapshotKey { id: head.id.clone(), last: head.last.map(Into::into), hash: head.hash, total: held.total() };

        let (mut at, mut failures, mut moved) = (0, 0, Moment::now());
        loop {
            // The first part is the head alone: its answer may be that most of the file is there already.
            let most = if at == 0 { held.start().min(PART as u64) as usize } else { PART };
            let file = held.clone();
            let bytes = self.io.run(move || file.read(at, most)).await.map_err(|e| self.failed(&e))?;
            self.pace.turn(bytes.len()).await;
            let ends = at + bytes.len() as u64 == key.total;
            let ttl = if ends { self.snapshot_ttl } else { self.snapshot_ttl.min(PART_TTL) };
            let body = Request::encode_snapshot(self.peer.id, vote, &SnapshotPart { key: key.clone(), offset: at, bytes });
            let answer = self.call(PeerRpc::Snapshot, body, ttl).await.and_then(|b| Reply::decode_snapshot(&b));
            match answer {
                Ok(said) if said.done || said.vote > vote => return Ok(said.vote),
                Ok(said) if said.wants > key.total => {
                    return Err(PeerError::Refused(format!("peer wants byte {} of a snapshot of {}", said.wants, key.total)));
                }
                Ok(said) => {
                    failures = 0;
                    if said.wants > at {
                        moved = Moment::now();
                    } else {
                        // It has begun anew, or has all and is installing it.
                        Runtime::sleep(RETRY).await;
                    }
                    at = said.wants;
                }
                Err(e) => {
                    failures += 1;
                    if failures == TRIES {
                        return Err(e);
                    }
                    Runtime::sleep(RETRY).await;
                }
            }
            if Moment::now() - moved > self.snapshot_ttl {
                return Err(PeerError::Timeout);
            }
        }
    }

    fn failed(&self, e: &StoreError) -> PeerError {
        let reason = chain(e);
        if !matches!(e, StoreError::Stopped(_)) {
            self.fatal.raise(reason.clone());
        }
        PeerError::Stopped(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pace_is_kept_and_an_idle_time_is_not_made_up_for() {
        let pace = Pace::new(1000);
        let started = Moment::now();
        for _ in 0..11 {
            pace.turn(100).await;
        }
        assert_eq!((Moment::now() - started).as_millis(), 1000, "the first one leaves at once");
        Runtime::sleep(Duration::from_secs(60)).await;
        let started = Moment::now();
        for _ in 0..11 {
            pace.turn(100).await;
        }
        assert_eq!((Moment::now() - started).as_millis(), 1000);
    }
}
