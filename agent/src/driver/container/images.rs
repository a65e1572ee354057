//! Images: fetched once for all copies that want them, and deleted again when the disk fills.
//!
//! What we fetched stands in a ledger of ours (`images.json`). Only what stands there is ever deleted, and only as long
//! as it is still what we fetched; an image somebody else brought, tagged or uses stays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::query_parameters::{CreateImageOptionsBuilder, RemoveImageOptions};
use futures_util::StreamExt;
use optimus_common::env::Env;
use optimus_common::spec::{Container, Pull};
use optimus_common::time::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::engine::{CALL_MAX, Engine, EngineError, short};
use super::{login, record};
use crate::driver::StartError;

const LEDGER_FILE: &str = "images.json";
/// Most images fetched at a time.
const PULLS_MAX: usize = 3;
/// Most images the ledger holds; the least recently used is forgotten, and then kept for ever.
const IMAGES_MAX: usize = 2000;
/// How often a long fetch is told of.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// A later use is noted at most this often.
const NOTE_USE_EVERY_MS: u64 = 60_000;

/// When images are deleted.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    /// Share of the engine's disk in use, in percent, from which on images go.
    pub high: u8,
    /// And down to which.
    pub low: u8,
    /// One used since is kept: its copy may be about to start.
    pub unused_for: Duration,
}

impl Default for Marks {
    fn default() -> Self {
        Marks { high: 85, low: 75, unused_for: Duration::from_secs(600) }
    }
}

/// An image we fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fetched {
    reference: String,
    id: String,
    fetched_at: Timestamp,
    used_at: Timestamp,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Ledger {
    images: Vec<Fetched>,
}

/// The images of this node's engine, as far as they are ours.
pub struct Images {
    engine: Arc<Engine>,
    /// Holds the ledger.
    dir: PathBuf,
    logins: PathBuf,
    env: Env,
    ledger: Mutex<Ledger>,
    pulls: Semaphore,
    /// One fetch of an image at a time; the copies that wait for it then find it.
    one_each: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Images {
    /// Reads the ledger; one that cannot be read means that nothing is ours. Blocking.
    pub fn open(engine: Arc<Engine>, data_dir: &Path, env: Env) -> Self {
        let ledger = match record::read(data_dir, LEDGER_FILE) {
            Ok(ledger) => ledger.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "the list of fetched images cannot be read: none of them will be deleted");
                Ledger::default()
            }
        };
        Images {
            engine,
            dir: data_dir.to_owned(),
            logins: data_dir.join("registry-auth"),
            env,
            ledger: Mutex::new(ledger),
            pulls: Semaphore::new(PULLS_MAX),
            one_each: Mutex::default(),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the engine has the image as the policy says.
    pub async fn ensure(&self, container: &Container) -> Result<(), StartError> {
        let image = &container.image;
        let lock = {
            let mut all = self.one_each.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, lock| Arc::strong_count(lock) > 1); // nobody waits for the others
            Arc::clone(all.entry(image.clone()).or_default())
        };
        let _one = lock.lock().await;
        let before = self.id_of(image).await.map_err(|e| StartError::step(&format!("look for the image {image}"), e))?;
        match (container.pull, &before) {
            (Pull::Missing | Pull::Never, Some(id)) => {
                self.note_use(image, id);
                Ok(())
            }
            (Pull::Never, None) => {
                let why = "the node does not have it, and `container.pull` is \"never\"";
                Err(StartError::step(&format!("find the image {image}"), why))
            }
            (Pull::Always, _) | (Pull::Missing, None) => {
                let step = format!("fetch the image {image}");
                self.fetch(container).await.map_err(|why| StartError::step(&step, why))?;
                let id = self.id_of(image).await.map_err(|e| StartError::step(&step, e))?;
                let id = id.ok_or_else(|| StartError::step(&step, "the engine does not have it after fetching it"))?;
                self.note_fetched(image, before.as_deref(), id);
                Ok(())
            }
        }
    }

