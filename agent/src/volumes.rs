//! Volumes: named directories on this node, one for each name in an environment of a project.
//!
//! They are made when first used and belong to the user of the workload that uses them. Nothing here ever deletes one:
//! they outlive copies, releases and agents.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use optimus_common::protocol::DesiredAlloc;
use optimus_common::spec::WorkloadSpec;

/// A volume as one copy uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    pub name: String,
    /// Where it is on the node.
    pub dir: PathBuf,
    /// Where the copy sees it; unset: where it is.
    pub target: Option<PathBuf>,
}

impl Used {
    /// The variable that tells the copy where it sees the volume.
    pub fn variable(&self) -> (String, String) {
        let name = self.name.to_ascii_uppercase().replace('-', "_");
        (format!("OPTIMUS_VOLUME_{name}"), self.target.as_ref().unwrap_or(&self.dir).display().to_string())
    }
}

/// The volumes of a copy, below the directory for all of the node. Makes nothing.
pub fn of(volumes_dir: &Path, alloc: &DesiredAlloc, spec: &WorkloadSpec) -> Vec<Used> {
    let place = &spec.placement;
    let target = |name: &str| place.mounts.iter().find(|mount| mount.volume.as_str() == name).map(|mount| PathBuf::from(&mount.path));
    let used = |name: &optimus_common::Name| Used {
        name: name.to_string(),
        // Names hold no slash and no dot: a volume cannot be outside of its environment's directory.
        dir: volumes_dir.join(alloc.key.project.as_str()).join(alloc.key.environment.as_str()).join(name.as_str()),
        target: target(name.as_str()),
    };
    place.volumes.iter().map(used).collect()
}

/// Makes the directory if it is missing, and hands it to its user. What is in it stays as it is.
pub fn prepare(dir: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    if let Some(above) = dir.parent() {
        // Users pass through to what is theirs and see nothing else.
        fs::DirBuilder::new().recursive(true).mode(0o711).create(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        made => made?,
    }
    let meta = fs::metadata(dir)?;
    match owner.filter(|owner| *owner != (meta.uid(), meta.gid())) {
        Some((uid, gid)) => chown(dir, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// The place where a copy sees a volume must be there to mount on.
pub fn prepare_target(target: &Path) -> io::Result<()> {
    match fs::metadata(target) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::NotADirectory, "it is no directory")),
        Err(_) => fs::DirBuilder::new().recursive(true).mode(0o755).create(target),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{desired, spec};

    #[test]
    fn a_volume_is_of_its_environment_and_stays_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let mut spec = spec(&["true"]);
        spec.placement.volumes = vec!["shop-data".parse().unwrap(), "cache".parse().unwrap()];
        spec.placement.mounts = vec![optimus_common::spec::VolumeMount { volume: "shop-data".parse().unwrap(), path: "/data".into() }];
        let used = of(root.path(), &desired(1, &spec), &spec);
        assert_eq!(used[0].dir, root.path().join("p/dev/shop-data"));
        assert_eq!(used[0].variable(), ("OPTIMUS_VOLUME_SHOP_DATA".to_owned(), "/data".to_owned()));
        assert_eq!(used[1].variable().1, root.path().join("p/dev/cache").display().to_string());
        prepare(&used[0].dir, None).unwrap();
        fs::write(used[0].dir.join("kept"), "x").unwrap();
        prepare(&used[0].dir, None).unwrap();
        assert_eq!(fs::read(used[0].dir.join("kept")).unwrap(), b"x");
        assert_eq!(fs::metadata(&used[0].dir).unwrap().mode() & 0o777, 0o700);
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(prepare_target(&file).is_err() && prepare(&file, None).is_err());
    }
}
