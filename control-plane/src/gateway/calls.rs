//! Requests to agents: each on a stream of its own, with the stream's flow control as back-pressure.

use std::time::Duration;

use optimus_common::NodeId;
use optimus_common::protocol::{LogRequest, Message};
use optimus_host::telemetry::Chain;
use optimus_host::transport::{FrameError, FrameReader, FrameWriter};
use tokio::sync::mpsc;

use super::Gateway;
use crate::agent_calls::{AgentCallError, AgentCalls, LogAnswer};

/// Longest wait for an agent's first word.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest frame of an answer; agents cut theirs at 64 KiB of text.
const CHUNK_MAX: usize = 512 << 10;
/// Chunks held for a slow reader; then the agent waits.
const CHUNKS_WAITING: usize = 4;

impl AgentCalls for Gateway {
    fn logs(&self, node: NodeId, request: LogRequest) -> LogAnswer<'_> {
        Box::pin(async move {
            let session = self.shared.sessions.get(node).ok_or(AgentCallError::NotConnected)?;
            let asked = async {
                let (send, receive) = session.connection.open_bi().await.map_err(|_| AgentCallError::NotConnected)?;
                let (mut writer, mut reader) = (FrameWriter::new(send), FrameReader::new(receive, CHUNK_MAX));
                let sent = async {
                    writer.send(request).await?;
                    writer.finish()
                };
                sent.await.map_err(|_| AgentCallError::NotConnected)?;
                // An agent answers at once: with lines, with an empty chunk, or with a refusal.
                let first = reader.next().await;
                Ok::<_, AgentCallError>((reader, first))
            };
            let (mut reader, first) = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.map_err(|_| AgentCallError::TimedOut)??;
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
