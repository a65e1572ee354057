//! A member that breaks the protocol.

use optimus_host::tls::{ExpectedServer, SERVER_NAME, peer_client};
use quinn::{Connection, ConnectionError};

use super::*;
use crate::peers::BODY_MAX;

/// Connects as server `number` does, and leaves the rest to the test.
async fn raw(world: &World, number: u64, to: &Listening) -> (Endpoint, Connection) {
    let settings = world.settings(number, world.server(number));
    let expected = ExpectedServer { cluster: world.cluster, server: to.settings.server };
    let tls = peer_client(&world.roots, expected, settings.certificate, settings.pins, ALPN_RAFT, &world.env.clock).unwrap();
    let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let connecting = endpoint.connect_with(transport::peer_config(tls).unwrap(), to.addr, SERVER_NAME).unwrap();
    let connection = connecting.await.unwrap();
    (endpoint, connection)
}

fn head(kind: u8, length: u32) -> Vec<u8> {
    [&[kind][..], &length.to_le_bytes()].concat()
}

/// The code with which the other side closes the connection.
async fn close_code(connection: &Connection) -> u64 {
    match tokio::time::timeout(TTL, connection.closed()).await.expect("it is closed within 10 s") {
        ConnectionError::ApplicationClosed(frame) => frame.error_code.into_inner(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_closes_its_connection_and_harms_nobody_else() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    append(&one, &two.peer(), "before").await.unwrap();
    let garbage = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![],
        vec![1],
        vec![1, 0, 0],
        head(1, 10),
        [head(1, 10), vec![0; 9]].concat(),
        [head(1, 10), vec![0; 11]].concat(),
        head(1, BODY_MAX as u32 + 1),
        head(3, (4 << 20) + (64 << 10) + 1),
        head(99, u32::MAX),
        vec![0xff; 5000],
    ];
    for bytes in &garbage {
        let (_endpoint, connection) = raw(&world, 3, &two).await;
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        let _ = send.finish();
        assert_eq!(close_code(&connection).await, u64::from(transport::close::PROTOCOL), "{:?}", &bytes[..bytes.len().min(20)]);
    }
    append(&one, &two.peer(), "after").await.unwrap();
    assert_eq!(echo.calls(), 2, "nothing of it reached the handler");
    assert_eq!(two.accepted(), garbage.len() + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kind_of_a_later_release_is_answered_not_punished() {
    let world = World::new();
    let two = world.start(2, Arc::new(Echo::default()));
    let (_endpoint, connection) = raw(&world, 3, &two).await;
    for (bytes, status) in [([head(99, 3), b"new".to_vec()].concat(), 1), ([head(1, 3), b"old".to_vec()].concat(), 0)] {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
        let answer = receive.read_to_end(4096).await.unwrap();
        assert_eq!(answer[0], status, "{}", String::from_utf8_lossy(&answer));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_holds_a_bounded_number_of_connections() {
    let world = World::new();
    let two = world.start(2, Arc::new(Echo::default()));
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(raw(&world, 3, &two).await);
        eventually("served", || two.accepted() == held.len()).await;
    }
    for (_, connection) in &held[..2] {
        assert_eq!(close_code(connection).await, u64::from(transport::close::REPLACED));
    }
    for (_, connection) in &held[2..] {
        assert!(connection.close_reason().is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_back_request_is_not_handled_and_costs_no_connection() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let two = world.start(2, echo.clone());
    let (_endpoint, connection) = raw(&world, 3, &two).await;
    // Far more than may be open at once.
    for _ in 0..500 {
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&head(1, 100)).await.unwrap();
        send.reset(0u32.into()).unwrap();
    }
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&head(1, 0)).await.unwrap();
    send.finish().unwrap();
    assert_eq!(receive.read_to_end(100).await.unwrap(), [0, 0, 0, 0, 0]);
    assert_eq!(echo.calls(), 1);
}
