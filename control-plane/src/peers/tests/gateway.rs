//! The gateway passes servers on, by what they say they speak.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::auth::AdminToken;
use crate::gateway::{Gateway, GatewayConfig};
use crate::identity::{Identity, ServerNames, root_key};
use crate::memory_store::memory_store;
use crate::peers::PeerServe;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_reach_each_other_on_the_port_of_agents() {
    let (dir, second, env) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), HostEnv::new());
    let store = memory_store(env.clone());
    let names = |server| ServerNames { server, names: vec![] };
    let one = Identity::found(dir.path(), &store, &names(1)).await.unwrap();
    std::fs::copy(dir.path().join(root_key::FILE), second.path().join(root_key::FILE)).unwrap();
    let two = Identity::found(second.path(), &store, &names(2)).await.unwrap();
    assert_ne!(one.reset_secret(), two.reset_secret());
    let pins = PinTable::new([(1, one.key_fingerprint()), (2, two.key_fingerprint())]);

    let echo = Arc::new(Echo::default());
    let serving: Arc<dyn PeerServe> = Arc::new(PeerServer::new(&two.peer_settings(pins.clone()), echo.clone(), None));
    let bind = |serving| {
        let config =
            GatewayConfig { listen: (Ipv4Addr::LOCALHOST, 0).into(), advertise: vec![], admin: AdminToken::generate(&*env.entropy) };
        Gateway::bind_with_peers(store.clone(), two.clone(), config, serving).unwrap()
    };
    let (gateway, alone) = (bind(Some(serving)), bind(None));
    let stop = CancellationToken::new();
    let running: Vec<_> = [&gateway, &alone]
        .map(|gateway| {
            let (gateway, stop) = (gateway.clone(), stop.clone());
            tokio::spawn(async move { gateway.run(stop).await })
        })
        .into();

    let caller = QuicPeers::new(one.peer_settings(pins.clone())).unwrap();
    let peer = |gateway: &Gateway| Peer { id: 2, addr: gateway.local_addr().to_string() };
    assert_eq!(append(&caller, &peer(&gateway), "through the gateway").await.unwrap(), "through the gateway");
    assert_eq!(*echo.calls.lock().unwrap(), [(1, PeerRpc::Append)]);

    let other = QuicPeers::new(one.peer_settings(pins)).unwrap();
    let reason = refused(&other, &peer(&alone)).await;
    assert!(reason.contains("no common protocol"), "a gateway without peers offers them nothing: {reason}");

    stop.cancel();
    for gateway in running {
        gateway.await.unwrap();
    }
}
