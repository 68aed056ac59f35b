//! Where an author-given URL may lead: its host is resolved once, each address is judged, and what is connected to are
//! those addresses and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::lookup_host;
use tokio::time::{Duration, timeout};

/// How long a name may take to be resolved.
const RESOLVING: Duration = Duration::from_secs(15);

/// Why a host is not connected to.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The name leads nowhere now.
    #[error("failed to resolve the host {host}: {reason}")]
    Unresolved {
        /// The host.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// The admin did not allow it.
    #[error(
        "the host {host} leads to {address}, which is a {kind} address: the admin may allow it by allowedPrivateHosts of the namespace's ProjectSettings"
    )]
    Forbidden {
        /// The host.
        host: String,
        /// One of its addresses.
        address: IpAddr,
        /// What is wrong with it.
        kind: &'static str,
    },
}

impl AddressError {
    /// Whether another try may succeed through no change of the session.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unresolved { .. })
    }
}

/// Hosts and networks that may be reached although their addresses are not public.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    networks: Vec<Network>,
    /// In lower case; `*.` in front: every name below.
    names: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Network {
    address: IpAddr,
    bits: u8,
}

impl Allowed {
    /// From `allowedPrivateHosts`: networks (`10.0.0.0/8`), addresses, names (`git.corp.example`, `*.corp.example`).
    pub fn new(entries: &[String]) -> Self {
        let mut allowed = Self::default();
        for entry in entries {
            match Network::parse(entry) {
                Some(network) => allowed.networks.push(network),
                None => allowed.names.push(entry.trim_end_matches('.').to_ascii_lowercase()),
            }
        }
        allowed
    }

    /// The addresses of a host, all of them fit to be connected to.
    pub async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, AddressError> {
        let unresolved = |reason: String| AddressError::Unresolved {
            host: host.to_owned(),
            reason,
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let found = timeout(RESOLVING, lookup_host((bare, port)))
            .await
            .map_err(|_| unresolved("the resolver does not answer".to_owned()))?
            .map_err(|error| unresolved(error.to_string()))?;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in found {
            self.judge(bare, address.ip())?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(unresolved("it has no address".to_owned()));
        }
        Ok(addresses)
    }

    /// Whether a host may be reached at this address.
    pub fn judge(&self, host: &str, address: IpAddr) -> Result<(), AddressError> {
        let address = canonical(address);
        let Some(kind) = kind(address) else { return Ok(()) };
        if self.networks.iter().any(|network| network.contains(address)) {
            return Ok(());
        }
        // A name says which service is meant; that it may also lead back into the pod or to the node is never meant.
        if kind == PRIVATE && self.names(host) {
            return Ok(());
        }
        Err(AddressError::Forbidden {
            host: host.to_owned(),
            address,
            kind,
        })
    }

    fn names(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        self.names.iter().any(|name| match name.strip_prefix('*') {
            Some(tail) => tail.starts_with('.') && host.len() > tail.len() && host.ends_with(tail),
            None => *name == host,
        })
    }
}

impl Network {
    fn parse(entry: &str) -> Option<Self> {
        let (address, bits) = match entry.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (entry, None),
        };
        let address: IpAddr = address.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(most), |bits| bits.parse().ok())?;
        (bits <= most).then_some(Self { address, bits })
    }

    fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                own.to_bits() & mask == other.to_bits() & mask
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                own.to_bits() & mask == other.to_bits() & mask
            }
            _ => false,
        }
    }
}

/// The IPv4 address that an IPv6 one stands for.
fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let [a, b, c, d] = v6.to_bits().to_be_bytes()[12..] else {
        return address;
    };
    let nat64 = v6.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
    if nat64 {
        return Ipv4Addr::new(a, b, c, d).into();
    }
    v6.to_ipv4_mapped().map_or(address, IpAddr::V4)
}

const PRIVATE: &str = "private";

/// What an address is that is not public.
fn kind(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(v4) => kind_v4(v4),
        IpAddr::V6(v6) => kind_v6(v6),
    }
}

fn kind_v4(v4: Ipv4Addr) -> Option<&'static str> {
    let [a, b, ..] = v4.octets();
    if v4.is_loopback() {
        Some("loopback")
    } else if v4.is_link_local() {
        Some("link-local")
    } else if v4.is_private() || (a == 100 && b & 0xc0 == 64) || (a == 198 && b & 0xfe == 18) {
        Some(PRIVATE)
    } else if a == 0 || v4.is_multicast() || a >= 240 {
        Some("special")
    } else {
        None
    }
}

