//! Which addresses are never connected to. Names are resolved once, the answers are filtered, and the connection goes to what is
//! left: between check and connect nothing is asked again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
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

/// The IPv4 address that an IPv6 one stands for: mapped, NAT64 (RFC 6052) or 6to4 (RFC 3056).
fn embedded(six: Ipv6Addr) -> Option<Ipv4Addr> {
    let octets = six.octets();
    let four = |at: usize| Ipv4Addr::new(octets[at], octets[at + 1], octets[at + 2], octets[at + 3]);
    match six.segments() {
        [0x64, 0xFF9B, 0, 0, 0, 0, ..] => Some(four(12)),
        [0x2002, ..] => Some(four(2)),
        _ => six.to_ipv4_mapped(),
    }
}

fn is_always_blocked(address: IpAddr) -> bool {
    /// The metadata service of some clouds, outside the link-local range.
    const METADATA: [IpAddr; 4] = [
        IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
        IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
        IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    ];
    let link_local = match address {
        IpAddr::V4(four) => four.is_link_local(),
        IpAddr::V6(six) => six.is_unicast_link_local(),
    };
    link_local || address.is_multicast() || METADATA.contains(&address)
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(four) => {
            let shared = four.octets()[0] == 100 && (64..128).contains(&four.octets()[1]);
            four.is_private() || four.is_loopback() || four.is_unspecified() || four.is_broadcast() || shared
        }
        IpAddr::V6(six) => six.is_unique_local() || six.is_loopback() || six.is_unspecified(),
    }
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
