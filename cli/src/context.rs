//! Which cluster to talk to, and with what credential.
//!
//! A context is a file `$XDG_CONFIG_HOME/optimus/contexts/NAME.json`, readable by its owner only;
//! `current` beside the folder names the one in use. `optimus server` and `optimus dev` write one at
//! their start with [`write_context`]. What counts, highest first:
//!
//! 1. `--context NAME`: that file and nothing else.
//! 2. `OPTIMUS_URL`, `OPTIMUS_TOKEN`, `OPTIMUS_CA_FILE`, each replacing its part.
//! 3. the file named by `OPTIMUS_CONTEXT`, else by `current`, else the only one there is.
//!
//! A stored token is never sent to a server that the stored CA does not vouch for.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use optimus_common::Name;
use optimus_common::reason::code;
use serde::{Deserialize, Serialize};

use crate::error::{Exit, Failure, nearest};

/// Largest context file or CA file read.
const FILE_MAX: u64 = 256 * 1024;

/// Most context files looked at when none is named.
const CONTEXTS_MAX: usize = 1000;

/// One cluster, as the CLI knows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `https://host:port` of the API.
    pub url: String,
    /// The cluster's CA certificate; the only one trusted.
    pub ca_pem: String,
    /// Bearer token.
    pub token: String,
    /// Project meant where a command names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    /// Environment meant where a command names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Name>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token stays out of logs.
        f.debug_struct("Context").field("url", &self.url).field("project", &self.project).finish_non_exhaustive()
    }
}

/// Why a context was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    #[error("neither XDG_CONFIG_HOME nor HOME is set, so there is no place for contexts")]
    NoHome,
    #[error("`{0}` is not a context name; use a-z, 0-9, `.`, `_` and -, at most 63, starting with a letter or digit")]
    Name(String),
    #[error("failed to {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a context: {source}", path.display())]
    Shape {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} may be read by others (mode {mode:o}); it holds a credential", path.display())]
    Mode { path: PathBuf, mode: u32 },
}

/// Writes a context for `name`, mode 0600, in one step; makes it the current one if there is none. Returns the file.
///
/// # Errors
/// When the name is not one, or the folder or file cannot be written.
pub fn write_context(name: &str, context: &Context) -> Result<PathBuf, ContextError> {
    let store = Store::open()?;
    let path = store.write(name, context)?;
    if store.current()?.is_none() {
        store.set_current(name)?;
    }
    Ok(path)
}

/// Makes `name` the current context.
///
/// # Errors
/// When the name is not one, or the file cannot be written.
pub fn set_current(name: &str) -> Result<(), ContextError> {
    Store::open()?.set_current(name)
}

/// Name of the context in use, if one is.
pub fn current() -> Option<String> {
    Store::open().ok()?.current().ok()?
}

/// Forgets a context; makes `next` the current one if it was that.
///
/// # Errors
/// When the file is there and cannot be removed.
pub fn remove_context(name: &str, next: Option<&str>) -> Result<(), ContextError> {
    let store = Store::open()?;
    let was_current = store.current()?.as_deref() == Some(name);
    remove_file(&store.path(name)?)?;
    match next.filter(|n| *n != name) {
        _ if !was_current => Ok(()),
        Some(next) => store.set_current(next),
        None => remove_file(&store.root.join("current")),
    }
}

fn remove_file(path: &Path) -> Result<(), ContextError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ContextError::Io { what: "remove", path: path.to_owned(), source }),
        _ => Ok(()),
    }
}

/// The folder of contexts.
pub struct Store {
    root: PathBuf,
}

impl Store {
    pub fn open() -> Result<Self, ContextError> {
        let config = absolute_env("XDG_CONFIG_HOME").or_else(|| absolute_env("HOME").map(|home| home.join(".config")));
        Ok(Store { root: config.ok_or(ContextError::NoHome)?.join("optimus") })
    }

    pub fn path(&self, name: &str) -> Result<PathBuf, ContextError> {
        Ok(self.root.join("contexts").join(format!("{}.json", check_name(name)?)))
    }

    fn write(&self, name: &str, context: &Context) -> Result<PathBuf, ContextError> {
        let path = self.path(name)?;
        let text = serde_json::to_vec_pretty(context).map_err(|source| ContextError::Shape { path: path.clone(), source })?;
        write_private(&path, &text)?;
        Ok(path)
    }

