#![allow(clippy::unwrap_used)]
use super::*;

fn rule(text: &str) -> Constraint {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn holds(text: &str, value: Option<&str>) -> bool {
    rule(text).test.holds(value)
}

#[test]
fn each_operator_means_what_it_says() {
    for (text, yes, no) in [
        ("label.a = x", vec![Some("x")], vec![Some("y"), None]),
        ("label.a != x", vec![Some("y"), None], vec![Some("x")]),
        ("label.a < 10", vec![Some("9"), Some("9.99")], vec![Some("10"), Some("11"), Some("word"), None]),
        ("kernel.version >= 5.10", vec![Some("5.10.0-23-amd64"), Some("6.1")], vec![Some("5.9.16"), Some("4.19"), None]),
        ("kernel.version > v5", vec![Some("5.0.1")], vec![Some("5.0.0")]),
        ("node.memory >= 16G", vec![Some("17179869184"), Some("16G")], vec![Some("17179869183")]),
        ("label.a ~ ^web-[0-9]+$", vec![Some("web-12")], vec![Some("web-x"), Some("a web-1"), None]),
        ("label.a !~ ssd", vec![Some("hdd"), None], vec![Some("fast-ssd-2")]),
        ("label.a in x, y", vec![Some("x"), Some("y")], vec![Some("z"), Some("x, y"), None]),
        ("label.a not in x,y", vec![Some("z"), None], vec![Some("x")]),
        ("label.a contains x,y", vec![Some("y, x"), Some("x,y,z")], vec![Some("x"), Some("xy"), None]),
        ("label.a version >= 1.2, < 2", vec![Some("1.2.0"), Some("1.99")], vec![Some("2.0"), Some("1.1"), Some("none")]),
        ("label.a exists", vec![Some("")], vec![None]),
        ("label.a not exists", vec![None], vec![Some("")]),
    ] {
        for value in yes {
            assert!(holds(text, value), "{text}: {value:?}");
        }
        for value in no {
            assert!(!holds(text, value), "{text}: {value:?}");
        }
    }
}

#[test]
fn a_rule_is_written_as_it_is_read() {
    for text in [
        "arch = amd64",
        "label.zone in a, b",
        "label.zone not in a",
        "kernel.version >= 5.10",
        "attr.rack ~ ^r[1-4]$",
        "label.x exists",
        "label.x not exists",
        "node.pool != gpu",
        "driver.nvidia version >= 535, < 600",
        "label.f contains a, b",
        "label.x !~ y",
        "hostname = h1",
    ] {
        assert_eq!(rule(text).to_string(), text);
        let json = serde_json::to_string(&rule(text)).unwrap();
        assert_eq!(serde_json::from_str::<Constraint>(&json).unwrap(), rule(text));
    }
    assert_eq!(rule("arch=amd64"), rule("arch == amd64"));
    for text in ["+50 label.disk = ssd", "-100 label.zone = c"] {
        assert_eq!(text.parse::<Affinity>().unwrap().to_string(), text);
    }
    assert_eq!("50 label.a = b".parse::<Affinity>().unwrap().to_string(), "+50 label.a = b");
    for text in ["label.zone", "label.zone a 70%, b 30%"] {
        assert_eq!(text.parse::<Spread>().unwrap().to_string(), text);
    }
    for text in ["1 gpu", "2 nvidia/gpu where memory >= 16G and model ~ A100"] {
        assert_eq!(text.parse::<DeviceAsk>().unwrap().to_string(), text);
    }
    assert_eq!("gpu".parse::<DeviceAsk>().unwrap().to_string(), "1 gpu");
}

#[test]
fn a_placement_that_asks_nothing_takes_no_room() {
    assert_eq!(serde_json::to_string(&Placement::default()).unwrap(), "{}");
    assert_eq!(serde_json::from_str::<Placement>("{}").unwrap(), Placement::default());
}

#[test]
fn what_is_wrong_with_a_rule_is_said() {
    let wrong = |text: &str| {
        let error = text.parse::<Constraint>().unwrap_err();
        format!("{error}; {}", error.hint.clone().unwrap_or_default())
    };
    assert_eq!(wrong(""), "the rule is empty; ");
    assert_eq!(
        wrong("zone = a"),
        "`zone` is no attribute of a node; write `label.zone` for a label, `attr.zone` for what the agent found out"
    );
    assert_eq!(wrong("node.poole = a"), "a node has no `poole`; did you mean `node.pool`?");
    assert_eq!(wrong("label.zone"), format!("`label.zone` is not compared with anything; known are {OPERATORS}"));
    assert_eq!(wrong("label.zone is a"), format!("`is` is no operator; known are {OPERATORS}"));
    assert_eq!(wrong("label.zone ="), "nothing follows `label.zone =`; write `label.zone = VALUE`");
    assert_eq!(wrong("label.n > many"), "`many` is no number, version or size, so nothing is > it; write for example `5.10` or `16G`");
    assert_eq!(wrong("label.a in x,,y"), "the list has an empty place; write the values with a comma between: a, b");
    assert!(wrong("label.a ~ (").starts_with("`(` is no pattern: "), "{}", wrong("label.a ~ ("));
    assert_eq!(wrong("label.a ~ ((((.{99}){99}){99}){99}){99}").lines().count(), 1);
}

#[test]
fn a_patterns_classes_are_those_of_ascii() {
    assert!(!holds("label.a ~ ^\\w$", Some("é")));
    assert!(holds("label.a ~ ^\\w$", Some("e")));
}
