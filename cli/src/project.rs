//! Project files: finding, reading and checking `optimus.toml`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use optimus_common::Name;
use optimus_common::reason::code;
use optimus_common::spec::{self, Parsed};

use crate::error::{Exit, Failure};
use crate::target::Scope;

pub const FILE_NAME: &str = "optimus.toml";

/// Largest project file; the server takes no larger source.
const FILE_MAX: u64 = 256 * 1024;

/// A project file as read, not yet checked.
#[derive(Debug)]
pub struct Source {
    /// As the user would write it, for messages.
    pub shown: String,
    pub text: String,
    /// Absolute folder of the file: the base of relative paths in it.
    pub base_dir: PathBuf,
}

impl Source {
    /// Reads the file at `path`, or the `optimus.toml` in it.
    ///
    /// # Errors
    /// Exit code 2 when there is none, or it cannot be read.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let file = if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() };
        let shown = file.strip_prefix("./").unwrap_or(&file).display().to_string();
        let fail = |why: String| Failure::new(Exit::Usage, format!("cannot read {shown}")).because(why);
        let opened = fs::File::open(&file).map_err(|error| {
            let failure = fail(error.to_string());
            match error.kind() {
                std::io::ErrorKind::NotFound => failure.hint("write one with `optimus init`, or name the directory that holds it"),
                _ => failure,
            }
        })?;
        let mut bytes = Vec::new();
        opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|error| fail(error.to_string()))?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(fail(format!("it is larger than {} KiB", FILE_MAX / 1024)));
        }
        let text = String::from_utf8(bytes).map_err(|_| fail("it is not UTF-8 text".into()))?;
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let base_dir = folder.canonicalize().map_err(|error| fail(error.to_string()))?;
        Ok(Source { shown, text, base_dir })
    }

    /// Checks it for one environment.
    ///
    /// # Errors
    /// Exit code 2 with every fault, each with its place.
    pub fn parse(&self, environment: Option<&Name>, project: Option<&Name>) -> Result<Parsed, Failure> {
        let context = spec::Context {
            default_project: project_of_folder(&self.base_dir),
            base_dir: self.base_dir.clone(),
            environment: environment.cloned(),
        };
        let mut parsed = spec::parse_toml(&self.shown, &self.text, &context).map_err(|errors| {
            let mut failure = Failure::usage(format!("{} is not valid", self.shown)).with_code(&code::INVALID_SPEC);
            failure.detail = errors.to_string().trim_end().lines().map(str::to_owned).collect();
            failure.hint("`optimus explain FIELD` documents each field")
        })?;
        if let Some(project) = project {
            parsed.spec.project = project.clone();
        }
        let refused = spec::not_available(&parsed.spec);
        if !refused.is_empty() {
            // The server would refuse it for the same reason; here it takes no server to know.
            let mut failure =
                Failure::usage(format!("{} asks for what this version does not do yet", self.shown)).with_code(&code::NOT_AVAILABLE_YET);
            failure.why = refused.into_iter().map(|fault| format!("{}: {}", fault.pointer, fault.message)).collect();
            return Err(failure.hint("remove the fields named"));
        }
        Ok(parsed)
    }
}

/// The project of a file that names none: its folder, as far as that is a name.
fn project_of_folder(folder: &Path) -> Option<Name> {
    let text = folder.file_name()?.to_str()?.to_lowercase();
    let text: String = text.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' }).collect();
    let text = text.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    Name::new(text.chars().take(optimus_common::ids::NAME_MAX).collect::<String>().trim_end_matches('-')).ok()
}

/// Project and environment of the file here, if there is one and it is valid.
pub fn scope_here() -> Scope {
    let here = Path::new(FILE_NAME);
    let parsed = here.is_file().then(|| Source::read(here)).and_then(Result::ok).and_then(|source| source.parse(None, None).ok());
    parsed.map_or_else(Scope::default, |parsed| Scope { project: Some(parsed.spec.project), environment: Some(parsed.spec.environment) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_project_a_name() {
        for (folder, name) in
            [("/a/shop", Some("shop")), ("/a/My Shop_2", Some("my-shop-2")), ("/a/2048", None), ("/", None), ("/a/9-x-", Some("x"))]
        {
            assert_eq!(project_of_folder(Path::new(folder)).as_ref().map(Name::as_str), name, "{folder}");
        }
    }
}
