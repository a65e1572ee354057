//! An authority and the certificates of servers, made for one run.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use optimus_common::ClusterId;
use optimus_control_plane::identity::Ca;
use optimus_control_plane::peers::PeerSettings;
use optimus_host::env::HostEnv;
use optimus_host::tls::{self, Key, PinTable, Roots};
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// One certificate, for both ends of a connection.
#[derive(Debug)]
pub struct Shown(Arc<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// Writes `cluster`, `ca`, and `ID.crt` and `ID.key` of servers 1 to `n`.
pub fn create(dir: &Path, n: u64) -> anyhow::Result<()> {
    let env = HostEnv::new();
    let cluster = ClusterId(env.new_id());
    let (ca, _) = Ca::create(cluster, &env)?;
    fs::create_dir_all(dir)?;
    fs::write(dir.join("cluster"), cluster.0.to_string())?;
    fs::write(dir.join("ca"), ca.certificate())?;
    for id in 1..=n {
        let key = Key::generate()?;
        fs::write(dir.join(format!("{id}.crt")), ca.issue_server(&key, id, &[], &env)?.certificate)?;
        fs::write(dir.join(format!("{id}.key")), &*key.to_pkcs8())?;
    }
    Ok(())
}

/// What server `id` of `n` shows and believes.
pub fn load(dir: &Path, id: u64, n: u64) -> anyhow::Result<(PeerSettings, Arc<Shown>)> {
    let read = |name: String| fs::read(dir.join(&name)).with_context(|| format!("failed to read {name}"));
    let cluster = ClusterId(String::from_utf8(read("cluster".to_owned())?)?.parse()?);
    let roots = Roots::new(&[read("ca".to_owned())?])?;
    let pins = PinTable::new([]);
    for server in 1..=n {
        pins.set(server, Key::from_pkcs8(&read(format!("{server}.key"))?)?.fingerprint());
    }
    let key = Key::from_pkcs8(&read(format!("{id}.key"))?)?;
    let certificate = read(format!("{id}.crt"))?.into();
    let shown = Arc::new(Shown(Arc::new(CertifiedKey::from_der(vec![certificate], key.private_der(), &tls::provider())?)));
    let settings = PeerSettings { cluster, server: id, roots, certificate: shown.clone(), pins, env: HostEnv::new() };
    Ok((settings, shown))
}
