//! Every file of `good-specs/` is read as the JSON beside it says: the whole spec, with defaults, and the warnings.
//!
//! A first line `# environment: NAME` chooses one. `UPDATE_EXPECT=1` rewrites the JSON; read it before it is committed.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use optimus_common::Name;
use optimus_common::spec::{self, Context, ProjectSpec};

#[test]
fn each_good_spec_is_read_as_expected() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("good-specs");
    let mut specs: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    specs.retain(|path| path.extension().is_some_and(|e| e == "toml"));
    specs.sort();
    let mut wrong = Vec::new();
    for path in &specs {
        let text = fs::read_to_string(path).unwrap();
        let environment = text.lines().next().and_then(|line| line.strip_prefix("# environment: ")).map(|name| Name::new(name).unwrap());
        let context = Context { default_project: Name::new("shop").ok(), base_dir: "/srv/shop".into(), environment };
        let parsed = spec::parse_toml("optimus.toml", &text, &context).unwrap_or_else(|errors| panic!("{}:\n{errors}", path.display()));
        assert_eq!(spec::check(&parsed.spec), [], "{}", path.display());
        let stored = serde_json::to_string(&parsed.spec).unwrap();
        assert_eq!(serde_json::from_str::<ProjectSpec>(&stored).unwrap(), parsed.spec);
        let shown = serde_json::json!({
            "spec": parsed.spec,
            "warnings": parsed.warnings,
            "environments": parsed.environments,
            "not_available": spec::not_available(&parsed.spec),
        });
        let shown = format!("{}\n", serde_json::to_string_pretty(&shown).unwrap());
        let expected = path.with_extension("json");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&expected, &shown).unwrap();
        }
        if fs::read_to_string(&expected).unwrap_or_default() != shown {
            wrong.push(format!("{} is read as\n{shown}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}\nUPDATE_EXPECT=1 rewrites them", wrong.join("\n"));
    assert!(specs.len() >= 20, "{} good specs", specs.len());
}
