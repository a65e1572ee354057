//! A CA rotation with members that hear, renew, fall silent and come back in any order.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{facts, id};
use crate::state::*;
use optimus_common::join_token::Role;
use optimus_common::{ClusterId, NodeId, Span, Timestamp, TokenId};

const SERVERS: usize = 3;
const NODES: usize = 4;

fn ca(number: u32) -> Vec<u8> {
    vec![number as u8; 4]
}

const OVERLAP: Span = Span::secs(24 * 3600);

/// To CA `number`, made while CA `from` signs: the cross certificate bears that one's number.
fn rotate(number: u32, from: u32) -> Command {
    Command::RotateCa { number, certificate: ca(number), key_sealed: vec![9], cross: vec![from as u8], overlap: OVERLAP }
}

struct Node {
    id: NodeId,
    roots: BTreeSet<u32>,
    signer: u32,
    progress: u64,
}

/// The replicated state, and what each member really has.
struct World {
    state: State,
    index: u64,
    /// Left out of a rotation, by the number of its CA.
    left_out: BTreeMap<NodeId, u32>,
    /// What each server has applied and taken up.
    servers: Vec<(u64, Cluster)>,
    nodes: Vec<Node>,
}

impl World {
    fn new() -> Self {
        let mut world = World { state: State::default(), index: 0, left_out: BTreeMap::new(), servers: vec![], nodes: vec![] };
        world.apply(Command::CreateCluster { id: ClusterId(id(1)), ca_certificate: ca(0), ca_key_sealed: vec![] });
        let expires_at = Timestamp(1_000) + Span::secs(1_000);
        for (n, role) in [(2, Role::Server), (3, Role::Agent)] {
            world.apply(Command::CreateToken { id: TokenId(id(n)), secret_hash: vec![], expires_at, uses: 100, role });
        }
        for n in 0..SERVERS {
            let server = ServerFacts { name: format!("s{n}"), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: LEVEL };
            let token = (n > 0).then_some(TokenId(id(2)));
            world.apply(Command::AdmitServer { token, server, key_fingerprint: vec![n as u8] });
        }
        world.apply(Command::RaiseVersion { to: LEVEL });
        let cluster = world.state.cluster.clone().unwrap();
        world.servers = world.state.servers.keys().map(|id| (*id, cluster.clone())).collect();
        for n in 0..NODES {
            let node = NodeId(id(100 + n as u128));
            let (token, name) = (TokenId(id(3)), format!("host-{n}"));
            world.apply(Command::AdmitNode { token, node, name, key_fingerprint: vec![n as u8], certificate_expires_at: expires_at });
            world.nodes.push(Node { id: node, roots: [0].into(), signer: 0, progress: 0 });
            world.up(n, true);
        }
        world
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.index += 1;
        self.state.apply(self.index, Proposal { at: Timestamp(1_000), request: None, command })
    }

    fn up(&mut self, n: usize, up: bool) {
        let node = self.nodes[n].id;
        let command = if up { Command::NodeUp { node, facts: facts(&format!("host-{n}")) } } else { Command::NodeDown { node } };
        self.apply(command);
    }

    fn is_up(&self, n: usize) -> bool {
        self.state.nodes[&self.nodes[n].id].up
    }

    /// A server applies what is committed; its word of it may be lost.
    fn server_follows(&mut self, n: usize, tells: bool) {
        let cluster = self.state.cluster.clone().unwrap();
        let (id, held) = &mut self.servers[n];
        let id = *id;
        if cluster.ca_progress() > held.ca_progress() {
            *held = cluster;
        }
        let (trusted, signer) = (held.trusted().1, held.authorities.signing);
        if tells {
            self.apply(Command::MemberCa { member: Member::Server(id), trusted, signer });
        }
    }

    /// A node talks to a server: takes the roots, renews if need be (an answer may be lost), tells (a word may be lost).
    fn node_talks(&mut self, n: usize, server: usize, renews: bool, tells: bool) {
        if !self.is_up(n) {
            return;
        }
        let cluster = &self.servers[server].1;
        let node = &mut self.nodes[n];
        if cluster.ca_progress() >= node.progress {
            node.progress = cluster.ca_progress();
            node.roots = BTreeSet::from([cluster.trusted().0, cluster.trusted().1]);
            if renews {
                node.signer = cluster.authorities.signing;
            }
        }
        let (member, trusted, signer) = (Member::Node(node.id), *node.roots.last().unwrap(), node.signer);
        if tells {
            self.apply(Command::MemberCa { member, trusted, signer });
        }
    }

