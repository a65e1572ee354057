//! Users of the host, as its own databases know them (also through NSS).

use std::ffi::{CStr, CString};
use std::io;
use std::ptr;

/// A user a workload may run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: String,
    /// Every group of the user, the primary one too.
    pub groups: Vec<u32>,
}

/// Longest user record that is read.
const RECORD_MAX: usize = 1 << 20;
/// Most groups of a user that are taken over.
const GROUPS_MAX: usize = 4096;

/// Looks a user up by name. Blocking: a directory service may be asked.
pub fn by_name(name: &str) -> io::Result<Option<User>> {
    let Ok(text) = CString::new(name) else { return Ok(None) };
    lookup(|record, buffer, length, found| {
        // SAFETY: every pointer is valid for the call and `buffer` has `length` bytes.
        unsafe { libc::getpwnam_r(text.as_ptr(), record, buffer, length, found) }
    })
}

/// Looks a user up by number.
pub fn by_uid(uid: u32) -> io::Result<Option<User>> {
    lookup(|record, buffer, length, found| {
        // SAFETY: as above.
        unsafe { libc::getpwuid_r(uid, record, buffer, length, found) }
    })
}

/// The user this process runs as; one without a name gets its number for one.
pub fn current() -> User {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    by_uid(uid).ok().flatten().unwrap_or_else(|| User { name: uid.to_string(), uid, gid, home: "/".into(), groups: vec![gid] })
}

fn lookup(call: impl Fn(*mut libc::passwd, *mut libc::c_char, usize, *mut *mut libc::passwd) -> libc::c_int) -> io::Result<Option<User>> {
    let mut buffer = vec![0 as libc::c_char; 4096];
    loop {
        // SAFETY: an all-zero passwd is a valid value of it (numbers and null pointers).
        let mut record: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        match call(&mut record, buffer.as_mut_ptr(), buffer.len(), &mut found) {
            0 if found.is_null() => return Ok(None),
            0 => {
                // SAFETY: on success its strings point into `buffer`, which lives until after the copies.
                let (name, home) = unsafe { (text(record.pw_name), text(record.pw_dir)) };
                let groups = groups(&name, record.pw_gid);
                let home = if home.is_empty() { "/".to_owned() } else { home };
                return Ok(Some(User { name, uid: record.pw_uid, gid: record.pw_gid, home, groups }));
            }
            libc::ERANGE if buffer.len() < RECORD_MAX => buffer.resize(buffer.len() * 4, 0),
            // What "no such user" may look like, says the manual.
            libc::ENOENT | libc::ESRCH => return Ok(None),
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

/// # Safety
/// `pointer` is null or points to a string that ends in NUL.
unsafe fn text(pointer: *const libc::c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: by this function's contract.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn groups(name: &str, primary: u32) -> Vec<u32> {
    let Ok(name) = CString::new(name) else { return vec![primary] };
    let mut groups = vec![0; 64];
    loop {
        let mut count = groups.len() as libc::c_int;
        // SAFETY: `groups` has room for `count` numbers.
        let got = unsafe { libc::getgrouplist(name.as_ptr(), primary, groups.as_mut_ptr(), &mut count) };
        if got >= 0 {
            groups.truncate(count.max(0) as usize);
            return groups;
        }
        if groups.len() >= GROUPS_MAX {
            return vec![primary];
        }
        groups.resize((groups.len() * 4).min(GROUPS_MAX), 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        let root = by_name("root").unwrap().unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert!(root.groups.contains(&0));
        assert_eq!(by_uid(0).unwrap().unwrap(), root);
        assert_eq!(by_name("no-such-user-here").unwrap(), None);
        assert_eq!(by_name("nul\0inside").unwrap(), None);
        assert_eq!(current().uid, rustix::process::geteuid().as_raw());
    }
}
