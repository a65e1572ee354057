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
    assert!(missing.is_empty(), "{missing:?}");
    assert_eq!(spec.secrets, ["DATABASE_URL"]);
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
        assert!(text.contains(&format!("{name} = ")) || text.contains(&format!("# {name}.")), "{name} is not in the template");
    }
}

#[test]
fn every_field_is_documented_and_its_example_is_read() {
    for name in field_names() {
        let text = explain_field(name).unwrap();
        assert!(text.contains("default") && text.contains("example"), "{text}");
    }
    for field in fields::FIELDS {
        if field.kinds() == [Kind::Job] {
            good(&format!("[job.w]\nrun = \"x\"\n{}\n", field.example));
            assert!(bad(&format!("name = \"w\"\nrun = \"x\"\n{}\n", field.example)).contains("field of a job"), "{}", field.name);
            continue;
        }
        if field.kinds() == [Kind::Daemon] {
            good(&format!("[daemon.w]\nrun = \"x\"\n{}\n", field.example));
            assert!(bad(&format!("name = \"w\"\nrun = \"x\"\n{}\n", field.example)).contains("for a daemon"), "{}", field.name);
            continue;
        }
        let mut text = String::new();
        let on_admin = field.example.contains("port = \"admin\"");
        for (key, line) in [("name", "name = \"w\"\n"), ("run", "run = \"x\"\n"), ("port", "port = \"auto\"\n")] {
            let clash = key == "port" && (field.name == "ports" || on_admin);
            if field.name != key && !clash {
                text.push_str(line);
            }
        }
        if on_admin {
            text.push_str("ports = { admin = 9000 }\n");
        }
        if field.name.starts_with("container") {
            text.push_str("image = \"app:1\"\n"); // of which it says more
        }
        good(&format!("{text}{}\n", field.example));
    }
    assert_eq!(explain_field("no-such"), None);
    assert!(explain_field("liveness.interval").is_some());
}

mod properties {
    use super::*;
    use proptest::prelude::*;
    use proptest::strategy::Strategy;
    use proptest::{collection, sample};

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

    /// Values that fit some field, mostly.
    fn value() -> impl Strategy<Value = serde_json::Value> {
        let plain = prop_oneof![
            sample::select(
                &["auto", "web", "128M", "128M..1G", "30s", "/h", "tcp", "none", "canary", "INT", "a 'b c'", "a | b", "", "\u{1b}"][..]
            )
            .prop_map(Into::into),
            sample::select(&[0i64, 1, 3, 80, 9000, 70_000, -1][..]).prop_map(Into::into),
            sample::select(&[0.5, 1.5, 0.0001][..]).prop_map(Into::into),
            any::<bool>().prop_map(Into::into),
        ];
        let list = collection::vec(sample::select(&["A", "B", "a-b", "x"][..]), 0..4).prop_map(|items| serde_json::json!(items));
        prop_oneof![4 => plain.clone(), 1 => list, 2 => table(plain)]
    }

    fn table<S: Strategy<Value = serde_json::Value>>(value: S) -> impl Strategy<Value = serde_json::Value> {
        let inner: Vec<&str> =
            field_names().into_iter().filter_map(|n| n.split_once('.')).map(|(_, key)| key).chain(["A", "a-b", "PORT"]).collect();
        collection::btree_map(sample::select(inner).prop_map(str::to_owned), value, 0..4).prop_map(|map| serde_json::json!(map))
    }

