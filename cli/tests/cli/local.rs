//! What needs no server: help, completion, files, the command line itself.

use std::time::Instant;

use crate::world::World;

const VERBS: [&str; 45] = [
    "dev",
    "server",
    "agent",
    "init",
    "validate",
    "deploy",
    "status",
    "ps",
    "logs",
    "scale",
    "restart",
    "stop",
    "rm",
    "explain",
    "cluster",
    "nodes",
    "events",
    "version",
    "completion",
    "help",
    "cluster status",
    "cluster members",
    "cluster join-token",
    "cluster join",
    "cluster leave",
    "cluster transfer-leader",
    "cluster rotate-ca",
    "nodes join-token",
    "nodes rm",
    "nodes show",
    "nodes label",
    "nodes pool",
    "nodes cordon",
    "nodes uncordon",
    "nodes drain",
    "run",
    "runs",
    "jobs",
    "rebalance",
    "cluster snapshot",
    "cluster snapshot verify",
    "cluster restore",
    "cluster recover",
    "cluster archive",
    "cluster root-key export",
];

#[test]
fn help_of_every_verb_starts_with_examples() {
    let world = World::new();
    for verb in VERBS {
        let mut args: Vec<&str> = verb.split(' ').collect();
        args.push("--help");
        let ran = world.run(&args).expect(0);
        let first = verb.split(' ').next().unwrap();
        assert!(
            ran.out.starts_with(&format!("Examples:\n  optimus {first}")) || ran.out.starts_with("Examples:\n  "),
            "{verb}: {}",
            ran.out
        );
        assert!(ran.out.contains(&format!("optimus {verb}")), "{verb}: {}", ran.out);
        assert!(!ran.out.contains('\x1b'), "{verb} colours a pipe");
        let same = world.run(&[&["help"], verb.split(' ').collect::<Vec<_>>().as_slice()].concat()).expect(0);
        assert_eq!(same.out, ran.out, "help {verb}");
    }
    let ran = world.run(&["--help"]).expect(0);
    assert!(ran.out.starts_with("Examples:\n"), "{}", ran.out);
    for verb in VERBS.iter().filter(|verb| !verb.contains(' ')) {
        assert!(ran.out.contains(&format!("\n  {verb} ")), "{verb} is not listed: {}", ran.out);
    }
}

#[test]
fn help_topics_are_there() {
    let world = World::new();
    let codes = world.run(&["help", "exit-codes"]).expect(0).out;
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "6 ", "7 ", "8 ", "130 "] {
        assert!(codes.contains(&format!("\n  {code}")), "{code}: {codes}");
    }
    assert!(world.run(&["help", "environment"]).expect(0).out.contains("OPTIMUS_CA_FILE"));
    assert!(world.run(&["help", "credentials"]).expect(0).out.contains("contexts/NAME.json"));
    let ran = world.run(&["help", "exit-code"]).expect(2);
    assert!(ran.err.contains("did you mean `optimus help exit-codes`?"), "{}", ran.err);
}

#[test]
fn typos_in_verbs_and_flags_are_usage_errors_with_a_suggestion() {
    let world = World::new();
    let ran = world.run(&["deplyo"]).expect(2);
    assert!(ran.err.contains("deploy") && ran.out.is_empty(), "{ran:?}");
    let ran = world.run(&["deploy", "--timout", "3s"]).expect(2);
    assert!(ran.err.contains("--timeout"), "{ran:?}");
    world.run(&["scale", "web", "many"]).expect(2);
    world.run(&["deploy", "--timeout", "soon"]).expect(2);
    world.run(&["logs", "--since", "yesterday"]).expect(2);
    world.run(&[]).expect(2);
}

#[test]
fn completion_is_made_for_each_shell() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = world.run(&["completion", shell]).expect(0);
        assert!(ran.out.contains("optimus") && ran.out.contains("join-token"), "{shell}");
    }
    let bash = world.run(&["completion", "bash"]).out;
    let script = world.write("complete.bash", &bash);
    let checked = std::process::Command::new("bash").arg("-n").arg(script).status().unwrap();
    assert!(checked.success());
}

