//! The server's requests, each on a stream it opens.

use std::sync::Arc;
use std::time::Duration;

use optimus_common::Metric;
use optimus_common::protocol::{Message, Refused};
use optimus_common::reason::code;
use optimus_common::usage::{HistoryAnswer, HistoryRequest};
use optimus_host::telemetry::Chain;
use optimus_host::transport::{FrameError, FrameReader, FrameWriter};

use super::logs;
use crate::metrics::history::{Query, Subject};
use crate::workloads::Workloads;

const REQUEST_MAX: usize = 4 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one stream the server opened.
pub(super) async fn serve(workloads: Arc<dyn Workloads>, send: quinn::SendStream, receive: quinn::RecvStream) {
    let mut writer = FrameWriter::new(send);
    let mut reader = FrameReader::new(receive, REQUEST_MAX);
    let result = match tokio::time::timeout(REQUEST_TIMEOUT, reader.next()).await {
        Ok(Ok(Some(Message::LogRequest(request)))) => logs::answer(&workloads, request, &mut writer).await,
        Ok(Ok(Some(Message::HistoryRequest(request)))) => history(&workloads, request, &mut writer).await,
        Ok(Ok(Some(_))) => refuse(&mut writer, code::BAD_REQUEST.code, "this agent does not know the request".into()).await,
        Ok(Ok(None)) | Err(_) => Ok(()),
        Ok(Err(error)) if error.is_violation() => {
            let text = Chain(&error).to_string();
            refuse(&mut writer, code::BAD_REQUEST.code, text).await
        }
        Ok(Err(error)) => Err(error),
    };
    if let Err(error) = result {
        tracing::debug!(error = %Chain(&error), "an answer ended early"); // the asker left, or the connection did
    }
}

pub(super) async fn refuse(writer: &mut FrameWriter, code: &str, message: String) -> Result<(), FrameError> {
    writer.send(Refused { code: code.into(), message }).await?;
    writer.finish()
}

async fn history(workloads: &Arc<dyn Workloads>, request: HistoryRequest, writer: &mut FrameWriter) -> Result<(), FrameError> {
    let HistoryRequest { alloc, metrics, from, to, step } = request;
    let known: Vec<Metric> = metrics.iter().filter_map(|id| Metric::from_id(*id)).collect();
    if known.len() != metrics.len() {
        return refuse(writer, code::BAD_REQUEST.code, "this agent does not know all of these metrics".into()).await;
    }
    let query = Query { subject: alloc.map_or(Subject::Host, Subject::Alloc), metrics: known, from, to, step };
    match workloads.history(query).await {
        Ok(Ok(series)) => {
            writer.send(HistoryAnswer { series }).await?;
            writer.finish()
        }
        Ok(Err(error)) => refuse(writer, code::BAD_REQUEST.code, error.to_string()).await,
        Err(error) => refuse(writer, code::INTERNAL.code, error.to_string()).await,
    }
}
