//! The disk's own limit: one small durable write at a time, as fast as it will.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// A page, the least a store writes.
const WRITE: usize = 4096;
/// Room made in advance.
const ROOM: usize = 256 << 20;

/// Prints fdatasyncs a second and their times. `how` says what the file is before: `append` nothing, so that it grows;
/// `fallocate` reserved; `written` full of zeros.
pub fn probe(dir: &str, seconds: f64, how: &str) -> anyhow::Result<()> {
    let path = Path::new(dir).join(format!("fdatasync-{}", std::process::id()));
    let file = File::options().create_new(true).write(true).open(&path).with_context(|| format!("failed to create {}", path.display()))?;
    std::fs::remove_file(&path)?; // gone whatever happens
    match how {
        "append" => {}
        // SAFETY: an open file of ours; the call touches no memory.
        "fallocate" => anyhow::ensure!(unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, ROOM as i64) } == 0, "no room"),
        "written" => {
            let zeros = vec![0; 1 << 20];
            for n in 0..ROOM / zeros.len() {
                file.write_all_at(&zeros, (n * zeros.len()) as u64)?;
            }
        }
        other => bail!("unknown way `{other}`"),
    }
    file.sync_all()?;
    let data = [7u8; WRITE];
    let (start, mut took) = (Instant::now(), Vec::new());
    while start.elapsed() < Duration::from_secs_f64(seconds) {
        let before = Instant::now();
        let at = took.len() * WRITE % if how == "append" { usize::MAX } else { ROOM };
        file.write_all_at(&data, at as u64)?;
        file.sync_data()?;
        took.push(before.elapsed().as_micros() as u32);
    }
    let per_second = took.len() as f64 / start.elapsed().as_secs_f64();
    took.sort_unstable();
    let quantile = |q: f64| took[((took.len() as f64 * q) as usize).min(took.len() - 1)];
    println!("{}", serde_json::json!({ "how": how, "per_second": per_second, "p50_us": quantile(0.5), "p99_us": quantile(0.99) }));
    Ok(())
}
