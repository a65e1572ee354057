//! The servers of the control plane and the version they share.

use optimus_common::TokenId;
use optimus_common::join_token::Role;

use super::*;

/// The founder's id: it is known before there is a log to take one from. A server that goes on alone after a recovery
/// has left its id in `next_server`.
const FOUNDER: u64 = 1;

impl Step<'_> {
    /// A retry with the same key changes nothing and burns no second use.
    pub(super) fn admit_server(&mut self, token: Option<TokenId>, server: ServerFacts, key_fingerprint: Vec<u8>) -> Applied {
        if self.state.servers.values().any(|s| s.key_fingerprint == key_fingerprint) {
            return self.unchanged();
        }
        let cluster = self.state.cluster.as_ref().map_or(0, |c| c.version);
        let checked = match token {
            _ if server.level < cluster => Err(Refusal::TooOld { cluster, server: server.level }),
            _ if self.state.servers.len() >= SERVERS_MAX => Err(Refusal::TooMany { what: "servers".into(), limit: SERVERS_MAX as u64 }),
            Some(token) => self.use_token(token, Role::Server),
            None if self.state.servers.is_empty() => Ok(()),
            None => Err(Refusal::TokenUnknown),
        };
        if let Err(refusal) = checked {
            self.event(EventKind::TokenRefused, &format!("server/{}", server.name), &format!("join refused: {refusal}"), None);
            return Applied::Refused(refusal);
        }
        // From the log index, so that ids of a state restored from a backup are new as well.
        let id = if token.is_none() { self.state.next_server.max(FOUNDER) } else { self.index.max(self.state.next_server) };
        self.state.next_server = id + 1;
        let ServerFacts { name, address, api, version, level } = server;
        let subject = format!("server/{id}");
        let message = format!("server {id} ({name}) joined at {address}");
        let ca = self.state.cluster.as_ref().map_or(0, |c| c.trusted().0);
        let row = ServerRow {
            id,
            name,
            address,
            api,
            key_fingerprint,
            version,
            level,
            joined_at: self.at,
            leaving: false,
            ca_trusted: ca,
            ca_signer: ca,
            clock_skew_ms: None,
        };
        self.state.servers.insert(id, Arc::new(row));
        self.event(EventKind::ServerJoined, &subject, &message, None);
        self.done()
    }

    pub(super) fn server_up(&mut self, id: u64, server: ServerFacts) -> Applied {
        let Some(row) = self.state.servers.get_mut(&id) else { return Applied::Refused(Refusal::NoSuchServer(id)) };
        let ServerFacts { name, address, api, version, level } = server;
        let fresh = ServerRow { name, address, api, version, level, ..ServerRow::clone(row) };
        if **row == fresh {
            return self.unchanged();
        }
        *row = Arc::new(fresh);
        self.done()
    }

    pub(super) fn raise_version(&mut self, to: u32) -> Applied {
        let understood = self.state.servers.values().map(|s| s.level).min().unwrap_or(0);
        match &mut self.state.cluster {
            Some(cluster) if cluster.version < to && to <= understood => cluster.version = to,
            _ => return self.unchanged(),
        }
        self.event(EventKind::ClusterUpgraded, "cluster", &format!("every server understands version {to} now"), None);
        self.done()
    }

    pub(super) fn remove_server(&mut self, id: u64) -> Applied {
        if self.state.servers.values().filter(|s| !s.leaving && s.id != id).count() == 0 {
            return Applied::Refused(Refusal::LastServer(id));
        }
        match self.state.servers.get_mut(&id) {
            None => return Applied::Refused(Refusal::NoSuchServer(id)),
            Some(row) if row.leaving => return self.unchanged(),
            Some(row) => Arc::make_mut(row).leaving = true,
        }
        self.event(EventKind::ServerLeaving, &format!("server/{id}"), &format!("server {id} is leaving"), None);
        self.done()
    }

    pub(super) fn forget_server(&mut self, id: u64) -> Applied {
        if self.state.servers.get(&id).is_none_or(|row| !row.leaving) {
            return self.unchanged();
        }
        self.state.servers.remove(&id);
        self.event(EventKind::ServerLeft, &format!("server/{id}"), &format!("server {id} has left"), None);
        self.done()
    }
}
