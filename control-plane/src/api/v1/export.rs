//! The whole state as a file.

use std::io::{self, Write};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use optimus_common::api::v1::SnapshotRequest;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use crate::api::context::{Ctx, Freshness};
use crate::api::json;
use crate::api::problem::ApiError;
use crate::rescue::{ExportHead, Lock, export};

/// Pieces of an export (64 KiB each) that may wait for a slow reader; then the writer waits.
const QUEUE: usize = 16;

/// Export the whole state as one encrypted file (age), to recipients or a passphrase.
///
/// The server encrypts: the state never leaves it in the clear. An answer that breaks off is no export.
#[utoipa::path(post, path = "/v1/cluster/snapshot", tag = "cluster", operation_id = "snapshot", request_body = SnapshotRequest,
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>)))]
pub(crate) async fn snapshot(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let SnapshotRequest { recipients, passphrase } = json::parse(&bytes)?;
    let lock = Lock::of(&recipients, passphrase).map_err(|e| ApiError::bad_request(e.to_string()))?;
    let place = ctx.shared.exports.clone().try_acquire_owned();
    let place = place.map_err(|_| ApiError::overloaded("another export is under way"))?;
    ctx.read(Freshness::default()).await?;
    let (head, state) = ExportHead::now(ctx.store()).ok_or_else(|| ApiError::conflict("there is no cluster yet"))?;
    tracing::info!(index = head.index, recipients = recipients.len(), "exporting the state");

    let index = head.index;
    let (queue, pieces) = mpsc::channel(QUEUE);
    let work = tokio::task::spawn_blocking(move || {
        let out = Pieces(queue);
        export::write(out, &lock, &head, &state).map(drop).map_err(io::Error::other)
    });
    let body = stream::unfold(Some(Running { pieces, work, _place: place }), next);
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    ctx.mark(&mut response, index);
    Ok(response)
}

/// An export on its way. Dropping it closes the queue, which ends the work at its next piece.
struct Running {
    pieces: mpsc::Receiver<Bytes>,
    work: JoinHandle<io::Result<()>>,
    _place: OwnedSemaphorePermit,
}

async fn next(running: Option<Running>) -> Option<(io::Result<Bytes>, Option<Running>)> {
    let mut running = running?;
    if let Some(piece) = running.pieces.recv().await {
        return Some((Ok(piece), Some(running)));
    }
    // The end of the pieces is the end of the file only if the work says so; else the answer breaks off.
    match running.work.await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => {
            tracing::error!(%error, "an export failed");
            Some((Err(error), None))
        }
        Err(error) => {
            tracing::error!(%error, "an export failed");
            Some((Err(io::Error::other("the export failed")), None))
        }
    }
}

struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map(|()| bytes.len()).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the reader has gone"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
