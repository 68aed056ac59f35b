//! A repository's address, taken apart and checked: `https://`, `ssh://` or `user@host:path`, nothing else.

use std::net::SocketAddr;

use reqwest::Url;

use super::{GitError, Repos};

/// How a remote is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Over TLS.
    Https,
    /// By a key.
    Ssh,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// How.
    pub scheme: Scheme,
    /// Host as it was written, in lower case.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What git is given; holds no credential.
    pub url: String,
}

/// A remote whose addresses were judged.
pub struct Pinned<'a> {
    /// The remote.
    pub remote: &'a Remote,
    /// Where it is, and nowhere else.
    pub addresses: Vec<SocketAddr>,
}

impl Remote {
    /// Reads an address.
    pub fn parse(text: &str) -> Result<Self, GitError> {
        // A password in it would end up in the message otherwise.
        let shown = || match text.split_once("://") {
            Some((scheme, rest)) => match rest.split_once('@') {
                Some((_, rest)) => format!("{scheme}://…@{rest}"),
                None => text.to_owned(),
            },
            None => text.to_owned(),
        };
        let wrong = |reason| GitError::Url { url: shown(), reason };
        if text.contains(|c: char| c.is_control() || c.is_whitespace() || c == '\\') {
            return Err(wrong("it holds spaces or control characters"));
        }
        if text.contains("::") && !text.contains('[') {
            return Err(wrong("remote helpers are not allowed"));
        }
        if text.contains("://") {
            return from_url(text).map_err(wrong);
        }
        from_scp(text).map_err(wrong)
    }

    /// Resolves the host, once, and judges its addresses.
    pub(super) async fn pin(&self, repos: &Repos) -> Result<Pinned<'_>, GitError> {
        Ok(Pinned {
            remote: self,
            addresses: repos.allowed.resolve(&self.host, self.port).await?,
        })
    }
}

fn from_url(text: &str) -> Result<Remote, &'static str> {
    let url = Url::parse(text).map_err(|_| "it is not a URL")?;
    let (scheme, default) = match url.scheme() {
        "https" => (Scheme::Https, 443),
        "ssh" => (Scheme::Ssh, 22),
        _ => return Err("only https://, ssh:// and user@host:path are allowed"),
    };
    if url.password().is_some() {
        return Err("it holds a password; put credentials into a Secret of the runner");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("it holds a query or a fragment");
    }
    let host = url.host_str().ok_or("it has no host")?.to_ascii_lowercase();
    let port = url.port().unwrap_or(default);
    let path = url.path();
    checked_host(&host)?;
    if path.len() < 2 {
        return Err("it names no repository");
    }
    let url = match scheme {
        Scheme::Https => format!("https://{host}:{port}{path}"),
        Scheme::Ssh => {
            let user = if url.username().is_empty() {
                "git"
            } else {
                url.username()
            };
            checked_user(user)?;
            format!("ssh://{user}@{host}:{port}{path}")
        }
    };
    Ok(Remote {
        scheme,
        host,
        port,
        url: url.replacen(":443/", "/", usize::from(scheme == Scheme::Https && port == 443)),
    })
}

fn from_scp(text: &str) -> Result<Remote, &'static str> {
    const FORM: &str = "only https://, ssh:// and user@host:path are allowed";
    let (user, rest) = text.split_once('@').ok_or(FORM)?;
    let (host, path) = rest.split_once(':').ok_or(FORM)?;
    let host = host.to_ascii_lowercase();
    checked_user(user)?;
    checked_host(&host)?;
    if path.is_empty() || path.starts_with('-') {
        return Err("it names no repository");
    }
    Ok(Remote {
        scheme: Scheme::Ssh,
        url: format!("{user}@{host}:{path}"),
        host,
        port: 22,
    })
}

fn checked_user(user: &str) -> Result<(), &'static str> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let good = !user.is_empty() && !user.starts_with('-') && user.chars().all(fine);
    good.then_some(()).ok_or("its user has characters that are not allowed")
}

/// ssh takes a host from a command line, so it must not look like anything else.
fn checked_host(host: &str) -> Result<(), &'static str> {
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let fine = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let good = if let Some(address) = inner {
        address.parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        !host.is_empty() && !host.starts_with('-') && host.chars().all(fine)
    };
    good.then_some(()).ok_or("its host has characters that are not allowed")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        "https://GitHub.com/o/r.git",
        Scheme::Https,
        "github.com",
        443,
        "https://github.com/o/r.git"
    )]
    #[case(
        "https://me@git.example:8443/r",
        Scheme::Https,
        "git.example",
        8443,
        "https://git.example:8443/r"
    )]
    #[case(
        "ssh://git@h.example/o/r",
        Scheme::Ssh,
        "h.example",
        22,
        "ssh://git@h.example:22/o/r"
    )]
    #[case(
        "ssh://h.example:2222/o/r",
        Scheme::Ssh,
        "h.example",
        2222,
        "ssh://git@h.example:2222/o/r"
    )]
    #[case(
        "ssh://h.example:443/o/r",
        Scheme::Ssh,
        "h.example",
        443,
        "ssh://git@h.example:443/o/r"
    )]
    #[case("git@h.example:o/r.git", Scheme::Ssh, "h.example", 22, "git@h.example:o/r.git")]
    #[case(
        "https://[2606:50c0::1]/r",
        Scheme::Https,
        "[2606:50c0::1]",
        443,
        "https://[2606:50c0::1]/r"
    )]
    fn an_address_is_taken_apart(
        #[case] text: &str,
        #[case] scheme: Scheme,
        #[case] host: &str,
        #[case] port: u16,
        #[case] url: &str,
    ) {
        let expected = Remote {
            scheme,
            host: host.into(),
            port,
            url: url.into(),
        };
        assert_eq!(Remote::parse(text).unwrap(), expected);
    }

    #[rstest]
    #[case("http://h.example/r")]
    #[case("git://h.example/r")]
    #[case("file:///etc")]
    #[case("/etc")]
    #[case("../r")]
    #[case("ext::sh -c true")]
    #[case("ext::sh%20-c%20true")]
    #[case("fd::17")]
    #[case("https::ext::x")]
    #[case("ssh://-oProxyCommand=x/r")]
    #[case("ssh://git@-oProxyCommand=x/r")]
    #[case("-oProxyCommand=x@h:r")]
    #[case("git@-oProxyCommand=x:r")]
    #[case("git@h:-oProxyCommand")]
    #[case("ssh://a b@h/r")]
    #[case("https://h.example/r\n")]
    #[case("https://h.example")]
    #[case("https:///r")]
    #[case("https://h.example/r?x=1")]
    #[case("https://h.example/a b")]
    #[case("https://h.example/a\u{7}b")]
    #[case("https://h.example\\a/r")]
    #[case("-l@h.example:r")]
    #[case("@h.example:r")]
    #[case("git@-l:r")]
    #[case("")]
    fn everything_else_is_refused(#[case] text: &str) {
        assert!(Remote::parse(text).is_err());
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        let refused = Remote::parse("https://me:fake-secret@h.example/r")
            .unwrap_err()
            .to_string();
        assert!(!refused.contains("fake-secret"), "{refused}");
    }
}