    /// Puts other CA certificates into the contexts that `mine` names. An empty `ca_pem` says nothing.
    ///
    /// # Errors
    /// When a file cannot be written. One that cannot be read is not ours.
    pub fn learn_ca(&self, mine: impl Fn(&Context) -> bool, ca_pem: &str) -> Result<(), ContextError> {
        for name in self.names() {
            let Ok(context) = self.read(&name) else { continue };
            if !ca_pem.is_empty() && context.ca_pem != ca_pem && mine(&context) {
                self.write(&name, &Context { ca_pem: ca_pem.to_owned(), ..context })?;
            }
        }
        Ok(())
    }

    pub fn read(&self, name: &str) -> Result<Context, ContextError> {
        let path = self.path(name)?;
        let file = fs::File::open(&path).map_err(|source| ContextError::Io { what: "open", path: path.clone(), source })?;
        let mode =
            file.metadata().map_err(|source| ContextError::Io { what: "read", path: path.clone(), source })?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(ContextError::Mode { path, mode });
        }
        let mut text = String::new();
        file.take(FILE_MAX).read_to_string(&mut text).map_err(|source| ContextError::Io { what: "read", path: path.clone(), source })?;
        serde_json::from_str(&text).map_err(|source| ContextError::Shape { path, source })
    }

    pub fn current(&self) -> Result<Option<String>, ContextError> {
        let path = self.root.join("current");
        match read_bounded(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|name| check_name(name).is_ok())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ContextError::Io { what: "read", path, source }),
        }
    }

    fn set_current(&self, name: &str) -> Result<(), ContextError> {
        write_private(&self.root.join("current"), format!("{}\n", check_name(name)?).as_bytes())
    }

    /// Names of the contexts there are, in order.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join("contexts")) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .take(CONTEXTS_MAX)
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        names
    }
}

fn check_name(name: &str) -> Result<&str, ContextError> {
    let good = |c: char| matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.');
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && name.len() <= 63 && name.chars().all(good) { Ok(name) } else { Err(ContextError::Name(name.to_owned())) }
}

/// The value of a variable that must be an absolute path; the XDG rule is to ignore others.
pub fn absolute_env(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes beside and renames, so that a reader sees the old file or the new one.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), ContextError> {
    let fail = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| ContextError::Io { what, path, source }
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fail("create", folder))?;
    let beside = path.with_extension(format!("tmp{}", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        // The rename itself must survive a power cut.
        fs::File::open(folder)?.sync_all()
    })();
    written.map_err(|source| {
        // The half-written file is of no use; that it stays is of no harm.
        let _ = fs::remove_file(&beside);
        ContextError::Io { what: "write", path: path.to_owned(), source }
    })
}

/// What the environment says, apart from the files; an argument so that tests need not set variables.
#[derive(Debug, Default)]
pub struct Overrides {
    pub context: Option<String>,
    pub url: Option<String>,
    pub token: Option<String>,
    pub ca_file: Option<PathBuf>,
}

impl Overrides {
    pub fn from_env() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Overrides {
            context: text("OPTIMUS_CONTEXT"),
            url: text("OPTIMUS_URL"),
            token: text("OPTIMUS_TOKEN"),
            ca_file: text("OPTIMUS_CA_FILE").map(PathBuf::from),
        }
    }
}

/// The context a command works with. `flag` is `--context`.
///
/// # Errors
/// Exit code 4 when no credential is to be found, 3 when the context named does not exist.
pub fn resolve(store: &Store, flag: Option<&str>, env: Overrides) -> Result<Context, Failure> {
    let what = "cannot tell which server to talk to";
    if let Some(name) = flag {
        return read_named(store, name, what);
    }
    if let (Some(url), Some(token), Some(ca_file)) = (&env.url, &env.token, &env.ca_file) {
        return Ok(Context { url: url.clone(), token: token.clone(), ca_pem: read_ca(ca_file)?, project: None, environment: None });
    }
    let names = store.names();
    let name = match (env.context, store.current().map_err(|error| failure(error, what))?, names.as_slice()) {
        (Some(name), _, _) | (None, Some(name), _) => name,
        (None, None, [only]) => only.clone(),
        (None, None, names) => {
            let failure = Failure::new(Exit::Denied, what).with_code(&code::UNAUTHENTICATED);
            return Err(if names.is_empty() {
                failure
                    .because("there is no context yet: no cluster was started or joined by this user on this machine")
                    .hint("start one with `optimus dev`, or see `optimus help credentials`")
            } else {
                failure.because(format!("there are several contexts: {}", names.join(", "))).hint("name one: `--context NAME`")
            });
        }
    };
    let mut context = read_named(store, &name, what)?;
    if let Some(ca_file) = env.ca_file {
        if env.token.is_none() {
            return Err(Failure::new(Exit::Denied, what)
                .because("OPTIMUS_CA_FILE is set without OPTIMUS_TOKEN; the stored token is not sent to a server of another CA")
                .hint("set OPTIMUS_TOKEN as well, or unset OPTIMUS_CA_FILE"));
        }
        context.ca_pem = read_ca(&ca_file)?;
    }
    if let Some(url) = env.url {
        context.url = url;
    }
    if let Some(token) = env.token {
        context.token = token;
    }
    Ok(context)
}

