//! Commands of users: one effect per Idempotency-Key, dry runs, and what came of it.

use std::time::Duration;

use axum::response::Response;
use http::{HeaderName, HeaderValue};
use optimus_common::Timestamp;
use optimus_common::ids::RequestId;
use optimus_core::state::command::Refusal;
use optimus_core::state::{Applied, Command, Proposal, State};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use utoipa::IntoParams;

use super::context::Ctx;
use super::problem::ApiError;

pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Longest key.
pub const IDEMPOTENCY_KEY_MAX: usize = 255;
/// This server may lag behind the leader that committed the command: how long it may take to catch up.
const CATCH_UP_MAX: Duration = Duration::from_secs(5);

/// Parameters of every operation that changes something.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ChangeQuery {
    /// Check and show what would happen, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What makes a retry of this request the same request.
pub(crate) struct Identity {
    id: RequestId,
    digest: Vec<u8>,
    /// The client gave a key; without one, only our own retries share the id.
    keyed: bool,
}

/// What came of a command.
pub(crate) struct Committed {
    pub applied: Applied,
    /// The state it left (for a dry run: would leave).
    pub state: State,
    pub replayed: bool,
}

impl Identity {
    pub fn id(&self) -> RequestId {
        self.id
    }

    pub fn of(ctx: &Ctx, body: &[u8]) -> Result<Self, ApiError> {
        // Not the host: a retry may go to another server, by another name.
        let target = ctx.parts.uri.path_and_query().map_or("", |target| target.as_str());
        let mut digest = Sha256::new();
        for part in [ctx.parts.method.as_str().as_bytes(), target.as_bytes(), body] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        let digest = digest.finalize().to_vec();
        let mut keys = ctx.parts.headers.get_all(IDEMPOTENCY_KEY).iter();
        let (id, keyed) = match (keys.next(), keys.next()) {
            (None, _) => (RequestId(ctx.store().env.new_id()), false),
            (Some(key), None) => (derive(ctx.principal.name(), checked(key)?), true),
            (Some(_), Some(_)) => return Err(ApiError::bad_request("the request has two Idempotency-Key headers")),
        };
        Ok(Identity { id, digest, keyed })
    }
}

/// The key's text; quotes around it (a structured-field string) are not part of it.
fn checked(key: &HeaderValue) -> Result<&str, ApiError> {
    let text = key.to_str().ok().map(|text| text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text));
    text.filter(|text| (1..=IDEMPOTENCY_KEY_MAX).contains(&text.len()))
        .ok_or_else(|| ApiError::bad_request(format!("Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_MAX} printable ASCII characters")))
}

/// The same principal and key give the same id on every server: a UUID of version 8.
fn derive(principal: &str, key: &str) -> RequestId {
    let digest =
        Sha256::new().chain_update(b"optimus idempotency key\0").chain_update(principal).chain_update([0]).chain_update(key).finalize();
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&digest[..16]);
    RequestId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// Commits a command, or gives the answer an earlier request with the same key got.
pub(crate) async fn commit(
    ctx: &Ctx,
    identity: Identity,
    query: &ChangeQuery,
    command: impl FnOnce(&State) -> Result<Command, ApiError>,
) -> Result<Committed, ApiError> {
    let before = ctx.store().read().await?;
    let earlier = before.requests.get(&identity.id).filter(|_| identity.keyed).cloned();
    if let Some(earlier) = earlier {
        if earlier.digest != identity.digest {
            return Err(Refusal::RequestReused.into());
        }
        return accept(Committed { applied: earlier.answer.clone(), state: before, replayed: true });
    }
    let command = command(&before)?;
    if query.dry_run {
        let mut state = before;
        let applied = rehearse(&mut state, ctx.store().env.clock.now(), command);
        return accept(Committed { applied, state, replayed: false });
    }
    let seen = before.index;
    drop(before);
    let applied = ctx.store().propose_for(identity.id, identity.digest, command).await?;
    // Somebody with the same key was quicker than we.
    let replayed = identity.keyed && index_of(&applied).is_some_and(|index| index <= seen);
    let state = caught_up(ctx, index_of(&applied).unwrap_or(seen)).await;
    accept(Committed { applied, state, replayed })
}

/// The very `apply` that a commit runs, on a copy.
fn rehearse(state: &mut State, at: Timestamp, command: Command) -> Applied {
    let index = state.index + 1;
    state.apply(index, Proposal { at, request: None, command })
}

fn accept(committed: Committed) -> Result<Committed, ApiError> {
    match committed.applied {
        Applied::Refused(refusal) => Err(refusal.into()),
        _ => Ok(committed),
    }
}

pub(crate) fn index_of(applied: &Applied) -> Option<u64> {
    match applied {
        Applied::Done { index } | Applied::Unchanged { index } | Applied::Deployed { index, .. } => Some(*index),
        Applied::Refused(_) => None,
    }
}

/// This server's state once it holds `index`, or as far as it got.
async fn caught_up(ctx: &Ctx, index: u64) -> State {
    let mut applied = ctx.store().applied();
    let caught_up = async {
        while ctx.store().state().index < index {
            if applied.changed().await.is_err() {
                break;
            }
        }
    };
    if tokio::time::timeout(CATCH_UP_MAX, caught_up).await.is_err() {
        tracing::warn!(index, "answering a write before this server has applied it");
    }
    ctx.store().state()
}

/// Says in the answer that it is an earlier one.
pub(crate) fn mark_replayed(response: &mut Response, replayed: bool) {
    if replayed {
        response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_belongs_to_its_principal() {
        assert_eq!(derive("admin", "k"), derive("admin", "k"));
        assert_ne!(derive("admin", "k"), derive("adminx", "k"));
        assert_ne!(derive("a", "b\0c"), derive("a\0b", "d"));
        assert_eq!(derive("admin", "k").0.get_version_num(), 8);
    }

    #[test]
    fn keys_are_bounded_text() {
        let long = "a".repeat(IDEMPOTENCY_KEY_MAX + 1);
        for bad in ["", "\"\"", long.as_str()] {
            assert!(HeaderValue::from_str(bad).is_ok_and(|value| checked(&value).is_err()), "{bad}");
        }
        let quoted = HeaderValue::from_static("\"abc\"");
        assert!(matches!(checked(&quoted), Ok("abc")));
    }
}
