//! Reporters, a network that loses what it likes, and a leader's table: no Raft, no clock.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use optimus_common::NodeId;
use proptest::prelude::*;

use super::super::{GRACE, LEASE};
use super::reporter::{Hearing, Reporter};
use super::table::Table;
use super::wire::{Content, LeaseAnswer, LeaseReport};
use super::{FRESH, MOVE, RECENT, SILENT_SERVER};

fn node(n: u128) -> NodeId {
    NodeId(uuid::Uuid::from_u128(n))
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Clocks of servers have nothing to do with each other.
fn clock_of(server: u64, now: Duration) -> Duration {
    now + ms(server * 1_000_000)
}

/// One server as far as leases go. Times are the world's.
struct Server {
    id: u64,
    serving_since: Duration,
    hearings: BTreeMap<NodeId, Hearing>,
    reporter: Reporter,
}

impl Server {
    fn new(id: u64, serving_since: Duration) -> Self {
        let incarnation = serving_since.as_millis() as u64;
        Server { id, serving_since, hearings: BTreeMap::new(), reporter: Reporter::new(id, incarnation) }
    }
    fn hear(&mut self, node: NodeId, at: Duration) {
        let session = self.hearings.get(&node).and_then(|h| h.session).or(Some(at));
        self.hearings.insert(node, Hearing { heard: at, session });
    }
    fn close(&mut self, node: NodeId) {
        self.hearings.entry(node).and_modify(|h| h.session = None);
    }
    fn report(&mut self, now: Duration) -> LeaseReport {
        let own = |at: Duration| clock_of(self.id, at);
        let mut hearings = self.hearings.clone();
        hearings.retain(|_, h| h.session.is_some() || now.saturating_sub(h.heard) <= RECENT);
        for hearing in hearings.values_mut() {
            *hearing = Hearing { heard: own(hearing.heard), session: hearing.session.map(own) };
        }
        let report = self.reporter.report(own(now), own(self.serving_since), &hearings);
        LeaseReport::decode(&report.encode()).unwrap()
    }
    /// Reports until the leader has it.
    fn tell(&mut self, table: &mut Table, now: Duration) {
        for _ in 0..3 {
            let answer = table.take(now, self.report(now));
            if !self.reporter.answered(&answer) {
                return;
            }
        }
        panic!("server {} and the leader do not come to terms", self.id);
    }
}

fn down(table: &Table, now: Duration, up: &[u128], others: &[u64]) -> Vec<NodeId> {
    down_with(table, now, up, others, &|_| None)
}

fn down_with(table: &Table, now: Duration, up: &[u128], others: &[u64], own: &dyn Fn(NodeId) -> Option<Duration>) -> Vec<NodeId> {
    let others: BTreeSet<u64> = others.iter().copied().collect();
    table.judge(now, up.iter().map(|&n| node(n)), &others, own).down
}

const LONG: Duration = ms(100_000);

#[test]
fn alone_silence_counts_from_the_last_word_and_after_a_start_only_after_the_grace() {
    let table = Table::new(LONG, LONG);
    let own = |n: NodeId| {
        [(node(2), LONG - ms(10)), (node(3), LONG + ms(2000)), (node(4), LONG + ms(11_000))]
            .into_iter()
            .find(|(id, _)| *id == n)
            .map(|(_, at)| at)
    };
    let at = |now: Duration| down_with(&table, now, &[1, 2, 3, 4], &[], &own);
    assert_eq!(at(LONG + ms(7000)), []);
    assert_eq!(at(LONG + ms(7001)), [node(3)]);
    assert_eq!(at(LONG + GRACE), [node(3)]);
    assert_eq!(at(LONG + GRACE + ms(1)), [node(1), node(2), node(3)], "the grace is over for those not heard since the start");
    assert_eq!(at(LONG + ms(16_001)).len(), 4);
}

#[test]
fn a_leader_change_restarts_no_lease_once_all_servers_have_told() {
    let since = LONG;
    let (mut b, mut c) = (Server::new(2, ms(0)), Server::new(3, ms(0)));
    b.hear(node(1), since - ms(4000));
    c.hear(node(2), since - ms(100));
    c.hear(node(3), since - ms(4000));
    c.close(node(3));
    let mut table = Table::new(since, ms(0));
    b.tell(&mut table, since + ms(200));
    let all = [1, 2, 3];
    assert_eq!(down(&table, since + ms(1001), &all, &[2, 3]), [], "server 3 may have heard them since");
    c.tell(&mut table, since + ms(300));
    assert_eq!(down(&table, since + ms(1000), &all, &[2, 3]), []);
    assert_eq!(down(&table, since + ms(1001), &all, &[2, 3]), [node(1), node(3)], "five seconds after their last word");
}

#[test]
fn nodes_of_a_leader_that_died_have_a_lease_to_move_and_those_that_died_with_it_no_more() {
    let since = LONG;
    let mut b = Server::new(2, ms(0));
    b.hear(node(1), since - ms(1000)); // moved here before
    let mut table = Table::new(since, ms(0));
    b.tell(&mut table, since + ms(100));
    // Server 1 was the leader and is dead; nodes 2 and 3 were there, 2 moves within two seconds.
    b.hear(node(2), since + ms(2000));
    b.tell(&mut table, since + ms(2050));
    for step in 0..100 {
        let now = since + ms(2500 + step * 50);
        b.hear(node(1), now);
        b.hear(node(2), now);
        b.tell(&mut table, now);
        let lost = now > since + LEASE;
        assert_eq!(down(&table, now, &[1, 2, 3], &[1, 2]), if lost { vec![node(3)] } else { vec![] }, "{step}");
    }
}

#[test]
fn a_server_that_died_and_came_back_at_once_proves_nothing_about_its_nodes() {
    let since = LONG;
    // It led, was killed, runs again, and follows before the next leader has begun.
    let (mut a, mut c) = (Server::new(1, since - ms(300)), Server::new(3, ms(0)));
    c.hear(node(1), since - ms(8000)); // left for the server that died
    c.close(node(1));
    let mut table = Table::new(since, ms(0));
    a.tell(&mut table, since + ms(100));
    c.tell(&mut table, since + ms(100));
    assert_eq!(down(&table, since + LEASE, &[1], &[1, 3]), []);
    assert_eq!(down(&table, since + LEASE + ms(1), &[1], &[1, 3]), [node(1)]);
}

#[test]
fn after_a_start_of_the_whole_cluster_all_nodes_have_the_grace() {
    let since = LONG;
    let (mut b, mut c) = (Server::new(2, since - ms(900)), Server::new(3, since - ms(400)));
    let mut table = Table::new(since, since - ms(1000));
    b.tell(&mut table, since + ms(100));
    c.tell(&mut table, since + ms(100));
    assert_eq!(down(&table, since + ms(9000), &[1], &[2, 3]), []);
    assert_eq!(down(&table, since + ms(9001), &[1], &[2, 3]), [node(1)]);
    // With one server that has been there all the time it is no start of the cluster.
    let mut d = Server::new(4, ms(0));
    d.tell(&mut table, since + ms(100));
    assert_eq!(down(&table, since + ms(5001), &[1], &[2, 3, 4]), [node(1)]);
}

#[test]
fn nodes_of_a_server_that_falls_silent_have_time_to_show_up_elsewhere() {
    let since = LONG;
    let mut b = Server::new(2, ms(0));
    let mut table = Table::new(since, ms(0));
    let cut = since + ms(20_000);
    b.hear(node(1), cut - ms(1400));
    b.hear(node(2), cut - ms(2500));
    b.tell(&mut table, cut);
    let at = |now| down(&table, now, &[1, 2], &[2]);
    assert_eq!(at(cut + ms(2500)), []);
    assert_eq!(at(cut + ms(2501)), [node(2)], "it was silent before its server was");
    assert_eq!(at(cut + LEASE + MOVE), [node(2)]);
    assert_eq!(at(cut + LEASE + MOVE + ms(1)), [node(1), node(2)]);
    // It starts again, with other sessions.
    let mut again = Server::new(2, cut + ms(600));
    again.tell(&mut table, cut + ms(700));
    let at = |now| down(&table, now, &[1], &[2]);
    assert_eq!(at(cut + MOVE + LEASE), []);
    assert_eq!(at(cut + MOVE + LEASE + ms(1)), [node(1)]);
}

#[test]
fn a_node_that_comes_up_is_not_judged_by_its_past() {
    let mut b = Server::new(2, ms(0));
    b.hear(node(1), LONG);
    let mut table = Table::new(LONG, ms(0));
    b.tell(&mut table, LONG);
    b.close(node(1));
    b.tell(&mut table, LONG + ms(500));
    let later = LONG + ms(60_000);
    assert_eq!(down(&table, later, &[1], &[2]), [node(1)]);
    table.came_up(node(1), later);
    assert_eq!(down(&table, later + LEASE, &[1], &[2]), []);
    assert_eq!(down(&table, later + LEASE + ms(1), &[1], &[2]), [node(1)]);
}

#[test]
fn beats_are_small_and_lost_reports_and_answers_are_noticed() {
    let mut b = Server::new(2, ms(0));
    for n in 0..1000 {
        b.hear(node(n), LONG);
    }
    let mut table = Table::new(LONG, ms(0));
    let first = b.report(LONG);
    assert!(matches!(&first.content, Content::Full { nodes, .. } if nodes.len() == 1000));
    let answer = table.take(LONG, first);
    assert!(!b.reporter.answered(&answer));
    let beat = b.report(LONG + ms(500));
    assert!(beat.encode().len() < 64, "{}", beat.encode().len());
    let answer = table.take(LONG + ms(500), beat);
    assert!(matches!(answer, LeaseAnswer::Taken { .. }) && !b.reporter.answered(&answer));

    // The report is lost: the next one carries its change.
    b.hear(node(5000), LONG + ms(600));
    let _ = b.report(LONG + ms(600));
    b.reporter.lost();
    b.tell(&mut table, LONG + ms(700));
    assert_eq!(table.holder(node(5000)), Some(2));
    // The answer is lost: the leader has moved on, and asks for all.
    b.close(node(7));
    let lost = b.report(LONG + ms(800));
    assert!(matches!(table.take(LONG + ms(800), lost.clone()), LeaseAnswer::Taken { .. }));
    b.reporter.lost();
    assert_eq!(table.take(LONG + ms(900), b.report(LONG + ms(900))), LeaseAnswer::SendFull);
    assert!(b.reporter.answered(&LeaseAnswer::SendFull));
    b.tell(&mut table, LONG + ms(900));
    assert_eq!(table.holder(node(7)), None);
    // One that arrives late changes nothing.
    b.hear(node(7), LONG + ms(950));
    b.tell(&mut table, LONG + ms(950));
    assert_eq!(table.take(LONG + ms(1000), lost), LeaseAnswer::SendFull);
    assert_eq!(table.holder(node(7)), Some(2));
    // Another leader asks for all.
    let mut next = Table::new(LONG + ms(1000), ms(0));
    assert_eq!(next.take(LONG + ms(1000), b.report(LONG + ms(1000))), LeaseAnswer::SendFull);
    b.reporter.answered(&LeaseAnswer::SendFull);
    b.tell(&mut next, LONG + ms(1001));
    assert_eq!(next.holder(node(999)), Some(2));
}

#[test]
fn a_set_that_does_not_match_its_digest_is_asked_for_again() {
    let mut b = Server::new(2, ms(0));
    b.hear(node(1), LONG);
    let mut table = Table::new(LONG, ms(0));
    b.tell(&mut table, LONG);
    b.hear(node(2), LONG);
    let mut report = b.report(LONG + ms(1));
    report.hash ^= 1;
    assert_eq!(table.take(LONG + ms(1), report), LeaseAnswer::SendFull);
    b.reporter.answered(&LeaseAnswer::SendFull);
    b.tell(&mut table, LONG + ms(2));
    assert_eq!(table.holder(node(2)), Some(2));
}

#[test]
fn of_two_sessions_of_a_node_the_older_server_is_told() {
    let (mut b, mut c) = (Server::new(2, ms(0)), Server::new(3, ms(0)));
    let mut table = Table::new(LONG, ms(0));
    b.hear(node(1), LONG);
    b.tell(&mut table, LONG);
    c.hear(node(1), LONG + ms(3000));
    c.tell(&mut table, LONG + ms(3100));
    b.hear(node(1), LONG + ms(3200));
    let answer = table.take(LONG + ms(3500), b.report(LONG + ms(3500)));
    assert!(matches!(&answer, LeaseAnswer::Taken { replaced, .. } if *replaced == [(node(1), 500)]), "{answer:?}");
    assert_eq!(table.holder(node(1)), Some(3));
    // Here, on the leader, a younger one begins, and an older one is known.
    assert_eq!(table.session_began(None, node(1), LONG + ms(4000)), None);
    assert_eq!(table.session_began(None, node(1), LONG + ms(2000)), Some(LONG + ms(3000)));
    let answer = table.take(LONG + ms(4100), c.report(LONG + ms(4100)));
    assert!(matches!(&answer, LeaseAnswer::Taken { replaced, .. } if *replaced == [(node(1), 100)]), "{answer:?}");
}

/// One step of the world; each takes some time.
#[derive(Debug, Clone)]
enum Step {
    /// A node beats at the server it is at, or moves there.
    Beat {
        node: u128,
        server: usize,
    },
    Silence,
    Close {
        node: u128,
        server: usize,
    },
    /// Each server reports; a bit says what is lost: the report, then the answer.
    Reports {
        lost: u8,
    },
    /// Another server leads.
    Lead {
        server: usize,
    },
    /// A server starts again.
    Restart {
        server: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => (0..6u128, 0..3usize).prop_map(|(node, server)| Step::Beat { node, server }),
        10 => Just(Step::Silence),
        3 => (0..6u128, 0..3usize).prop_map(|(node, server)| Step::Close { node, server }),
        40 => Just(Step::Reports { lost: 0 }),
        2 => any::<u8>().prop_map(|lost| Step::Reports { lost }),
        1 => (0..3usize).prop_map(|server| Step::Lead { server }),
        1 => (0..3usize).prop_map(|server| Step::Restart { server }),
    ]
}

/// Whatever is lost and whoever leads: a node that some server has heard within the last second is never down, and one
/// that all were deaf to for long is, as long as one leader could ask all servers.
#[test]
fn who_is_heard_is_not_down_and_who_is_not_is() {
    let judged = std::cell::Cell::new((0u64, 0u64));
    proptest!(ProptestConfig::with_cases(512), |(steps in prop::collection::vec((step(), 20..400u64), 1..300))| {
        let mut now = LONG;
        let mut servers: Vec<Server> = (0..3).map(|id| Server::new(id, ms(0))).collect();
        let mut heard: BTreeMap<NodeId, (Duration, usize)> = BTreeMap::new();
        let (mut leader, mut since) = (0usize, now);
        let mut table = Table::new(now, ms(0));
        // The last time each server's report got through, whole.
        let mut told = [None::<Duration>; 3];
        let mut lossy = now;
        for (step, took) in steps {
            now += ms(took);
            match step {
                Step::Beat { node: n, server } => {
                    servers[server].hear(node(n), now);
                    heard.insert(node(n), (now, server));
                }
                Step::Silence => {}
                Step::Close { node: n, server } => servers[server].close(node(n)),
                Step::Reports { lost } => {
                    for (i, server) in servers.iter_mut().enumerate().filter(|(i, _)| *i != leader) {
                        if lost & (1 << i) != 0 {
                            let _ = server.report(now);
                            server.reporter.lost();
                            lossy = now;
                            continue;
                        }
                        if lost & (16 << i) != 0 {
                            if matches!(table.take(now, server.report(now)), LeaseAnswer::Taken { .. }) {
                                told[i] = Some(now);
                            }
                            server.reporter.lost();
                            lossy = now;
                            continue;
                        }
                        server.tell(&mut table, now);
                        told[i] = Some(now);
                    }
                }
                Step::Lead { server } if server != leader => {
                    leader = server;
                    since = now;
                    told = [None; 3];
                    table = Table::new(now, servers[leader].serving_since);
                }
                Step::Lead { .. } => {}
                Step::Restart { server } => {
                    // Its sessions end with it, and with it what it had heard and not told.
                    heard.retain(|_, (at, s)| *s != server || told[server].is_some_and(|t| t >= *at));
                    servers[server] = Server::new(server as u64, now);
                    if server == leader {
                        leader = (server + 1) % 3;
                        since = now;
                        told = [None; 3];
                        table = Table::new(now, servers[leader].serving_since);
                    }
                    lossy = now;
                }
            }
            let own = servers[leader].hearings.clone();
            let others: BTreeSet<u64> = (0..3).filter(|i| *i != leader as u64).collect();
            let up: Vec<NodeId> = heard.keys().copied().collect();
            let verdict = table.judge(now, up.iter().copied(), &others, &|n| own.get(&n).map(|h| h.heard));
            for (&n, &(at, server)) in &heard {
                let is_down = verdict.down.contains(&n);
                // The leader hears it itself, or was told; or its server has told this leader nothing yet.
                let known = server == leader || told[server].map_or(now - since <= LEASE, |t| t >= at);
                if known && now - at <= ms(1000) {
                    judged.set((judged.get().0 + 1, judged.get().1));
                    prop_assert!(!is_down, "{n:?} was heard {:?} ago at server {server}", now - at);
                }
                let bound = LEASE + FRESH + MOVE;
                let settled = now - since > GRACE + LEASE && now - lossy > bound;
                if settled && now - at > bound.max(LEASE + SILENT_SERVER) {
                    judged.set((judged.get().0, judged.get().1 + 1));
                    prop_assert!(is_down, "{n:?} was not heard for {:?}", now - at);
                }
            }
            prop_assert!(verdict.look_at >= now);
        }
    });
    let (heard, silent) = judged.get();
    assert!(heard > 1000 && silent > 1000, "the steps prove nothing: {heard} heard and {silent} silent nodes were judged");
}
