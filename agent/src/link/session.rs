//! One session with one server.

use std::sync::Mutex;
use std::time::Duration;

use optimus_common::protocol::{
    ALPN_AGENT, Blob, Desired, Hello, Message, PROTOCOL, Pong, Refused, RenewRequest, Report, STATUS_MAX, Welcome,
};
use optimus_common::reason::code;
use optimus_common::time::Span;
use optimus_common::usage::{USAGE_EVERY, USAGE_WATCHED};
use optimus_host::dial::{DialError, dial};
use optimus_host::telemetry::Chain;
use optimus_host::tls;
use optimus_host::transport::{self, FrameError, FrameReader, FrameWriter, HANDSHAKE_TIMEOUT, close};
use quinn::{ApplicationClose, Connection, ConnectionError, Endpoint};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::{Link, LinkStatus, calls, renewal, usage};

/// A server pings every second; after this much silence it is taken for gone, so that a node whose server died is back
/// with another two seconds later. Silence means no packet at all: a faster heartbeat would cost servers 8 % of a core
/// for each thousand beats a second, and QUIC acknowledges a probe at once even where the server is busy.
const SILENCE_MAX: Duration = Duration::from_millis(1500);
/// After this much, longer than a heartbeat, a probe is sent for the server to acknowledge.
const PROBE_AFTER: Duration = Duration::from_millis(1100);
const SILENCE_CHECK: Duration = Duration::from_millis(100);
/// Packets without a single message are a server that answers but does not serve.
const MUTE_MAX: Duration = Duration::from_secs(4);
/// Messages waiting for the control stream beside reports: pongs, renewals, acknowledgements.
const OUTGOING: usize = 16;
/// A report is sent in frames of about this many bytes.
const REPORT_FRAME: usize = 1 << 20;
/// Longest answer to a greeting or a renewal.
const ANSWER_MAX: usize = 64 << 10;

/// How a session, or the try to have one, ended.
#[derive(Debug)]
pub enum End {
    /// There was none.
    Failed { reason: String },
    /// The server sent us away.
    Refused { code: String, message: String },
    /// There was one, and it broke.
    Lost { reason: String },
    /// The expired certificate is fresh again, or the node's facts are others: connect anew.
    Renewed,
}

impl End {
    fn failed(reason: impl Into<String>) -> Self {
        End::Failed { reason: reason.into() }
    }
    pub(super) fn lost(reason: impl Into<String>) -> Self {
        End::Lost { reason: reason.into() }
    }

    /// What a broken stream means before (`make` = failed) or after (`make` = lost) the welcome.
    pub(super) fn of_frame(error: &FrameError, make: fn(String) -> End) -> Self {
        match error.connection() {
            Some(lost) => Self::of_connection(lost, make),
            None => make(Chain(error).to_string()),
        }
    }

    pub(super) fn of_connection(error: &ConnectionError, make: fn(String) -> End) -> Self {
        let text = transport::explain(error);
        match error {
            // Closed with `CODE message`.
            ConnectionError::ApplicationClosed(ApplicationClose { error_code, .. })
                if u64::from(*error_code) == u64::from(close::REFUSED) =>
            {
                let (code, message) = text.split_once(' ').unwrap_or(("", &text));
                End::Refused { code: code.to_owned(), message: message.to_owned() }
            }
            // The server ended the handshake over our certificate.
            ConnectionError::ConnectionClosed(frame) if (0x100..0x200).contains(&u64::from(frame.error_code)) => {
                End::Refused { code: code::NODE_REFUSED.code.into(), message: text }
            }
            _ => make(text),
        }
    }
}

/// Connects to the server at `address`, which gets `patience` to answer, and serves until the session ends.
pub async fn run(link: &Link, endpoint: &Endpoint, address: &str, patience: Duration) -> End {
    match connect(link, endpoint, address, patience).await {
        Ok(Welcomed { connection, reader, writer, version }) => {
            tracing::info!(server = address, "connected to the control plane");
            link.status.send_replace(LinkStatus::Connected { server: address.to_owned() });
            let end = serve(link, &connection, reader, writer, version).await;
            connection.close(close::DONE.into(), b""); // a no-op where it is gone
            end
        }
        Err(end) => end,
    }
}

