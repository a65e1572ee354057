//! The few system calls a runner needs, each with its reason.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Leaves the agent's session and files: a session of our own, orphans come to us, nothing inherited but stdio and
/// the lock.
pub fn detach(lock: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls with constant arguments; the descriptors are ours.
    unsafe {
        libc::setsid(); // fails only when we lead a session already
        check(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))?;
        libc::prctl(libc::PR_SET_NAME, c"optimus-runner".as_ptr(), 0, 0, 0);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE, libc::SIGUSR1, libc::SIGUSR2] {
            libc::signal(signal, libc::SIG_IGN);
        }
        // Inherited as ignored, it would bury our children before we know how they ended.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        close_others(&[lock]);
    }
    // The last to be killed when the host is out of memory: it knows what happened.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    Ok(())
}

/// `/dev/null` for stdio. Gives the former stdout, on which the agent waits for one word. Errors before this are still
/// heard on stderr.
pub fn leave_stdio() -> io::Result<OwnedFd> {
    // SAFETY: as in `detach`; `starter` and `null` are fresh descriptors.
    unsafe {
        let starter = OwnedFd::from_raw_fd(check(libc::fcntl(1, libc::F_DUPFD_CLOEXEC, 3))?);
        let null = check(libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))?;
        for fd in 0..3 {
            check(libc::dup2(null, fd))?;
        }
        libc::close(null);
        Ok(starter)
    }
}

/// Closes every descriptor above stdio except `keep`.
unsafe fn close_others(keep: &[RawFd]) {
    let mut from = 3;
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    for fd in keep.into_iter().chain([-1]) {
        let last = if fd < 0 { u32::MAX } else { fd as u32 - 1 };
        if last >= from {
            // SAFETY: closing descriptors nobody in this process uses.
            unsafe { libc::syscall(libc::SYS_close_range, from, last, 0) };
        }
        from = (fd + 1) as u32;
    }
}

/// SIGCHLD as a descriptor.
pub struct ChildSignals(OwnedFd);

impl ChildSignals {
    pub fn block() -> io::Result<Self> {
        // SAFETY: a zeroed signal set is made valid by sigemptyset before use.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGCHLD);
            check(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
            let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            Ok(ChildSignals(OwnedFd::from_raw_fd(fd)))
        }
    }
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    /// Takes what is waiting; what it says is read from `waitpid`.
    pub fn clear(&self) {
        let mut buffer = [0u8; 128 * 4];
        while read(self.0.as_raw_fd(), &mut buffer).is_ok_and(|n| n > 0) {}
    }
}

/// Reaps everything that has ended; gives the wait status of `main` if it is among them.
pub fn reap(main: u32) -> Option<i32> {
    let mut found = None;
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        if pid <= 0 {
            return found;
        }
        if pid as u32 == main {
            found = Some(status);
        }
    }
}

pub fn reap_others() {
    reap(0);
}

pub fn exit_code(status: i32) -> Option<i32> {
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

pub fn exit_signal(status: i32) -> Option<i32> {
    libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
}

/// Sends a signal; a process that is gone is what was wanted.
pub fn kill(pid: i32, signal: i32) {
    if pid == 0 || pid == -1 {
        return; // never ourselves, never everyone
    }
    // SAFETY: plain kill(2).
    unsafe { libc::kill(pid, signal) };
}

pub fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// A pipe; the read end does not block.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: pipe2 fills both.
    unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        let pair = (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]));
        Ok(pair)
    }
}

pub fn nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain fcntl on a descriptor of ours.
    unsafe { check(libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK)).map(drop) }
}

pub fn unix_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// What one `poll` waits for.
pub struct PollSet(Vec<libc::pollfd>);

impl PollSet {
    pub fn new() -> Self {
        PollSet(Vec::with_capacity(8))
    }
    /// Adds a descriptor to read from; a place is taken even for `None`, so that places are known.
    pub fn add(&mut self, fd: Option<RawFd>) -> usize {
        self.0.push(libc::pollfd { fd: fd.unwrap_or(-1), events: libc::POLLIN, revents: 0 });
        self.0.len() - 1
    }
    pub fn wait(&mut self, timeout: Option<Duration>) {
        // Rounded up: waking a little early would spin until the time is there.
        let ms = timeout.map_or(-1, |t| t.as_millis().saturating_add(1).min(i32::MAX as u128) as i32);
        // SAFETY: the slice is valid for its length.
        match check(unsafe { libc::poll(self.0.as_mut_ptr(), self.0.len() as libc::nfds_t, ms) }) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => self.none_ready(),
            // The kernel has no memory for it now. A workload is not given up for that.
            Err(_) => {
                self.none_ready();
                pause(Duration::from_millis(10));
            }
        }
    }
    fn none_ready(&mut self) {
        for place in &mut self.0 {
            place.revents = 0;
        }
    }
    pub fn ready(&self, place: usize) -> bool {
        self.0.get(place).is_some_and(|p| p.revents != 0)
    }
}
