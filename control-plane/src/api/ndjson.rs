//! Streams of JSON lines, with a blank line when nothing else was sent for a while, so that proxies
//! do not cut an idle stream and both ends notice a dead one.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::context::Ctx;

pub const NDJSON: &str = "application/x-ndjson";
/// A blank line is sent after so long a silence.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// Pieces of an answer that may wait for a slow reader; then the writer waits.
const QUEUE: usize = 16;

/// The writing end of a stream. Writes wait for the reader; false means it has gone.
pub(crate) struct Lines {
    queue: mpsc::Sender<Bytes>,
    /// The server is stopping; a stream that may go on for ever must end.
    pub shutdown: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Lines {
    /// Sends values as lines, in one piece.
    pub async fn send<'a, T: Serialize + 'a>(&self, values: impl IntoIterator<Item = &'a T>) -> bool {
        let mut piece = Vec::new();
        for value in values {
            if let Err(error) = serde_json::to_writer(&mut piece, value) {
                tracing::error!(%error, "failed to write a line of a stream");
                return false;
            }
            piece.push(b'\n');
        }
        piece.is_empty() || self.queue.send(piece.into()).await.is_ok()
    }

    pub async fn heartbeat(&self) -> bool {
        self.queue.send(Bytes::from_static(b"\n")).await.is_ok()
    }

    /// Resolves when the reader has gone or the server stops.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.queue.closed() => {}
            () = self.shutdown.cancelled() => {}
        }
    }
}

/// Answers with what `write` writes. Its task ends with the reader, or by itself; `write` must look at [`Lines::ended`].
pub(crate) fn respond<F, Fut>(ctx: &Ctx, index: u64, place: OwnedSemaphorePermit, write: F) -> Response
where
    F: FnOnce(Lines) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let (queue, pieces) = mpsc::channel(QUEUE);
    let task = write(Lines { queue, shutdown: ctx.shared.shutdown.clone(), _place: place });
    // The task lives inside the body: whoever drops the connection drops it too, and nothing is left to join.
    let body = stream::unfold((Some(Box::pin(task)), pieces), |(mut task, mut pieces)| async move {
        loop {
            let Some(running) = task.as_mut() else {
                return pieces.recv().await.map(|piece| (Ok::<_, std::convert::Infallible>(piece), (task, pieces)));
            };
            tokio::select! {
                biased;
                Some(piece) = pieces.recv() => return Some((Ok(piece), (task, pieces))),
                () = running => task = None,
            }
        }
    });
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    ctx.mark(&mut response, index);
    response
}
