//! What clients see while releases change.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::support::*;

/// Requests at a fixed rate, whatever becomes of them.
struct Load {
    sent: Arc<AtomicU64>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Vec<String>>,
}

impl Load {
    fn start(address: SocketAddr, per_second: u32) -> Load {
        let (stop, mut stopped) = oneshot::channel();
        let sent = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&sent);
        let running = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
            let (mut requests, mut faults) = (JoinSet::new(), Vec::new());
            loop {
                tokio::select! {
                    _ = &mut stopped => break,
                    _ = ticks.tick() => {
                        requests.spawn(get(address));
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    Some(ended) = requests.join_next() => faults.extend(fault(ended.unwrap())),
                }
            }
            while let Some(ended) = requests.join_next().await {
                faults.extend(fault(ended.unwrap()));
            }
            faults
        });
        Load { sent, stop, running }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// What went wrong, of all that were sent.
    async fn end(self) -> Vec<String> {
        self.stop.send(()).unwrap();
        self.running.await.unwrap()
    }
}

fn fault(ended: std::io::Result<(u16, String)>) -> Option<String> {
    match ended {
        Ok((200, _)) => None,
        Ok((status, body)) => Some(format!("{status} {body}")),
        Err(error) => Some(error.to_string()),
    }
}

/// One request over a connection of its own: status and body.
pub async fn get(address: SocketAddr) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    Ok((head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0), body.to_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_six_copies_are_replaced() {
    let world = World::new();
    let rolling = "update = { parallel = 2, deadline = \"30s\" }";
    let web = |version| Web { name: "web", copies: 6, version, mode: "ok", more: rolling };
    world.deploy("web", &[web("v1")]);
    world.phase("web", &["done"]).await;
    let edge = world.edge("edge", &["web"]).await;
    let before = routed(&edge, "web", 6).await;
    let router = edge.router("web");

    let load = Load::start(router.address, 200);
    until("a hundred requests before", async || (load.sent() >= 100).then_some(())).await;
    world.deploy("web", &[web("v2")]);
    world.phase("web", &["done"]).await;
    let after = routed(&edge, "web", 6).await;
    let then = load.sent();
    until("a hundred requests after", async || (load.sent() >= then + 100).then_some(())).await;
    let sent = load.sent();
    assert_eq!(load.end().await, Vec::<String>::new(), "of {sent} requests");
    assert_eq!(router.failed(), Vec::<String>::new());

    assert!(after.releases.values().all(|release| before.releases.values().all(|old| release > old)), "{after:?}");
    let served = router.served();
    assert!(before.releases.keys().chain(after.releases.keys()).all(|copy| served.contains_key(copy)), "all twelve served: {served:?}");
    assert_eq!(get(router.address).await.unwrap(), (200, "v2".into()));
}