/// A session that has begun.
struct Welcomed {
    connection: Connection,
    reader: FrameReader,
    writer: FrameWriter,
    /// Of the protocol.
    version: u16,
}

/// Dials and greets (or renews, if the certificate is good for nothing else).
async fn connect(link: &Link, endpoint: &Endpoint, address: &str, patience: Duration) -> Result<Welcomed, End> {
    let identity = link.identity().clone();
    let config = tls::member_client(&identity.roots, &identity.certificate, &identity.key, ALPN_AGENT, &link.env.clock)
        .map_err(|e| End::failed(Chain(&e).to_string()))?;
    let config = transport::client_config(config).map_err(|e| End::failed(Chain(&e).to_string()))?;
    let connection = dial(endpoint, config, address, patience).await.map_err(|error| match error {
        DialError::NotTrusted(reason) if reason.contains("expired") || reason.contains("not valid yet") => End::Refused {
            code: code::CERTIFICATE_EXPIRED.code.into(),
            message: format!(
                "the certificate of the server at {address} does not hold at this time; check the clocks of both hosts: {reason}"
            ),
        },
        DialError::NotTrusted(reason) => End::Refused {
            code: code::NODE_REFUSED.code.into(),
            message: format!(
                "whoever answers at {address} is not a server of this node's cluster, or the cluster's CA was replaced more than once while this node was away (then it joins again, with a new token and an empty data directory): {reason}"
            ),
        },
        DialError::Closed(error) => End::of_connection(&error, End::failed),
        DialError::Unreachable(reason) => End::failed(reason),
    })?;
    let expired = link.renewal.first(identity.expired(&*link.env.clock));
    let first: Message = if expired {
        let csr = identity.key.request().map_err(|e| End::failed(Chain(&e).to_string()))?;
        RenewRequest { csr }.into()
    } else {
        Hello { versions: PROTOCOL, node: identity.node, generation: link.workloads.generation(), facts: Blob::of(&link.workloads.facts()) }
            .into()
    };
    let greeting = async {
        let (send, receive) = connection.open_bi().await.map_err(quinn::ReadError::ConnectionLost)?;
        let (mut reader, mut writer) = (FrameReader::new(receive, ANSWER_MAX), FrameWriter::new(send));
        writer.send(first).await?;
        let answer = reader.next().await?;
        Ok::<_, FrameError>((reader, writer, answer))
    };
    // A commit is between greeting and welcome.
    let greeted = tokio::time::timeout(2 * HANDSHAKE_TIMEOUT, greeting).await;
    match greeted {
        Ok(Ok((mut reader, writer, Some(Message::Welcome(Welcome { version, cluster, heartbeat: _ }))))) if !expired => {
            if !(PROTOCOL.0..=PROTOCOL.1).contains(&version) || cluster != identity.cluster {
                connection.close(close::PROTOCOL.into(), b"not the version or cluster greeted");
                return Err(End::failed(format!("the server answered with protocol version {version} of cluster {cluster}")));
            }
            reader.set_limit(optimus_common::codec::FRAME_MAX);
            link.renewal.welcomed(version);
            Ok(Welcomed { connection, reader, writer, version })
        }
        Ok(Ok((_, _, Some(Message::RenewAnswer(answer))))) if expired => {
            connection.close(close::DONE.into(), b"");
            link.identity().renew(answer.certificate, answer.ca).map_err(|e| End::failed(Chain(&e).to_string()))?;
            link.renewal.renewed();
            tracing::info!(expires_at = %link.identity().not_after, "the expired certificate was renewed");
            Err(End::Renewed)
        }
        Ok(Ok((_, _, Some(Message::Refused(Refused { code, message }))))) => Err(End::Refused { code, message }),
        Ok(Ok(_)) => {
            connection.close(close::PROTOCOL.into(), b"a welcome was expected");
            Err(End::failed("the server answered the greeting with something else"))
        }
        Ok(Err(error)) => Err(End::of_frame(&error, End::failed)),
        Err(_) => {
            connection.close(close::DONE.into(), b"no welcome in time");
            Err(End::failed(format!("no welcome for {} s", 2 * HANDSHAKE_TIMEOUT.as_secs())))
        }
    }
}

