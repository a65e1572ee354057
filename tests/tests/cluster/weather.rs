//! Bad weather between servers: a proxy before each, by a seed; and clocks that jump.

use std::time::{Duration, Instant};

use optimus_tests::chaos_proxy::{Direction, Faults};
use optimus_tests::cluster::Cluster;
use optimus_tests::dice::Dice;

use crate::{ONE, Trial, rounds, seed};

fn weather(dice: &mut Dice) -> Faults {
    Faults {
        delay: Duration::from_millis(dice.below(30)),
        jitter: Duration::from_millis(dice.below(40)),
        loss: dice.fraction() * 0.05,
        duplicate: dice.fraction() * 0.1,
        reorder: dice.fraction() * 0.2,
        hold: Duration::from_millis(dice.below(60)),
        blackhole: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delay_duplication_reordering_and_one_way_silence_are_survived() {
    let _one = ONE.lock().await;
    let seed = seed("weather");
    let mut dice = Dice(seed);
    let cluster = Cluster::behind_proxies(3, seed).await;
    let trial = Trial::start(&cluster, seed).await;
    for round in 0..rounds("OPTIMUS_CLUSTER_ROUNDS", 3) {
        for proxy in cluster.proxies() {
            proxy.set(Direction::ToServer, weather(&mut dice));
            proxy.set(Direction::FromServer, weather(&mut dice));
        }
        let silent = dice.below(3) as usize;
        let way = if dice.below(2) == 0 { Direction::ToServer } else { Direction::FromServer };
        if round % 2 == 1 {
            println!("round {round}: nothing passes the proxy of server {silent} {way:?}");
            cluster.proxies()[silent].set(way, Faults::blackhole());
        }
        trial.load.wait_more(30).await;
    }
    let counts: Vec<_> = cluster.proxies().iter().map(|p| p.counts(Direction::ToServer)).collect();
    println!("{counts:?}");
    assert!(counts.iter().all(|c| c.lost > 0 && c.duplicated > 0 && c.reordered > 0), "the weather was fine: nothing was proven");
    cluster.proxies().iter().for_each(|proxy| proxy.heal());
    trial.judge(&cluster).await;
}

/// Where Debian puts the library that fakes the wall clock.
const FAKETIME: [&str; 2] = ["/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_that_jump_lose_nothing() {
    let _one = ONE.lock().await;
    let seed = seed("clocks");
    let mut dice = Dice(seed);
    let library = FAKETIME.iter().find(|path| std::path::Path::new(path).exists()).expect("libfaketime is installed by scripts/setup");
    let mut cluster = Cluster::in_namespaces(3, 0).await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let offset = |n: usize| dir.path().join(format!("offset-{n}"));
    for n in 0..3 {
        std::fs::write(offset(n), "+0s").expect("a file");
        let set = |name: &str, value: String| (name.to_owned(), value);
        cluster.servers[n].env = vec![
            set("LD_PRELOAD", (*library).to_owned()),
            set("FAKETIME_TIMESTAMP_FILE", offset(n).display().to_string()),
            set("FAKETIME_NO_CACHE", "1".to_owned()),
            // A real clock that is set leaves the monotonic one alone.
            set("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            set("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        cluster.servers[n].kill();
        cluster.start_server(n);
        cluster.wait_voters(3).await;
    }
    let trial = Trial::start(&cluster, seed).await;
    for round in 0..rounds("OPTIMUS_CLUSTER_ROUNDS", 4) {
        let server = if round % 2 == 0 { cluster.leader().await } else { dice.below(3) as usize };
        let jump = dice.pick(&["+3600s", "-3600s", "+86400s", "-86400s", "+20s", "+0s"]);
        println!("round {round}: the clock of server {server} jumps to {jump}");
        // Renamed into place: half a number would be another time.
        let beside = dir.path().join("beside");
        std::fs::write(&beside, jump).and_then(|()| std::fs::rename(&beside, offset(server))).expect("a file");
        trial.load.wait_more(30).await;
        let meant: i64 = jump.trim_end_matches('s').parse().expect("seconds");
        // What the server itself takes for now, in its log: it notices a jump, but not at once.
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let said = cluster.servers[server].output();
            let believed = said.lines().rev().find_map(|line| line.split_whitespace().next()?.parse::<jiff::Timestamp>().ok());
            let ahead = believed.expect("a time in the log").as_second() - jiff::Timestamp::now().as_second();
            if (ahead - meant).abs() < 15 {
                break;
            }
            assert!(Instant::now() < end, "the clock of server {server} is {ahead} s ahead, not {meant}: nothing was proven");
            trial.load.wait_more(1).await;
        }
    }
    trial.judge(&cluster).await;
}
