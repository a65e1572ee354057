#![allow(clippy::unwrap_used)]
use super::*;
use crate::units::{Bytes, Millicores};

fn context() -> Context {
    Context { default_project: Name::new("shop").ok(), base_dir: PathBuf::from("/srv/shop"), environment: None }
}

fn good(text: &str) -> Parsed {
    parse_toml("optimus.toml", text, &context()).unwrap_or_else(|e| panic!("{e}"))
}

fn bad(text: &str) -> String {
    parse_toml("optimus.toml", text, &context()).map(|p| format!("{p:?}")).unwrap_err().to_string()
}

fn one(parsed: &Parsed) -> &WorkloadSpec {
    parsed.spec.workloads.values().next().unwrap()
}

#[test]
fn nine_lines_are_enough_for_a_web_service() {
    let parsed = good(
        "name = \"web\"\nrun = \"python3 app.py\"\ncopies = 3\nport = \"auto\"\nhealth = \"/healthz\"\ncpu = 0.5\nmemory = \"128M..256M\"\nupdate = \"canary\"\nsecrets = [\"DATABASE_URL\"]\n",
    );
    let spec = one(&parsed);
    assert_eq!(parsed.spec.project.as_str(), "shop");
    assert_eq!(parsed.spec.environment.as_str(), "dev");
    assert_eq!(spec.run, Run::Argv(vec!["python3".into(), "app.py".into()]));
    assert_eq!((spec.copies, spec.resources.cpu), (Some(3), Millicores(500)));
    assert_eq!((spec.resources.memory_request, spec.resources.memory_limit), (Bytes::mib(128), Bytes::mib(256)));
    assert_eq!(spec.health.readiness.as_ref().unwrap().check, Check::Http { path: "/healthz".into() });
    assert_eq!(spec.dir.as_deref(), Some("/srv/shop"));
    let missing: Vec<String> = not_available(&parsed.spec).into_iter().map(|e| e.pointer).collect();
    assert_eq!(missing, ["/workloads/web/update/strategy", "/workloads/web/secrets"]);
}

#[test]
fn an_unknown_key_is_shown_with_its_place_and_the_nearest_known_one() {
    assert_eq!(
        bad("name = \"web\"\nrun = \"x\"\nmemroy = \"64M\"\n"),
        "error[OPT-1001]: unknown key `memroy`\n --> optimus.toml:3:1\n  |\n3 | memroy = \"64M\"\n  | ^^^^^^ did you mean `memory`?\n"
    );
}

#[test]
fn an_overlay_replaces_fields_and_merges_tables() {
    let text = "[service.web]\nrun = \"x\"\ncopies = 1\nenv = { A = \"1\", B = 2 }\n[env.prod.service.web]\ncopies = 5\nenv = { B = \"3\", C = true }\n";
    let mut context = context();
    assert_eq!(one(&parse_toml("f", text, &context).unwrap()).copies, Some(1));
    context.environment = Name::new("prod").ok();
    let prod = parse_toml("f", text, &context).unwrap();
    assert_eq!(one(&prod).copies, Some(5));
    let env: Vec<_> = one(&prod).env.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(env, ["A=1", "B=3", "C=true"]);
    assert_eq!(prod.environments, [Name::new("prod").unwrap()]);
    // Flat: variables and overlays live under the same word.
    let flat = "name = \"web\"\nrun = \"x\"\n[env]\nA = \"1\"\n[env.prod]\ncopies = 4\n[env.prod.env]\nA = \"2\"\n";
    let prod = parse_toml("f", flat, &context).unwrap();
    assert_eq!((one(&prod).copies, one(&prod).env["A"].as_str()), (Some(4), "2"));
}

#[test]
fn a_shell_line_is_told_from_a_command() {
    for (run, shell) in
        [("python3 app.py", false), ("echo $PORT", true), ("A=1 ./x", true), ("sh -c 'a b'", false), ("a | b", true), ("a && b", true)]
    {
        let parsed = good(&format!("name = \"w\"\nrun = {run:?}\n"));
        assert_eq!(matches!(one(&parsed).run, Run::Shell(_)), shell, "{run}");
    }
}

