//! Puts in a closed loop: each of N writers waits for its answer before its next put.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::etcd_wire;

/// Connections the writers share.
const CONNECTIONS: usize = 8;
const VALUE: usize = 256;
/// Load before the measured part, as a share of it.
const WARM_UP: f64 = 0.2;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_millis(300);
/// When servers die: longest wait for one answer, and the pause before the next try.
const TRY: Duration = Duration::from_millis(100);
const AGAIN: Duration = Duration::from_millis(2);
/// Errors in a row at which a writer gives up.
const ERRORS_MAX: u64 = 1000;

type Client = SendRequest<Bytes>;

async fn connect(endpoint: &str) -> anyhow::Result<Client> {
    let socket = tokio::time::timeout(CONNECT, TcpStream::connect(endpoint)).await??;
    socket.set_nodelay(true)?;
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 24);
    let (client, connection) = builder.handshake(socket).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn put(client: &Client, endpoint: &str, body: Bytes) -> anyhow::Result<()> {
    let mut client = client.clone().ready().await?;
    let request = Request::post(format!("http://{endpoint}{}", etcd_wire::PATH))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut send) = client.send_request(request, false)?;
    send.send_data(body, true)?;
    let response = response.await?;
    let ok = |status: Option<&http::HeaderValue>| status.is_some_and(|s| s == "0");
    if let Some(status) = response.headers().get("grpc-status")
        && !ok(Some(status))
    {
        bail!("status {status:?}");
    }
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    let trailers = body.trailers().await?.context("no trailers")?;
    match ok(trailers.get("grpc-status")) {
        true => Ok(()),
        false => bail!("status {:?}", trailers.get("grpc-status")),
    }
}

