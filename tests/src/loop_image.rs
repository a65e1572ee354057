//! A file system in a file, behind a loop device: a disk whose power can be cut.
//!
//! What a program wrote and synced has reached the file behind the device; what it only wrote is in the page cache of the
//! file system above. So a copy of that file, taken at one moment, is what a disk holds after the power went at that
//! moment, and mounting the copy replays the journal as a boot would.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// Directories of images begin so, then the id of the process they belong to.
const PREFIX: &str = "optimus-loop-";
/// Bytes of an image; sparse, so that only what is written takes room.
const SIZE: u64 = 256 << 20;
/// Copies of an image that may be disturbed by a write of the kernel before this is given up.
const COPY_ATTEMPTS: usize = 20;
/// Attempts to get a free loop device; another process may take the one that was found.
const ATTACH_ATTEMPTS: usize = 10;

/// Runs a program to its end.
///
/// # Errors
/// What it said, with its arguments, when it did not leave with 0.
pub fn run(program: &str, args: &[&str]) -> io::Result<Output> {
    let output = Command::new(program).args(args).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{program} {}: {}: {}", args.join(" "), output.status, said.trim())));
    }
    Ok(output)
}

/// A mounted image, in a directory of its own; unmounted, detached and removed with this value.
#[derive(Debug)]
pub struct LoopImage {
    dir: PathBuf,
    device: Option<String>,
    mounted: bool,
}

impl LoopImage {
    /// A new, empty file system.
    ///
    /// # Errors
    /// What the tools said; they need root and loop devices.
    pub fn new() -> io::Result<Self> {
        let image = Self::prepare()?;
        let file = fs::File::create(image.file())?;
        file.set_len(SIZE)?;
        run("mkfs.ext4", &["-q", "-F", &image.file().display().to_string()])?;
        image.mount()
    }

    fn prepare() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{n}", std::process::id()));
        fs::create_dir(&dir)?;
        fs::create_dir(dir.join("mount"))?;
        Ok(Self { dir, device: None, mounted: false })
    }

    fn file(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// Where the file system is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.join("mount")
    }

    fn mount(mut self) -> io::Result<Self> {
        let file = self.file().display().to_string();
        let mut attempt = 0;
        let device = loop {
            attempt += 1;
            match run("losetup", &["--find", "--show", &file]) {
                Ok(output) => break String::from_utf8_lossy(&output.stdout).trim().to_owned(),
                Err(e) if attempt >= ATTACH_ATTEMPTS => return Err(e),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(50)),
            }
        };
        self.device = Some(device.clone());
        // The journal's own clock would only write what nobody asked to be durable: make the cut as hard as it can be.
        run("mount", &["-t", "ext4", "-o", "commit=600", &device, &self.path().display().to_string()])?;
        self.mounted = true;
        Ok(self)
    }

    /// What the disk holds now, as a new mounted image. Nobody may be writing to this one.
    ///
    /// # Errors
    /// What the tools said, or that the kernel did not stop writing.
    pub fn cut(&self) -> io::Result<LoopImage> {
        for _ in 0..COPY_ATTEMPTS {
            let before = self.writes()?;
            let copy = Self::prepare()?;
            run("cp", &["--sparse=always", &self.file().display().to_string(), &copy.file().display().to_string()])?;
            // A copy during which something was written is of no single moment: no power cut looks like it.
            if before.in_flight == 0 && self.writes()? == before {
                return copy.mount();
            }
        }
        Err(io::Error::other(format!("{} never was at rest", self.dir.display())))
    }

    fn writes(&self) -> io::Result<Writes> {
        let device = self.device.as_deref().and_then(|d| d.strip_prefix("/dev/")).unwrap_or_default();
        let text = fs::read_to_string(format!("/sys/block/{device}/stat"))?;
        let field = |n: usize| text.split_whitespace().nth(n).and_then(|f| f.parse().ok());
        match (field(4), field(6), field(8)) {
            (Some(requests), Some(sectors), Some(in_flight)) => Ok(Writes { requests, sectors, in_flight }),
            _ => Err(io::Error::other(format!("/sys/block/{device}/stat is not understood: {text}"))),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Writes {
    requests: u64,
    sectors: u64,
    in_flight: u64,
}

impl Drop for LoopImage {
    fn drop(&mut self) {
        if self.mounted {
            unmount(&self.path());
        }
        if let Some(device) = &self.device {
            detach(device);
        }
        if let Err(e) = fs::remove_dir_all(&self.dir) {
            eprintln!("failed to remove {}: {e}", self.dir.display());
        }
    }
}

fn unmount(path: &Path) {
    let path = path.display().to_string();
    // Lazily if it must be: a process that was killed a moment ago may still hold it.
    if run("umount", &[&path]).is_err()
        && let Err(e) = run("umount", &["--lazy", &path])
    {
        eprintln!("{e}");
    }
}

fn detach(device: &str) {
    if let Err(e) = run("losetup", &["--detach", device]) {
        eprintln!("{e}");
    }
}

/// Removes what a test process that was killed has left: mounts, loop devices and files.
pub fn sweep() {
    let root = std::env::temp_dir();
    let Ok(entries) = fs::read_dir(&root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(owner) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if Path::new("/proc").join(owner).exists() {
            continue;
        }
        let mount = entry.path().join("mount").display().to_string();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        if mounts.lines().any(|line| line.split(' ').nth(1) == Some(&mount)) {
            unmount(Path::new(&mount));
        }
        let file = entry.path().join("image").display().to_string();
        if let Ok(output) = run("losetup", &["--noheadings", "--output", "NAME", "--associated", &file]) {
            String::from_utf8_lossy(&output.stdout).split_whitespace().for_each(detach);
        }
        if let Err(e) = fs::remove_dir_all(entry.path()) {
            eprintln!("failed to remove {}: {e}", entry.path().display());
        }
    }
}
