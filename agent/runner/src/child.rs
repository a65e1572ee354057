//! From the runner to the program: fork, then in the child cgroups, limits, user, directory, exec.
//!
//! Between fork and exec only plain system calls on what was prepared before. A step that fails tells its number,
//! errno and place through a pipe that a good exec closes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use optimus_runner::{StartFile, Step, User};

use crate::output::Output;
use crate::sys;

/// Why there is no program.
#[derive(Debug)]
pub struct Failure {
    pub step: Step,
    pub errno: i32,
    pub detail: String,
}

impl Failure {
    pub fn prepare(error: io::Error) -> Self {
        Failure { step: Step::Prepare, errno: error.raw_os_error().unwrap_or(0), detail: error.to_string() }
    }
}

/// All that the child needs, made before the fork.
struct Prepared {
    /// Programs to try, in the order of `PATH`.
    programs: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    cwd: CString,
    cgroups: Vec<CString>,
    user: Option<User>,
    nofile: Option<u64>,
    umask: u32,
    binds: Vec<(CString, CString)>,
    /// Ours, to see whether we are still there.
    runner: libc::pid_t,
    // What the pointers above point into.
    _strings: Vec<CString>,
}

fn c_string(bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure { step: Step::Prepare, errno: libc::EINVAL, detail: "a string holds a NUL".into() })
}

impl Prepared {
    fn new(start: &StartFile) -> Result<Self, Failure> {
        let mut strings = Vec::new();
        let mut pointers = |texts: &mut dyn Iterator<Item = Vec<u8>>| -> Result<Vec<*const libc::c_char>, Failure> {
            let mut list = Vec::new();
            for text in texts {
                let text = c_string(&text)?;
                list.push(text.as_ptr()); // the heap bytes stay where they are when the CString moves
                strings.push(text);
            }
            list.push(std::ptr::null());
            Ok(list)
        };
        let argv = pointers(&mut start.argv.iter().map(|a| a.clone().into_bytes()))?;
        let envp = pointers(&mut start.env.iter().map(|(k, v)| format!("{k}={v}").into_bytes()))?;
        Ok(Prepared {
            programs: programs(start)?,
            argv,
            envp,
            cwd: c_string(start.cwd.as_bytes())?,
            cgroups: start.cgroup_procs.iter().map(|p| c_string(p.as_os_str().as_bytes())).collect::<Result<_, _>>()?,
            user: start.user.clone(),
            nofile: start.nofile,
            umask: start.umask,
            binds: start
                .binds
                .iter()
                .map(|(from, to)| Ok((c_string(from.as_os_str().as_bytes())?, c_string(to.as_os_str().as_bytes())?)))
                .collect::<Result<_, _>>()?,
            runner: std::process::id() as libc::pid_t,
            _strings: strings,
        })
    }
}

/// A name without a slash is looked for in the workload's own `PATH`, one with a slash from its directory.
fn programs(start: &StartFile) -> Result<Vec<CString>, Failure> {
    let name = &start.argv[0];
    // An empty name is nowhere to be found; joined to a directory it would be that.
    if name.is_empty() || name.contains('/') {
        return Ok(vec![c_string(name.as_bytes())?]);
    }
    let path = start.env.iter().find(|(k, _)| k == "PATH").map_or("/usr/bin:/bin", |(_, v)| v.as_str());
    path.split(':').map(|dir| c_string(Path::new(if dir.is_empty() { "." } else { dir }).join(name).as_os_str().as_bytes())).collect()
}

/// Starts the program. Gives its pid and its output.
pub fn start(start: &StartFile) -> Result<(u32, Output), Failure> {
    let prepared = Prepared::new(start)?;
    let (out_read, out_write) = sys::pipe().map_err(Failure::prepare)?;
    let (err_read, err_write) = sys::pipe().map_err(Failure::prepare)?;
    let (told, tell) = sys::pipe().map_err(Failure::prepare)?;
    // SAFETY: the child makes plain system calls only, on memory prepared above, and ends in exec or _exit. This
    // process has one thread, so no lock can be held by another at the fork.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Failure::prepare(io::Error::last_os_error()));
    }
    if pid == 0 {
        // SAFETY: we are the forked child.
        unsafe { become_program(&prepared, out_write.as_raw_fd(), err_write.as_raw_fd(), tell.as_raw_fd()) }
    }
    drop((out_write, err_write, tell));
    match read_failure(&told) {
        None => {
            sys::nonblocking(out_read.as_raw_fd()).map_err(Failure::prepare)?;
            sys::nonblocking(err_read.as_raw_fd()).map_err(Failure::prepare)?;
            Ok((pid as u32, Output::new(out_read, err_read, start.log_segment, start.log_segments)))
        }
        Some((step, errno, which)) => {
            // SAFETY: our own child, which is ending.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            let detail = match step {
                Step::Cgroup => start.cgroup_procs.get(usize::from(which)).map_or_else(String::new, |p| p.display().to_string()),
                Step::Directory => start.cwd.clone(),
                Step::Exec => start.argv[0].clone(),
                Step::User => start.user.as_ref().map_or_else(String::new, |u| format!("uid {} gid {}", u.uid, u.gid)),
                Step::Limits if which == 1 => format!("open files {}", start.nofile.unwrap_or(0)),
                Step::Limits => "core files".to_owned(),
                Step::Mount => start.binds.get(usize::from(which)).map_or_else(String::new, |(_, to)| to.display().to_string()),
                Step::Prepare => String::new(),
            };
            Err(Failure { step, errno, detail })
        }
    }
}

