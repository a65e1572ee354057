//! Asks a copy once: over HTTP, by opening a connection, or by a command inside it.
//!
//! Every question has one time limit over all its steps, reads at most [`BODY_MAX`] bytes of body, follows no
//! redirect and goes to 127.0.0.1 only.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use optimus_common::spec::Check;
use tokio::net::TcpStream;

use crate::driver::{ExecOutput, Run};

/// Most bytes of an answer's body that are read.
pub const BODY_MAX: usize = 4 << 10;
/// Most characters of a body that go into a reason.
const EXCERPT_MAX: usize = 160;

/// What is asked, for people: `GET http://127.0.0.1:20001/healthz`.
pub fn describe(check: &Check, port: u16) -> String {
    match check {
        Check::Http { path } => format!("GET http://127.0.0.1:{port}{path}"),
        Check::Tcp => format!("connect to 127.0.0.1:{port}"),
        Check::Grpc { service } => format!("grpc health of {service} at 127.0.0.1:{port}"),
        Check::Command { argv } => format!("command {}", argv.join(" ")),
    }
}

/// Asks once by a command inside the run.
pub async fn ask_inside(run: &dyn Run, argv: &[String], timeout: Duration) -> Result<(), String> {
    match run.exec(argv.to_vec(), timeout).await? {
        ExecOutput { code: 0, .. } => Ok(()),
        ExecOutput { code, output } => {
            let excerpt = excerpt(&output);
            Err(if excerpt.is_empty() { format!("exit status {code}") } else { format!("exit status {code}: {excerpt}") })
        }
    }
}

/// Asks once. The error is a text for people: `connection refused`, `HTTP 500: ...`.
pub async fn ask(check: &Check, port: u16, timeout: Duration) -> Result<(), String> {
    let asked = async {
        match check {
            Check::Http { path } => http(port, path).await,
            Check::Tcp => connect(port).await.map(drop),
            // The spec's reader refuses these; a set from a newer server may still hold one.
            Check::Grpc { .. } => Err("grpc checks are not available yet".to_owned()),
            Check::Command { .. } => Err("a command is asked inside its run".to_owned()),
        }
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {}", optimus_common::Span::from(timeout))),
    }
}

async fn connect(port: u16) -> Result<TcpStream, String> {
    TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await.map_err(|e| plain(&e))
}

async fn http(port: u16, path: &str) -> Result<(), String> {
    let stream = connect(port).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let request = http::Request::get(path)
        .header(http::header::HOST, format!("127.0.0.1:{port}"))
        .header(http::header::USER_AGENT, concat!("optimus-health/", env!("CARGO_PKG_VERSION")))
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("path {path:?} cannot be asked for: {e}"))?;
    let exchange = async {
        let mut response = sender.send_request(request).await.map_err(http_error)?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(());
        }
        let mut body = Vec::new();
        while body.len() < BODY_MAX {
            match response.body_mut().frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        let room = BODY_MAX - body.len();
                        body.extend_from_slice(&data[..data.len().min(room)]);
                    }
                }
                Some(Err(_)) | None => break,
            }
            if body.len() >= EXCERPT_MAX * 4 {
                break; // more than is shown
            }
        }
        let excerpt = excerpt(&body);
        Err(if excerpt.is_empty() { format!("HTTP {}", status.as_u16()) } else { format!("HTTP {}: {excerpt}", status.as_u16()) })
    };
    // The connection is driven beside the exchange and dropped with it: no task outlives the question.
    tokio::pin!(connection);
    tokio::pin!(exchange);
    let mut connection_done = false;
    loop {
        tokio::select! {
            biased;
            answer = &mut exchange => return answer,
            _ = &mut connection, if !connection_done => connection_done = true,
        }
    }
}

fn http_error(error: hyper::Error) -> String {
    if error.is_parse() {
        return "the answer is not HTTP".to_owned();
    }
    if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        return "connection closed without an answer".to_owned();
    }
    match std::error::Error::source(&error).and_then(|e| e.downcast_ref::<std::io::Error>()) {
        Some(io) => plain(io),
        None => error.to_string(),
    }
}

fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        std::io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
        _ => error.to_string(),
    }
}

/// The beginning of a body as one line of printable text.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    let line = words.join(" ");
    match line.char_indices().nth(EXCERPT_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const SECOND: Duration = Duration::from_secs(5);

    /// Answers every connection with these bytes; keeps it open if `hold`.
    async fn server(answer: &'static [u8], hold: bool) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = [0; 1024];
                    let _ = stream.read(&mut request).await;
                    let _ = stream.write_all(answer).await;
                    if hold {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        port
    }

    async fn get(port: u16) -> Result<(), String> {
        ask(&Check::Http { path: "/healthz".into() }, port, SECOND).await
    }

    #[tokio::test]
    async fn statuses_200_to_399_are_good_and_redirects_not_followed() {
        assert_eq!(get(server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", false).await).await, Ok(()));
        let moved = server(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", false).await;
        assert_eq!(get(moved).await, Ok(()));
    }

    #[tokio::test]
    async fn a_bad_status_shows_the_beginning_of_its_body() {
        let port = server(b"HTTP/1.1 500 Oops\r\n\r\nno   database\x1b[31m\n", false).await;
        assert_eq!(get(port).await, Err("HTTP 500: no database [31m".into()));
        assert_eq!(get(server(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", false).await).await, Err("HTTP 404".into()));
    }

    #[tokio::test]
    async fn strange_and_missing_answers_are_named() {
        assert_eq!(get(server(b"SSH-2.0-OpenSSH\r\n", false).await).await, Err("the answer is not HTTP".into()));
        assert_eq!(get(server(b"", false).await).await, Err("connection closed without an answer".into()));
        let free = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port() };
        assert_eq!(get(free).await, Err("connection refused".into()));
        assert_eq!(ask(&Check::Tcp, free, SECOND).await, Err("connection refused".into()));
    }

    #[tokio::test]
    async fn an_endless_body_is_cut_and_a_silent_server_times_out() {
        static ENDLESS: [u8; 64 << 10] = {
            let mut bytes = [b'x'; 64 << 10];
            let head = b"HTTP/1.1 503 Busy\r\ncontent-length: 99999999\r\n\r\n";
            let mut i = 0;
            while i < head.len() {
                bytes[i] = head[i];
                i += 1;
            }
            bytes
        };
        let error = get(server(&ENDLESS, true).await).await.unwrap_err();
        assert!(error.starts_with("HTTP 503: xxx") && error.chars().count() < 200, "{error}");
        let silent = ask(&Check::Http { path: "/".into() }, server(b"", true).await, Duration::from_millis(50)).await;
        assert_eq!(silent, Err("no answer within 50ms".into()));
    }

    #[tokio::test]
    async fn checks_that_do_not_exist_yet_fail_plainly() {
        let error = ask(&Check::Grpc { service: "a".into() }, 1, SECOND).await.unwrap_err();
        assert!(error.contains("not available yet"));
    }
}