    /// The leader counts.
    fn wait(&mut self, more: Span) {
        let Some(Rotation { number, phase, waited, .. }) = self.state.cluster.as_ref().unwrap().authorities.rotation.clone() else {
            return;
        };
        self.apply(Command::RotationWaited { number, phase, waited: Span(waited.0 + more.0) });
        self.apply(Command::RotationWaited { number, phase, waited }); // an older word
    }

    fn leader_steps(&mut self) {
        let Some(Rotation { number, phase, .. }) = self.state.cluster.as_ref().unwrap().authorities.rotation.clone() else { return };
        if let RotationVerdict::Advance(left) = judge_rotation(&self.state)
            && phase == RotationPhase::Sign
        {
            let down = |id: &NodeId| !self.state.nodes[id].up;
            assert!(left.nodes.iter().all(down), "whoever is here is not shut out by a date");
            self.left_out.extend(left.nodes.iter().map(|id| (*id, number)));
        }
        self.apply(Command::StepRotation { number, from: phase });
    }

    /// Everybody can talk to everybody; who was left out of one rotation finds back until the next one's CA signs.
    fn check(&self) -> Result<(), TestCaseError> {
        let accepts = |c: &Cluster, signer: u32| c.trusted().0 <= signer && signer <= c.trusted().1;
        let crossed = |c: &Cluster, roots: &BTreeSet<u32>| c.authorities.cross.first().is_some_and(|by| roots.contains(&u32::from(*by)));
        for (id, shows) in &self.servers {
            let signs = shows.authorities.signing;
            for (other, judges) in &self.servers {
                let (oldest, newest) = judges.trusted();
                let known = accepts(judges, signs) || crossed(shows, &[oldest, newest].into());
                prop_assert!(known, "server {other} refuses server {id}");
            }
            // Also nodes that are down: they must be able to come back.
            for node in &self.nodes {
                let left_out = self.left_out.get(&node.id).copied().filter(|_| node.signer < shows.trusted().0);
                if left_out.is_some_and(|missed| missed < signs) {
                    continue; // two rotations missed
                }
                // A node that was left out is known by its key, and may renew.
                let accepted = accepts(shows, node.signer) || left_out.is_some();
                prop_assert!(accepted, "server {id} refuses a node certified by CA {}", node.signer);
                let trusts = node.roots.contains(&signs) || crossed(shows, &node.roots);
                prop_assert!(trusts, "a node that trusts {:?} refuses server {id}, certified by CA {signs}", node.roots);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Act {
    Rotate,
    Server(usize, bool),
    Node {
        node: usize,
        server: usize,
        renews: bool,
        tells: bool,
    },
    Up(usize, bool),
    Leader,
    Abort,
    /// Hours pass.
    Hours(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        1 => Just(Act::Rotate),
        3 => (0..SERVERS, any::<bool>()).prop_map(|(n, tells)| Act::Server(n, tells)),
        6 => (0..NODES, 0..SERVERS, any::<bool>(), any::<bool>())
            .prop_map(|(node, server, renews, tells)| Act::Node { node, server, renews, tells }),
        1 => (0..NODES, any::<bool>()).prop_map(|(n, up)| Act::Up(n, up)),
        3 => Just(Act::Leader),
        1 => Just(Act::Abort),
        1 => (1u64..30).prop_map(Act::Hours),
    ]
}

proptest! {
    #[test]
    fn at_no_moment_does_anyone_refuse_another_and_in_the_end_all_are_over(acts in proptest::collection::vec(act(), 0..120)) {
        let mut world = World::new();
        for act in acts {
            match act {
                Act::Rotate => {
                    let Authorities { newest, signing, .. } = world.state.cluster.as_ref().unwrap().authorities;
                    world.apply(rotate(newest + 1, signing));
                }
                Act::Server(n, tells) => world.server_follows(n, tells),
                Act::Node { node, server, renews, tells } => world.node_talks(node, server, renews, tells),
                Act::Up(n, up) => world.up(n, up),
                Act::Leader => world.leader_steps(),
                Act::Abort => {
                    let number = world.state.cluster.as_ref().unwrap().authorities.newest;
                    world.apply(Command::AbortRotation { number });
                }
                Act::Hours(hours) => world.wait(Span::secs(hours * 3600)),
            }
            world.check()?;
        }
        // Peace: everybody who can come back is up and heard.
        let signing = world.state.cluster.as_ref().unwrap().authorities.signing;
        let lost: Vec<NodeId> = world.left_out.iter().filter(|(_, missed)| **missed < signing).map(|(id, _)| *id).collect();
        let gone = |node: &Node| node.signer != signing && lost.contains(&node.id);
        let removed: Vec<NodeId> = world.nodes.extract_if(.., |node| gone(node)).map(|node| node.id).collect();
        for node in removed {
            world.apply(Command::RemoveNode { node });
        }
        let nodes = world.nodes.len();
        (0..nodes).for_each(|n| world.up(n, true));
        for _ in 0..3 {
            (0..SERVERS).for_each(|n| world.server_follows(n, true));
            (0..nodes).for_each(|n| world.node_talks(n, n % SERVERS, true, true));
            world.leader_steps();
            world.check()?;
        }
        prop_assert_eq!(judge_rotation(&world.state), RotationVerdict::Idle);
        let signing = world.state.cluster.as_ref().unwrap().authorities.signing;
        prop_assert!(world.nodes.iter().all(|n| n.signer == signing && n.roots.contains(&signing)));
    }
}

#[test]
fn each_phase_waits_for_its_members_and_says_for_whom() {
    let mut world = World::new();
    assert_eq!(explain_rotation(&world.state), None);
    assert_eq!(world.apply(Command::ForceRotation), Applied::Refused(Refusal::NoRotation));
    assert_eq!(world.apply(rotate(5, 0)), Applied::Refused(Refusal::RotationUnderWay), "made from an older view");
    assert!(matches!(world.apply(rotate(1, 0)), Applied::Done { .. }));
    assert!(matches!(world.apply(rotate(1, 0)), Applied::Unchanged { .. }), "proposed twice");
    world.up(3, false);
    let step = |world: &mut World, from| world.apply(Command::StepRotation { number: 1, from });
    assert!(matches!(step(&mut world, RotationPhase::Announce), Applied::Unchanged { .. }), "nobody trusts it yet");

    (1..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..2).for_each(|n| world.node_talks(n, 1, false, true));
    let why = explain_rotation(&world.state).unwrap();
    assert!(why.contains("; 1 server has not taken the new CA: 1 (s0); 1 node has not taken the new CA: host-2; given up in 1h"), "{why}");
    world.apply(Command::ForceRotation);
    assert!(matches!(step(&mut world, RotationPhase::Announce), Applied::Unchanged { .. }), "force leaves no server out");
    world.server_follows(0, true);
    assert!(matches!(step(&mut world, RotationPhase::Sign), Applied::Unchanged { .. }), "that is not the phase");
    assert!(matches!(step(&mut world, RotationPhase::Announce), Applied::Done { .. }), "host-2 was forced, host-3 is down");
    let cluster = world.state.cluster.clone().unwrap();
    assert_eq!((cluster.ca_certificate.clone(), cluster.ca_key_sealed.clone(), cluster.authorities.signing), (ca(1), vec![9], 1));
    assert_eq!(cluster.roots(), [ca(1), ca(0)]);
    assert_eq!((cluster.number_of(|c| c == ca(0)), cluster.number_of(|c| c == ca(1))), (Some(0), Some(1)));

    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..2).for_each(|n| world.node_talks(n, 1, true, true));
    let why = explain_rotation(&world.state).unwrap();
    assert!(
        why.contains("; 2 nodes still hold certificates of the old CA: host-2, host-3; in 1d dropped without those who are away"),
        "{why}"
    );
    assert!(matches!(step(&mut world, RotationPhase::Sign), Applied::Unchanged { .. }), "force was for the phase before");
    world.apply(Command::ForceRotation);
    assert!(matches!(step(&mut world, RotationPhase::Sign), Applied::Done { .. }));
    assert_eq!(world.state.cluster.as_ref().unwrap().roots(), [ca(1)]);
    let last = world.state.events.get_max().unwrap().1.clone();
    assert!(last.message.ends_with("2 nodes were left out and have to renew when they are back: host-2, host-3"), "{}", last.message);
}

#[test]
fn nobody_trusts_a_ca_that_does_not_exist() {
    let mut world = World::new();
    let node = world.nodes[0].id;
    world.apply(Command::MemberCa { member: Member::Node(node), trusted: 40, signer: 40 });
    let row = &world.state.nodes[&node];
    assert_eq!((row.ca_trusted, row.ca_signer), (0, 0));
    let stranger = Command::MemberCa { member: Member::Server(77), trusted: 0, signer: 0 };
    assert_eq!(world.apply(stranger), Applied::Refused(Refusal::NoSuchServer(77)));
    world.apply(Command::MemberClock { member: Member::Node(node), skew_ms: Some(14_000) });
    assert_eq!(world.state.nodes[&node].clock_skew_ms, Some(14_000));
}

#[test]
fn a_rotation_can_be_taken_back_until_the_new_ca_signs() {
    let mut world = World::new();
    let abort = |world: &mut World, number| world.apply(Command::AbortRotation { number });
    assert_eq!(abort(&mut world, 1), Applied::Refused(Refusal::NoRotation));
    world.apply(rotate(1, 0));
    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..NODES).for_each(|n| world.node_talks(n, 0, true, true));
    assert!(matches!(abort(&mut world, 1), Applied::Done { .. }));
    assert!(matches!(abort(&mut world, 1), Applied::Unchanged { .. }), "proposed twice");
    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    assert!(world.servers.iter().all(|(_, c)| c.roots() == [ca(0)]), "a server drops what was given up");
    // Its number is not given again: a word about it may still be on its way.
    assert_eq!(world.apply(rotate(1, 0)), Applied::Refused(Refusal::RotationUnderWay));
    assert!(matches!(world.apply(rotate(2, 0)), Applied::Done { .. }));
    let member = Member::Server(world.servers[0].0);
    world.apply(Command::MemberCa { member, trusted: 1, signer: 0 });
    assert!(rotation_waits_for(&world.state)[0].starts_with("3 servers have not taken the new CA"));
    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..NODES).for_each(|n| world.node_talks(n, 0, true, true));
    world.leader_steps();
    assert_eq!(abort(&mut world, 2), Applied::Refused(Refusal::RotationPastAbort));
    assert_eq!(abort(&mut world, 1), Applied::Refused(Refusal::NoRotation));
}

#[test]
fn an_announcement_that_is_not_heard_is_given_up_and_an_overlap_ends() {
    let mut world = World::new();
    world.apply(rotate(1, 0));
    (1..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..NODES).for_each(|n| world.node_talks(n, 1, false, true));
    world.wait(Span::secs(3599));
    assert!(matches!(judge_rotation(&world.state), RotationVerdict::Wait(_)));
    world.wait(Span::secs(1));
    world.leader_steps();
    let last = |world: &World| world.state.events.get_max().unwrap().1.message.clone();
    assert_eq!(last(&world), "the rotation to CA 1 was given up after 1h: 1 server has not taken the new CA: 1 (s0); CA 0 signs as before");

    world.apply(rotate(2, 0));
    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..NODES).for_each(|n| world.node_talks(n, 1, false, true));
    world.leader_steps();
    (0..SERVERS).for_each(|n| world.server_follows(n, true));
    (0..2).for_each(|n| world.node_talks(n, 1, true, true));
    world.up(3, false);
    world.wait(OVERLAP);
    world.leader_steps();
    let why = explain_rotation(&world.state).unwrap();
    assert!(why.contains("; 1 node still holds a certificate of the old CA: host-2; overdue after 1d"), "{why}");
    world.node_talks(2, 1, true, true);
    world.leader_steps();
    assert_eq!(last(&world), "CA 0 is no longer trusted; 1 node was left out and has to renew when it is back: host-3");
}

