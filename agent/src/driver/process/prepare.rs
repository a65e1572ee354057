//! Everything that is found out and made before a process is started, each with its own reason to refuse.
//!
//! Blocking: run off the async threads. What is checked here can change before the process is there; the runner
//! meets the same errors again and names them the same way.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use optimus_common::protocol::DesiredAlloc;
use optimus_common::reason::Reason;
use optimus_common::spec::WorkloadSpec;

use super::ProcessConfig;
use crate::alloc::worker::alloc_dir;
use crate::driver::environment::{self, DEFAULT_PATH};
use crate::driver::users::{self, User};
use crate::driver::{StartError, StartRequest};
use crate::isolation::DeviceNode;
use crate::logs::retention;
use crate::manager::make_dir;
use crate::ports;
use crate::volumes;

/// A start with every question answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// `<allocs>/<alloc>/<attempt>`.
    pub run_dir: PathBuf,
    /// Looked up by the runner as it was here.
    pub argv: Vec<String>,
    pub dir: PathBuf,
    pub env: BTreeMap<String, String>,
    /// Devices of the node it is kept from.
    pub kept_from: Vec<DeviceNode>,
    /// Volumes it sees at other places: where they are, and where they are seen.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Volumes that are not where they were asked for, where that is allowed.
    pub unmounted: Vec<String>,
    /// Unset: the agent's own user, and nothing to change.
    pub user: Option<User>,
}

/// Answers them, and makes the run directory with its private tmp.
pub fn prepare(request: &StartRequest, config: &ProcessConfig) -> Result<Prepared, StartError> {
    let StartRequest { alloc, spec, attempt } = request;
    prove_ports(alloc, spec)?;
    let (user, change) = choose_user(spec, config)?;
    let share = config.devices.share(&spec.placement.given).map_err(|why| StartError::step("give it its devices", why))?;
    may_open(&share.paths, &user)?;
    let dir = PathBuf::from(spec.dir.as_deref().unwrap_or("/"));
    match fs::metadata(&dir) {
        Ok(meta) if meta.is_dir() && may_enter(&meta, &user) => {}
        _ => return Err(StartError::here(Reason::DirMissing { dir: dir.display().to_string() })),
    }
    let argv = spec.run.argv();
    let path = spec.env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
    find_program(argv.first().map_or("", String::as_str), &dir, path, &user).map_err(StartError::here)?;

    let alloc_dir = alloc_dir(&config.allocs_dir, alloc.id);
    make_dir(&alloc_dir).map_err(|e| StartError::step("create the run directory", e))?;
    if let Err(error) = retention::trim_attempts(&alloc_dir, *attempt, spec.logs.size) {
        tracing::warn!(alloc = %alloc.id, %error, "failed to delete the output of earlier attempts");
    }
    let run_dir = alloc_dir.join(attempt.to_string());
    make_dir(&run_dir).map_err(|e| StartError::step("create the run directory", e))?;
    let tmp = make_tmp(&run_dir, &user, change)?;
    if let Some(payload) = spec.runs.as_ref().and_then(|runs| runs.input.as_ref()?.payload.as_deref()) {
        write_payload(&tmp.join(environment::PAYLOAD), payload, change.then_some(&user))
            .map_err(|e| StartError::step("write the payload of the run", e))?;
    }
    let host = ["LANG", "TZ"].into_iter().filter_map(|key| Some((key.to_owned(), std::env::var(key).ok()?))).collect();
    let Volumes { binds, unmounted, env: volumes } = prepare_volumes(request, config, &user, change)?;
    let told = share.env.into_iter().chain(volumes).collect();
    let env = environment::build(alloc, spec, &user, &tmp, &config.node, &host, &told);
    let kept_from = share.kept_from.into_iter().collect();
    Ok(Prepared { run_dir, argv, dir, env, kept_from, binds, unmounted, user: change.then_some(user) })
}

#[derive(Default)]
struct Volumes {
    binds: Vec<(PathBuf, PathBuf)>,
    unmounted: Vec<String>,
    env: BTreeMap<String, String>,
}