fn kind_v6(v6: Ipv6Addr) -> Option<&'static str> {
    if v6.is_loopback() {
        Some("loopback")
    } else if v6.is_unicast_link_local() {
        Some("link-local")
    } else if v6.is_unique_local() || v6.segments()[0] & 0xffc0 == 0xfec0 {
        Some(PRIVATE)
    } else if v6.is_unspecified() || v6.is_multicast() || v6.segments()[..6] == [0; 6] || v6.segments()[0] == 0x2002 {
        // The last two embed IPv4 addresses in forms that nobody needs any more.
        Some("special")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn allowed(entries: &[&str]) -> Allowed {
        Allowed::new(&entries.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>())
    }

    #[rstest]
    #[case("140.82.121.3", None)]
    #[case("2606:50c0:8000::153", None)]
    #[case("127.0.0.1", Some("loopback"))]
    #[case("::1", Some("loopback"))]
    #[case("::ffff:127.0.0.1", Some("loopback"))]
    #[case("64:ff9b::7f00:1", Some("loopback"))]
    #[case("169.254.169.254", Some("link-local"))]
    #[case("fe80::1", Some("link-local"))]
    #[case("10.1.2.3", Some("private"))]
    #[case("172.31.0.1", Some("private"))]
    #[case("172.32.0.1", None)]
    #[case("192.168.0.1", Some("private"))]
    #[case("100.64.0.1", Some("private"))]
    #[case("100.128.0.1", None)]
    #[case("198.19.0.1", Some("private"))]
    #[case("198.20.0.1", None)]
    #[case("feff::1", Some("private"))]
    #[case("ff02::1", Some("special"))]
    #[case("::a00:1", Some("special"))]
    #[case("fd00::1", Some("private"))]
    #[case("0.0.0.0", Some("special"))]
    #[case("::", Some("special"))]
    #[case("224.0.0.1", Some("special"))]
    #[case("255.255.255.255", Some("special"))]
    #[case("2002:7f00:1::", Some("special"))]
    fn only_public_addresses_are_reached_by_default(#[case] address: &str, #[case] expected: Option<&str>) {
        let found = match Allowed::default().judge("host.example", address.parse().unwrap()) {
            Ok(()) => None,
            Err(AddressError::Forbidden { kind, .. }) => Some(kind),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(found, expected);
    }

    #[rstest]
    #[case("10.0.0.0/8", "any.example", "10.200.0.1", true)]
    #[case("10.0.0.0/8", "any.example", "11.0.0.1", true)]
    #[case("10.0.0.0/8", "any.example", "192.168.0.1", false)]
    #[case("192.168.7.9", "any.example", "192.168.7.9", true)]
    #[case("192.168.7.9", "any.example", "192.168.7.8", false)]
    #[case("127.0.0.1", "localhost", "127.0.0.1", true)]
    #[case("0.0.0.0/0", "any.example", "127.0.0.1", true)]
    #[case("fd00::/8", "any.example", "fd12::1", true)]
    #[case("git.corp.example", "git.corp.example", "10.0.0.1", true)]
    #[case("git.corp.example", "GIT.corp.example.", "10.0.0.1", true)]
    #[case("git.corp.example", "evil.example", "10.0.0.1", false)]
    #[case("*.corp.example", "a.b.corp.example", "10.0.0.1", true)]
    #[case("*.corp.example", "corp.example", "10.0.0.1", false)]
    #[case("*.corp.example", "notcorp.example", "10.0.0.1", false)]
    #[case("*.corp.example", ".corp.example", "10.0.0.1", false)]
    #[case("fd00::/16", "any.example", "fd12::1", false)]
    #[case::a_name_does_not_open_the_pod_itself("git.corp.example", "git.corp.example", "127.0.0.1", false)]
    #[case::nor_the_metadata_service("*.corp.example", "git.corp.example", "169.254.169.254", false)]
    fn the_admin_decides_what_else_is(
        #[case] entry: &str,
        #[case] host: &str,
        #[case] address: &str,
        #[case] expected: bool,
    ) {
        let judged = allowed(&[entry]).judge(host, address.parse().unwrap());
        assert_eq!(judged.is_ok(), expected, "{judged:?}");
    }

    #[tokio::test]
    async fn a_name_that_leads_to_loopback_is_refused() {
        let refused = Allowed::default().resolve("localhost", 443).await;
        assert!(
            matches!(refused, Err(AddressError::Forbidden { kind: "loopback", .. })),
            "{refused:?}"
        );
        let found = allowed(&["127.0.0.0/8", "::1"])
            .resolve("localhost", 443)
            .await
            .unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback()));
    }
}