fn read_named(store: &Store, name: &str, what: &str) -> Result<Context, Failure> {
    store.read(name).map_err(|error| {
        let missing = matches!(&error, ContextError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
        if !missing {
            return failure(error, what);
        }
        let names = store.names();
        let near = nearest(name, names.iter().map(String::as_str));
        let failure = Failure::new(Exit::NotFound, what).because(format!("there is no context `{name}`"));
        match (near, names.is_empty()) {
            (Some(near), _) => failure.hint(format!("did you mean `--context {near}`?")),
            (None, false) => failure.hint(format!("there are: {}", names.join(", "))),
            (None, true) => failure.hint("start a cluster with `optimus dev`, or see `optimus help credentials`"),
        }
    })
}

fn read_ca(path: &Path) -> Result<String, Failure> {
    read_bounded(path).map_err(|error| {
        Failure::new(Exit::Denied, "cannot read the CA named by OPTIMUS_CA_FILE").because(format!("{}: {error}", path.display()))
    })
}

fn failure(error: ContextError, what: &str) -> Failure {
    let hint = match &error {
        ContextError::Mode { path, .. } => Some(format!("chmod 600 {}", path.display())),
        ContextError::Shape { .. } => Some("start `optimus server` or `optimus dev` again, it writes the file anew".to_owned()),
        _ => None,
    };
    let mut failure = Failure::from(anyhow::Error::from(error)).doing(what);
    failure.exit = Exit::Denied;
    failure.hint = hint;
    failure
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("optimus");
        (dir, Store { root })
    }

    fn context(url: &str) -> Context {
        Context { url: url.into(), ca_pem: "ca".into(), token: "t".into(), project: None, environment: None }
    }

    #[test]
    fn a_context_reads_back_and_is_private() {
        let (_dir, store) = store();
        let path = store.write("dev", &context("https://a")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(store.read("dev").unwrap(), context("https://a"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(store.read("dev"), Err(ContextError::Mode { .. })));
        for bad in ["", "../x", ".hidden", "a/b", &"a".repeat(64)] {
            assert!(store.write(bad, &context("https://a")).is_err(), "{bad}");
        }
    }

    #[test]
    fn flag_beats_environment_beats_current() {
        let (_dir, store) = store();
        for name in ["a", "b", "c"] {
            store.write(name, &context(&format!("https://{name}"))).unwrap();
        }
        let env = |name: Option<&str>| Overrides { context: name.map(str::to_owned), ..Overrides::default() };
        assert_eq!(resolve(&store, None, env(None)).unwrap_err().exit, Exit::Denied);
        store.set_current("a").unwrap();
        assert_eq!(resolve(&store, None, env(None)).unwrap().url, "https://a");
        assert_eq!(resolve(&store, None, env(Some("b"))).unwrap().url, "https://b");
        let url = Overrides { url: Some("https://z".into()), ..env(Some("b")) };
        assert_eq!(resolve(&store, Some("c"), url).unwrap().url, "https://c");
        let url = Overrides { url: Some("https://z".into()), ..env(None) };
        assert_eq!(resolve(&store, None, url).unwrap().url, "https://z");
        assert_eq!(resolve(&store, Some("bb"), env(None)).unwrap_err().hint.unwrap(), "did you mean `--context b`?");
    }

    #[test]
    fn a_stored_token_does_not_go_to_another_ca() {
        let (dir, store) = store();
        store.write("a", &context("https://a")).unwrap();
        let ca = dir.path().join("ca.pem");
        fs::write(&ca, "other").unwrap();
        let env = || Overrides { ca_file: Some(ca.clone()), ..Overrides::default() };
        assert_eq!(resolve(&store, None, env()).unwrap_err().exit, Exit::Denied);
        let all = Overrides { token: Some("x".into()), ..env() };
        assert_eq!(resolve(&store, None, all).unwrap().ca_pem, "other");
    }
}
