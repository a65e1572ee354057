//! A UDP proxy that treats datagrams badly, by a seed and to order.
//!
//! It stands in front of one server: others are told its address, it forwards to the real one and back. The kernel's own
//! tools for this (netem) are not in every kernel. What befalls the nth datagram of a direction depends on the seed and the
//! faults set, not on timing, so a seed repeats the same weather. Everything is bounded; what does not fit is dropped and
//! counted, as a router does.
//!
//! ```text
//! client --> listen --dice--> queue by time --> upstream socket (one a client) --> server
//! client <-- listen <-- queue by time <--dice-- upstream socket <-- server
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use crate::dice::Dice;

/// Clients at a time; the one silent for longest makes room.
pub const MAX_FLOWS: usize = 64;
/// Datagrams held back at a time, both directions together.
pub const MAX_HELD: usize = 8192;
/// Largest datagram.
const MTU: usize = 65_535;
/// Answers that wait to be looked at.
const QUEUE: usize = 1024;

/// Which way a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From a client to the server behind the proxy.
    ToServer,
    /// From the server back.
    FromServer,
}

/// What is done to datagrams of one direction. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// Added to every datagram.
    pub delay: Duration,
    /// Up to this is added on top, evenly distributed; more than the pause between datagrams reorders them.
    pub jitter: Duration,
    /// Share that is dropped, 0.0 to 1.0.
    pub loss: f64,
    /// Share that arrives twice, the second time with a jitter of its own.
    pub duplicate: f64,
    /// Share that is held back by `hold` so that later ones overtake it.
    pub reorder: f64,
    /// How long a reordered datagram is held back.
    pub hold: Duration,
    /// Drops everything.
    pub blackhole: bool,
}

impl Faults {
    /// Drops everything.
    pub fn blackhole() -> Self {
        Self { blackhole: true, ..Self::default() }
    }
}

/// What happened to the datagrams of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub received: u64,
    pub delivered: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
    /// Dropped because [`MAX_HELD`] was reached.
    pub overflow: u64,
}

/// When the copies of one datagram go on: none, one or two.
#[derive(Clone, Debug, Default, PartialEq)]
struct Fate {
    after: Vec<Duration>,
    reordered: bool,
}

impl Fate {
    /// Draws the same number of random numbers for every datagram, so that a change of faults does not shift the others.
    fn draw(dice: &mut Dice, faults: &Faults) -> Self {
        let [lose, twice, hold, first, second] = std::array::from_fn(|_| dice.fraction());
        if faults.blackhole || lose < faults.loss {
            return Self::default();
        }
        let reordered = hold < faults.reorder;
        let mut after = vec![faults.delay + faults.jitter.mul_f64(first) + if reordered { faults.hold } else { Duration::ZERO }];
        if twice < faults.duplicate {
            after.push(faults.delay + faults.jitter.mul_f64(second));
        }
        Self { after, reordered }
    }
}

struct Control {
    faults: BTreeMap<Direction, Faults>,
    counts: BTreeMap<Direction, Counts>,
    upstream: SocketAddr,
}

/// A running proxy; it ends with this handle.
pub struct ChaosProxy {
    addr: SocketAddr,
    control: Arc<Mutex<Control>>,
    task: JoinHandle<()>,
}

impl ChaosProxy {
    /// Listens on a free port of 127.0.0.1 and forwards to `upstream`.
    ///
    /// # Errors
    /// What the system says to the socket.
    pub async fn start(seed: u64, upstream: SocketAddr) -> io::Result<Self> {
        Self::start_on(seed, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0), upstream).await
    }

    /// The same, on an address of the caller's choice.
    ///
    /// # Errors
    /// What the system says to the socket.
    pub async fn start_on(seed: u64, listen: SocketAddr, upstream: SocketAddr) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind(listen).await?);
        let addr = socket.local_addr()?;
        let control = Arc::new(Mutex::new(Control { faults: BTreeMap::new(), counts: BTreeMap::new(), upstream }));
        let (answers, incoming) = mpsc::channel(QUEUE);
        let proxy = Proxy {
            socket,
            control: control.clone(),
            to_server: Dice(seed),
            from_server: Dice(seed ^ 0x5851_f42d_4c95_7f2d),
            flows: BTreeMap::new(),
            held: BinaryHeap::new(),
            sequence: 0,
            answers,
        };
        Ok(Self { addr, control, task: tokio::spawn(proxy.run(incoming)) })
    }

    /// Where clients send to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where new clients are forwarded to.
    pub fn upstream(&self) -> SocketAddr {
        self.control().upstream
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Faults of one direction from now on. Datagrams already held go on as decided.
    pub fn set(&self, direction: Direction, faults: Faults) {
        self.control().faults.insert(direction, faults);
    }

    /// Faults of both directions.
    pub fn set_both(&self, faults: Faults) {
        self.set(Direction::ToServer, faults);
        self.set(Direction::FromServer, faults);
    }

    /// No more faults.
    pub fn heal(&self) {
        self.set_both(Faults::default());
    }

    /// Forwards new clients to another address (the server has moved).
    pub fn redirect(&self, upstream: SocketAddr) {
        self.control().upstream = upstream;
    }

    /// What happened so far.
    pub fn counts(&self, direction: Direction) -> Counts {
        self.control().counts.get(&direction).copied().unwrap_or_default()
    }
}