#[test]
fn help_and_completion_ask_no_server() {
    let world = World::new();
    // Nobody answers there: a request would fail or wait.
    world.context("gone", "https://127.0.0.1:1", "not a certificate", "t");
    let started = Instant::now();
    world.run(&["help", "deploy"]).expect(0);
    world.run(&["completion", "bash"]).expect(0);
    world.run(&["explain", "OPT-2201"]).expect(0);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn every_code_is_explained() {
    let world = World::new();
    for code in optimus_common::reason::CODES.iter().step_by(5) {
        let ran = world.run(&["explain", &code.code.to_lowercase()]).expect(0);
        assert!(ran.out.contains(code.title) && ran.out.contains(code.about), "{}", ran.out);
    }
    assert_eq!(world.run(&["explain", "OPT-2302", "--json"]).expect(0).json()["title"], "out of memory");
    let ran = world.run(&["explain", "OPT-2399"]).expect(3);
    assert!(ran.err.contains("there is no code `OPT-2399`") && ran.err.contains("did you mean"), "{}", ran.err);
}

#[test]
fn fields_are_explained_without_a_server() {
    let world = World::new();
    let ran = world.run(&["explain", "memory"]).expect(0);
    assert!(ran.out.to_lowercase().contains("memory"), "{}", ran.out);
    assert_eq!(world.run(&["explain", "memory", "--json"]).expect(0).json()["field"], "memory");
    // A word that is nothing known, without a server to ask.
    let ran = world.run(&["explain", "memroy"]).expect(4);
    assert!(ran.err.contains("`memory`"), "{}", ran.err);
}

#[test]
fn init_writes_a_valid_file_once() {
    let world = World::new();
    assert_eq!(world.run(&["init"]).expect(0).out, "optimus.toml\n");
    world.run(&["validate"]).expect(0);
    let ran = world.run(&["init"]).expect(5);
    assert!(ran.err.contains("not overwritten") && ran.err.contains("hint:"), "{}", ran.err);
    world.run(&["init", "missing-folder"]).expect(1);
}

#[test]
fn validate_shows_what_a_file_means() {
    let world = World::new();
    world.write(
        "work/shop/optimus.toml",
        "project = \"shop\"\nname = \"web\"\nrun = \"python3 app.py\"\ncopies = 3\nport = \"auto\"\nmemory = \"64M..128M\"\n",
    );
    let ran = world.run(&["validate", "shop"]).expect(0);
    assert!(ran.out.contains("/web") && ran.out.contains("64M..128M") && ran.out.contains("python3 app.py"), "{}", ran.out);
    assert!(ran.err.contains("shop/optimus.toml is valid: 1 workload"), "{}", ran.err);
    let spec = world.run(&["validate", "shop/optimus.toml", "--json"]).expect(0).json();
    assert_eq!(spec["project"], "shop");
    assert_eq!(spec["workloads"]["web"]["copies"], 3);
}

#[test]
fn a_faulty_file_is_shown_with_its_place() {
    let world = World::new();
    world.write("work/optimus.toml", "name = \"web\"\nrun = \"x\"\nmemmory = \"64M\"\n");
    for verb in [["validate"].as_slice(), &["deploy"]] {
        let ran = world.run(verb).expect(2);
        assert!(ran.out.is_empty());
        assert!(ran.err.starts_with("error[OPT-1001]: optimus.toml is not valid\n"), "{}", ran.err);
        assert!(ran.err.contains("optimus.toml:3") && ran.err.contains('^') && ran.err.contains("memory"), "{}", ran.err);
        assert!(ran.err.contains("optimus explain OPT-1001"), "{}", ran.err);
    }
    let ran = world.run(&["validate", "nowhere"]).expect(2);
    assert!(ran.err.contains("cannot read nowhere") && ran.err.contains("optimus init"), "{}", ran.err);
}

#[test]
fn what_is_not_done_yet_is_refused_before_it_is_sent() {
    let world = World::new();
    world.write("work/optimus.toml", "name = \"web\"\nrun = \"x\"\nport = \"auto\"\nhealth = { grpc = \"\" }\n");
    for verb in ["validate", "deploy"] {
        let ran = world.run(&[verb]).expect(2);
        assert!(ran.err.starts_with("error[OPT-1002]: optimus.toml") && ran.err.contains("grpc"), "{}", ran.err);
    }
}

#[test]
fn roles_check_their_flags() {
    let world = World::new();
    let ran = world.run(&["server", "--agent-listen", "0.0.0.0:7601"]).expect(2);
    assert!(ran.err.contains("--advertise"), "{}", ran.err);
    world.run(&["server", "--api-listen", "nowhere"]).expect(2);
    world.run(&["agent", "--ports", "90-80"]).expect(2);
    world.run(&["agent", "--name", "Not A Name"]).expect(2);
    let ran = world.run(&["agent", "--join-file", "missing.txt"]).expect(2);
    assert!(ran.err.contains("missing.txt"), "{}", ran.err);
}

#[test]
fn without_a_context_it_says_how_to_get_one() {
    let world = World::new();
    let ran = world.run(&["status"]).expect(4);
    assert!(ran.err.contains("error[OPT-1102]") && ran.err.contains("optimus dev"), "{}", ran.err);
    world.context("a", "https://127.0.0.1:1", "x", "t");
    world.context("b", "https://127.0.0.1:1", "x", "t");
    let ran = world.run(&["status"]).expect(4);
    assert!(ran.err.contains("a, b") && ran.err.contains("--context"), "{}", ran.err);
    let ran = world.run(&["status", "--context", "c"]).expect(3);
    assert!(ran.err.contains("no context `c`"), "{}", ran.err);
}