    /// Fields with values: flat, in sections, with an overlay.
    fn document() -> impl Strategy<Value = serde_json::Value> {
        let names: Vec<&str> = fields::below("").into_iter().filter(|n| *n != "name" && *n != "project").chain(["memroy"]).collect();
        let fields = || collection::btree_map(sample::select(names.clone()).prop_map(str::to_owned), value(), 0..6);
        (fields(), fields(), any::<bool>(), any::<bool>()).prop_map(|(mut base, over, flat, with_over)| {
            base.entry("run".into()).or_insert("x".into());
            let mut doc = serde_json::Map::new();
            let over = serde_json::json!(over);
            if flat {
                doc.extend(base);
                doc.insert("name".into(), "web".into());
                if with_over {
                    doc.insert("env".into(), serde_json::json!({ "dev": over, "A": "1" }));
                }
            } else {
                doc.insert("service".into(), serde_json::json!({ "web": base }));
                if with_over {
                    doc.insert("env".into(), serde_json::json!({ "dev": { "service": { "web": over } } }));
                }
            }
            serde_json::Value::Object(doc)
        })
    }

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
        fn property_toml_and_json_of_one_shape_say_the_same(doc in document()) {
            let text = toml::to_string(&doc).unwrap();
            match (parse_toml("f", &text, &context()), parse_json(&doc, &context())) {
                (Ok(toml), Ok(json)) => {
                    prop_assert_eq!(&toml, &json);
                    let stored = serde_json::to_string(&toml.spec).unwrap();
                    prop_assert_eq!(serde_json::from_str::<ProjectSpec>(&stored).unwrap(), toml.spec);
                }
                (Err(toml), Err(json)) => {
                    // In the order of their places, which JSON has not; what is told, and of what, is the same.
                    let told = |errors: &SpecErrors| {
                        let mut all: Vec<_> = errors.errors.iter().map(|e| (e.pointer(), e.message.clone())).collect();
                        all.sort();
                        all
                    };
                    prop_assert_eq!(told(&toml), told(&json));
                }
                (toml, json) => prop_assert!(false, "{:?}\n{:?}\n{}", toml, json, text),
            }
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

#[test]
fn deep_documents_are_refused_before_they_cost_stack() {
    let dotted = format!("{}a = 1\n", "a.".repeat(100_000));
    let header = format!("[{}a]\nb = 1\n", "a.".repeat(100_000));
    let inline = format!("{}1{}\n", "a={".repeat(5_000), "}".repeat(5_000));
    let lists = format!("a = {}{}\n", "[".repeat(5_000), "]".repeat(5_000));
    // Each of the two within the parser's own bound, their product not.
    let steps = "a.".repeat(70);
    let both = format!("[{steps}a]\n{}{}", format!("{steps}a={{").repeat(70), "}".repeat(70));
    for text in [dotted, header, inline, lists, both] {
        assert!(bad(&text).contains("error[OPT-1001]"), "{}", &text[..40]);
    }
}

#[test]
fn large_tables_are_refused_before_they_cost_time() {
    let keys = |n: usize| (0..n).map(|i| format!("k{i}=1\n")).collect::<String>();
    // Laying one over the other would compare each key with each.
    assert!(bad(&format!("name=\"w\"\nrun=\"x\"\n{}[env.dev]\n{}", keys(13_000), keys(13_000))).contains("a table of 13003 keys"));
    let list = format!("name=\"w\"\nrun=[{}]\n", "\"\",".repeat(60_000));
    assert!(bad(&list).contains("more than 50000 values"));
    let many: String = (0..40).map(|i| format!("[env.e{i}]\ncopies=1\n")).collect();
    assert!(bad(&format!("name=\"w\"\nrun=\"x\"\n{many}")).contains("overlays for more than 32 environments"));
    let mut json = serde_json::json!(1);
    for _ in 0..100 {
        json = serde_json::json!([json]);
    }
    assert!(parse_json(&json, &context()).unwrap_err().to_string().contains("nested more than"));
}

#[test]
fn every_environment_is_checked_whichever_is_asked_for() {
    let text = "name = \"w\"\nrun = \"x\"\n[env.prod]\nmemroy = 1\n[env.stage]\npids = 0\n";
    let shown = bad(text);
    assert!(shown.contains("optimus.toml:4:1"), "{shown}");
    assert!(shown.contains("optimus.toml:6:8"), "{shown}");
    let mut context = context();
    context.environment = Name::new("prdo").ok();
    let parsed = parse_toml("f", "name = \"w\"\nrun = \"x\"\n[env.prod]\ncopies = 1\n", &context).unwrap();
    assert_eq!(parsed.warnings, ["the file says nothing of the environment `prdo`, so its base applies; did you mean `prod`?"]);
}

#[test]
fn pointers_of_json_lead_to_the_value_also_in_overlays() {
    let pointers = |json: serde_json::Value| -> Vec<String> {
        let errors = parse_json(&json, &context()).unwrap_err();
        errors.errors.iter().map(SpecError::pointer).collect()
    };
    let value = serde_json::json!({
        "service": { "web": { "run": "x", "port": "auto", "env": { "PORT": "1", "A": [] }, "health": { "http": "x y" } } },
        "env": { "dev": { "service": { "web": { "cpu": "x", "health": { "http": "/", "interval": "1ms" } } } } }
    });
    let found = pointers(value.clone());
    assert!(!found.is_empty());
    for pointer in &found {
        assert!(value.pointer(pointer).is_some(), "{pointer} of {found:?}");
    }
    assert!(found.iter().any(|p| p == "/env/dev/service/web/cpu"), "{found:?}");
    assert!(found.iter().any(|p| p == "/env/dev/service/web/health/interval"), "{found:?}");
    assert!(found.iter().any(|p| p == "/service/web/env/A"), "{found:?}");
}

#[test]
fn pointers_of_a_typed_spec_lead_to_the_value() {
    let text = "[service.web]\nrun = \"x\"\nports = { http = \"auto\", admin = 9000 }\nhealth = \"/h\"\nliveness = \"tcp\"\nsecrets = [\"A\"]\nenv = { B = \"1\" }\nlabels = { c = \"1\" }\n";
    let mut project = good(text).spec;
    let spec = project.workloads.values_mut().next().unwrap();
    spec.resources = Resources { cpu: Millicores(1), memory_request: Bytes(2), memory_limit: Bytes(1), pids: 0 };
    spec.ports[1].fixed = Some(0);
    let probe = spec.health.readiness.as_mut().unwrap();
    probe.check = Check::Http { path: "no".into() };
    probe.interval = crate::Span(0);
    spec.health.liveness.as_mut().unwrap().healthy_after = 0;
    spec.secrets = vec!["1".into()];
    spec.env = [("PORT".to_owned(), "x".to_owned())].into();
    spec.labels = [("a b/~".to_owned(), "x".to_owned())].into();
    spec.stop.signal = "KILL".into();
    spec.update.parallel = 0;
    spec.logs.size = Bytes(1);
    spec.copies = Some(20_000);
    spec.restart.delay = crate::Span(0);
    let json = serde_json::to_value(&project).unwrap();
    let errors = check(&project);
    assert!(errors.len() > 12, "{errors:?}");
    for error in errors {
        assert!(json.pointer(&error.pointer).is_some(), "{error:?}");
    }
}

#[test]
fn messages_carry_no_characters_that_move_a_cursor() {
    let text = "name = \"\\u001b[31mweb\"\nrun = \"x\"\n\"\\u001b]0;x\\u0007\" = 1\ncpu = \"\\u202e1\"\nhealth = { interval = \"\\u001b[2J\" }\n[env.\"\\u001b\"]\n";
    let shown = bad(text);
    assert!(shown.contains("\\u{1b}"), "{shown}");
    assert!(!shown.chars().any(|c| c.is_control() && c != '\n' || c == '\u{202e}'), "{shown:?}");
}

#[test]
fn a_template_takes_what_was_found() {
    let name = Name::new("shop").unwrap();
    let found = Detected { run: "node \"my server.js\"".into(), port: true, health: Some("/up".into()), because: "package.json".into() };
    let parsed = good(&template_for(&name, Some(&found)));
    let spec = &parsed.spec.workloads[&name];
    assert_eq!(spec.run, Run::Argv(vec!["node".into(), "my server.js".into()]));
    assert!(spec.health.readiness.is_some());
    let quiet = Detected { run: "./worker".into(), port: false, health: None, because: "a\nname = 'x'".into() };
    assert!(good(&template_for(&name, Some(&quiet))).spec.workloads[&name].ports.is_empty());
}

#[test]
fn every_line_the_template_offers_is_valid_when_it_is_taken() {
    let text = template_for(&Name::new("w").unwrap(), None);
    let offered: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# "))
        .filter(|l| l.split_once(" = ").is_some_and(|(k, _)| field(k).is_some()))
        .collect();
    assert!(offered.len() > 12, "{offered:?}");
    // Variables and an overlay, both as the template offers them, do not exclude each other.
    let both: String = text
        .lines()
        .map(|l| match l.strip_prefix("# ") {
            Some(line) if line.starts_with("env.") || line == "[env.prod]" || line == "copies = 3" => format!("{line}\n"),
            _ => format!("{l}\n"),
        })
        .collect();
    let parsed = good(&both);
    assert_eq!((parsed.environments.len(), one(&parsed).env.len()), (1, 2), "{both}");
    for line in offered {
        let key = line.split(" = ").next().unwrap();
        let job_only = field(key).unwrap().kinds() == [Kind::Job];
        if job_only || key == "project" {
            continue;
        }
        let kept: String = text
            .lines()
            .filter(|l| !l.strip_prefix(key).is_some_and(|rest| rest.starts_with(" =")))
            .filter(|l| key != "ports" || !l.starts_with("port ="))
            .map(|l| format!("{l}\n"))
            .collect();
        let image = if key == "container" { "image = \"app:1\"\n" } else { "" };
        good(&kept.replacen(&format!("# {line}\n"), &format!("{image}{line}\n"), 1));
    }
}
