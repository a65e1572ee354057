//! `optimus cluster rotate-ca`: begins, follows, takes back, and keeps the CAs it hears of.

use std::sync::atomic::{AtomicUsize, Ordering};

use optimus_common::api::v1::{ActionAnswer, CaPhase, CaRotation, ClusterView};
use optimus_common::{ClusterId, Span, Timestamp};
use serde_json::json;

use crate::fake::{Fake, Reply};
use crate::world::World;

fn view(ca: u32, rotation: Option<&str>, ca_pem: &str) -> ClusterView {
    let rotation = rotation.map(|text| CaRotation {
        from: 0,
        to: 1,
        phase: CaPhase::Announce,
        started_at: Timestamp(0),
        phase_since: Timestamp(0),
        waited: Span(0),
        left: Span(3_600_000),
        overlap: Span(60_000),
        waits_for: vec![],
        text: text.into(),
    });
    let ca_pem = ca_pem.to_owned();
    let cluster = ClusterId(uuid::Uuid::nil());
    ClusterView { cluster, leader: Some(1), term: 1, last_log: 1, version: 3, servers: vec![], ca, ca_pem, rotation, warnings: vec![] }
}

/// A cluster that shows these views one after the other.
fn cluster(views: Vec<ClusterView>) -> Fake {
    let looks = AtomicUsize::new(0);
    Fake::start(move |seen| match (seen.method.as_str(), seen.path()) {
        ("GET", "/v1/cluster") => {
            let look = looks.fetch_add(1, Ordering::Relaxed).min(views.len() - 1);
            Reply::json(views[look].clone())
        }
        ("POST", "/v1/cluster:rotate-ca") => Reply::json(ActionAnswer { index: 5, deployment: None, changed: true }),
        _ => Reply::problem(404, "OPT-1104", "no such thing"),
    })
}

#[test]
fn a_rotation_is_begun_and_followed_to_its_end() {
    let fake =
        cluster(vec![view(0, None, ""), view(0, Some("announced; s2 lags"), ""), view(1, Some("signs"), ""), view(1, None, "the new CA")]);
    let world = World::with(&fake);
    let ran = world.run(&["cluster", "rotate-ca", "--watch", "--overlap", "2d"]).expect(0);
    assert!(ran.err.contains("announced; s2 lags\nsigns\nCA 1 signs, and nobody trusts the one before any more"), "{}", ran.err);
    let kept = world.run(&["cluster", "status"]);
    assert_ne!(kept.code, 0, "the context knows the new CA alone, and the fake server is of another");
}

#[test]
fn a_rotation_that_is_given_up_fails_and_one_under_way_is_only_followed() {
    let fake = cluster(vec![view(0, Some("announced"), ""), view(0, None, "")]);
    let world = World::with(&fake);
    let ran = world.run(&["cluster", "rotate-ca", "--watch"]).expect(1);
    assert!(ran.err.contains("the rotation was given up") && !ran.err.contains("a new CA is announced;"), "{}", ran.err);
}

#[test]
fn what_is_asked_for_goes_to_the_server() {
    let fake = cluster(vec![view(0, None, "")]);
    let world = World::with(&fake);
    for (flags, body) in [
        (vec![], json!({ "force": false, "abort": false })),
        (vec!["--abort"], json!({ "force": false, "abort": true })),
        (vec!["--force"], json!({ "force": true, "abort": false })),
        (vec!["--overlap", "2d"], json!({ "force": false, "abort": false, "overlap": "2d" })),
    ] {
        world.run(&[&["cluster", "rotate-ca"], flags.as_slice()].concat()).expect(0);
        let seen = fake.seen();
        assert_eq!(seen.last().unwrap().body, body);
    }
    world.run(&["cluster", "rotate-ca", "--abort", "--force"]).expect(2);
}
