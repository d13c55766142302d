//! Who is at the other end: the client's address, as the proxies tell it that may be believed.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;
use ipnet::IpNet;

/// Proxies that tell the truth in `X-Forwarded-For`.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self(networks)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The address nearest to us that no trusted proxy has: everything before it is what somebody says.
    pub fn client(&self, headers: &HeaderMap, peer: Option<SocketAddr>) -> String {
        let Some(peer) = peer.map(|peer| peer.ip().to_canonical()) else { return String::new() };
        let mut nearest = peer;
        let said = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
        let hops: Vec<&str> = said.flat_map(|line| line.split(',')).map(str::trim).collect();
        for hop in hops.iter().rev() {
            if !self.trusts(nearest) {
                break;
            }
            let Some(address) = address(hop) else { break };
            nearest = address;
        }
        nearest.to_string()
    }
}

/// With or without a port.
fn address(hop: &str) -> Option<IpAddr> {
    let plain = hop.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    plain.or_else(|_| hop.parse::<SocketAddr>().map(|socket| socket.ip())).ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn only_trusted_proxies_are_believed() {
        let cases = [
            ("", "10.0.0.1", "1.1.1.1", "10.0.0.1"),
            ("10.0.0.0/8", "10.0.0.1", "1.1.1.1", "1.1.1.1"),
            ("10.0.0.0/8", "8.8.8.8", "1.1.1.1", "8.8.8.8"),
            ("10.0.0.0/8", "10.0.0.1", "9.9.9.9, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
            ("10.0.0.0/8", "10.0.0.1", "", "10.0.0.1"),
            ("10.0.0.0/8", "10.0.0.1", "nonsense", "10.0.0.1"),
            ("10.0.0.1/32,::1/128", "::1", "2001:db8::1", "2001:db8::1"),
            ("0.0.0.0/0", "10.0.0.1", "9.9.9.9,1.1.1.1:555", "9.9.9.9"),
            ("::1/128", "::1", "[2001:db8::1]:443", "2001:db8::1"),
        ];
        for (trusted, peer, said, client) in cases {
            let headers = HeaderMap::from_iter([(
                axum::http::HeaderName::from_static("x-forwarded-for"),
                HeaderValue::from_str(said).expect("text"),
            )]);
            let peer = SocketAddr::new(peer.parse().expect("an address"), 1);
            let networks = trusted.split(',').filter(|text| !text.is_empty());
            let proxies = TrustedProxies::new(networks.map(|text| text.parse().expect("a network")).collect());
            assert_eq!(proxies.client(&headers, Some(peer)), client, "{trusted} {peer} {said}");
        }
    }
}
