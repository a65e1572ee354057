//! Two directories change places in one step.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

/// Exchanges `a` and `b`, which both exist; durable when this returns. A crash leaves them as before or exchanged.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?;
    sync_parent(a)?;
    sync_parent(b)
}

/// Renames `from` to `to`, which must not exist; durable when this returns.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?;
    sync_parent(to)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(parent)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn directories_change_places() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        for (path, text) in [(&a, "was a"), (&b, "was b")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("file"), text).unwrap();
        }
        exchange(&a, &b).unwrap();
        assert_eq!(fs::read_to_string(a.join("file")).unwrap(), "was b");
        assert_eq!(fs::read_to_string(b.join("file")).unwrap(), "was a");
        assert!(rename_new(&a, &b).is_err(), "there is one already");
        rename_new(&a, &c).unwrap();
        assert!(!a.exists() && c.exists());
        assert!(exchange(&a, &b).is_err(), "one is missing");
    }
}
