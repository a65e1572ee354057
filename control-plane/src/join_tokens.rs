//! Making join tokens, as the API sees it. The identity part, which holds the CA, makes them.

use std::future::Future;
use std::pin::Pin;

use optimus_common::Span;
use optimus_common::api::v1::JoinTokenAnswer;
use optimus_common::join_token::Role;
use optimus_core::state::Command;

use crate::store::ProposeError;

/// Why a join token was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// The request breaks a rule, or the state refuses it (too many tokens).
    #[error("{0}")]
    Refused(String),
    #[error("failed to store the join token")]
    Propose(#[from] ProposeError),
}

/// Makes join tokens.
pub trait JoinTokens: Send + Sync + 'static {
    /// Makes a token that `uses` agents or servers may use within `ttl`. Its text is in the answer only.
    fn create(
        &self,
        role: Role,
        ttl: Span,
        uses: u32,
    ) -> Pin<Box<dyn Future<Output = Result<JoinTokenAnswer, JoinTokenError>> + Send + '_>>;

    /// The command that announces a new CA, both to be trusted for `overlap` at most.
    fn next_ca(&self, _overlap: Span) -> Result<Command, JoinTokenError> {
        Err(JoinTokenError::Refused("this server holds no CA".into()))
    }
}
