//! The runner's socket: a few connections, one request a line.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use optimus_runner::{Request, SOCKET, Status};

use crate::sys::PollSet;

/// Connections at a time; the oldest gives way. An agent needs one, a person with a terminal another.
const CLIENTS_MAX: usize = 8;
/// Connections that are told of the end; as many as can wait to be accepted, and those that are.
const LAST_CLIENTS_MAX: usize = 256;
/// Longest request line.
const LINE_MAX: usize = 128;

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    place: usize,
    gone: bool,
}

pub struct Server {
    listener: UnixListener,
    place: usize,
    clients: Vec<Client>,
}

impl Server {
    /// Listens on `sock` in the current directory, for its owner only.
    pub fn listen() -> io::Result<Self> {
        match fs::remove_file(SOCKET) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(SOCKET)?;
        fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Server { listener, place: usize::MAX, clients: Vec::new() })
    }

    pub fn register(&mut self, set: &mut PollSet) {
        self.place = set.add(Some(self.listener.as_raw_fd()));
        for client in &mut self.clients {
            client.place = set.add(Some(client.stream.as_raw_fd()));
        }
    }

    /// Takes new connections and gives the requests that have come in, answered.
    pub fn requests(&mut self, set: &PollSet, status: &Status) -> Vec<Request> {
        let mut requests = Vec::new();
        for client in &mut self.clients {
            if set.ready(client.place) {
                client.read(&mut requests, status);
            }
        }
        self.clients.retain(|c| !c.gone);
        if set.ready(self.place)
            && let Ok((stream, _)) = self.listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            if self.clients.len() >= CLIENTS_MAX {
                self.clients.remove(0);
            }
            self.clients.push(Client { stream, line: Vec::new(), place: usize::MAX, gone: false });
        }
        requests
    }

    /// The last word: the exit record is written.
    pub fn say_exit(&mut self) {
        // Whoever connected while we were ending is told too.
        while self.clients.len() < LAST_CLIENTS_MAX
            && let Ok((stream, _)) = self.listener.accept()
        {
            self.clients.push(Client { stream, line: Vec::new(), place: usize::MAX, gone: false });
        }
        for client in &mut self.clients {
            let _ = client.stream.write_all(b"exit\n");
        }
        let _ = fs::remove_file(SOCKET);
    }
}

impl Client {
    fn read(&mut self, requests: &mut Vec<Request>, status: &Status) {
        let mut buffer = [0u8; LINE_MAX];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.gone = true,
            Ok(n) => self.line.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.gone = true,
        }
        while let Some(at) = self.line.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.line.drain(..=at).collect();
            let request = std::str::from_utf8(&line).ok().and_then(|l| Request::decode(l.trim_end()));
            let answer = match request {
                Some(Request::Status) => status.encode(),
                Some(_) => "ok\n".to_owned(),
                None => "error not a request\n".to_owned(),
            };
            requests.extend(request);
            // A client that does not read its answers is not waited for.
            self.gone |= self.stream.write_all(answer.as_bytes()).is_err();
        }
        self.gone |= self.line.len() >= LINE_MAX;
    }
}
