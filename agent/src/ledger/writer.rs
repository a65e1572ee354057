//! The one thread that writes the ledger. What gathers while it commits goes into the next commit together.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use optimus_common::AllocId;
use optimus_common::protocol::DesiredAlloc;
use redb::Database;
use tokio::sync::oneshot;

use super::{AllocRecord, DESIRED, GENERATION, KIND_DESIRED, KIND_RECORD, LedgerError, META, RECORD, Sealer, chain, store};

/// What waits to be written. Bounded by the number of allocations: a later value replaces an earlier one.
#[derive(Default)]
struct Queue {
    generation: Option<u64>,
    desired: BTreeMap<AllocId, Option<DesiredAlloc>>,
    records: BTreeMap<AllocId, Option<AllocRecord>>,
    waiting: Vec<oneshot::Sender<bool>>,
    stop: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Hands changes to the writing thread; joins it when dropped, after everything is written.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(database: Database, sealer: Sealer) -> Self {
        let shared = Arc::new(Shared { queue: Mutex::new(Queue::default()), wake: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("ledger".into()).spawn(move || run(&theirs, &database, &sealer));
        let thread = thread.map_err(|error| tracing::error!(%error, "failed to start the ledger's thread: nothing is remembered")).ok();
        Writer { shared, thread }
    }

    /// Writes a change of the desired set; true once it is durable, false if the disk refused it.
    pub async fn accept(&self, generation: u64, put: Vec<DesiredAlloc>, remove: Vec<AllocId>) -> bool {
        let (done, written) = oneshot::channel();
        {
            let mut queue = self.shared.lock();
            queue.generation = Some(generation);
            queue.desired.extend(put.into_iter().map(|a| (a.id, Some(a))));
            queue.desired.extend(remove.into_iter().map(|id| (id, None)));
            queue.waiting.push(done);
        }
        self.shared.wake.notify_one();
        self.thread.is_some() && written.await.unwrap_or(false)
    }

    /// Notes how far an allocation got (unset: forget it). Written soon, not waited for: the run directories hold what matters.
    pub fn record(&self, alloc: AllocId, record: Option<AllocRecord>) {
        self.shared.lock().records.insert(alloc, record);
        self.shared.wake.notify_one();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it has logged what went wrong
        }
    }
}

fn run(shared: &Shared, database: &Database, sealer: &Sealer) {
    loop {
        let batch = {
            let mut queue = shared.lock();
            loop {
                if !queue.desired.is_empty() || !queue.records.is_empty() || !queue.waiting.is_empty() {
                    break;
                }
                if queue.stop {
                    return;
                }
                queue = shared.wake.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            let stop = queue.stop;
            std::mem::replace(&mut *queue, Queue { stop, ..Queue::default() })
        };
        let written = commit(database, sealer, &batch);
        if let Err(error) = &written {
            tracing::error!(error = %chain(error), "failed to write the ledger: a restart of the agent may know an older set");
        }
        for done in batch.waiting {
            let _ = done.send(written.is_ok()); // nobody waits any more
        }
    }
}

fn commit(database: &Database, sealer: &Sealer, batch: &Queue) -> Result<(), LedgerError> {
    let writing = store("write");
    let write = database.begin_write().map_err(|e| writing(e.into()))?;
    {
        let mut table = write.open_table(DESIRED).map_err(|e| writing(e.into()))?;
        for (id, alloc) in &batch.desired {
            match alloc {
                Some(alloc) => table.insert(id.0.into_bytes(), sealer.seal(KIND_DESIRED, *id, alloc).as_slice()).map(drop),
                None => table.remove(id.0.into_bytes()).map(drop),
            }
            .map_err(|e| writing(e.into()))?;
        }
        let mut table = write.open_table(RECORD).map_err(|e| writing(e.into()))?;
        for (id, record) in &batch.records {
            match record {
                Some(record) => table.insert(id.0.into_bytes(), sealer.seal(KIND_RECORD, *id, record).as_slice()).map(drop),
                None => table.remove(id.0.into_bytes()).map(drop),
            }
            .map_err(|e| writing(e.into()))?;
        }
        if let Some(generation) = batch.generation {
            let mut meta = write.open_table(META).map_err(|e| writing(e.into()))?;
            meta.insert(GENERATION, generation).map_err(|e| writing(e.into()))?;
        }
    }
    write.commit().map_err(|e| writing(e.into()))
}