#[test]
fn another_root_key_comes_into_use_when_every_server_holds_it() {
    let mut world = World::new();
    let authorities = |world: &World| world.state.cluster.as_ref().unwrap().authorities.clone();
    let steps = authorities(&world).steps;
    let servers: Vec<u64> = world.state.servers.keys().copied().collect();
    let rewrap = |steps, holders: &[u64]| {
        Command::Rewrap(Rewrap { steps, root_key: vec![7; 16], ca_key_sealed: vec![8; 40], holders: holders.to_vec(), vaults: vec![] })
    };
    assert_eq!(world.apply(rewrap(steps, &servers[1..])), Applied::Refused(Refusal::RootKeyNotHeld(servers[0])));
    assert_eq!(world.apply(rewrap(steps + 1, &servers)), Applied::Refused(Refusal::RotationUnderWay), "made from another view");
    assert!(matches!(world.apply(rotate(1, 0)), Applied::Done { .. }));
    let announced = authorities(&world).steps;
    assert_eq!(world.apply(rewrap(announced, &servers)), Applied::Refused(Refusal::RotationUnderWay), "its key is sealed, too");
    world.apply(Command::AbortRotation { number: 1 });
    let steps = authorities(&world).steps;
    assert!(matches!(world.apply(rewrap(steps, &servers)), Applied::Done { .. }));
    assert_eq!((authorities(&world).steps, authorities(&world).root_key), (steps + 1, vec![7; 16]));
    assert_eq!(world.state.cluster.as_ref().unwrap().ca_key_sealed, [8; 40]);
    assert!(matches!(world.apply(rewrap(steps, &servers)), Applied::Unchanged { .. }), "proposed twice");
}