impl Drop for ChaosProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A datagram on its way, ordered by when it goes on.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    at: Instant,
    /// Equal times go in order of arrival.
    sequence: u64,
    direction: Direction,
    client: SocketAddr,
    bytes: Vec<u8>,
}

/// The way of one client to the server.
struct Flow {
    upstream: Arc<UdpSocket>,
    reader: AbortHandle,
    used: Instant,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

struct Proxy {
    socket: Arc<UdpSocket>,
    control: Arc<Mutex<Control>>,
    to_server: Dice,
    from_server: Dice,
    flows: BTreeMap<SocketAddr, Flow>,
    held: BinaryHeap<Reverse<Held>>,
    sequence: u64,
    answers: mpsc::Sender<(SocketAddr, Vec<u8>)>,
}

impl Proxy {
    async fn run(mut self, mut answers: mpsc::Receiver<(SocketAddr, Vec<u8>)>) {
        let mut buffer = vec![0; MTU];
        loop {
            let due = self.held.peek().map(|Reverse(held)| held.at);
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => {
                    // An error here is the echo of an earlier send to a port that is gone.
                    if let Ok((len, client)) = received {
                        self.take(Direction::ToServer, client, &buffer[..len]);
                    }
                }
                Some((client, bytes)) = answers.recv() => self.take(Direction::FromServer, client, &bytes),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            self.deliver().await;
        }
    }

    /// Decides what becomes of a datagram.
    fn take(&mut self, direction: Direction, client: SocketAddr, bytes: &[u8]) {
        let dice = match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::FromServer => &mut self.from_server,
        };
        let mut control = lock(&self.control);
        let faults = control.faults.get(&direction).copied().unwrap_or_default();
        let counts = control.counts.entry(direction).or_default();
        let fate = Fate::draw(dice, &faults);
        counts.received += 1;
        counts.reordered += u64::from(fate.reordered);
        match fate.after.len() {
            0 => counts.lost += 1,
            1 => {}
            _ => counts.duplicated += 1,
        }
        for after in fate.after {
            if self.held.len() >= MAX_HELD {
                counts.overflow += 1;
                continue;
            }
            self.sequence += 1;
            let held = Held { at: Instant::now() + after, sequence: self.sequence, direction, client, bytes: bytes.to_vec() };
            self.held.push(Reverse(held));
        }
    }

    /// Sends what is due.
    async fn deliver(&mut self) {
        let now = Instant::now();
        while self.held.peek().is_some_and(|Reverse(held)| held.at <= now) {
            let Some(Reverse(held)) = self.held.pop() else { break };
            let sent = match held.direction {
                Direction::ToServer => match self.upstream_of(held.client).await {
                    Ok(upstream) => upstream.send(&held.bytes).await,
                    Err(e) => Err(e),
                },
                Direction::FromServer => self.socket.send_to(&held.bytes, held.client).await,
            };
            // Not sent is lost, as on any network: a full buffer, a server that is down.
            let mut control = lock(&self.control);
            let counts = control.counts.entry(held.direction).or_default();
            match sent {
                Ok(_) => counts.delivered += 1,
                Err(_) => counts.lost += 1,
            }
        }
    }

    /// The socket towards the server that stands for `client`, made at its first datagram.
    async fn upstream_of(&mut self, client: SocketAddr) -> io::Result<Arc<UdpSocket>> {
        if let Some(flow) = self.flows.get_mut(&client) {
            flow.used = Instant::now();
            return Ok(flow.upstream.clone());
        }
        if self.flows.len() >= MAX_FLOWS
            && let Some(oldest) = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(client, _)| *client)
        {
            self.flows.remove(&oldest);
        }
        let target = lock(&self.control).upstream;
        let any = SocketAddr::new(if target.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { [0u16; 8].into() }, 0);
        let upstream = Arc::new(UdpSocket::bind(any).await?);
        upstream.connect(target).await?;
        let reader = tokio::spawn(read_answers(client, upstream.clone(), self.answers.clone())).abort_handle();
        self.flows.insert(client, Flow { upstream: upstream.clone(), reader, used: Instant::now() });
        Ok(upstream)
    }
}

async fn read_answers(client: SocketAddr, upstream: Arc<UdpSocket>, answers: mpsc::Sender<(SocketAddr, Vec<u8>)>) {
    let mut buffer = vec![0; MTU];
    loop {
        match upstream.recv(&mut buffer).await {
            Ok(len) => {
                if answers.send((client, buffer[..len].to_vec())).await.is_err() {
                    return;
                }
            }
            // The server is down: each refused datagram comes back as one error, and it may come up again.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

#[cfg(test)]
mod tests;
