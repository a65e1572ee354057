//! A Docker engine and a registry of this test's own: own directories, socket and bridge, no rule of the host's
//! firewall. Whatever is in it goes with it.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::support::until;

/// Imported from the host's static busybox; nothing is fetched from anywhere.
pub const IMAGE: &str = "optimus-test/busybox:1";
const APPLETS: [&str; 18] = [
    "sh", "sleep", "echo", "cat", "httpd", "yes", "dd", "true", "false", "id", "ls", "test", "wget", "usleep", "env", "touch", "nc",
    "printf",
];
/// Longest time the engine takes to come up; it is some seconds.
const UP_MAX: Duration = Duration::from_secs(60);

/// One engine at a time: they share the host's network.
static ONE: Mutex<()> = Mutex::new(());

pub struct Engine {
    pub dir: tempfile::TempDir,
    /// Address of the host on the engine's bridge.
    pub bridge_ip: String,
    bridge: String,
    child: Option<Child>,
    /// Certificates it trusts beside none.
    pub trust: Option<PathBuf>,
    _one: MutexGuard<'static, ()>,
}

impl Engine {
    /// A running engine with [`IMAGE`].
    pub fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let n = std::process::id() % 200 + 20;
        let (bridge, bridge_ip) = (format!("optbr{}", std::process::id()), format!("10.219.{n}.1"));
        run("ip", &["link", "add", &bridge, "type", "bridge"]);
        run("ip", &["addr", "add", &format!("{bridge_ip}/24"), "dev", &bridge]);
        run("ip", &["link", "set", &bridge, "up"]);
        let mut engine = Engine { dir: tempfile::tempdir().unwrap(), bridge_ip, bridge, child: None, trust: None, _one: one };
        engine.start();
        engine.import(IMAGE);
        engine
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("docker.sock")
    }

    /// Starts it (again) and waits until it answers.
    pub fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.path().join("dockerd.log")).unwrap();
        let dir = self.dir.path();
        let mut command = Command::new("dockerd");
        command.arg("--host").arg(format!("unix://{}", self.socket().display()));
        command.arg("--data-root").arg(dir.join("data")).arg("--exec-root").arg(dir.join("exec")).arg("--pidfile").arg(dir.join("pid"));
        command.args(["--bridge", &self.bridge, "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--shutdown-timeout", "3"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        if let Some(trust) = &self.trust {
            command.env("SSL_CERT_FILE", trust);
        }
        let _ = fs::remove_file(dir.join("pid"));
        self.child = Some(command.spawn().expect("dockerd: scripts/setup test installs it"));
        let deadline = Instant::now() + UP_MAX;
        while !self.docker_try(&["info"]).status.success() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            let log = || fs::read_to_string(self.dir.path().join("dockerd.log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < deadline, "dockerd does not come up: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it as an administrator would; its containers end with it.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(30);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > deadline {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    pub fn docker_try(&self, args: &[&str]) -> Output {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket().display())).args(args);
        command.env("DOCKER_CONFIG", self.dir.path().join("client")).stdin(Stdio::null()).output().unwrap()
    }
    pub fn docker(&self, args: &[&str]) -> String {
        let done = self.docker_try(args);
        assert!(done.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    }
    /// Names of all containers.
    pub fn containers(&self) -> Vec<String> {
        self.docker(&["ps", "--all", "--format", "{{.Names}}"]).lines().map(str::to_owned).collect()
    }
    pub fn has_image(&self, reference: &str) -> bool {
        self.docker_try(&["image", "inspect", reference]).status.success()
    }

    /// Makes an image of busybox and what is in `extra`.
    pub fn import(&self, reference: &str) {
        self.import_with(reference, "");
    }
    pub fn import_with(&self, reference: &str, mark: &str) {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::create_dir(root.path().join("tmp")).unwrap();
        fs::copy(find("busybox"), bin.join("busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", bin.join(applet)).unwrap();
        }
        fs::write(root.path().join("mark"), mark).unwrap();
        let tar = Command::new("tar").arg("-C").arg(root.path()).args(["-c", "."]).output().unwrap();
        assert!(tar.status.success());
        let mut import = Command::new("docker");
        import.arg("--host").arg(format!("unix://{}", self.socket().display()));
        let mut import = import.args(["import", "-", reference]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        import.stdin.take().unwrap().write_all(&tar.stdout).unwrap();
        assert!(import.wait().unwrap().success());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.child.is_none() {
            self.start();
        }
        let left = self.containers();
        for name in &left {
            self.docker_try(&["rm", "--force", "--volumes", name]);
        }
        self.stop();
        // What the storage driver keeps mounted.
        for mount in ["data/overlay2", "data/plugins", "exec/netns/default", "data"] {
            let _ = Command::new("umount").arg("--lazy").arg(self.dir.path().join(mount)).stderr(Stdio::null()).status();
        }
        run("ip", &["link", "del", &self.bridge]);
    }
}

/// Debian's registry with a password file and a certificate of our own authority.
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    pub address: String,
    /// The authority, for the engine to trust.
    pub ca: PathBuf,
}

impl Registry {
    pub const USER: &str = "shop";
    pub const PASSWORD: &str = "correct horse";

    pub fn new(ip: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (ca, ca_key) = authority();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new([ip.to_owned()]).unwrap().signed_by(&key, &ca_key).unwrap();
        fs::write(path("ca.pem"), ca).unwrap();
        fs::write(path("cert.pem"), certificate.pem()).unwrap();
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        let passwords = Command::new("htpasswd").args(["-Bbn", Self::USER, Self::PASSWORD]).output().unwrap();
        assert!(passwords.status.success());
        fs::write(path("htpasswd"), passwords.stdout).unwrap();
        let port = std::net::TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port();
        let address = format!("{ip}:{port}");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {0}/data}}}}\n\
             http:\n  addr: {address}\n  secret: test\n  tls: {{certificate: {0}/cert.pem, key: {0}/key.pem}}\n\
             auth: {{htpasswd: {{realm: test, path: {0}/htpasswd}}}}\n",
            dir.path().display()
        );
        fs::write(path("config.yml"), config).unwrap();
        let log = File::create(path("log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path("config.yml")).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("docker-registry: scripts/setup test installs it");
        let registry = Registry { child, ca: path("ca.pem"), dir, address };
        until("the registry answers", || std::net::TcpStream::connect(&registry.address).ok().map(drop));
        registry
    }

    /// Puts an image there that the engine then no longer has.
    pub fn push(&self, engine: &Engine, name: &str, mark: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        engine.import_with(&reference, mark);
        engine.docker(&["login", "--username", Self::USER, "--password", Self::PASSWORD, &self.address]);
        engine.docker(&["push", &reference]);
        engine.docker(&["rmi", &reference]);
        assert!(!engine.has_image(&reference));
        reference
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn authority() -> (String, rcgen::Issuer<'static, rcgen::KeyPair>) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "optimus test authority");
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), rcgen::Issuer::new(params, key))
}

fn run(command: &str, args: &[&str]) {
    let done = Command::new(command).args(args).output().unwrap();
    assert!(done.status.success(), "{command} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn find(program: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap();
    let found = path.split(':').map(|dir| Path::new(dir).join(program)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("{program}: scripts/setup test installs it"))
}
