//! A small web server to deploy, in as many broken ways as tests need: `WEB_MODE` says which.
//!
//! It ends at once when it is told to stop, so a request that is still under way then is one that fails.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

fn main() {
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let (mode, version) = (var("WEB_MODE"), var("WEB_VERSION"));
    let delay = Duration::from_millis(var("WEB_DELAY_MS").parse().unwrap_or(0));
    println!("{version} starts as {mode}");
    match mode.as_str() {
        "exits" => {
            println!("no configuration found");
            std::process::exit(1);
        }
        "oom" => {
            let mut held = Vec::new();
            loop {
                held.push(vec![1u8; 1 << 20]); // written to, so it counts
            }
        }
        _ => {}
    }
    // Memory it really uses, in MiB.
    let held = vec![1u8; var("WEB_HOLD").parse::<usize>().unwrap_or(0) << 20];
    std::hint::black_box(&held);
    let port = if mode == "wrong-port" { 0 } else { var("PORT").parse().expect("PORT is a port") };
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("the port is free");
    println!("listens on {}", listener.local_addr().expect("a bound socket has an address"));
    for stream in listener.incoming().flatten() {
        let (mode, version) = (mode.clone(), version.clone());
        std::thread::spawn(move || serve(stream, &mode, &version, delay));
    }
}

fn serve(stream: TcpStream, mode: &str, version: &str, delay: Duration) {
    let Ok(back) = stream.try_clone() else { return };
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    // The head ends with an empty line.
    for line in lines {
        if line.is_empty() {
            break;
        }
    }
    let health = first.contains("/healthz");
    if !health {
        std::thread::sleep(delay); // the work a request makes
    }
    let bad = if health { mode == "never-ready" } else { mode == "errors" };
    let status = if bad { "503 Service Unavailable" } else { "200 OK" };
    let mut back = back;
    let _ = write!(back, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{version}", version.len());
}
