//! Renewing the certificate, and following the cluster's CAs.
//!
//! It is renewed at half its life, and at once when another CA has begun to sign. Whether it has expired is the server's
//! to say: our own clock may be hours off, so what it says is a guess that is dropped when the server knows better.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::time::Duration;

use optimus_common::Timestamp;
use optimus_common::protocol::{ClockPong, Message, Pong, RenewRequest, Trust, VERSION_TRUST};
use optimus_common::reason::code;
use optimus_host::telemetry::Chain;
use tokio::sync::{Notify, mpsc};

use super::Link;
use super::session::End;

/// How often the certificate's age is looked at, and a renewal without an answer asked for again.
const CHECK: Duration = Duration::from_secs(60);
/// The nodes of a cluster spread their renewals over this when another CA begins to sign.
const SPREAD: Duration = Duration::from_secs(5);

/// What the server and our clock say of the certificate.
#[derive(Debug, Default)]
pub struct Renewal {
    doubt: AtomicU8,
    /// Protocol of the session.
    version: AtomicU16,
    /// Another CA signs.
    superseded: Notify,
}

/// Our clock is believed.
const BELIEVED: u8 = 0;
/// The server said that the certificate has expired.
const MUST: u8 = 1;
/// The certificate was renewed just now: if it seems expired, our clock is wrong.
const FRESH: u8 = 2;

impl Renewal {
    /// Whether the next connection has to renew before anything else.
    pub fn first(&self, seems_expired: bool) -> bool {
        match self.doubt.load(Ordering::Relaxed) {
            MUST => true,
            FRESH => false,
            _ => seems_expired,
        }
    }

    pub fn renewed(&self) {
        self.doubt.store(FRESH, Ordering::Relaxed);
    }

    /// A server has sent us away.
    pub fn refused(&self, refusal: &str) {
        if refusal == code::CERTIFICATE_EXPIRED.code {
            self.doubt.store(MUST, Ordering::Relaxed);
        }
    }

    pub fn welcomed(&self, version: u16) {
        self.doubt.store(BELIEVED, Ordering::Relaxed);
        self.version.store(version, Ordering::Relaxed);
    }

    fn tells(&self) -> bool {
        self.version.load(Ordering::Relaxed) >= VERSION_TRUST
    }

    /// The answer to ping `n` at `now` of our wall clock.
    pub fn pong(&self, n: u64, now: Timestamp) -> Message {
        if self.tells() { ClockPong { n, at: now }.into() } else { Pong { n }.into() }
    }
}

/// Takes the CAs to trust and tells the server; false when the session is ending.
pub async fn take(link: &Link, trust: Trust, out: &mpsc::Sender<Message>) -> bool {
    let taken = link.identity().trust(trust.progress, trust.roots);
    match taken {
        Ok(true) => tracing::info!(trusted = link.identity().roots.len(), "told which CAs to trust"),
        Ok(false) => {}
        Err(error) => {
            tracing::error!(error = %Chain(&error), "failed to store the cluster's CAs; told again in the next session");
            return true;
        }
    }
    if link.identity().superseded() {
        link.renewal.superseded.notify_one();
    }
    tell(link, out).await
}

/// Tells the server what we trust and whose certificate we hold; false when the session is ending.
pub async fn tell(link: &Link, out: &mpsc::Sender<Message>) -> bool {
    let trusting = link.identity().trusting();
    !link.renewal.tells() || out.send(trusting.into()).await.is_ok()
}

/// Asks for a fresh certificate when it is due. Goes by the wall clock in short steps, as a host may sleep.
pub async fn run(link: &Link, out: &mpsc::Sender<Message>) -> End {
    let clock = &link.env.clock;
    // A clock that runs far ahead finds every certificate old. One that came in this session is as old as the session
    // has been since, whatever the clock says.
    let mut held = (link.identity().not_after, None);
    loop {
        let due = {
            let identity = link.identity();
            if held.0 != identity.not_after {
                held = (identity.not_after, Some(clock.monotonic()));
            }
            let half_life = Duration::from_millis(identity.not_after.since(identity.not_before).0 / 2);
            let old = match held.1 {
                Some(came) => clock.monotonic().saturating_sub(came) >= half_life,
                None => clock.now() >= identity.renew_at(),
            };
            (old || identity.superseded()).then(|| identity.key.clone())
        };
        if let Some(key) = due {
            match key.request() {
                Ok(csr) => {
                    if out.send(RenewRequest { csr }.into()).await.is_err() {
                        return End::lost("the session is ending");
                    }
                }
                Err(error) => tracing::error!(error = %Chain(&error), "failed to make a certificate request; trying again"),
            }
        }
        tokio::select! {
            () = clock.sleep(CHECK) => {}
            () = link.renewal.superseded.notified() => clock.sleep(SPREAD.mul_f64(link.env.fraction().clamp(0.0, 1.0))).await,
        }
    }
}
