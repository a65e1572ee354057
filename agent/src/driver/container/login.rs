//! Registry logins of this node: `<data>/registry-auth/NAME.json`.
//!
//! A spec names one and never holds it. The file must be readable by its owner alone.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use bollard::auth::DockerCredentials;
use serde::Deserialize;

/// Longest file read.
const FILE_MAX: u64 = 64 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    username: Option<String>,
    password: Option<String>,
    identity_token: Option<String>,
}

/// Reads a login for the registry of `image`. The error is for people and holds nothing secret. Blocking.
pub fn read(dir: &Path, name: &str, image: &str) -> Result<DockerCredentials, String> {
    let path = dir.join(format!("{name}.json"));
    let shown = path.display();
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    let file = opened.map_err(|e| format!("the registry login {shown}: {e}"))?;
    let meta = file.metadata().map_err(|e| format!("the registry login {shown}: {e}"))?;
    let own = rustix::process::geteuid().as_raw();
    if meta.mode() & 0o077 != 0 || (meta.uid() != own && meta.uid() != 0) {
        return Err(format!("the registry login {shown} is readable by others than its owner (chmod 600)"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(|e| format!("the registry login {shown}: {e}"))?;
    // Its error would quote the text.
    let login: Login = serde_json::from_slice(&bytes).map_err(|e| {
        format!("the registry login {shown} is not what is expected (username and password, or identity_token) at line {}", e.line())
    })?;
    if login.identity_token.is_none() && (login.username.is_none() || login.password.is_none()) {
        return Err(format!("the registry login {shown} has neither username and password nor identity_token"));
    }
    let Login { username, password, identity_token } = login;
    let serveraddress = Some(registry_of(image).to_owned());
    Ok(DockerCredentials { username, password, identitytoken: identity_token, serveraddress, ..DockerCredentials::default() })
}

/// The registry an image comes from, as engines read references.
pub fn registry_of(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => "docker.io",
    }
}

/// Repository and tag (or digest) of a reference, for a pull: without one the engine would fetch every tag.
pub fn repository_and_tag(image: &str) -> (&str, &str) {
    if let Some((repository, digest)) = image.split_once('@') {
        return (repository, digest);
    }
    match image.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (image, "latest"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn references_are_taken_apart_as_engines_do() {
        for (image, registry, repository, tag) in [
            ("nginx", "docker.io", "nginx", "latest"),
            ("shop/web:1.2", "docker.io", "shop/web", "1.2"),
            ("localhost/web", "localhost", "localhost/web", "latest"),
            ("host:5000/web", "host:5000", "host:5000/web", "latest"),
            ("host:5000/a/web:2", "host:5000", "host:5000/a/web", "2"),
            ("r.example/web@sha256:00", "r.example", "r.example/web", "sha256:00"),
            ("r.example/web:1@sha256:00", "r.example", "r.example/web:1", "sha256:00"),
        ] {
            assert_eq!((registry_of(image), repository_and_tag(image)), (registry, (repository, tag)), "{image}");
        }
    }

    #[test]
    fn a_login_others_can_read_is_refused_and_none_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("company.json");
        assert!(read(dir.path(), "company", "r.example/a").unwrap_err().contains("company.json"));
        fs::write(&path, r#"{"username":"u","password":"hunter2"}"#).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(dir.path(), "company", "r.example/a").unwrap_err().contains("chmod 600"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let login = read(dir.path(), "company", "r.example/a").unwrap();
        assert_eq!((login.password.as_deref(), login.serveraddress.as_deref()), (Some("hunter2"), Some("r.example")));
        for bad in [r#"{"username":"u","pass":"hunter2"}"#, r#"{"username":"hunter2"}"#, "hunter2"] {
            fs::write(&path, bad).unwrap();
            assert!(!read(dir.path(), "company", "r.example/a").unwrap_err().contains("hunter2"), "{bad}");
        }
    }
}
