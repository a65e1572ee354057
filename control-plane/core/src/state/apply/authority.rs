//! The steps of a CA rotation, and what members say of their trust and their clocks.

use super::*;
use crate::state::authority::{self, Authorities, Left, Member, Rotation, RotationPhase, RotationVerdict};

impl Step<'_> {
    pub(super) fn rotate_ca(&mut self, number: u32, certificate: Vec<u8>, key_sealed: Vec<u8>, cross: Vec<u8>) -> Applied {
        let at = self.at;
        let Some(cluster) = &mut self.state.cluster else { return Applied::Refused(Refusal::NoCluster) };
        let Authorities { signing, rotation } = &mut cluster.authorities;
        match rotation {
            Some(under_way) if under_way.certificate == certificate => return self.unchanged(), // proposed twice
            Some(_) => return Applied::Refused(Refusal::RotationUnderWay),
            // Made from an older view: its cross certificate is by a CA that no longer signs.
            None if number != signing.saturating_add(1) => return Applied::Refused(Refusal::RotationUnderWay),
            None => {}
        }
        let phase = RotationPhase::Announce;
        *rotation = Some(Rotation { number, phase, certificate, key_sealed, cross, started_at: at, phase_at: at, force: false });
        self.event(
            EventKind::CaRotation,
            "cluster",
            &format!("CA {number} is announced; CA {} signs until all trust it", number - 1),
            None,
        );
        self.done()
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

    /// Ends the phase `from` of the rotation to CA `number`, if it is over.
    pub(super) fn step_rotation(&mut self, number: u32, from: RotationPhase) -> Applied {
        let RotationVerdict::Advance(Left { nodes, .. }) = authority::judge_rotation(self.state) else { return self.unchanged() };
        let left_out = authority::names(self.state, &nodes);
        let at = self.at;
        let Some(cluster) = &mut self.state.cluster else { return self.unchanged() };
        let Some(rotation) = cluster.authorities.rotation.as_mut().filter(|r| r.number == number && r.phase == from) else {
            return self.unchanged();
        };
        let mut message = match from {
            RotationPhase::Announce => {
                std::mem::swap(&mut cluster.ca_certificate, &mut rotation.certificate);
                // The old CA signs no more, so its key goes.
                cluster.ca_key_sealed = std::mem::take(&mut rotation.key_sealed);
                cluster.authorities.signing = number;
                rotation.phase = RotationPhase::Sign;
                rotation.phase_at = at;
                rotation.force = false;
                format!("CA {number} signs from now on; CA {} is still trusted", number.saturating_sub(1))
            }
            RotationPhase::Sign => {
                cluster.authorities.rotation = None;
                format!("CA {} is no longer trusted", number.saturating_sub(1))
            }
        };
        if !left_out.is_empty() {
            let what = match from {
                RotationPhase::Announce => ("does not trust the new one yet", "do not trust the new one yet"),
                RotationPhase::Sign => ("is left out and must join again", "are left out and must join again"),
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
        match member {
            Member::Server(id) => match self.state.servers.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchServer(id)),
                Some(row) if row.clock_skew_ms == skew_ms => return self.unchanged(),
                Some(row) => Arc::make_mut(row).clock_skew_ms = skew_ms,
            },
            Member::Node(id) => match self.state.nodes.get_mut(&id) {
                None => return Applied::Refused(Refusal::NoSuchNode(id)),
                Some(row) if row.clock_skew_ms == skew_ms => return self.unchanged(),
                Some(row) => Arc::make_mut(row).clock_skew_ms = skew_ms,
            },
        }
        self.done()
    }
}
