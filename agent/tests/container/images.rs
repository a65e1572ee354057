//! Fetching from a registry with a password and a certificate, and deleting what was fetched.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use optimus_agent::driver::container::images::Marks;
use optimus_common::protocol::{DesiredAlloc, Phase};
use optimus_common::spec::{Driver, Pull};
use optimus_common::time::Span;

use crate::engine::{Engine, Registry};
use crate::support::{Node, until};
use crate::{copy, node, with};

fn of_image(n: u128, image: &str, login: Option<&str>) -> DesiredAlloc {
    let mut spec = with("cat /mark; echo; exec sleep 1000", |c| {
        c.image = image.to_owned();
        c.auth = login.map(str::to_owned);
    });
    spec.resources.pids = 16;
    copy(n, &spec, None)
}

fn login(node: &Node, name: &str, password: &str) {
    let dir = node.config.data_dir.join("registry-auth");
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{name}.json"));
    fs::write(&path, format!(r#"{{"username":"{}","password":"{password}"}}"#, Registry::USER)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The reason of a start that was refused.
fn refused(node: &mut Node, alloc: &DesiredAlloc) -> String {
    node.want([alloc.clone()]);
    let status = node.until(alloc.id, "refused", |s| s.phase == Phase::Backoff);
    status.reason.unwrap().root().to_string()
}

#[test]
fn images_are_fetched_with_login_and_certificate_and_only_ours_are_deleted() {
    let mut engine = Engine::new();
    let registry = Registry::new(&engine.bridge_ip);
    engine.stop();
    engine.trust = Some(registry.ca.clone());
    engine.start();
    let one = registry.push(&engine, "shop/one:1", "first");
    let two = registry.push(&engine, "shop/two:1", "second");
    engine.import_with("foreign:1", "not fetched by us");
    let mut node = node(&engine);
    login(&node, "good", Registry::PASSWORD);
    login(&node, "wrong", "guess");
    // The client's own login must not help.
    fs::remove_dir_all(engine.dir.path().join("client")).unwrap();

    let text = refused(&mut node, &of_image(1, &one, None));
    assert!(text.contains("auth") && text.contains(&one), "{text}");
    let text = refused(&mut node, &of_image(2, &one, Some("wrong")));
    assert!(text.contains("unauthorized") && !text.contains("guess"), "{text}");
    let text = refused(&mut node, &of_image(3, &one, Some("none-such")));
    assert!(text.contains("none-such.json"), "{text}");
    assert!(!engine.has_image(&one));
    // Several copies, one fetch.
    let copies: Vec<_> = (4..8).map(|n| of_image(n, &one, Some("good"))).collect();
    node.want(copies.clone());
    for copy in &copies {
        until("it runs the image", || node.logs(copy.id, None).contains(&"first".to_owned()).then_some(()));
    }
    let mut always = of_image(8, &two, Some("good"));
    let mut spec: optimus_common::spec::WorkloadSpec = always.spec().unwrap();
    if let Driver::Container(container) = &mut spec.driver {
        container.pull = Pull::Always;
    }
    always.spec = optimus_common::protocol::Blob::of(&spec);
    node.want([always.clone()]);
    until("it runs the image", || node.logs(always.id, None).contains(&"second".to_owned()).then_some(()));

    // The disk is always fuller than nothing. What is in use stays, and what others brought.
    let everything = Marks { high: 0, low: 0, unused_for: Duration::ZERO };
    node.stop(always.id);
    node.until(always.id, "stopped", |s| s.phase == Phase::Stopped);
    until("its container is gone", || (!engine.containers().iter().any(|c| c.contains(&always.id.to_string()))).then_some(()));
    let marks = Marks { high: 101, ..everything };
    assert_eq!(node.block_on(node.agent().collect_images(marks)), 0, "the disk is not that full");
    assert_eq!(node.block_on(node.agent().collect_images(everything)), 1);
    assert!(engine.has_image(&one) && !engine.has_image(&two) && engine.has_image("foreign:1") && engine.has_image(crate::engine::IMAGE));

    // An authority that is not trusted.
    engine.stop();
    engine.trust = None;
    engine.start();
    let text = refused(&mut node, &of_image(9, &two, Some("good")));
    assert!(text.contains("certificate"), "{text}");
}

#[test]
fn a_fetch_that_does_not_end_is_given_up_in_time_and_holds_up_nobody() {
    let engine = Engine::new();
    let mut node = node(&engine);
    // Takes connections and says nothing.
    let silent = TcpListener::bind((engine.bridge_ip.as_str(), 0)).unwrap();
    let image = format!("{}/shop/slow:1", silent.local_addr().unwrap());
    let mut slow = with("sleep 1000", |c| {
        c.image = image;
        c.pull_timeout = Span::secs(2);
    });
    slow.restart.delay = Span::secs(30);
    let (slow, other) = (copy(1, &slow, None), copy(2, &crate::contained("sleep 1000"), None));
    let begun = Instant::now();
    node.want([slow.clone(), other.clone()]);
    node.until(other.id, "running", |s| s.phase == Phase::Running);
    let status = node.until(slow.id, "given up", |s| s.phase == Phase::Backoff);
    let text = status.reason.unwrap().root().to_string();
    assert!(text.contains("not done within 2s"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
}