fn quantile(sorted: &[u32], q: f64) -> u32 {
    sorted.get(((sorted.len() as f64 * q) as usize).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// Ticks of CPU time the processes have used.
fn ticks(pids: &[u32]) -> u64 {
    let used = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    };
    pids.iter().filter_map(used).sum()
}

/// One operation of a writer: its number, and a number no other operation has.
type Operation = Arc<dyn Fn(usize, u64) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> + Send + Sync>;

/// Puts at the first endpoint; CPU is that of `pids` together.
pub async fn load(endpoints: &str, in_flight: usize, seconds: f64, pids: &[u32]) -> anyhow::Result<()> {
    let endpoint: Arc<str> = endpoints.split(',').next().unwrap_or_default().into();
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS.min(in_flight.max(1)) {
        clients.push(connect(&endpoint).await.with_context(|| format!("failed to connect to {endpoint}"))?);
    }
    let operation: Operation = Arc::new(move |writer, number| {
        let (client, endpoint) = (clients[writer % clients.len()].clone(), endpoint.clone());
        Box::pin(async move { put(&client, &endpoint, etcd_wire::encode(&number.to_be_bytes(), &[b'x'; VALUE])).await })
    });
    measure(operation, in_flight, seconds, pids).await
}

/// Scales workloads through the API of a server, each writer its own, with connections that are kept.
pub async fn api(workloads: &str, credentials: &str, in_flight: usize, seconds: f64, pids: &[u32]) -> anyhow::Result<()> {
    let context: serde_json::Value = serde_json::from_slice(&std::fs::read(credentials)?)?;
    let word = |name: &str| context[name].as_str().map(str::to_owned).with_context(|| format!("no `{name}` in {credentials}"));
    let _ = rustls::crypto::ring::default_provider().install_default(); // the second call of a process finds it installed
    let certificates = reqwest::Certificate::from_pem_bundle(word("ca_pem")?.as_bytes())?;
    // HTTP/1.1: one request at a time on a connection, as most clients do.
    let http = reqwest::Client::builder().tls_certs_only(certificates).http1_only().build()?;
    let (token, workloads): (Arc<str>, Arc<str>) = (word("token")?.into(), workloads.into());
    let operation: Operation = Arc::new(move |writer, number| {
        let url = format!("{workloads}/w{writer}:scale");
        let request = http.post(url).bearer_auth(&token).json(&json!({ "copies": number % 2 + 1 }));
        Box::pin(async move {
            let response = request.send().await?;
            let status = response.status();
            let body = response.bytes().await?;
            anyhow::ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
            Ok(())
        })
    });
    measure(operation, in_flight, seconds, pids).await
}

/// Runs the writers and prints what was measured.
async fn measure(operation: Operation, in_flight: usize, seconds: f64, pids: &[u32]) -> anyhow::Result<()> {
    let begin = Instant::now() + Duration::from_secs_f64(seconds * WARM_UP);
    let end = begin + Duration::from_secs_f64(seconds);
    let sequence = Arc::new(AtomicU64::new(0));
    let mut writers = JoinSet::new();
    for writer in 0..in_flight {
        let (operation, sequence) = (operation.clone(), sequence.clone());
        writers.spawn(async move {
            let (mut took, mut errors, mut error) = (Vec::with_capacity(1 << 14), 0u64, None);
            while Instant::now() < end && errors < ERRORS_MAX {
                let before = Instant::now();
                match operation(writer, sequence.fetch_add(1, Ordering::Relaxed)).await {
                    Ok(()) if before >= begin => took.push(before.elapsed().as_micros() as u32),
                    Ok(()) => {}
                    Err(e) => {
                        errors += 1;
                        error = Some(e);
                    }
                }
            }
            (took, errors, error)
        });
    }
    tokio::time::sleep_until(begin.into()).await;
    let before = ticks(pids);
    tokio::time::sleep_until(end.into()).await;
    let used = ticks(pids) - before;
    let (mut took, mut errors) = (Vec::new(), 0);
    while let Some(writer) = writers.join_next().await {
        let (more, failed, error) = writer?;
        if let Some(error) = error.filter(|_| errors == 0) {
            eprintln!("first error of a writer: {error:#}");
        }
        took.extend(more);
        errors += failed;
    }
    took.sort_unstable();
    // SAFETY: no arguments to get wrong.
    let tick_us = 1e6 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    println!(
        "{}",
        json!({
            "puts": took.len(),
            "per_second": took.len() as f64 / seconds,
            "p50_us": quantile(&took, 0.5),
            "p99_us": quantile(&took, 0.99),
            "errors": errors,
            "cpu_us": used as f64 * tick_us / took.len().max(1) as f64,
        })
    );
    Ok(())
}

/// Writes while somebody kills servers, and prints the longest time without an acknowledged put. A writer whose put
/// is not answered in time goes to the next endpoint.
pub async fn gap(endpoints: &str, in_flight: usize, seconds: f64) -> anyhow::Result<()> {
    let endpoints: Arc<Vec<String>> = Arc::new(endpoints.split(',').map(str::to_owned).collect());
    let (start, end) = (Instant::now(), Instant::now() + Duration::from_secs_f64(seconds));
    let (sequence, last, longest) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut writers = JoinSet::new();
    for number in 0..in_flight {
        let (endpoints, sequence) = (endpoints.clone(), sequence.clone());
        let (last, longest) = (last.clone(), longest.clone());
        writers.spawn(async move {
            let (mut at, mut client, mut puts, mut errors) = (number, None, 0u64, 0u64);
            let value = [b'x'; VALUE];
            while Instant::now() < end {
                let endpoint = &endpoints[at % endpoints.len()];
                let connected = match client.take() {
                    Some(client) => Ok(client),
                    None => connect(endpoint).await,
                };
                let done = match connected {
                    Err(e) => Err(e),
                    Ok(connected) => {
                        let key = sequence.fetch_add(1, Ordering::Relaxed).to_be_bytes();
                        let sent = put(&connected, endpoint, etcd_wire::encode(&key, &value));
                        let done = tokio::time::timeout(TRY, sent).await.map_err(anyhow::Error::from).and_then(|done| done);
                        done.map(|()| client = Some(connected))
                    }
                };
                match done {
                    Ok(()) => {
                        puts += 1;
                        let now = start.elapsed().as_micros() as u64;
                        let before = last.swap(now, Ordering::Relaxed);
                        if before > 0 {
                            longest.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
                        }
                    }
                    Err(_) => {
                        errors += 1;
                        at += 1;
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
            (puts, errors)
        });
    }
    let (mut puts, mut errors) = (0, 0);
    while let Some(writer) = writers.join_next().await {
        let (more, failed) = writer?;
        puts += more;
        errors += failed;
    }
    // An end without acknowledgements is a gap too.
    let silent = (start.elapsed().as_micros() as u64).saturating_sub(last.load(Ordering::Relaxed));
    let longest = longest.load(Ordering::Relaxed).max(silent);
    println!("{}", json!({ "puts": puts, "errors": errors, "gap_ms": longest as f64 / 1000.0 }));
    Ok(())
}