/// All loops of a welcomed session; the first to end ends it.
async fn serve(link: &Link, connection: &Connection, reader: FrameReader, writer: FrameWriter, version: u16) -> End {
    let (out, outgoing) = mpsc::channel(OUTGOING);
    let (newest, desired) = watch::channel(None);
    let (every, pace) = watch::channel(USAGE_EVERY);
    let heard = Mutex::new(link.env.clock.monotonic());
    tokio::select! {
        end = read(link, reader, &heard, &out, &newest, &every) => end,
        end = write(link, writer, outgoing) => end,
        end = accept(link, desired, &out) => end,
        end = renewal::run(link, &out) => end,
        end = streams(link, connection) => end,
        end = usage::send(link, connection, version, pace) => end,
        end = silence(link, connection, &heard, &out) => end,
        // They are part of the greeting.
        () = link.workloads.facts_changed() => End::Renewed,
    }
}

async fn read(
    link: &Link,
    mut reader: FrameReader,
    heard: &Mutex<Duration>,
    out: &mpsc::Sender<Message>,
    newest: &watch::Sender<Option<Desired>>,
    every: &watch::Sender<Span>,
) -> End {
    loop {
        let message = match reader.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return End::lost("the server ended the session"),
            Err(error) => return End::of_frame(&error, End::lost),
        };
        *heard.lock().unwrap_or_else(|e| e.into_inner()) = link.env.clock.monotonic();
        match message {
            Message::Ping(ping) => {
                if out.send(link.renewal.pong(ping.n, link.env.clock.now())).await.is_err() {
                    return End::lost("the session is ending");
                }
            }
            // Only the newest counts: one that arrives while another is stored takes the place of those between.
            Message::Desired(desired) => {
                newest.send_replace(Some(desired));
            }
            Message::RenewAnswer(answer) => {
                let renewed = link.identity().renew(answer.certificate, answer.ca);
                match renewed {
                    Ok(()) => tracing::info!(expires_at = %link.identity().not_after, "certificate renewed"),
                    Err(error) => tracing::error!(error = %Chain(&error), "failed to take a renewed certificate; asking again"),
                }
                if !renewal::tell(link, out).await {
                    return End::lost("the session is ending");
                }
            }
            Message::Trust(trust) => {
                if !renewal::take(link, trust, out).await {
                    return End::lost("the session is ending");
                }
            }
            Message::Servers(servers) => {
                let learned = link.identity().learn(servers.addresses);
                match learned {
                    Ok(true) => tracing::info!(servers = ?link.identity().learned, "told where the servers are"),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::error!(error = %Chain(&error), "failed to store where the servers are; told again in the next session")
                    }
                }
            }
            Message::UsageEvery(asked) => {
                every.send_replace(asked.every.clamp(USAGE_WATCHED, USAGE_EVERY));
            }
            Message::Refused(Refused { code, message }) => return End::Refused { code, message },
            _ => return End::lost("the server sent a message that is not for agents"),
        }
    }
}

/// Hands desired sets to the workloads; slow ones hold up neither heartbeat nor reports.
async fn accept(link: &Link, mut desired: watch::Receiver<Option<Desired>>, out: &mpsc::Sender<Message>) -> End {
    loop {
        if desired.changed().await.is_err() {
            return End::lost("the session is ending");
        }
        let Some(set) = desired.borrow_and_update().clone() else { continue };
        let (generation, allocs) = (set.generation, set.allocs.len());
        match link.workloads.accept(set).await {
            Ok(()) => {
                tracing::debug!(generation, allocs, "took a desired set");
                let done = Report { generation: link.workloads.generation(), statuses: vec![], gone: vec![] };
                if out.send(done.into()).await.is_err() {
                    return End::lost("the session is ending");
                }
            }
            Err(older) => tracing::warn!(offered = older.offered, held = older.held, "refused a desired set older than the one held"),
        }
    }
}

async fn write(link: &Link, mut writer: FrameWriter, mut outgoing: mpsc::Receiver<Message>) -> End {
    let result: Result<(), FrameError> = async {
        send_report(&mut writer, link.workloads.full_report()).await?;
        loop {
            tokio::select! {
                biased;
                message = outgoing.recv() => match message {
                    Some(message) => writer.send(message).await?,
                    None => return Ok(()),
                },
                report = link.workloads.next_report() => send_report(&mut writer, report).await?,
            }
        }
    }
    .await;
    match result {
        Ok(()) => End::lost("the session is ending"),
        Err(error) => End::of_frame(&error, End::lost),
    }
}