/// `None`: the pipe was closed by a good exec.
fn read_failure(told: &OwnedFd) -> Option<(Step, i32, u8)> {
    let mut message = [0u8; 6];
    loop {
        match sys::read(told.as_raw_fd(), &mut message) {
            Ok(6) => {
                return Some((
                    crate::step_of(message[0]),
                    i32::from_le_bytes([message[1], message[2], message[3], message[4]]),
                    message[5],
                ));
            }
            Ok(0) => return None,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return Some((Step::Prepare, libc::EIO, 0)),
        }
    }
}

/// In the child. Never returns.
unsafe fn become_program(p: &Prepared, out: i32, err: i32, tell: i32) -> ! {
    // SAFETY: async-signal-safe calls on prepared, NUL-terminated memory; see `start`.
    unsafe {
        let fail = |step: Step, which: u8| -> ! {
            let errno = *libc::__errno_location();
            let e = errno.to_le_bytes();
            let message = [step as u8, e[0], e[1], e[2], e[3], which];
            libc::write(tell, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        };
        libc::setsid();
        for (n, path) in p.cgroups.iter().enumerate() {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd < 0 || libc::write(fd, c"0".as_ptr().cast(), 1) != 1 {
                fail(Step::Cgroup, n as u8);
            }
            libc::close(fd);
        }
        // The runner is spared by the kernel's out-of-memory choice; what it runs is not.
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::setrlimit(libc::RLIMIT_CORE, &no_core) != 0 {
            fail(Step::Limits, 0);
        }
        if let Some(n) = p.nofile {
            let limit = libc::rlimit { rlim_cur: n, rlim_max: n };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
                fail(Step::Limits, 1);
            }
        }
        if !p.binds.is_empty() {
            // Mounts of its own: the host does not see them, and they go with its last process. Those of the host still
            // come through.
            let (none, root) = (std::ptr::null(), c"/".as_ptr());
            if libc::unshare(libc::CLONE_NEWNS) != 0 || libc::mount(none, root, none, libc::MS_REC | libc::MS_SLAVE, std::ptr::null()) != 0
            {
                fail(Step::Mount, u8::MAX);
            }
            for (n, (from, to)) in p.binds.iter().enumerate() {
                if libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()) != 0 {
                    fail(Step::Mount, n as u8);
                }
            }
        }
        libc::umask(p.umask);
        if let Some(user) = &p.user
            && (libc::setgroups(user.groups.len(), user.groups.as_ptr()) != 0
                || libc::setresgid(user.gid, user.gid, user.gid) != 0
                || libc::setresuid(user.uid, user.uid, user.uid) != 0)
        {
            fail(Step::User, 0);
        }
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            fail(Step::User, 1);
        }
        // After the change of user, which clears it. A process without its runner would be without a keeper.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        if libc::getppid() != p.runner {
            libc::_exit(127); // the runner died before the line above
        }
        if libc::chdir(p.cwd.as_ptr()) != 0 {
            fail(Step::Directory, 0);
        }
        if libc::dup2(out, 1) < 0 || libc::dup2(err, 2) < 0 {
            fail(Step::Prepare, 0);
        }
        // The kernel's own call: the C library refuses two signals that it keeps for itself, yet they are inherited as
        // ignored like all others. All zero is the default action, no flags, an empty mask.
        let default = [0u64; 8];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8usize);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());

        let mut found = libc::ENOENT;
        for program in &p.programs {
            libc::execve(program.as_ptr(), p.argv.as_ptr(), p.envp.as_ptr());
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                // Another directory of PATH may hold one that may be executed.
                libc::EACCES => found = libc::EACCES,
                other => {
                    found = other;
                    break;
                }
            }
        }
        *libc::__errno_location() = found;
        fail(Step::Exec, 0)
    }
}