/// Makes the volumes of the copy, theirs who uses them.
fn prepare_volumes(request: &StartRequest, config: &ProcessConfig, user: &User, change: bool) -> Result<Volumes, StartError> {
    let mut found = Volumes::default();
    for mut used in volumes::of(&config.volumes_dir, &request.alloc, &request.spec) {
        let failed = |error: io::Error| StartError::step(&format!("prepare volume {}", used.name), error);
        volumes::prepare(&used.dir, change.then_some((user.uid, user.gid))).map_err(failed)?;
        // Only root may mount.
        if users::current().uid != 0
            && let Some(target) = used.target.take()
        {
            let why = format!("volume {}: not at {}, as the agent does not run as root", used.name, target.display());
            if !config.allow_unenforced {
                return Err(StartError::step("mount its volumes", why));
            }
            found.unmounted.push(why);
        }
        match &used.target {
            Some(target) => {
                volumes::prepare_target(target).map_err(|e| StartError::step(&format!("make {}", target.display()), e))?;
                found.binds.push((used.dir.clone(), target.clone()));
            }
            // Seen where it is: its user must be able to get there.
            None => {
                for above in used.dir.ancestors().filter(|_| change) {
                    if !may_enter(&fs::metadata(above).map_err(failed)?, user) {
                        let why = format!("user {} may not pass through {}; set its mode to 711", user.name, above.display());
                        return Err(StartError::step(&format!("prepare volume {}", used.name), why));
                    }
                }
            }
        }
        found.env.extend([used.variable()]);
    }
    Ok(found)
}

/// The user has rights on the device files: being given a device does not change whose they are.
fn may_open(paths: &[String], user: &User) -> Result<(), StartError> {
    for path in paths.iter().filter(|_| user.uid != 0) {
        let meta = fs::metadata(path).map_err(|error| StartError::step(&format!("look at device file {path}"), error))?;
        // Reading or writing: which of them it needs, nobody has said.
        if meta.mode() & (execute_bit(&meta, user) * 6) == 0 {
            let why = format!("user {} may neither read nor write {path}; put it into the file's group", user.name);
            return Err(StartError::step("give it its devices", why));
        }
    }
    Ok(())
}

/// A dynamic port in a stranger's hands moves the copy to another one; a fixed port is waited for.
pub(crate) fn prove_ports(alloc: &DesiredAlloc, spec: &WorkloadSpec) -> Result<(), StartError> {
    for (name, port) in &alloc.ports {
        match ports::is_free(*port) {
            Ok(true) => {}
            Ok(false) => {
                let fixed = spec.ports.iter().any(|p| p.name.as_str() == name && p.fixed.is_some());
                return Err(StartError { reason: Reason::PortTaken { port: *port, holder: ports::holder(*port) }, elsewhere: !fixed });
            }
            // A port below 1024 without rights, mostly: the workload could not bind it either.
            Err(error) => return Err(StartError::step(&format!("bind port {port}"), error)),
        }
    }
    Ok(())
}

/// The user to run as, and whether that is a change from the agent's own.
fn choose_user(spec: &WorkloadSpec, config: &ProcessConfig) -> Result<(User, bool), StartError> {
    let current = users::current();
    let Some(name) = spec.user.as_ref().or(config.workload_user.as_ref()) else { return Ok((current, false)) };
    let found = users::by_name(name).map_err(|e| StartError::step(&format!("look up user {name}"), e))?;
    let Some(user) = found else { return Err(StartError::here(Reason::UserUnknown { user: name.clone() })) };
    if user.uid == current.uid {
        return Ok((user, false));
    }
    if current.uid != 0 {
        let why = format!("the agent runs as {}, only root may start processes of other users", current.name);
        return Err(StartError::step(&format!("become user {name}"), why));
    }
    Ok((user, true))
}

/// Whether the mode lets the user in. ACLs may say otherwise, which the kernel then has the last word on.
fn may_enter(meta: &fs::Metadata, user: &User) -> bool {
    user.uid == 0 || meta.mode() & execute_bit(meta, user) != 0
}