async fn send_report(writer: &mut FrameWriter, report: Report) -> Result<(), FrameError> {
    for part in split(report) {
        writer.send(part).await?;
    }
    Ok(())
}

/// Reports of about [`REPORT_FRAME`] bytes each; at least one.
fn split(report: Report) -> Vec<Report> {
    let Report { generation, statuses, gone } = report;
    let mut parts = vec![Report { generation, statuses: vec![], gone: vec![] }];
    let mut size = 0;
    for status in statuses {
        if status.0.len() > STATUS_MAX {
            // The server would not take it; sending it again and again would cost the session.
            tracing::error!(bytes = status.0.len(), "the status of an allocation is too long to be reported");
            continue;
        }
        if size > 0 && size + status.0.len() > REPORT_FRAME {
            parts.push(Report { generation, statuses: vec![], gone: vec![] });
            size = 0;
        }
        size += status.0.len();
        if let Some(part) = parts.last_mut() {
            part.statuses.push(status);
        }
    }
    // In the last: after the last words of what is gone.
    if let Some(part) = parts.last_mut() {
        part.gone = gone;
    }
    parts
}

/// Serves the streams the server opens; the transport bounds how many there are.
async fn streams(link: &Link, connection: &Connection) -> End {
    let mut open = JoinSet::new(); // ends all of them with the session
    loop {
        tokio::select! {
            stream = connection.accept_bi() => match stream {
                Ok((send, receive)) => {
                    open.spawn(calls::serve(link.workloads.clone(), send, receive));
                }
                Err(error) => return End::of_connection(&error, End::lost),
            },
            Some(ended) = open.join_next() => {
                if ended.is_err_and(|e| e.is_panic()) {
                    tracing::error!("serving a request panicked");
                }
            }
        }
    }
}

/// Notices that the server is gone long before QUIC gives the connection up.
async fn silence(link: &Link, connection: &Connection, heard: &Mutex<Duration>, out: &mpsc::Sender<Message>) -> End {
    let clock = &link.env.clock;
    let packets = || connection.stats().udp_rx.datagrams;
    let (mut seen, mut last) = (packets(), clock.monotonic());
    let mut probed = false;
    loop {
        clock.sleep(SILENCE_CHECK).await;
        let (now, packets) = (clock.monotonic(), packets());
        if packets != seen {
            (seen, last, probed) = (packets, now, false);
        }
        let message = *heard.lock().unwrap_or_else(|e| e.into_inner());
        if now.saturating_sub(last) > SILENCE_MAX {
            return End::lost(format!("nothing heard from the server for {} ms", SILENCE_MAX.as_millis()));
        }
        if now.saturating_sub(message) > MUTE_MAX {
            return End::lost(format!("no message of the server for {} s", MUTE_MAX.as_secs()));
        }
        if !probed && now.saturating_sub(last) > PROBE_AFTER {
            // Any message will do; servers of all versions take a pong nobody asked for. A full queue is traffic enough.
            probed = out.try_send(Pong { n: 0 }.into()).is_ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_report_is_sent_in_parts_and_the_gone_come_last() {
        let statuses: Vec<Blob> = (0..60u8).map(|n| Blob(vec![n; 60_000])).collect();
        let gone = vec![optimus_common::AllocId(uuid::Uuid::from_u128(1))];
        let mut with_too_long = statuses.clone();
        with_too_long.insert(3, Blob(vec![0; STATUS_MAX + 1]));
        let parts = split(Report { generation: 7, statuses: with_too_long, gone: gone.clone() });
        assert!(parts.len() >= 4);
        for part in &parts {
            assert!(part.statuses.iter().map(|s| s.0.len()).sum::<usize>() <= REPORT_FRAME);
            assert_eq!(part.generation, 7);
        }
        assert_eq!(parts.iter().flat_map(|p| p.statuses.clone()).collect::<Vec<_>>(), statuses);
        let with_gone: Vec<usize> = (0..parts.len()).filter(|&i| !parts[i].gone.is_empty()).collect();
        assert_eq!(with_gone, vec![parts.len() - 1]);
        assert_eq!(split(Report { generation: 1, statuses: vec![], gone: vec![] }).len(), 1);
    }
}
