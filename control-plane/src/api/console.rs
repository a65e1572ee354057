//! The web console's files, embedded into the binary.
//!
//! They are the same for everybody and hold nothing of the cluster; what the page shows it asks of the API, with the
//! session of who looks. `web/` is their source, `build.rs` embeds them.

use axum::body::Body;
use axum::response::Response;
use http::header::{ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};

/// One embedded file.
pub(super) struct File {
    /// Without a leading slash.
    path: &'static str,
    bytes: &'static [u8],
    brotli: Option<&'static [u8]>,
}

include!(concat!(env!("OUT_DIR"), "/console_files.rs"));

const INDEX: &str = "index.html";
/// Files below have a hash of their content in their names.
const HASHED: &str = "assets/";
/// Paths that are never a page: a program that misspells one gets the API's error, not HTML.
const NOT_PAGES: [&str; 5] = ["v1", "metrics", "federate", "healthz", "readyz"];

/// Everything from here, nothing inline, nobody's frame.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'";

const NOT_BUILT: &str = "<!doctype html><html lang=en><meta charset=utf-8><title>Optimus</title>\
<h1>The console is not in this binary</h1>\
<p>It was built without it. Build the console with <code>scripts/web build</code>, then the binary again. The API and the command line work without it.";

/// The answer to a request for a file or a page of the console; none for everything else.
pub(super) fn page<B>(request: &Request<B>) -> Option<Response> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return None;
    }
    let path = request.uri().path().trim_start_matches('/');
    if let Some(file) = FILES.iter().find(|file| file.path == path) {
        return Some(answer(file, request.headers()));
    }
    let first = path.split('/').next().unwrap_or_default();
    let accepts = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if NOT_PAGES.contains(&first) || path.starts_with(HASHED) || !accepts.contains("text/html") {
        return None;
    }
    // Pages have paths of their own, which the script reads.
    Some(match FILES.iter().find(|file| file.path == INDEX) {
        Some(index) => answer(index, request.headers()),
        None => {
            let mut response = Response::new(Body::from(NOT_BUILT));
            *response.status_mut() = StatusCode::NOT_FOUND;
            dress(&mut response, [(CONTENT_TYPE, "text/html; charset=utf-8"), (CACHE_CONTROL, "no-store")]);
            response
        }
    })
}

/// Whether the binary has the console.
pub fn is_built() -> bool {
    !FILES.is_empty()
}

fn answer(file: &File, headers: &HeaderMap) -> Response {
    let mut encodings = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let brotli = file.brotli.filter(|_| encodings.any(|encoding| encoding.split(';').next().unwrap_or_default().trim() == "br"));
    let mut response = Response::new(Body::from(brotli.unwrap_or(file.bytes)));
    let cache = if file.path.starts_with(HASHED) { "public, max-age=31536000, immutable" } else { "no-cache" };
    dress(&mut response, [(CONTENT_TYPE, kind(file.path)), (CACHE_CONTROL, cache)]);
    if brotli.is_some() {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("br"));
    }
    response
}

fn dress(response: &mut Response, values: [(HeaderName, &'static str); 2]) {
    let fixed = [(CONTENT_SECURITY_POLICY, POLICY), (VARY, "accept-encoding")];
    for (name, value) in values.into_iter().chain(fixed) {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}

fn kind(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("woff2") => "font/woff2",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(method: Method, path: &str, accept: &str) -> Option<Response> {
        let request = Request::builder().method(method).uri(path).header(ACCEPT, accept).body(());
        page(&request.unwrap_or_else(|error| panic!("{error}")))
    }

    #[test]
    fn only_pages_are_pages() {
        let html = "text/html,application/xhtml+xml";
        for path in ["/", "/services/shop/dev/web", "/nodes"] {
            let response = ask(Method::GET, path, html).unwrap_or_else(|| panic!("{path} is a page"));
            assert_eq!(response.headers()[CONTENT_SECURITY_POLICY], POLICY);
            assert_eq!(response.status() == StatusCode::OK, is_built());
        }
        for (method, path, accept) in [
            (Method::POST, "/", html),
            (Method::GET, "/v1/nothing", html),
            (Method::GET, "/v1", html),
            (Method::GET, "/assets/none.js", html),
            (Method::GET, "/nodes", "application/json"),
        ] {
            assert!(ask(method, path, accept).is_none(), "{path}");
        }
    }
}
