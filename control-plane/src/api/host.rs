//! Which names this server answers to.
//!
//! A page of a stranger may point its own DNS name at our address and have a victim's browser talk
//! to us (DNS rebinding); the Host header gives it away. Requests of browsers carry an Origin, which
//! must be ours too.

use std::net::{IpAddr, SocketAddr};

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Uri};

use super::problem::ApiError;

/// The hosts a server answers to.
#[derive(Debug, Clone)]
pub struct AllowedHosts {
    /// Listening on every address: any IP literal may be ours, and none can be a rebound name.
    any_address: bool,
    addresses: Vec<IpAddr>,
    /// Lower case, without a final dot; with or without a port.
    names: Vec<String>,
}

impl AllowedHosts {
    /// `localhost`, the loopback and listen addresses, and the names (or `name:port`) given.
    pub fn new(listening: &[SocketAddr], names: &[String]) -> Self {
        let mut allowed: Vec<String> = names.iter().map(|name| tidy(name)).collect();
        allowed.push("localhost".into());
        let addresses = listening.iter().map(SocketAddr::ip).collect::<Vec<_>>();
        AllowedHosts { any_address: addresses.iter().any(IpAddr::is_unspecified), addresses, names: allowed }
    }

    /// Refuses a request whose Host or Origin is not ours.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let authority = authority(uri, headers)?;
        if !self.knows(&authority) {
            return Err(ApiError::host_not_allowed(format!("the host `{authority}` is not one this server answers to")));
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        match (origins.next(), origins.next()) {
            (None, _) => Ok(()),
            (Some(origin), None) if self.is_ours(origin.to_str().unwrap_or_default(), &authority) => Ok(()),
            (Some(origin), _) => Err(ApiError::host_not_allowed(format!("the origin {origin:?} is not one this server answers to"))),
        }
    }

    fn knows(&self, authority: &Authority) -> bool {
        let host = tidy(authority.host());
        if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            let address = address.to_canonical();
            return self.any_address
                || address.is_loopback()
                || self.addresses.contains(&address)
                || self.names.iter().any(|name| name.parse() == Ok(address));
        }
        self.names.iter().any(|name| *name == host || *name == tidy(authority.as_str()))
    }

    /// An origin is ours if it is the very host the request names, or one given with its port.
    fn is_ours(&self, origin: &str, authority: &Authority) -> bool {
        let Some(origin) = origin.strip_prefix("https://") else { return false };
        let origin = tidy(origin);
        origin == tidy(authority.as_str()) || (origin.contains(':') && self.names.contains(&origin))
    }
}

fn tidy(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// The host asked for: `:authority` in HTTP/2, else the Host header, which must be there once and agree.
fn authority(uri: &Uri, headers: &HeaderMap) -> Result<Authority, ApiError> {
    let mut hosts = headers.get_all(HOST).iter();
    let from_header = match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => return Err(ApiError::bad_request("the request has two Host headers")),
        (Some(host), None) => Some(
            Authority::try_from(host.as_bytes())
                .ok()
                .filter(|authority| !authority.as_str().contains('@'))
                .ok_or_else(|| ApiError::bad_request("the Host header is not a host"))?,
        ),
        (None, _) => None,
    };
    match (uri.authority(), from_header) {
        (Some(asked), Some(host)) if tidy(asked.as_str()) != tidy(host.as_str()) => {
            Err(ApiError::bad_request("the Host header and the request's target name different hosts"))
        }
        (Some(asked), _) if asked.as_str().contains('@') => Err(ApiError::bad_request("the request's target is not a host")),
        (Some(asked), _) => Ok(asked.clone()),
        (None, Some(host)) => Ok(host),
        (None, None) => Err(ApiError::bad_request("the request names no host")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ask(hosts: &AllowedHosts, host: &str, origin: Option<&str>) -> u16 {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(ORIGIN, origin.parse().unwrap());
        }
        hosts.check(&Uri::from_static("/v1/version"), &headers).map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_our_names_are_answered() {
        let hosts = AllowedHosts::new(&["10.1.2.3:7443".parse().unwrap()], &["Optimus.Example.com".into(), "ui.example:5173".into()]);
        for good in
            ["localhost:1", "LOCALHOST", "127.0.0.1:9", "[::1]:9", "10.1.2.3:7443", "optimus.example.com", "optimus.example.com.:443"]
        {
            assert_eq!(ask(&hosts, good, None), 200, "{good}");
        }
        for bad in
            ["evil.example", "10.1.2.4", "localhost.evil.example", "xlocalhost", "ui.example", "127.0.0.1.evil.example", "2130706433"]
        {
            assert_eq!(ask(&hosts, bad, None), 403, "{bad}");
        }
        for malformed in ["", "a b", "user@localhost", "http://localhost"] {
            assert_eq!(ask(&hosts, malformed, None), 400, "{malformed}");
        }
    }

    #[test]
    fn every_address_is_ours_when_we_listen_on_all() {
        let hosts = AllowedHosts::new(&["0.0.0.0:7443".parse().unwrap()], &[]);
        assert_eq!(ask(&hosts, "192.0.2.9:7443", None), 200);
        assert_eq!(ask(&hosts, "evil.example", None), 403);
    }

    #[test]
    fn an_origin_must_be_ours() {
        let hosts = AllowedHosts::new(&["127.0.0.1:7443".parse().unwrap()], &["ui.example:5173".into()]);
        assert_eq!(ask(&hosts, "localhost:7443", Some("https://localhost:7443")), 200);
        assert_eq!(ask(&hosts, "localhost:7443", Some("https://ui.example:5173")), 200);
        for bad in
            ["https://evil.example", "http://localhost:7443", "https://localhost:3000", "null", "https://localhost:7443.evil.example"]
        {
            assert_eq!(ask(&hosts, "localhost:7443", Some(bad)), 403, "{bad}");
        }
    }
}
