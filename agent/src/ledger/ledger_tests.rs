//! What comes back from a ledger, whole or damaged.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use optimus_common::ids::{Name, WorkloadKey};
use optimus_common::protocol::{Blob, Phase};

use super::*;
use crate::testing::test_env;

fn alloc(n: u128, run: bool) -> DesiredAlloc {
    let name = |s: &str| Name::new(s).unwrap();
    DesiredAlloc {
        id: AllocId(uuid::Uuid::from_u128(n)),
        key: WorkloadKey { project: name("p"), environment: name("dev"), workload: name("web") },
        index: 0,
        release: 1,
        run,
        ports: vec![("http".into(), 20_000)],
        spec: Blob(b"top secret value".to_vec()),
    }
}

fn record(n: u128) -> AllocRecord {
    let status = AllocStatus {
        id: AllocId(uuid::Uuid::from_u128(n)),
        seq: 7,
        phase: Phase::Running,
        ready: true,
        ready_since: None,
        reason: None,
        restarts: 2,
        pid: Some(1),
        started_at: None,
        last_exit: None,
        unenforced: vec![],
        last_lines: vec![],
        limits: None,
    };
    AllocRecord { attempt: 3, row: 2, skipped: 0, status }
}

fn sealer(dir: &Path, env: &Env) -> Sealer {
    Sealer::from_file(&dir.join("ledger.key"), Arc::clone(&env.entropy)).unwrap()
}

#[tokio::test]
async fn what_was_accepted_is_there_after_a_restart_and_sealed() {
    let (dir, env) = (tempfile::tempdir().unwrap(), test_env());
    let sealer = sealer(dir.path(), &env);
    let (writer, first) = open(dir.path(), &sealer, &env).unwrap();
    assert!(writer.accept(5, vec![alloc(1, true), alloc(2, true)], vec![]).await);
    assert!(writer.accept(6, vec![alloc(2, false)], vec![alloc(1, true).id]).await);
    writer.record(alloc(2, true).id, Some(record(2)));
    drop(writer);
    let (_writer, held) = open(dir.path(), &sealer, &env).unwrap();
    assert_eq!(held.generation, 6);
    assert!(held.epoch > first.epoch && !held.rebuilt);
    assert_eq!(held.desired, BTreeMap::from([(alloc(2, false).id, alloc(2, false))]));
    assert_eq!(held.records, BTreeMap::from([(record(2).status.id, record(2))]));
    let bytes = fs::read(dir.path().join("ledger.redb")).unwrap();
    assert!(!bytes.windows(10).any(|w| w == b"top secret"));
    assert_eq!(fs::metadata(dir.path().join("ledger.key")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_damaged_ledger_is_moved_aside_and_the_epoch_still_grows() {
    let (dir, env) = (tempfile::tempdir().unwrap(), test_env());
    let sealer = sealer(dir.path(), &env);
    let path = dir.path().join("ledger.redb");
    let damages: [fn(&mut Vec<u8>); 4] =
        [|b| b.truncate(100), |b| b.fill(0xA5), |b| b[..4096].fill(0), |b| b.iter_mut().step_by(97).for_each(|x| *x ^= 0x11)];
    let mut epoch = 0;
    for (n, damage) in damages.into_iter().enumerate() {
        let (writer, held) = open(dir.path(), &sealer, &env).unwrap();
        assert!(held.epoch > epoch);
        epoch = held.epoch;
        assert!(writer.accept(9, vec![alloc(1, true)], vec![]).await);
        drop(writer);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let (writer, held) = open(dir.path(), &sealer, &env).unwrap();
        assert!(held.rebuilt && held.desired.is_empty() && held.generation == 0, "damage {n}: {held:?}");
        assert!(held.epoch >= epoch);
        epoch = held.epoch;
        drop(writer);
    }
    assert!(fs::read_dir(dir.path()).unwrap().count() > 2);
}

#[test]
fn a_value_opens_only_with_its_key_and_in_its_place() {
    let (dir, env) = (tempfile::tempdir().unwrap(), test_env());
    let sealer = sealer(dir.path(), &env);
    let (a, b) = (alloc(1, true).id, alloc(2, true).id);
    let bytes = sealer.seal(KIND_RECORD, a, &"text");
    assert_eq!(sealer.open::<String>(KIND_RECORD, a, &bytes).unwrap(), "text");
    assert_eq!(sealer.open::<String>(KIND_RECORD, b, &bytes), Err(SealError::Tag));
    assert!(sealer.open::<String>(KIND_DESIRED, a, &bytes).is_err());
    let other = Sealer::from_file(&dir.path().join("other.key"), Arc::clone(&env.entropy)).unwrap();
    assert_eq!(other.open::<String>(KIND_RECORD, a, &bytes), Err(SealError::Tag));
    fs::write(dir.path().join("short.key"), "short").unwrap();
    assert!(Sealer::from_file(&dir.path().join("short.key"), env.entropy).is_err());
}
