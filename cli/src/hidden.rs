//! Asks for what nobody is to see.

use std::io::{self, BufRead as _, Write as _};
use std::os::fd::AsRawFd as _;

use crate::error::Failure;
use crate::output::Terminal;

/// A line typed on the terminal, which does not show it.
///
/// # Errors
/// When there is no terminal.
pub fn ask(prompt: &str, terminal: &Terminal) -> Result<String, Failure> {
    if !(terminal.stdin_tty && terminal.stderr_tty) {
        return Err(Failure::usage("cannot ask for what is to be hidden").because("this is no terminal"));
    }
    let _hidden = Hidden::new().map_err(|error| Failure::usage("cannot hide what is typed").because(error.to_string()))?;
    terminal.note_raw(prompt);
    let mut typed = String::new();
    io::stdin().lock().read_line(&mut typed)?;
    terminal.note_raw("\n");
    let _ = io::stderr().flush(); // a prompt that cannot be seen is no reason to stop
    Ok(typed.trim_end_matches(['\r', '\n']).to_owned())
}

/// Keeps the terminal from showing what is typed, until it is dropped.
struct Hidden(libc::termios);

impl Hidden {
    fn new() -> io::Result<Self> {
        let fd = io::stdin().as_raw_fd();
        // SAFETY: termios is plain data, all zeroes is a value of it, and tcgetattr fills it.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `fd` is open and `settings` is ours.
        if unsafe { libc::tcgetattr(fd, &mut settings) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let before = Hidden(settings);
        settings.c_lflag &= !libc::ECHO;
        // SAFETY: as above.
        if unsafe { libc::tcsetattr(fd, libc::TCSAFLUSH, &settings) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(before)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // SAFETY: stdin outlives this and the settings are those it had.
        unsafe { libc::tcsetattr(io::stdin().as_raw_fd(), libc::TCSAFLUSH, &self.0) };
    }
}
