//! Random and mutated bytes on the ports of the real server: clear errors, no panic, no growth.
//!
//! Bounded in count, loopback only. The memory check compares the server after a warm-up with the server
//! after the whole run.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use optimus_tests::harness::*;

/// Connections or datagrams of one kind in the measured part; a quarter of it warms up.
const ROUNDS: u64 = 400;

/// SplitMix64: the run is the same each time.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
    /// Changes, drops, doubles and inserts bytes.
    fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..=self.below(6) {
            if out.is_empty() {
                break;
            }
            let at = self.below(out.len());
            match self.below(4) {
                0 => out[at] = self.next() as u8,
                1 => drop(out.remove(at)),
                2 => out.insert(at, self.next() as u8),
                _ => {
                    let piece = out[at..(at + self.below(32)).min(out.len())].to_vec();
                    out.splice(at..at, piece);
                }
            }
        }
        out
    }
}

struct Target {
    api: u16,
    quic: u16,
    tls: Arc<rustls::ClientConfig>,
    token: String,
}

fn context(sandbox: &Sandbox) -> serde_json::Value {
    let dir = sandbox.path("config/optimus");
    let name = fs::read_to_string(dir.join("current")).unwrap();
    serde_json::from_str(&fs::read_to_string(dir.join(format!("contexts/{}.json", name.trim()))).unwrap()).unwrap()
}

impl Target {
    fn of(sandbox: &Sandbox) -> Self {
        use rustls_pki_types::pem::PemObject;
        let context = context(sandbox);
        let mut roots = rustls::RootCertStore::empty();
        let pem = context["ca_pem"].as_str().unwrap();
        roots.add(rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Target { api: sandbox.api_port, quic: sandbox.agent_port, tls: Arc::new(tls), token: context["token"].as_str().unwrap().to_owned() }
    }

    /// Raw bytes on the TLS port.
    fn raw_tcp(&self, bytes: &[u8]) {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.api)) else { return };
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0u8; 256]);
    }

    /// Bytes inside a good TLS connection; gives what came back.
    fn in_tls(&self, bytes: &[u8]) -> Vec<u8> {
        let tcp = TcpStream::connect(("127.0.0.1", self.api)).unwrap();
        tcp.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
        let mut stream = rustls::StreamOwned::new(rustls::ClientConnection::new(self.tls.clone(), name).unwrap(), tcp);
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let mut buffer = [0u8; 4096];
        while answer.len() < 64 * 1024 {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(n) => answer.extend_from_slice(&buffer[..n]),
            }
            // One answer is enough; an idle connection would cost us the time-out.
            if String::from_utf8_lossy(&answer).contains("\r\n\r\n") {
                break;
            }
        }
        answer
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Vec<u8> {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost:{}\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            self.api,
            self.token,
            body.len()
        )
        .into_bytes()
    }

    fn round(&self, random: &mut Random, rounds: u64) {
        let spec = r#"{"project":"p","environment":"dev","workloads":{"w":{"kind":"service","copies":1}}}"#;
        let seeds = [
            self.request("POST", "/v1/deploy", spec),
            self.request("GET", "/v1/workloads?page_size=10&page_token=abc", ""),
            self.request("POST", "/v1/projects/a/envs/b/workloads/c:scale", r#"{"copies":2}"#),
            self.request("GET", "/v1/events?since=0", ""),
            self.request("POST", "/v1/join-tokens", r#"{"ttl":"5s","uses":1}"#),
        ];
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect(("127.0.0.1", self.quic)).unwrap();
        for n in 0..rounds {
            let size = random.below(2000);
            let noise = random.bytes(size);
            self.raw_tcp(&noise);
            // A TLS record head in front gets noise past the first check.
            self.raw_tcp(&[&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &noise].concat());
            let mutant = random.mutate(&seeds[n as usize % seeds.len()]);
            let answer = self.in_tls(&mutant);
            let text = String::from_utf8_lossy(&answer);
            assert!(!text.starts_with("HTTP/1.1 500"), "{}\n{text}", String::from_utf8_lossy(&mutant));
            for _ in 0..4 {
                let _ = udp.send(&noise);
                // A long header with a version we speak: an Initial packet of noise.
                let mut initial = vec![0xC3, 0, 0, 0, 1, 8];
                initial.extend(random.bytes(1200));
                let _ = udp.send(&initial);
            }
        }
    }
}

fn rss_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn garbage_on_the_ports_is_refused_and_costs_no_memory() {
    let mut sandbox = Sandbox::new();
    let server = sandbox.server();
    let target = Target::of(&sandbox);
    let mut random = Random(2026);
    target.round(&mut random, ROUNDS / 2);
    let pid = sandbox.process(server).pid();
    let warm = rss_kib(pid);
    target.round(&mut random, ROUNDS);
    let after = rss_kib(pid);
    assert!(after <= warm + warm / 10, "RSS grew from {warm} KiB to {after} KiB");
    sandbox.run(&["status"]).expect(0);
    let log = sandbox.process(server).output();
    assert!(!log.contains("panicked"), "{log}");
}
