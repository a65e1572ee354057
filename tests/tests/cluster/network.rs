//! The network of namespaces does what the other tests believe it does.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use optimus_tests::netns::{Network, sweep};

/// Whether `from` gets an answer from `to` to one of some pings.
fn reaches(network: &Network, from: usize, to: usize) -> bool {
    let mut ping = network.command(from, Path::new("python3"));
    // A datagram there and back; `ping` is not on every machine.
    let code = "import socket,sys
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(0.2)
for _ in range(5):
    s.sendto(b'x',(sys.argv[1],7))
    try: s.recv(9); sys.exit(0)
    except OSError: pass
sys.exit(1)";
    ping.args(["-c", code, &network.address(to).to_string()]).status().expect("python3 runs").success()
}

struct Echo(std::process::Child);

impl Echo {
    fn start(network: &Network, host: usize) -> Self {
        let code = "import socket
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('0.0.0.0',7)); print('ready',flush=True)
while True:
    d,a=s.recvfrom(9); s.sendto(d,a)";
        let mut command = network.command(host, Path::new("python3"));
        let mut child = command.args(["-c", code]).stdout(Stdio::piped()).spawn().expect("python3 runs");
        let mut ready = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().expect("a pipe"), &mut ready).expect("the echo is ready");
        Self(child)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn hosts_reach_each_other_and_cuts_are_one_way_or_both() {
    sweep();
    let network = Network::new(3).expect("network namespaces");
    let _echoes: Vec<Echo> = (0..3).map(|host| Echo::start(&network, host)).collect();
    assert!(reaches(&network, 0, 1) && reaches(&network, 1, 0) && reaches(&network, 2, 0));
    // An answer needs both ways, so a one-way cut shows in both; whether it is one-way shows in what arrives.
    network.cut(0, 1).expect("a rule");
    assert!(!reaches(&network, 0, 1) && !reaches(&network, 1, 0) && reaches(&network, 0, 2) && reaches(&network, 2, 1));
    assert!(arrives(&network, 1, 0) && !arrives(&network, 0, 1), "only one way is cut");
    network.heal().expect("rules");
    network.isolate(2).expect("rules");
    assert!(reaches(&network, 0, 1) && !reaches(&network, 0, 2) && !reaches(&network, 2, 1));
    // This process reaches every host all the time.
    let own = std::net::UdpSocket::bind(SocketAddr::new(network.client().into(), 0)).expect("a socket in the network");
    own.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("a timeout");
    own.send_to(b"x", SocketAddr::new(network.address(2).into(), 7)).expect("sent");
    own.recv(&mut [0; 9]).expect("an isolated host answers this process");
    network.heal().expect("rules");
    network.lose(1.0).expect("rules");
    assert!(!reaches(&network, 0, 1));
    network.heal().expect("rules");
    assert!(reaches(&network, 0, 1));
}

/// Whether a datagram of `from` is received at `to`, whatever becomes of an answer.
fn arrives(network: &Network, from: usize, to: usize) -> bool {
    let code = "import socket,sys
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('0.0.0.0',9)); s.settimeout(2); print('ready',flush=True)
try: s.recv(9); sys.exit(0)
except OSError: sys.exit(1)";
    let mut receiver = network.command(to, Path::new("python3"));
    let mut receiver = receiver.args(["-c", code]).stdout(Stdio::piped()).spawn().expect("python3 runs");
    std::io::Read::read_exact(receiver.stdout.as_mut().expect("a pipe"), &mut [0; 5]).expect("the receiver is ready");
    let send = "import socket,sys
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)
for _ in range(5): s.sendto(b'x',(sys.argv[1],9))";
    let sent = network.command(from, Path::new("python3")).args(["-c", send, &network.address(to).to_string()]).status();
    assert!(sent.expect("python3 runs").success());
    receiver.wait().expect("a child").success()
}

#[test]
fn what_a_dead_process_left_is_swept() {
    // The id of a process that has ended.
    let mut child = std::process::Command::new("true").spawn().expect("a process");
    let pid = child.id();
    child.wait().expect("its end");
    let name = format!("opx{pid:x}zn0");
    optimus_tests::loop_image::run("ip", &["netns", "add", &name]).expect("a namespace");
    sweep();
    assert!(!Path::new("/run/netns").join(&name).exists());
}