    async fn id_of(&self, image: &str) -> Result<Option<String>, EngineError> {
        let image = image.to_owned();
        match self.engine.call(CALL_MAX, |docker| async move { docker.inspect_image(&image).await }).await {
            Ok(found) => Ok(found.id),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn fetch(&self, container: &Container) -> Result<(), String> {
        let Container { image, auth, pull_timeout, .. } = container;
        let credentials = match auth {
            Some(name) => {
                let (dir, name, image) = (self.logins.clone(), name.clone(), image.clone());
                let read = tokio::task::spawn_blocking(move || login::read(&dir, &name, &image)).await;
                Some(read.map_err(|e| e.to_string())??)
            }
            None => None,
        };
        let (repository, tag) = login::repository_and_tag(image);
        let options = CreateImageOptionsBuilder::default().from_image(repository).tag(tag).build();
        let up = self.engine.up().map_err(|e| e.to_string())?;
        let longest = pull_timeout.as_duration();
        let progress = Mutex::new(String::from("nothing yet"));
        let work = async {
            let _one_of_few = self.pulls.acquire().await;
            tracing::info!(image, "fetching an image");
            let mut steps = std::pin::pin!(up.docker.create_image(Some(options), None, credentials));
            let mut layers: BTreeMap<String, (i64, i64)> = BTreeMap::new();
            let mut told = self.env.clock.monotonic();
            while let Some(step) = steps.next().await {
                let step = step.map_err(|error| self.engine.judge(error).to_string())?;
                if let (Some(id), Some(detail)) = (step.id, step.progress_detail)
                    && let (Some(current), Some(total)) = (detail.current, detail.total)
                    && step.status.as_deref() == Some("Downloading")
                    && layers.len() < 1000
                {
                    layers.insert(id, (current, total));
                }
                let (got, of) = layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
                let now = format!("{} of {} MB in {} layers", got >> 20, of >> 20, layers.len());
                if self.env.clock.monotonic().saturating_sub(told) >= TELL_EVERY {
                    told = self.env.clock.monotonic();
                    tracing::info!(image, progress = now, "still fetching an image");
                }
                *progress.lock().unwrap_or_else(PoisonError::into_inner) = now;
            }
            Ok(())
        };
        // Dropping the request makes the engine give up the fetch.
        match self.engine.within(longest, work).await {
            Some(done) => done,
            None => {
                let so_far = progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Err(format!("not done within {pull_timeout} (`container.pull_timeout`); {so_far}"))
            }
        }
    }

    fn note_use(&self, reference: &str, id: &str) {
        let now = self.env.clock.now();
        let mut ledger = self.ledger();
        let found = ledger.images.iter_mut().find(|i| i.reference == reference && i.id == id);
        let Some(image) = found.filter(|i| now.0.saturating_sub(i.used_at.0) >= NOTE_USE_EVERY_MS) else { return };
        image.used_at = now;
        self.save(&ledger);
    }

    /// Ours unless the engine had something under this name that is not.
    fn note_fetched(&self, reference: &str, before: Option<&str>, id: String) {
        let now = self.env.clock.now();
        let mut ledger = self.ledger();
        let is_ours = |known: &str| ledger.images.iter().any(|i| i.reference == reference && i.id == known);
        if before.is_some_and(|before| !is_ours(before)) {
            return;
        }
        ledger.images.retain(|i| i.reference != reference || i.id != id);
        ledger.images.push(Fetched { reference: reference.to_owned(), id, fetched_at: now, used_at: now });
        if ledger.images.len() > IMAGES_MAX {
            ledger.images.sort_by_key(|i| i.used_at);
            ledger.images.remove(0);
        }
        self.save(&ledger);
    }

    /// Under the lock, so that what is newer is written last. Small; a failure costs an image that is kept for ever.
    fn save(&self, ledger: &Ledger) {
        if let Err(error) = record::write(&self.dir, LEDGER_FILE, ledger) {
            tracing::warn!(%error, "failed to write the list of fetched images");
        }
    }

    /// Deletes images of ours, the least recently used first, if the engine's disk is fuller than the high mark, until
    /// it is below the low one. How many are gone.
    pub async fn collect(&self, marks: Marks) -> usize {
        let Ok(up) = self.engine.up() else { return 0 };
        let root = up.facts.root_dir.clone();
        if used_percent(&root).is_none_or(|used| used < marks.high) {
            return 0;
        }
        let mut images = self.ledger().images.clone();
        images.sort_by_key(|i| i.used_at);
        let now = self.env.clock.now();
        let mut gone = 0;
        for image in images {
            if used_percent(&root).is_none_or(|used| used < marks.low) {
                break;
            }
            if u128::from(now.0.saturating_sub(image.used_at.0)) < marks.unused_for.as_millis() {
                continue;
            }
            match self.delete(&image).await {
                Ok(deleted) => {
                    gone += usize::from(deleted);
                    let mut ledger = self.ledger();
                    ledger.images.retain(|i| *i != image);
                    self.save(&ledger);
                }
                Err(EngineError::Refused { status: 409, .. }) => {} // a container uses it
                Err(error) => {
                    tracing::warn!(image = image.reference, %error, "failed to delete an image");
                    if error.is_absence() {
                        break;
                    }
                }
            }
        }
        gone
    }

    /// False: it is not ours any more.
    async fn delete(&self, image: &Fetched) -> Result<bool, EngineError> {
        let by_name = self.id_of(&image.reference).await?;
        let name = if by_name.as_deref() == Some(&image.id) {
            image.reference.clone()
        } else {
            // The name is another image's by now. This one is deleted only if nobody gave it a name.
            let id = image.id.clone();
            match self.engine.call(CALL_MAX, |docker| async move { docker.inspect_image(&id).await }).await {
                Ok(found) if found.repo_tags.as_ref().is_none_or(Vec::is_empty) => image.id.clone(),
                Ok(_) => return Ok(false),
                Err(error) if error.is_not_found() => return Ok(false),
                Err(error) => return Err(error),
            }
        };
        let deleted =
            self.engine.call(4 * CALL_MAX, |docker| async move { docker.remove_image(&name, None::<RemoveImageOptions>, None).await });
        match deleted.await {
            Ok(_) => {
                tracing::info!(image = image.reference, id = short(&image.id), "deleted an image: the disk is short");
                Ok(true)
            }
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn used_percent(dir: &Path) -> Option<u8> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    let used = stat.f_blocks.checked_sub(stat.f_bavail)?;
    u8::try_from(used.saturating_mul(100) / stat.f_blocks.max(1)).ok()
}
