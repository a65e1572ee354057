//! Who is let in, at either end.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_not_taken_for_another_one() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (three, one) = (world.start(3, echo.clone()), world.caller(1));
    world.server(2);
    let reason = refused(&one, &Peer { id: 2, addr: three.addr.to_string() }).await;
    assert!(reason.contains("server/3") && reason.contains("expected server/2"), "{reason}");
    assert_eq!(echo.calls(), 0);
    append(&one, &three.peer(), "the right one").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_cannot_call_as_a_server() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let two = world.start(2, echo.clone());
    let agent = QuicPeers::new(world.settings(1, world.agent())).unwrap();
    let reason = refused(&agent, &two.peer()).await;
    assert!(reason.contains("not of a server"), "{reason}");
    assert_eq!(echo.calls(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_calls_without_a_certificate_or_as_the_called_server_itself() {
    #[derive(Debug)]
    struct Nothing;
    impl ResolvesClientCert for Nothing {
        fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }
        fn has_certs(&self) -> bool {
            false
        }
    }
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let two = world.start(2, echo.clone());
    let nameless = QuicPeers::new(PeerSettings { certificate: Arc::new(Nothing), ..world.settings(1, world.server(1)) }).unwrap();
    let reason = refused(&nameless, &two.peer()).await;
    assert!(reason.contains("must show a certificate"), "{reason}");
    let itself = QuicPeers::new(two.settings.clone()).unwrap();
    let reason = refused(&itself, &two.peer()).await;
    assert!(reason.contains("which is this one"), "{reason}");
    assert_eq!(echo.calls(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_another_cluster_are_refused_by_both_ends() {
    let (world, other) = (World::new(), World::new());
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    append(&one, &two.peer(), "of this cluster").await.unwrap();

    // Its certificate is refused by us,
    let foreign = other.server(2);
    let settings = PeerSettings { roots: other.roots.clone(), ..world.settings(2, foreign) };
    let impostor = Listening::start(settings, echo.clone(), None);
    let fresh = world.caller(3);
    let reason = refused(&fresh, &impostor.peer()).await;
    println!("{reason}");
    // and we by it, also when the foreigner trusts our authority.
    let foreigner = QuicPeers::new(world.settings(1, other.server(1))).unwrap();
    let reason = refused(&foreigner, &two.peer()).await;
    assert!(reason.contains("another cluster"), "{reason}");

    // A certificate of our authority that names another cluster.
    let key = Key::generate().unwrap();
    let secret = Key::generate().unwrap();
    let ca_key = secret.to_pkcs8();
    let (mut world, twin_cluster) = (world, ClusterId(HostEnv::new().new_id()));
    let self_signed = {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        params.self_signed(secret.pair()).unwrap().der().to_vec()
    };
    let twin = Ca::open(twin_cluster, &self_signed, Key::from_pkcs8(&ca_key).unwrap()).unwrap();
    world.ca = Ca::open(world.cluster, &self_signed, Key::from_pkcs8(&ca_key).unwrap()).unwrap();
    world.roots = Roots::new(&[&self_signed]).unwrap();
    let two = world.start(2, echo.clone());
    append(&world.caller(1), &two.peer(), "under the same authority").await.unwrap();
    let certificate = shown(twin.issue_server(&key, 1, &[], &world.env).unwrap().certificate, &key);
    world.pins.set(1, key.fingerprint());
    let reason = refused(&QuicPeers::new(world.settings(1, certificate)).unwrap(), &two.peer()).await;
    assert!(reason.contains("is for cluster"), "{reason}");
    assert_eq!(echo.calls(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_hundred_days_off_members_still_find_each_other() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    world.days_later(100);
    append(&one, &two.peer(), "both certificates have expired").await.unwrap();
}

/// One host's clock runs hours ahead, and it certifies itself by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_from_the_future_counts_only_with_the_key_on_record() {
    let world = World::new();
    world.days_later(1);
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    world.clock.0.store(0, Ordering::Relaxed);
    append(&one, &two.peer(), "both certificates are not valid yet").await.unwrap();
    world.pins.set(1, [0; 32]);
    let refused = append(&QuicPeers::new(one.settings.clone()).unwrap(), &two.peer(), "another key").await;
    assert!(matches!(refused, Err(PeerError::Unreachable(_) | PeerError::NotSent(_))), "{refused:?}");
}

/// An expired certificate, with the record of its key as `key` at the end that looks at it.
async fn expired(ours: bool, key: Option<[u8; 32]>) -> Result<Bytes, PeerError> {
    let world = World::new();
    let (first, second) = (world.server(1), world.server(2));
    let pins = |server: u64| {
        let table = PinTable::new([]);
        for n in 1..=2 {
            use optimus_host::tls::PinnedKeys as _;
            let held = if n == server { key } else { world.pins.key_of(n) };
            held.into_iter().for_each(|key| table.set(n, key));
        }
        table
    };
    let (their_pins, our_pins) = if ours { (pins(1), world.pins.clone()) } else { (world.pins.clone(), pins(2)) };
    let two = Listening::start(PeerSettings { pins: their_pins, ..world.settings(2, second) }, Arc::new(Echo::default()), None);
    let one = QuicPeers::new(PeerSettings { pins: our_pins, ..world.settings(1, first) }).unwrap();
    world.days_later(100);
    append(&one, &two.peer(), "?").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_counts_only_with_the_key_on_record() {
    for ours in [true, false] {
        for key in [Some([0; 32]), None] {
            let refused = expired(ours, key).await;
            assert!(
                matches!(refused, Err(PeerError::Unreachable(_) | PeerError::NotSent(_))),
                "ours: {ours}, record: {key:?}: {refused:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_is_another_server() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    for server in 1..=2 {
        world.pins.set(server, [0; 32]);
    }
    let refused = append(&one, &two.peer(), "under a known number").await;
    assert!(matches!(refused, Err(PeerError::Unreachable(_) | PeerError::NotSent(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_server_is_out_at_its_next_call_and_stays_out() {
    let world = World::new();
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    append(&one, &two.peer(), "a member").await.unwrap();
    world.pins.remove(1);
    let before = echo.calls();
    let reason = refused(&one, &two.peer()).await;
    println!("{reason}");
    assert_eq!(echo.calls(), before, "its request was not even read");
    let again = QuicPeers::new(one.settings.clone()).unwrap();
    let reason = refused(&again, &two.peer()).await;
    assert!(reason.contains("revoked"), "{reason}");
    // And the other way: nobody calls a server that was removed.
    world.pins.set(1, [1; 32]);
    world.pins.remove(2);
    let fresh = world.caller(3);
    let reason = refused(&fresh, &two.peer()).await;
    println!("{reason}");
    assert_eq!(echo.calls(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_is_replaced_without_a_gap() {
    let mut world = World::new();
    let old = world.ca.certificate().to_vec();
    let echo = Arc::new(Echo::default());
    let (two, one) = (world.start(2, echo.clone()), world.caller(1));
    append(&one, &two.peer(), "under the old one").await.unwrap();

    let (next, _) = Ca::create(world.cluster, &world.env).unwrap();
    let next_der = next.certificate().to_vec();
    world.roots.replace(&[&old, &next_der]).unwrap();
    world.ca = next;
    let (three, four) = (world.start(3, echo.clone()), world.caller(4));
    append(&one, &three.peer(), "old calls new").await.unwrap();
    append(&four, &two.peer(), "new calls old").await.unwrap();

    world.roots.replace(&[&next_der]).unwrap();
    append(&one, &two.peer(), "what is connected stays").await.unwrap();
    let late = QuicPeers::new(one.settings.clone()).unwrap();
    let reason = refused(&late, &three.peer()).await;
    assert!(reason.contains("another cluster"), "{reason}");
    append(&four, &three.peer(), "under the new one").await.unwrap();
}
