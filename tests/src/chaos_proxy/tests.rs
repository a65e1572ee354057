//! The weather by itself, and a server behind the proxy on loopback.
#![allow(clippy::unwrap_used)]

use super::*;

/// Longest wait for a datagram that must come.
const SOON: Duration = Duration::from_secs(20);

fn fates(seed: u64, faults: &Faults, n: usize) -> Vec<Fate> {
    let mut dice = Dice(seed);
    (0..n).map(|_| Fate::draw(&mut dice, faults)).collect()
}

#[test]
fn a_seed_repeats_its_weather_and_another_has_its_own() {
    let faults = Faults {
        delay: Duration::from_millis(5),
        jitter: Duration::from_millis(20),
        loss: 0.1,
        duplicate: 0.1,
        reorder: 0.1,
        hold: Duration::from_millis(50),
        ..Faults::default()
    };
    assert_eq!(fates(7, &faults, 1000), fates(7, &faults, 1000));
    assert_ne!(fates(7, &faults, 1000), fates(8, &faults, 1000));
    let fates = fates(7, &faults, 10_000);
    let share = |is: fn(&Fate) -> bool| fates.iter().filter(|f| is(f)).count();
    for (what, n) in
        [("lost", share(|f| f.after.is_empty())), ("twice", share(|f| f.after.len() == 2)), ("reordered", share(|f| f.reordered))]
    {
        assert!((700..1300).contains(&n), "{n} of 10000 {what}");
    }
    let all = fates.iter().flat_map(|f| &f.after);
    assert!(all.clone().all(|d| (5..=75).contains(&d.as_millis())), "delays within their bounds");
}

#[test]
fn a_change_of_one_fault_does_not_shift_the_others() {
    let lossy = Faults { loss: 0.2, ..Faults::default() };
    let both = Faults { duplicate: 0.5, ..lossy };
    let lost = |faults| fates(3, &faults, 500).iter().map(|f| f.after.is_empty()).collect::<Vec<_>>();
    assert_eq!(lost(lossy), lost(both));
}

/// A server that sends everything back, and a client beside it.
async fn echo() -> (SocketAddr, UdpSocket) {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = server.recv_from(&mut buffer).await {
            server.send_to(&buffer[..len], from).await.unwrap();
        }
    });
    (addr, UdpSocket::bind("127.0.0.1:0").await.unwrap())
}

async fn receive(client: &UdpSocket) -> u32 {
    let mut buffer = [0; 2048];
    let len = tokio::time::timeout(SOON, client.recv(&mut buffer)).await.expect("an answer").unwrap();
    u32::from_le_bytes(buffer[..len].try_into().unwrap())
}

async fn send(client: &UdpSocket, n: u32) {
    client.send(&n.to_le_bytes()).await.unwrap();
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < end, "gave up waiting for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn without_faults_all_pass_in_order_for_every_client() {
    let (server, first) = echo().await;
    let second = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let proxy = ChaosProxy::start(1, server).await.unwrap();
    for (base, client) in [(0, &first), (1000, &second)] {
        client.connect(proxy.addr()).await.unwrap();
        for n in base..base + 50 {
            send(client, n).await;
            assert_eq!(receive(client).await, n);
        }
    }
    let counts = proxy.counts(Direction::FromServer);
    assert_eq!((counts.received, counts.delivered, counts.lost), (100, 100, 0));
}

#[tokio::test]
async fn a_one_way_blackhole_takes_one_way_only_and_heals() {
    let (server, client) = echo().await;
    let proxy = ChaosProxy::start(1, server).await.unwrap();
    client.connect(proxy.addr()).await.unwrap();
    proxy.set(Direction::FromServer, Faults::blackhole());
    send(&client, 1).await;
    until("the answer to be swallowed", || proxy.counts(Direction::FromServer).lost == 1).await;
    assert_eq!(proxy.counts(Direction::ToServer).delivered, 1);
    proxy.set_both(Faults::blackhole());
    send(&client, 2).await;
    until("the request to be swallowed", || proxy.counts(Direction::ToServer).lost == 1).await;
    proxy.heal();
    send(&client, 3).await;
    assert_eq!(receive(&client).await, 3, "neither of the swallowed ones comes after all");
}

#[tokio::test]
async fn loss_duplication_and_reordering_do_what_they_say() {
    let (server, client) = echo().await;
    let proxy = ChaosProxy::start(42, server).await.unwrap();
    client.connect(proxy.addr()).await.unwrap();
    let faults = Faults { loss: 0.2, duplicate: 0.2, reorder: 0.3, hold: Duration::from_millis(30), ..Faults::default() };
    proxy.set(Direction::ToServer, faults);
    let mut got = Vec::new();
    let (sent, mut expected) = (200u32, 0);
    for n in 0..sent {
        send(&client, n).await;
        // One after the other, so that no socket buffer overflows and every loss is the proxy's.
        until("the datagram to arrive", || proxy.counts(Direction::ToServer).received == u64::from(n) + 1).await;
        let counts = proxy.counts(Direction::ToServer);
        expected = counts.received - counts.lost + counts.duplicated;
    }
    for _ in 0..expected {
        got.push(receive(&client).await);
    }
    let counts = proxy.counts(Direction::ToServer);
    assert!(counts.lost > 20 && counts.duplicated > 15 && counts.reordered > 25, "{counts:?}");
    let mut unique = got.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len() as u64, u64::from(sent) - counts.lost);
    assert!(got.windows(2).any(|w| w[0] > w[1]), "nothing overtook anything");
}

#[tokio::test]
async fn delay_holds_back_and_a_flood_is_bounded() {
    let (server, client) = echo().await;
    let proxy = ChaosProxy::start(1, server).await.unwrap();
    client.connect(proxy.addr()).await.unwrap();
    proxy.set(Direction::ToServer, Faults { delay: Duration::from_secs(3600), ..Faults::default() });
    let mut sent = 0u64;
    while proxy.counts(Direction::ToServer).overflow == 0 {
        send(&client, 0).await;
        sent += 1;
        assert!(sent < 20 * MAX_HELD as u64, "no bound");
        if sent.is_multiple_of(64) {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(proxy.counts(Direction::ToServer).delivered, 0);
    proxy.heal();
}

#[tokio::test]
async fn a_server_that_was_down_is_reached_again() {
    let (server, client) = echo().await;
    let down = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let gone = down.local_addr().unwrap();
    drop(down);
    let proxy = ChaosProxy::start(1, gone).await.unwrap();
    client.connect(proxy.addr()).await.unwrap();
    send(&client, 1).await;
    until("the datagram to be taken", || proxy.counts(Direction::ToServer).received == 1).await;
    // A new client is led to the new place.
    proxy.redirect(server);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(proxy.addr()).await.unwrap();
    send(&client, 2).await;
    assert_eq!(receive(&client).await, 2);
}
