//! Stores made and read while no server runs on them.

use optimus_common::disk::Disk;
use optimus_common::disk::sim::{Crash, MemDisk};

use super::super::{MemoryNetwork, NoPeers, Role, SalvageError, Seed, StartError, StoreError, owner, salvage, seed};
use super::*;

const INDEX: u64 = 5_000_000_007;

fn a_state() -> Vec<u8> {
    let state = State { values: BTreeMap::from([("k".to_owned(), 7)]), history: vec![(3, "before".to_owned())], ..State::default() };
    rmp_serde::to_vec_named(&state).unwrap()
}

fn a_seed() -> Seed {
    Seed { node_id: INDEX, addr: "new:1".into(), term: 9, index: INDEX, content: a_state() }
}

#[tokio::test]
async fn a_seeded_server_leads_alone_goes_on_at_its_index_and_takes_new_learners() {
    let disk = MemDisk::new();
    seed(Arc::new(disk.clone()), &a_seed()).unwrap();
    disk.crash(Crash::LoseAll);
    assert_eq!(owner(&disk).unwrap(), Some(INDEX));
    let wrong = start(1, disk.clone(), Tuning::fast(), Arc::new(NoPeers)).await;
    assert!(matches!(wrong, Err(StartError::Store(StoreError::WrongOwner { owner: INDEX, .. }))));

    let network = MemoryNetwork::new();
    let (node, seen) = start(INDEX, disk.clone(), Tuning::fast(), network.transport(INDEX)).await.unwrap();
    network.connect(&node);
    node.initialize_single("new:1").await.unwrap(); // does nothing: it is a member
    eventually("the seeded server leads", || node.status().role == Role::Leader).await;
    assert!(node.status().term > 9);
    let (index, answer) = node.propose(add("k", 1)).await.unwrap();
    assert!(index > INDEX, "{index}");
    assert_eq!(answer, Answer { before: Some(7), after: 8 });

    let (learner, learned) = start(index, MemDisk::new(), Tuning::fast(), network.transport(index)).await.unwrap();
    network.connect(&learner);
    node.add_learner(index, "second:1").await.unwrap();
    node.change_voters([INDEX, index].into()).await.unwrap();
    let (last, _) = node.propose(add("k", 1)).await.unwrap();
    learner.wait_applied(last).await.unwrap();
    eventually("both hold the same", || learned.lock().unwrap().1 == seen.lock().unwrap().1).await;
    assert_eq!(seen.lock().unwrap().1.values["k"], 9);

    node.shutdown().await;
    learner.shutdown().await;
    // And once more, from its own disk.
    let again = salvage(Arc::new(disk), Kv::default()).unwrap();
    assert_eq!(again.machine.state.values["k"], 9);
    assert_eq!(again.voters, [[INDEX, index].into()]);
    assert_eq!(again.members[&index], "second:1");
}

/// Cuts the power after every single change of the disk.
#[tokio::test]
async fn a_seed_cut_short_never_starts_as_anything_else() {
    let steps = {
        let disk = MemDisk::new();
        seed(Arc::new(disk.clone()), &a_seed()).unwrap();
        disk.changes()
    };
    assert!(steps > 20, "{steps}");
    let (mut refused, mut whole, mut empty) = (0, 0, 0);
    for step in 0..=steps {
        for case in 0..6 {
            let disk = MemDisk::new();
            disk.power_off_after(step);
            let done = seed(Arc::new(disk.clone()), &a_seed());
            disk.crash(if case == 0 { Crash::LoseAll } else { Crash::Scattered { seed: case } });
            if disk.list().unwrap().is_empty() {
                assert!(done.is_err());
                empty += 1; // nothing is there; the restore is simply repeated
                continue;
            }
            match owner(&disk) {
                Ok(Some(INDEX)) => {
                    let found = salvage(Arc::new(disk), Kv::default()).unwrap();
                    assert_eq!((found.last, found.machine.state.values["k"]), ((9, INDEX), 7));
                    whole += 1;
                }
                Err(StoreError::HalfSeeded { .. }) => {
                    assert!(done.is_err(), "step {step}: said to be done");
                    let started = start(INDEX, disk, Tuning::fast(), Arc::new(NoPeers)).await;
                    assert!(matches!(started, Err(StartError::Store(StoreError::HalfSeeded { .. }))));
                    refused += 1;
                }
                other => panic!("step {step}, case {case}: {other:?}"),
            }
        }
    }
    assert!(refused > 50 && whole > 0 && empty > 0, "{refused} refused, {whole} whole, {empty} empty");
}