fn execute_bit(meta: &fs::Metadata, user: &User) -> u32 {
    if meta.uid() == user.uid {
        0o100
    } else if user.groups.contains(&meta.gid()) || user.gid == meta.gid() {
        0o010
    } else {
        0o001
    }
}

/// Looks a command up as `execvp` would, in the workload's own PATH and directory.
fn find_program(command: &str, dir: &Path, path: &str, user: &User) -> Result<PathBuf, Reason> {
    let candidates: Vec<PathBuf> =
        if command.contains('/') { vec![dir.join(command)] } else { path.split(':').map(|part| dir.join(part).join(command)).collect() };
    let mut refused = false;
    if !command.is_empty() {
        for candidate in candidates {
            let Ok(meta) = fs::metadata(&candidate) else { continue };
            let bits = if user.uid == 0 { 0o111 } else { execute_bit(&meta, user) };
            if meta.is_file() && meta.permissions().mode() & bits != 0 {
                return Ok(candidate);
            }
            refused = true;
        }
    }
    let command = command.to_owned();
    Err(if refused { Reason::NotExecutable { command } } else { Reason::CommandNotFound { command } })
}

/// A tmp nobody else can look into, removed with the attempt.
fn make_tmp(run_dir: &Path, user: &User, change: bool) -> Result<PathBuf, StartError> {
    let failed = |error: io::Error| StartError::step("create the private tmp", error);
    let tmp = run_dir.join("tmp");
    match fs::DirBuilder::new().mode(0o700).create(&tmp) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(failed)?,
    }
    if change {
        chown(&tmp, Some(user.uid), Some(user.gid)).map_err(failed)?;
        // Its user must be able to get there.
        for above in run_dir.ancestors() {
            let meta = fs::metadata(above).map_err(failed)?;
            if !may_enter(&meta, user) {
                let why = format!("user {} may not pass through {}; set its mode to 711", user.name, above.display());
                return Err(StartError::step("create the private tmp", why));
            }
        }
    }
    Ok(tmp)
}

/// A file only its reader may read. Whatever stands there was left by a start that was cut off.
fn write_payload(path: &Path, payload: &[u8], user: Option<&User>) -> io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    file.write_all(payload)?;
    match user {
        Some(user) => chown(path, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_for_its_reader_alone_and_replaces_what_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("payload");
        write_payload(&path, b"old", None).unwrap();
        write_payload(&path, b"new", None).unwrap();
        assert_eq!((fs::read(&path).unwrap(), fs::metadata(&path).unwrap().mode() & 0o777), (b"new".to_vec(), 0o400));
    }

    fn file(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_command_is_found_as_a_shell_would_find_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        file(&at("a/tool"), 0o644);
        file(&at("b/tool"), 0o755);
        file(&at("here"), 0o755);
        let path = format!("{}:{}", at("a").display(), at("b").display());
        let find = |command: &str| find_program(command, dir.path(), &path, &users::current());
        assert_eq!(find("tool"), Ok(at("b/tool")), "one that may not be executed is passed over");
        assert_eq!(find("./here"), Ok(dir.path().join("./here")), "relative to the workload's directory");
        assert_eq!(find(at("here").to_str().unwrap()), Ok(at("here")));
        assert_eq!(find("here"), Err(Reason::CommandNotFound { command: "here".into() }));
        assert_eq!(find(""), Err(Reason::CommandNotFound { command: "".into() }));
        assert_eq!(find("./a/tool"), Err(Reason::NotExecutable { command: "./a/tool".into() }));
        assert_eq!(find("./a"), Err(Reason::NotExecutable { command: "./a".into() }));
    }

    #[test]
    fn a_directory_is_entered_by_whom_its_mode_says() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o710)).unwrap();
        let meta = fs::metadata(dir.path()).unwrap();
        let user = |uid, gid| User { name: "x".into(), uid, gid, home: "/".into(), groups: vec![gid] };
        assert!(may_enter(&meta, &user(0, 0)));
        assert!(may_enter(&meta, &user(meta.uid() + 1, meta.gid())));
        assert!(!may_enter(&meta, &user(meta.uid() + 1, meta.gid() + 1)));
    }
}
