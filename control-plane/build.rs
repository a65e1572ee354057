//! Embeds the built console, if there is one: `web/dist/site` becomes a table of files. Without it the binary has a page
//! that says how to build it, so that Rust builds need no Node.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Compressed once by the build of the console.
const COMPRESSED: &str = "br";

fn main() -> io::Result<()> {
    let dist = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?).join("../web/dist");
    println!("cargo:rerun-if-changed={}", dist.display());
    let site = dist.join("site");
    let mut files = Vec::new();
    if site.join("index.html").exists() {
        walk(&site, &mut files)?;
        files.sort();
    }
    let mut table = String::from("pub(super) static FILES: &[File] = &[\n");
    for file in &files {
        let path = file.strip_prefix(&site).map_err(io::Error::other)?.display().to_string();
        let mut compressed = file.clone().into_os_string();
        compressed.push(format!(".{COMPRESSED}"));
        let compressed = match Path::new(&compressed).exists() {
            true => format!("Some(include_bytes!({compressed:?}))"),
            false => "None".to_owned(),
        };
        let line = writeln!(table, "    File {{ path: {path:?}, bytes: include_bytes!({file:?}), brotli: {compressed} }},");
        line.map_err(io::Error::other)?;
    }
    table.push_str("];\n");
    fs::write(PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?).join("console_files.rs"), table)
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else if path.extension().is_none_or(|extension| extension != COMPRESSED) {
            files.push(path);
        }
    }
    Ok(())
}