#[test]
fn a_store_is_only_made_where_there_is_none() {
    let disk = MemDisk::new();
    assert_eq!(owner(&disk).unwrap(), None);
    assert!(matches!(salvage(Arc::new(disk.clone()), Kv::default()), Err(SalvageError::Store(StoreError::Missing { .. }))));
    seed(Arc::new(disk.clone()), &a_seed()).unwrap();
    assert!(matches!(seed(Arc::new(disk), &a_seed()), Err(StoreError::NotEmpty { .. })));
}

#[tokio::test]
async fn salvage_applies_the_whole_log_also_what_was_never_known_to_be_committed() {
    let (disk, network) = (MemDisk::new(), MemoryNetwork::new());
    let members: BTreeMap<u64, String> = (1..=3).map(|id| (id, format!("s{id}:1"))).collect();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let store = if id == 1 { disk.clone() } else { MemDisk::new() };
        let (node, _) = start(id, store, Tuning::fast(), network.transport(id)).await.unwrap();
        network.connect(&node);
        nodes.push(node);
    }
    nodes[0].initialize(members).await.unwrap();
    eventually("a leader", || nodes.iter().any(|n| n.status().role == Role::Leader)).await;
    let leader = nodes.iter().find(|n| n.status().role == Role::Leader).unwrap().clone();
    let mut last = 0;
    for value in 1..=50 {
        last = soon(leader.propose(set("k", value))).await.unwrap().0;
        if value == 25 {
            nodes[0].trigger_snapshot().await.unwrap();
        }
    }
    // Each acknowledged write is on the quorum; wait until this one is among it.
    nodes[0].wait_applied(last).await.unwrap();
    let applied = *nodes[0].applied().borrow();
    for id in 2..=3 {
        network.disconnect(id);
    }
    // Appended on the survivor when it leads, and never acknowledged: it is kept, and said to be unknown.
    let _ = tokio::time::timeout(Duration::from_millis(300), nodes[0].propose(set("tail", 1))).await;
    for node in &nodes {
        node.shutdown().await;
    }
    disk.crash(Crash::LoseAll);

    let found = salvage(Arc::new(disk.clone()), Kv::default()).unwrap();
    assert_eq!((found.node_id, found.machine.state.values["k"]), (1, 50));
    assert!(found.last.1 >= applied && found.term >= found.last.0);
    assert_eq!(found.voters, [[1, 2, 3].into()]);
    assert_eq!(found.members[&3], "s3:1");
    if leader.id() == 1 {
        assert_eq!(found.machine.state.values["tail"], 1);
        assert!(found.committed < found.last.1);
    }
    // Reading changes nothing: it can be read again, and the server could still start.
    let again = salvage(Arc::new(disk), Kv::default()).unwrap();
    assert_eq!((again.last, again.machine.state), (found.last, found.machine.state));
}

#[tokio::test]
async fn entries_are_read_back_by_range_and_say_what_is_purged() {
    let tuning = Tuning { keep_logs: 0, ..Tuning::fast() };
    let (node, _) = start(1, MemDisk::new(), tuning, Arc::new(NoPeers)).await.unwrap();
    node.initialize_single("a:1").await.unwrap();
    eventually("it leads", || node.status().role == Role::Leader).await;
    let mut indexes = Vec::new();
    for value in 0..10 {
        indexes.push(node.propose(set("k", value)).await.unwrap().0);
    }
    let last = *indexes.last().unwrap();
    let all = node.read_entries(0, u64::MAX, usize::MAX).await.unwrap();
    assert_eq!(all.iter().map(|e| e.index).collect::<Vec<_>>(), (0..=last).collect::<Vec<_>>());
    let commands: Vec<Command> = all.iter().flat_map(|e| &e.commands).map(|c| rmp_serde::from_slice(c).unwrap()).collect();
    assert_eq!(commands, (0..10).map(|v| set("k", v)).collect::<Vec<_>>());
    assert_eq!(node.read_entries(3, 5, usize::MAX).await.unwrap().len(), 3);
    assert_eq!(node.read_entries(3, 5, 1).await.unwrap().len(), 1, "at least one");
    assert!(node.read_entries(last + 1, u64::MAX, usize::MAX).await.unwrap().is_empty());
    node.trigger_snapshot().await.unwrap();
    eventually("the log is purged", || node.status().purged.is_some_and(|p| p > 3)).await;
    let rest = node.read_entries(3, u64::MAX, usize::MAX).await.unwrap();
    assert!(rest.first().is_none_or(|e| e.index > 3), "{rest:?}");
    node.shutdown().await;
}
