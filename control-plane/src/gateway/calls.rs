//! Requests to agents: each on a stream of its own, with the stream's flow control as back-pressure. To the agent itself
//! if it is connected here, else through the server it is connected to ([`relay`]).

use std::time::Duration;

use optimus_common::NodeId;
use optimus_common::protocol::{LogRequest, Message};
use optimus_common::usage::HistoryRequest;
use optimus_host::telemetry::Chain;
use optimus_host::transport::{FrameError, FrameReader, FrameWriter};
use tokio::sync::mpsc;

use super::{Gateway, relay};
use crate::agent_calls::{AgentCallError, AgentCalls, HistoryCall, LogAnswer, NodeUsage};

/// Longest wait for an agent's first word.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest frame of an answer; agents cut theirs at 64 KiB of text.
const CHUNK_MAX: usize = 512 << 10;
/// And of a history: every metric at the most points.
const HISTORY_MAX: usize = 1 << 20;
/// Chunks held for a slow reader; then the agent waits.
const CHUNKS_WAITING: usize = 4;

impl Gateway {
    /// Sends a request on a stream of its own and waits for the first frame of the answer.
    async fn ask(
        &self,
        node: NodeId,
        request: impl Into<Message>,
        limit: usize,
    ) -> Result<(FrameReader, Result<Option<Message>, FrameError>), AgentCallError> {
        let asked = async {
            let (send, receive) = match self.shared.sessions.get(node) {
                Some(session) => session.connection.open_bi().await.map_err(|_| AgentCallError::NotConnected)?,
                None => relay::open(&self.shared, &self.endpoint, node).await?,
            };
            let (mut writer, mut reader) = (FrameWriter::new(send), FrameReader::new(receive, limit));
            let sent = async {
                writer.send(request).await?;
                writer.finish()
            };
            sent.await.map_err(|_| AgentCallError::NotConnected)?;
            let first = reader.next().await;
            Ok((reader, first))
        };
        tokio::time::timeout(ANSWER_TIMEOUT, asked).await.map_err(|_| AgentCallError::TimedOut)?
    }
}

impl AgentCalls for Gateway {
    fn usages(&self, watch: bool) -> Vec<(NodeId, NodeUsage)> {
        if watch {
            self.shared.usages.watch(self.shared.store.env.clock.monotonic());
        }
        self.shared.usages.all()
    }

    fn history(&self, node: NodeId, request: HistoryRequest) -> HistoryCall<'_> {
        Box::pin(async move {
            let (_, first) = self.ask(node, request, HISTORY_MAX).await?;
            match first {
                Ok(Some(Message::HistoryAnswer(answer))) => Ok(answer),
                Ok(Some(Message::Refused(refused))) => Err(AgentCallError::Refused(refused.message)),
                Ok(_) => Err(AgentCallError::Refused("the agent sent something else than a history".into())),
                Err(FrameError::Read(_)) => Err(AgentCallError::NotConnected),
                Err(error) => Err(AgentCallError::Refused(Chain(&error).to_string())),
            }
        })
    }

    fn logs(&self, node: NodeId, request: LogRequest) -> LogAnswer<'_> {
        Box::pin(async move {
            // An agent answers at once: with lines, with an empty chunk, or with a refusal.
            let (mut reader, first) = self.ask(node, request, CHUNK_MAX).await?;
            let first = match first {
                Ok(Some(Message::LogChunk(chunk))) => Some(chunk),
                Ok(None) => None,
                Ok(Some(Message::Refused(refused))) => return Err(AgentCallError::Refused(refused.message)),
                Ok(Some(_)) => return Err(AgentCallError::Refused("the agent sent another message than a log chunk".into())),
                Err(FrameError::Read(_)) => return Err(AgentCallError::NotConnected),
                Err(error) => return Err(AgentCallError::Refused(Chain(&error).to_string())),
            };
            let (give, take) = mpsc::channel(CHUNKS_WAITING);
            let Some(first) = first else { return Ok(take) };
            let stop = self.shared.stop.clone();
            self.shared.tasks.spawn(async move {
                if !first.lines.is_empty() && give.send(first).await.is_err() {
                    return reader.stop();
                }
                loop {
                    let next = tokio::select! {
                        next = reader.next() => next,
                        // A half-read frame does not matter: nobody wants it.
                        () = give.closed() => return reader.stop(),
                        () = stop.cancelled() => return,
                    };
                    match next {
                        Ok(Some(Message::LogChunk(chunk))) if chunk.lines.is_empty() => {}
                        Ok(Some(Message::LogChunk(chunk))) => {
                            if give.send(chunk).await.is_err() {
                                return reader.stop();
                            }
                        }
                        Ok(None) => return,
                        Ok(Some(Message::Refused(refused))) => {
                            tracing::warn!(%node, reason = refused.message, "the agent broke off a log");
                            return;
                        }
                        Ok(Some(_)) => return reader.stop(),
                        Err(error) => {
                            tracing::info!(%node, error = %Chain(&error), "a log ended early");
                            return;
                        }
                    }
                }
            });
            Ok(take)
        })
    }
}
