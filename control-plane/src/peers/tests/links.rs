//! One caller, one called.

use super::*;
use crate::peers::{BODY_MAX, PART_MAX};

type Calls = Vec<tokio::task::JoinHandle<Result<Bytes, PeerError>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_carries_any_body_there_and_back_over_one_connection() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    for length in [0, 1, 4, 5, 1200, 70_000, (256 << 10) + 1, 5 << 20] {
        let body: Bytes = (0..length).map(|i| (i * 7 % 251) as u8).collect::<Vec<_>>().into();
        let answer = one.call(two.peer(), PeerRpc::Append, body.clone(), TTL).await.unwrap();
        assert!(answer == body, "{length} bytes came back as {}", answer.len());
    }
    let refused = one.call(two.peer(), PeerRpc::Transfer, Bytes::new(), TTL).await;
    assert_eq!(refused, Err(PeerError::Refused("not today".to_owned())));
    assert!(echo.calls.lock().unwrap().iter().all(|(from, _)| *from == 1), "the caller is whom its certificate names");
    assert_eq!(two.accepted(), 1);
    one.close_endpoint().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_long_is_refused_before_it_is_sent() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    for (kind, length) in [(PeerRpc::Append, BODY_MAX + 1), (PeerRpc::Snapshot, PART_MAX + 1)] {
        let refused = one.call(two.peer(), kind, vec![0; length].into(), TTL).await;
        assert!(matches!(refused, Err(PeerError::Refused(_))), "{refused:?}");
    }
    one.call(two.peer(), PeerRpc::Snapshot, vec![0; PART_MAX].into(), TTL).await.unwrap();
    assert_eq!(echo.calls(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_at_once_share_one_dial() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    let calls: Calls = (0..300)
        .map(|_| {
            let (one, peer) = (one.clone(), two.peer());
            tokio::spawn(async move { append(&one, &peer, "all at once").await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), "all at once");
    }
    assert_eq!(two.accepted(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_answers_are_no_reason_to_dial_anew() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    append(&one, &two.peer(), "first").await.unwrap();
    for _ in 0..6 {
        let late = one.call(two.peer(), PeerRpc::Propose, Bytes::from_static(b"never answered"), Duration::from_millis(100)).await;
        assert_eq!(late, Err(PeerError::Timeout));
    }
    assert_eq!(append(&one, &two.peer(), "still there").await.unwrap(), "still there");
    assert_eq!(two.accepted(), 1, "the peer acknowledged every packet, so it is there");
}

/// Calls as a leader does: short ones, again and again.
async fn until_answered(from: &Arc<QuicPeers>, to: &Peer) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while from.call(to.clone(), PeerRpc::Append, Bytes::from_static(b"beat"), Duration::from_millis(100)).await.is_err() {
        assert!(Instant::now() < deadline, "not reached within 20 s");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_reached_again_soon_after_it_is_back() {
    let world = World::new();
    let (mut two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    let mut took = Vec::new();
    for away in [0, 30, 150, 400, 1500] {
        let peer = two.peer();
        until_answered(&one, &peer).await;
        let (settings, addr) = two.kill();
        // The others keep calling while it is away.
        let back = Instant::now() + Duration::from_millis(away);
        while Instant::now() < back {
            let _ = one.call(peer.clone(), PeerRpc::Append, Bytes::new(), Duration::from_millis(100).min(back - Instant::now())).await;
        }
        two = Listening::start(settings, Arc::new(Echo::default()), Some(addr));
        let up = Instant::now();
        until_answered(&one, &peer).await;
        took.push((away, up.elapsed().as_millis()));
    }
    println!("away for, reached after (ms): {took:?}");
    assert!(took.iter().all(|(_, ms)| *ms < 2000), "that is the idle timeout at work: {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_fell_silent_is_dialled_anew_long_before_it_times_out() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    let peer = two.peer();
    until_answered(&one, &peer).await;
    let (settings, addr) = two.kill();
    let server = PeerServer::new(&settings, Arc::new(Echo::default()), None);
    let _two = Listening::serve_with(settings, server, Some(addr), &[99; 32]);
    let up = Instant::now();
    until_answered(&one, &peer).await;
    println!("noticed the silence and reached it after {:?}", up.elapsed());
    assert!(up.elapsed() < Duration::from_secs(2), "that is the idle timeout at work");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_waits_for_a_server_that_is_about_to_start() {
    let world = World::new();
    let (settings, addr) = world.start(2, Arc::new(Echo::default())).kill();
    let one = world.caller(1);
    let peer = Peer { id: 2, addr: addr.to_string() };
    let early = one.call(peer.clone(), PeerRpc::Vote, Bytes::from_static(b"early"), Duration::from_millis(50)).await;
    assert_eq!(early, Err(PeerError::Timeout));
    let (caller, to) = (one.clone(), peer.clone());
    let call = tokio::spawn(async move { append(&caller, &to, "patient").await });
    let _two = Listening::start(settings, Arc::new(Echo::default()), Some(addr));
    assert_eq!(call.await.unwrap().unwrap(), "patient");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_moved_is_called_at_its_new_address() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (old, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    append(&one, &old.peer(), "here").await.unwrap();
    let moved = Listening::start(old.settings.clone(), echo.clone(), None);
    // Calls go to the old address until the new one answers; then all go there.
    eventually("the new address is used", || {
        moved.accepted() > 0 || {
            let (one, peer) = (one.clone(), moved.peer());
            tokio::spawn(async move { append(&one, &peer, "there").await });
            false
        }
    })
    .await;
    let before = echo.calls();
    append(&one, &moved.peer(), "there").await.unwrap();
    eventually("calls arrive there", || echo.calls() > before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_end_calls_fail_at_once() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    append(&one, &two.peer(), "first").await.unwrap();
    one.close_endpoint().await;
    assert!(refused(&one, &two.peer()).await.contains("stopping"));
    assert!(two.server.close(TTL).await);
}

/// Sends 32 MiB in parts, `at_once` of them side by side, and appends beside them: how long all took, and each append.
async fn appends_beside_a_snapshot(at_once: usize) -> (Duration, Vec<Duration>) {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    append(&one, &two.peer(), "warm").await.unwrap();
    let part = Bytes::from(vec![7u8; 4 << 20]);
    let started = Instant::now();
    let parts: Vec<_> = (0..at_once)
        .map(|_| {
            let (one, peer, part) = (one.clone(), two.peer(), part.clone());
            tokio::spawn(async move {
                for _ in 0..8 / at_once {
                    let answer = one.call(peer.clone(), PeerRpc::Snapshot, part.clone(), Duration::from_secs(60)).await;
                    assert_eq!(answer.unwrap().len(), 4 << 20);
                }
            })
        })
        .collect();
    let mut waits = Vec::new();
    while !parts.iter().all(|p| p.is_finished()) {
        let at = Instant::now();
        append(&one, &two.peer(), "beat").await.unwrap();
        waits.push(at.elapsed());
        tokio::time::sleep(Duration::from_millis(2)).await; // the pace of the appends
    }
    for part in parts {
        part.await.unwrap();
    }
    let all = started.elapsed();
    waits.sort();
    let (count, median, worst) = (waits.len(), waits[waits.len() / 2], waits[waits.len() - 1]);
    println!("32 MiB there and back, {at_once} parts at once, in {all:?}; {count} appends beside it: median {median:?}, worst {worst:?}");
    (all, waits)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_snapshot_do_not_hold_up_appends() {
    for at_once in [1, 8] {
        let (all, waits) = appends_beside_a_snapshot(at_once).await;
        assert!(waits.len() > 3, "no append was answered while the snapshot was under way ({all:?})");
        assert!(waits[waits.len() / 2] < all / 4, "appends wait for the snapshot: {waits:?} of {all:?}");
    }
}