#[test]
fn toml_and_json_of_one_shape_give_one_spec() {
    let text = "name = \"web\"\nrun = [\"a\", \"b c\"]\nports = { admin = 9000, http = \"auto\" }\nmemory = 134217728\ncpu = 2\n[health]\ntcp = true\nport = \"http\"\n";
    let json: serde_json::Value = serde_json::json!({
        "name": "web", "run": ["a", "b c"], "ports": {"admin": 9000, "http": "auto"}, "memory": 134217728, "cpu": 2.0, "health": {"tcp": true, "port": "http"}
    });
    assert_eq!(good(text), parse_json(&json, &context()).unwrap());
    let wrong = parse_json(&serde_json::json!({"name": "web", "run": "x", "health": {"interval": 5}}), &context()).unwrap_err();
    let pointers: Vec<String> = wrong.errors.iter().map(SpecError::pointer).collect();
    assert_eq!(pointers, ["/health"]);
}

#[test]
fn a_spec_survives_json_and_msgpack() {
    let parsed = good("name = \"web\"\nrun = \"x\"\nport = 80\nlabels = { a = \"b\" }\n");
    let json = serde_json::to_string(&parsed.spec).unwrap();
    assert_eq!(serde_json::from_str::<ProjectSpec>(&json).unwrap(), parsed.spec);
    let bytes = crate::codec::to_msgpack(&parsed.spec);
    assert_eq!(crate::codec::from_msgpack::<ProjectSpec>(&bytes).unwrap(), parsed.spec);
}

#[test]
fn the_template_is_valid_and_names_every_field() {
    let text = template();
    assert!(not_available(&good(&text).spec).is_empty());
    for name in field_names().iter().filter(|n| !n.contains('.')) {
        assert!(text.contains(&format!("{name} = ")) || text.contains(&format!("{name} =")), "{name} is not in the template");
    }
}

#[test]
fn every_field_is_documented_and_its_example_is_read() {
    for name in field_names() {
        let text = explain_field(name).unwrap();
        assert!(text.contains("default") && text.contains("example"), "{text}");
    }
    for field in fields::FIELDS {
        let mut text = String::new();
        for (key, line) in [("name", "name = \"w\"\n"), ("run", "run = \"x\"\n"), ("port", "port = \"auto\"\n")] {
            let clash = key == "port" && (field.name == "ports" || field.example.contains("port = \"admin\""));
            if field.name != key && !clash {
                text.push_str(line);
            }
        }
        if field.example.contains("port = \"admin\"") {
            text.push_str("ports = { admin = 9000 }\n");
        }
        good(&format!("{text}{}\n", field.example));
    }
    assert_eq!(explain_field("no-such"), None);
    assert!(explain_field("liveness.interval").is_some());
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    /// Pieces that get a document past the first checks.
    const PIECES: &[&str] = &[
        "name = ",
        "\"web\"",
        "run = ",
        "\"x\"",
        "\n",
        "[service.web]",
        "[env.prod]",
        "[env",
        "]",
        "port = ",
        "\"auto\"",
        "8080",
        "health = ",
        "{",
        "}",
        "=",
        "\"/h\"",
        "memory = ",
        "\"1M..2M\"",
        "..",
        "cpu = ",
        "0.5",
        "nan",
        "-1",
        "1e400",
        "copies",
        "= 3\n",
        "#",
        "'''",
        "\"\"\"",
        "\u{e9}\u{1F600}",
        "\t",
        "\0",
        "[[",
        "true",
        "1979-05-27",
        "update.deadline = \"5s\"\n",
        "labels = { a = \"b\" }\n",
        "secrets = [",
        ",",
        "99999999999999999999",
        "liveness = \"tcp\"\n",
        "stop.signal = ",
        "\"SIGTERM\"\n",
    ];

    proptest! {
        #[test]
        fn property_no_document_panics_and_errors_have_places(pieces in proptest::collection::vec(proptest::sample::select(PIECES), 0..40)) {
            let text = pieces.concat();
            if let Err(errors) = parse_toml("f.toml", &text, &context()) {
                prop_assert!(!errors.errors.is_empty());
                let shown = errors.to_string();
                prop_assert!(shown.contains("f.toml:"), "{shown}");
            }
        }

        #[test]
        fn property_no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let text = String::from_utf8_lossy(&bytes);
            let _ = parse_toml("f", &text, &context()).map_err(|e| e.to_string());
        }

        #[test]
        fn property_what_is_read_passes_the_check(copies in 0u32..20_000, cpu in -1.0f64..5000.0, memory in 0u64..1 << 40, grace in 0u64..5_000_000) {
            let text = format!("name = \"w\"\nrun = \"x\"\ncopies = {copies}\ncpu = {cpu}\nmemory = {memory}\nstop = {{ grace = \"{grace}ms\" }}\n");
            if let Ok(parsed) = parse_toml("f", &text, &context()) {
                prop_assert!(check(&parsed.spec).is_empty());
            }
        }
    }
}
