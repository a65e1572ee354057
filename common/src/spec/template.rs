//! The file `optimus init` writes.

use std::fmt::Write as _;

use super::fields::FIELDS;
use crate::ids::Name;

/// What was found in a source directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// The command that starts it.
    pub run: String,
    /// Whether it listens on a port.
    pub port: bool,
    /// The path of its health check, if it is known to have one.
    pub health: Option<String>,
    /// What the guess stands on: `app.py`. One line, put into a comment.
    pub because: String,
}

/// [`template_for`] a workload nobody has named yet.
pub fn template() -> String {
    write("app", None)
}

/// A commented `optimus.toml` to start from. Every field is in it; those not needed at first are comments.
pub fn template_for(name: &Name, detected: Option<&Detected>) -> String {
    write(name.as_str(), detected)
}

fn write(name: &str, detected: Option<&Detected>) -> String {
    let run = detected.map_or("python3 app.py", |d| d.run.as_str());
    let because = detected.map_or_else(String::new, |d| format!("# Found: {}\n", d.because.replace(char::is_control, " ")));
    let mut text = format!(
        "# A project file of Optimus. `optimus explain FIELD` tells more of each field, `optimus validate` checks the file.\n{because}\n\
         name = \"{name}\"\n\
         # Started directly; by `sh -c` only if the line uses shell syntax.\n\
         run = {}\n\
         copies = 1\n",
        toml::Value::String(run.to_owned()),
    );
    let (port, health) = detected.map_or((true, None), |d| (d.port, d.health.as_deref()));
    if port {
        let health = toml::Value::String(health.unwrap_or("tcp").to_owned());
        let _ = write!(
            text,
            "port = \"auto\"                # a free host port; the process finds it in $PORT\n\
             health = {health}               # or a path that must answer 200 to 399: \"/healthz\"\n"
        );
    } else {
        text.push_str("# port = \"auto\"              # a free host port; the process finds it in $PORT\n# health = \"/healthz\"\n");
    }
    text.push_str("cpu = 0.25                   # cores, a hard limit\nmemory = \"128M..256M\"        # reserved .. killed above\n\n# More, each with an example:\n");
    let above = ["name", "run", "copies", "port", "health", "cpu", "memory"];
    for field in FIELDS.iter().filter(|f| !f.name.contains('.') && !above.contains(&f.name)) {
        let note = if field.available { "" } else { " (not available yet)" };
        let _ = writeln!(text, "#\n# {}{note}", first_sentence(field.about));
        for line in field.example.lines() {
            let _ = writeln!(text, "# {line}");
        }
        let prefix = format!("{}.", field.name);
        let below: Vec<&str> = FIELDS.iter().filter_map(|f| f.name.strip_prefix(&prefix)).filter(|f| *f != "NAME").collect();
        if !below.is_empty() {
            let _ = writeln!(text, "#   its fields: {}", below.join(", "));
        }
    }
    text.push_str("\n# Another environment, `optimus deploy --env prod`:\n#\n# [env.prod]\n# copies = 3\n# memory = \"256M..512M\"\n");
    text
}

fn first_sentence(text: &str) -> &str {
    text.find(". ").map_or(text, |at| &text[..=at])
}
