//! The steps of a CA rotation, and what members say of their trust and their clocks.

use std::collections::BTreeMap;

use optimus_common::clock_skew;

use super::*;
use crate::state::authority::{self, Authorities, Member, Rewrap, Rotation, RotationPhase, RotationVerdict};
use crate::state::{Vault, VaultKey};

impl Step<'_> {
    pub(super) fn rotate_ca(&mut self, number: u32, certificate: Vec<u8>, key_sealed: Vec<u8>, cross: Vec<u8>, overlap: Span) -> Applied {
        let at = self.at;
        let Some(cluster) = &mut self.state.cluster else { return Applied::Refused(Refusal::NoCluster) };
        let Authorities { signing, newest, steps, rotation, .. } = &mut cluster.authorities;
        match rotation {
            Some(under_way) if under_way.number == number && under_way.certificate == certificate => return self.unchanged(), // proposed twice
            Some(_) => return Applied::Refused(Refusal::RotationUnderWay),
            // Made from an older view: its cross certificate may be by a CA that no longer signs.
            None if number != newest.saturating_add(1) => return Applied::Refused(Refusal::RotationUnderWay),
            None => {}
        }
        let (shortest, longest) = authority::OVERLAP;
        let (from, phase) = (*signing, RotationPhase::Announce);
        *newest = number;
        *steps += 1;
        let fresh = Rotation {
            number,
            from,
            phase,
            certificate,
            key_sealed,
            cross,
            overlap: overlap.clamp(shortest, longest),
            started_at: at,
            phase_at: at,
            waited: Span(0),
            force: false,
        };
        *rotation = Some(fresh);
        self.event(EventKind::CaRotation, "cluster", &format!("CA {number} is announced; CA {from} signs until all trust it"), None);
        self.done()
    }

    /// The present CA's key is sealed with another root key from now on.
    pub(super) fn rewrap(&mut self, Rewrap { steps, root_key, ca_key_sealed, holders, vaults }: Rewrap) -> Applied {
        let Some(cluster) = &mut self.state.cluster else { return Applied::Refused(Refusal::NoCluster) };
        if cluster.authorities.root_key == root_key {
            return self.unchanged(); // proposed twice
        }
        // While a CA is announced its key is sealed, too.
        if cluster.authorities.rotation.is_some() || cluster.authorities.steps != steps {
            return Applied::Refused(Refusal::RotationUnderWay);
        }
        if let Some(without) = self.state.servers.keys().find(|id| !holders.contains(id)) {
            return Applied::Refused(Refusal::RootKeyNotHeld(*without));
        }
        // An environment got its first secret meanwhile: its key would be lost with the old root key.
        let sealed: BTreeMap<&VaultKey, &Vec<u8>> = vaults.iter().map(|(key, id, _)| (key, id)).collect();
        if let Some((key, _)) = self.state.vaults.iter().find(|(key, vault)| sealed.get(key) != Some(&&vault.id)) {
            return Applied::Refused(Refusal::OtherVault(key.clone()));
        }
        for (key, id, key_sealed) in vaults {
            self.state.vaults.insert(key, Arc::new(Vault { id, key_sealed }));
        }
        cluster.ca_key_sealed = ca_key_sealed;
        cluster.authorities.root_key = root_key;
        cluster.authorities.steps += 1;
        self.event(EventKind::CaRotation, "cluster", "another root key seals the CA's key from now on", None);
        self.done()
    }

    /// Gives the rotation to CA `number` up while the old CA still signs.
    pub(super) fn abort_rotation(&mut self, number: u32) -> Applied {
        let Some(authorities) = self.state.cluster.as_mut().map(|c| &mut c.authorities) else {
            return Applied::Refused(Refusal::NoCluster);
        };
        match &authorities.rotation {
            // Also what was proposed twice.
            None if number <= authorities.newest && number != authorities.signing => return self.unchanged(),
            None => return Applied::Refused(Refusal::NoRotation),
            Some(rotation) if rotation.number != number => return Applied::Refused(Refusal::NoRotation),
            Some(rotation) if rotation.phase != RotationPhase::Announce => return Applied::Refused(Refusal::RotationPastAbort),
            Some(_) => {}
        }
        self.drop_announced(number, "by a person");
        self.done()
    }

    fn drop_announced(&mut self, number: u32, why: &str) {
        let Some(authorities) = self.state.cluster.as_mut().map(|c| &mut c.authorities) else { return };
        authorities.rotation = None;
        authorities.steps += 1;
        let message = format!("the rotation to CA {number} was given up {why}; CA {} signs as before", authorities.signing);
        self.event(EventKind::CaRotation, "cluster", &message, None);
    }

    pub(super) fn force_rotation(&mut self) -> Applied {
        let rotation = self.state.cluster.as_mut().and_then(|c| c.authorities.rotation.as_mut());
        match rotation {
            None => return Applied::Refused(Refusal::NoRotation),
            Some(rotation) if rotation.force => return self.unchanged(),
            Some(rotation) => rotation.force = true,
        }
        self.event(EventKind::CaRotation, "cluster", "the CA rotation no longer waits for nodes in this phase", None);
        self.done()
    }

    /// The leader has counted how long the phase has lasted. It never becomes less.
    pub(super) fn rotation_waited(&mut self, number: u32, phase: RotationPhase, waited: Span) -> Applied {
        let rotation = self.state.cluster.as_mut().and_then(|c| c.authorities.rotation.as_mut());
        match rotation.filter(|r| r.number == number && r.phase == phase && r.waited < waited) {
            None => return self.unchanged(),
            Some(rotation) => rotation.waited = waited,
        }
        self.done()
    }

    /// Ends the phase `from` of the rotation to CA `number`, if it is over.
    pub(super) fn step_rotation(&mut self, number: u32, from: RotationPhase) -> Applied {
        let at = self.at;
        let now = |r: &Rotation| r.number == number && r.phase == from;
        if !self.state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref()).is_some_and(now) {
            return self.unchanged();
        }
        let left = match authority::judge_rotation(self.state) {
            RotationVerdict::Advance(left) => left,
            RotationVerdict::GiveUp(left) => {
                let why = format!("after {}: {}", authority::ANNOUNCE_MAX, authority::explain_giving_up(self.state, &left));
                self.drop_announced(number, &why);
                return self.done();
            }
            RotationVerdict::Idle | RotationVerdict::Wait(_) => return self.unchanged(),
        };
        let left_out = authority::names(self.state, &left.nodes);
        let Some(cluster) = &mut self.state.cluster else { return self.unchanged() };
        let Authorities { signing, steps, cross, rotation: held, .. } = &mut cluster.authorities;
        let Some(rotation) = held else { return self.unchanged() };
        let before = rotation.from;
        *steps += 1;
        let mut message = match from {
            RotationPhase::Announce => {
                std::mem::swap(&mut cluster.ca_certificate, &mut rotation.certificate);
                // The old CA signs no more, so its key goes.
                cluster.ca_key_sealed = std::mem::take(&mut rotation.key_sealed);
                *cross = std::mem::take(&mut rotation.cross);
                *signing = number;
                rotation.phase = RotationPhase::Sign;
                rotation.phase_at = at;
                rotation.waited = Span(0);
                rotation.force = false;
                format!("CA {number} signs from now on; CA {before} is still trusted")
            }
            RotationPhase::Sign => {
                *held = None;
                format!("CA {before} is no longer trusted")
            }
        };
        if !left_out.is_empty() {
            let what = match from {
                RotationPhase::Announce => ("does not trust the new one yet", "do not trust the new one yet"),
                RotationPhase::Sign => {
                    ("was left out and has to renew when it is back", "were left out and have to renew when they are back")
                }
            };
            message = format!("{message}; {}", authority::sentence("node", what, left_out));
        }
        self.event(EventKind::CaRotation, "cluster", &message, None);
        self.done()
    }

    pub(super) fn member_ca(&mut self, member: Member, trusted: u32, signer: u32) -> Applied {
        let newest = self.state.cluster.as_ref().map_or(0, |c| c.trusted().1);
        // Nobody can trust what does not exist.
        let (trusted, signer) = (trusted.min(newest), signer.min(newest));
        match member {
            Member::Server(id) => match self.state.servers.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchServer(id)),
                Some(row) if (row.ca_trusted, row.ca_signer) == (trusted, signer) => return self.unchanged(),
                Some(row) => {
                    let row = Arc::make_mut(row);
                    (row.ca_trusted, row.ca_signer) = (trusted, signer);
                }
            },
            Member::Node(id) => match self.state.nodes.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchNode(id)),
                Some(row) if (row.ca_trusted, row.ca_signer) == (trusted, signer) => return self.unchanged(),
                Some(row) => {
                    let row = Arc::make_mut(row);
                    (row.ca_trusted, row.ca_signer) = (trusted, signer);
                }
            },
        }
        self.done()
    }

    pub(super) fn member_clock(&mut self, member: Member, skew_ms: Option<i64>) -> Applied {
        let (subject, told) = match member {
            Member::Server(id) => match self.state.servers.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchServer(id)),
                Some(row) => (format!("server/{id}"), &mut Arc::make_mut(row).clock_skew_ms),
            },
            Member::Node(id) => match self.state.nodes.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchNode(id)),
                Some(row) => (format!("node/{}", row.facts.name), &mut Arc::make_mut(row).clock_skew_ms),
            },
        };
        if *told == skew_ms {
            return self.unchanged();
        }
        *told = skew_ms;
        let message = match skew_ms {
            Some(ms) => format!("its clock is {}", clock_skew::in_words(ms)),
            None => "its clock agrees with the others' again".to_owned(),
        };
        self.event(EventKind::ClockSkew, &subject, &message, None);
        self.done()
    }
}
