//! Requests to agents, as the API sees them. The gateway, which holds the agents' connections or knows who does, answers them.

use std::future::Future;
use std::pin::Pin;

use optimus_common::NodeId;
use optimus_common::protocol::{LogChunk, LogRequest};
use optimus_common::usage::{HistoryAnswer, HistoryRequest};
use tokio::sync::mpsc;

pub use crate::gateway::usage::{Measured, NodeUsage};

/// Why an agent did not answer a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentCallError {
    #[error("the node is not connected to any server that can be reached")]
    NotConnected,
    #[error("the node did not answer in time")]
    TimedOut,
    #[error("the node refused: {0}")]
    Refused(String),
}

/// An answer that comes as a bounded stream of log chunks; the channel's end is the answer's end.
pub type LogAnswer<'a> = Pin<Box<dyn Future<Output = Result<mpsc::Receiver<LogChunk>, AgentCallError>> + Send + 'a>>;

pub type HistoryCall<'a> = Pin<Box<dyn Future<Output = Result<HistoryAnswer, AgentCallError>> + Send + 'a>>;

/// Asks agents.
pub trait AgentCalls: Send + Sync + 'static {
    /// Newest figures of every node connected to this server. With `watch`, fresher ones follow for some seconds.
    fn usages(&self, _watch: bool) -> Vec<(NodeId, NodeUsage)> {
        vec![]
    }
    /// The history of a node or of one of its allocations.
    fn history(&self, _node: NodeId, _request: HistoryRequest) -> HistoryCall<'_> {
        Box::pin(async { Err(AgentCallError::NotConnected) })
    }
    /// The output of one allocation, oldest line first. Dropping the receiver ends the request.
    fn logs(&self, node: NodeId, request: LogRequest) -> LogAnswer<'_>;
}
