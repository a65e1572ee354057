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
    let web = |version| Web::new("web", 6, version, rolling);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn canaries_get_their_share_of_ten_thousand_requests() {
    const REQUESTS: usize = 10_000;
    let world = World::new();
    let canary = "update = { strategy = \"canary\", canary = 1, steps = [{ weight = 23, bake = \"100ms\" }], auto_promote = false }";
    let web = |version| Web { cpu: "0.4", ..Web::new("web", 3, version, canary) };
    world.deploy("web", &[web("v1")]);
    world.phase("web", &["done"]).await;
    let edge = world.edge("edge", &["web"]).await;
    routed(&edge, "web", 3).await;
    world.deploy("web", &[web("v2")]);
    world.phase("web", &["promoting"]).await;
    routed(&edge, "web", 4).await;

    let address = edge.router("web").address;
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        clients.spawn(async move {
            let mut bodies = Vec::new();
            for _ in 0..REQUESTS / 20 {
                bodies.push(get(address).await.unwrap());
            }
            bodies
        });
    }
    let answers = clients.join_all().await.concat();
    assert_eq!(edge.router("web").failed(), Vec::<String>::new());
    let new = answers.iter().filter(|(status, body)| (*status, body.as_str()) == (200, "v2")).count();
    let old = answers.iter().filter(|(status, body)| (*status, body.as_str()) == (200, "v1")).count();
    assert_eq!(new + old, REQUESTS);
    let share = 100.0 * new as f64 / REQUESTS as f64;
    assert!((21.0..=25.0).contains(&share), "{share} % went to the canary, its weight is 23 %");

    world.sandbox.run(&["promote", "web"]).expect(0);
    world.phase("web", &["done"]).await;
    routed(&edge, "web", 3).await;
    assert_eq!(get(address).await.unwrap(), (200, "v2".into()));
}

/// Healthy, never restarted, and wrong: only those who route can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn canaries_that_answer_with_errors_are_rolled_back_by_what_routers_count() {
    let world = World::new();
    let canary = "update = { strategy = \"canary\", canary = 1, steps = [{ weight = 50, bake = \"10m\" }] }";
    let web = |version, mode| Web { mode, ..Web::new("web", 2, version, canary) };
    world.deploy("web", &[web("v1", "ok")]);
    world.phase("web", &["done"]).await;
    let edge = world.edge("edge", &["web"]).await;
    routed(&edge, "web", 2).await;
    let pids = world.pids("web");
    let load = Load::start(edge.router("web").address, 200);
    world.deploy("web", &[web("v2", "errors")]);
    let ended = world.phase("web", &["rolled_back"]).await;
    let why = ended["reason"]["message"].as_str().unwrap();
    assert!(why.starts_with("100.0 % of ") && why.contains("requests to the new copies failed, 0.0 % of"), "{why}");
    world.expect_whole("web", &pids, 1, &routed(&edge, "web", 2).await);
    let sent = load.sent();
    let faults = load.end().await.len() as u64;
    assert!(faults > 0 && faults < sent, "{faults} of {sent}");
}

/// A copy outlives its last acknowledgement that is missing, by two seconds at most.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_stops_when_routers_said_that_they_know() {
    let world = World::new();
    world.deploy("web", &[Web::new("web", 3, "v1", "")]);
    world.phase("web", &["done"]).await;
    let edge = world.edge("edge", &["web"]).await;
    let pids = |n: usize| {
        let world = &world;
        async move { until("the copies", async || Some(world.pids("web")).filter(|p| p.len() == n)).await }
    };
    let copies = pids(3).await;
    routed(&edge, "web", 3).await;

    // Held back, the acknowledgement is what the copy's end waits for.
    edge.hold(true);
    world.sandbox.run(&["scale", "web", "2", "--no-wait"]).expect(0);
    let unrouted = routed(&edge, "web", 2).await.at.unwrap();
    assert!(alive(copies[2]), "its end is not before routers were told");
    edge.hold(false);
    let acked = until("the acknowledgement", async || edge.acked().1.filter(|at| *at > unrouted)).await;
    until("the copy to end", async || (!alive(copies[2])).then_some(())).await;
    let (waited, ended) = (acked - unrouted, acked.elapsed());
    assert!(waited + ended < Duration::from_secs(2), "an acknowledgement after {waited:?} is heeded; the copy ended {ended:?} later");

    // A router that never says so is waited for, but not for ever.
    edge.hold(true);
    world.sandbox.run(&["scale", "web", "1", "--no-wait"]).expect(0);
    let unrouted = routed(&edge, "web", 1).await.at.unwrap();
    until("the copy to end", async || (!alive(copies[1])).then_some(())).await;
    let waited = unrouted.elapsed();
    assert!(waited > Duration::from_millis(1700), "stopped after {waited:?}, without an acknowledgement");
    assert!(waited < Duration::from_secs(5), "stopped after {waited:?} only");
    assert_eq!(pids(1).await, copies[..1]);
}
