//! Which addresses are never connected to. Names are resolved once, the answers are filtered, and the connection goes to what is
//! left: between check and connect nothing is asked again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
use ipnet::IpNet;
use tower_service::Service;
use url::{Host, Url};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The addresses of a destination are refused.
#[derive(Debug, thiserror::Error)]
#[error("{0} is an address that deliveries may not go to")]
pub struct Blocked(pub String);

/// Link-local and metadata addresses are always refused; private and loopback ones where the operator says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guard {
    pub block_private: bool,
}

impl Guard {
    /// Checks an URL whose host is written as an address; names are checked when they are resolved.
    ///
    /// # Errors
    /// [`Blocked`].
    pub fn check(&self, url: &Url) -> Result<(), Blocked> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            _ => return Ok(()),
        };
        match self.allows(address) {
            true => Ok(()),
            false => Err(Blocked(address.to_string())),
        }
    }

    fn allows(&self, address: IpAddr) -> bool {
        let address = match address {
            IpAddr::V6(six) => embedded(six).map_or(IpAddr::V6(six), IpAddr::V4),
            four => four,
        };
        !(is_always_blocked(address) || (self.block_private && is_private(address)))
    }
}

/// The IPv4 address inside of an IPv6 one: mapped, compatible (RFC 4291), NAT64 (RFC 6052, RFC 8215) or 6to4 (RFC 3056).
fn embedded(six: Ipv6Addr) -> Option<Ipv4Addr> {
    let octets = six.octets();
    let four = |at: usize| Ipv4Addr::new(octets[at], octets[at + 1], octets[at + 2], octets[at + 3]);
    match six.segments() {
        [0x64, 0xFF9B, 0, 0, 0, 0, ..] | [0x64, 0xFF9B, 1, ..] => Some(four(12)),
        [0x2002, ..] => Some(four(2)),
        // `::` and `::1` are addresses of their own.
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 || low > 1 => Some(four(12)),
        _ => six.to_ipv4_mapped(),
    }
}

/// Link-local, multicast, and the metadata services of clouds outside of the link-local ranges.
const ALWAYS_BLOCKED: [&str; 9] = [
    "169.254.0.0/16",
    "224.0.0.0/4",
    "100.100.100.200/32",
    "192.0.0.192/32",
    "168.63.129.16/32",
    "fe80::/10",
    "ff00::/8",
    "fd00:ec2::254/128",
    "fd00:ec2::23/128",
];

/// What the IANA registries of special-purpose addresses call not globally reachable, as far as it is not blocked always, and Teredo, which
/// hides an IPv4 address.
const PRIVATE: [&str; 21] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "100::/64",
    "2001::/32",
    "2001:2::/48",
    "2001:db8::/32",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
];

fn ranges(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a range in the table")).collect()
}

static BLOCKED_RANGES: LazyLock<[Vec<IpNet>; 2]> = LazyLock::new(|| [ranges(&ALWAYS_BLOCKED), ranges(&PRIVATE)]);

fn is_always_blocked(address: IpAddr) -> bool {
    BLOCKED_RANGES[0].iter().any(|range| range.contains(&address))
}

fn is_private(address: IpAddr) -> bool {
    BLOCKED_RANGES[1].iter().any(|range| range.contains(&address))
}

impl Service<Name> for Guard {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guard = *self;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let any = !found.is_empty();
            let allowed: Vec<SocketAddr> = found.into_iter().filter(|address| guard.allows(address.ip())).collect();
            if any && allowed.is_empty() {
                return Err(Blocked(name.as_str().to_owned()).into());
            }
            Ok(allowed.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_refused_by_their_range() {
        let cases = [
            ("http://169.254.169.254/latest", false, false),
            ("http://[fe80::1]/", false, false),
            ("http://[::ffff:169.254.169.254]/", false, false),
            ("http://[64:ff9b::a9fe:a9fe]/", false, false),
            ("http://[2002:a9fe:a9fe::1]/", false, false),
            ("http://100.100.100.200/", false, false),
            ("http://127.0.0.1:80/", true, false),
            ("http://10.1.2.3/", true, false),
            ("http://[::1]/", true, false),
            ("http://[fd12::1]/", true, false),
            ("http://0x7f000001/", true, false),
            ("http://[64:ff9b:1::a9fe:a9fe]/", false, false),
            ("http://[::169.254.169.254]/", false, false),
            ("http://[fd00:ec2::23]/", false, false),
            ("http://[fd00:ec2::254]/", false, false),
            ("http://224.0.0.1/", false, false),
            ("http://198.18.0.1/", true, false),
            ("http://192.0.0.1/", true, false),
            ("http://250.0.0.1/", true, false),
            ("http://0.0.0.0/", true, false),
            ("http://172.31.0.1/", true, false),
            ("http://100.64.0.1/", true, false),
            ("http://[2001::1]/", true, false),
            ("http://[::10.0.0.1]/", true, false),
            ("http://[::ffff:10.0.0.1]/", true, false),
            ("http://[::]/", true, false),
            ("http://172.32.0.1/", true, true),
            ("http://[2606:4700::1]/", true, true),
            ("http://[64:ff9b::5db8:d822]/", true, true),
            ("http://93.184.216.34/", true, true),
            ("http://example.test/", true, true),
        ];
        for (url, open, strict) in cases {
            let url = Url::parse(url).expect("an URL");
            assert_eq!(Guard { block_private: false }.check(&url).is_ok(), open, "{url}");
            assert_eq!(Guard { block_private: true }.check(&url).is_ok(), strict, "{url}");
        }
    }
}
