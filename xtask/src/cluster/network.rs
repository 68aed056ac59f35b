//! The cluster's network namespace: nothing in it can reach the outside, unless asked to.

use std::{ffi::OsString, net::Ipv4Addr, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::command;

/// The node's address, the API server's and the DNS server's, on a bridge that is the node's network device.
pub(super) const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub(super) const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Where pods find the API server: the first address of [`SERVICE_CIDR`].
pub(super) const API_SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(super) const POD_CIDR: &str = "10.244.0.0/24";

/// A network namespace by name.
pub(super) struct Network {
    name: String,
}

impl Network {
    pub(super) fn of_cluster(cluster: &str) -> Self {
        Self {
            name: format!("agentic-{cluster}"),
        }
    }

    /// The file that stands for the namespace.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// What enters the namespace and `exec`s the command that follows. Not `ip netns exec`: that makes a mount namespace
    /// per command, and the mounts of one daemon would be invisible to the next.
    pub(super) fn prefix(&self) -> Vec<OsString> {
        vec![
            "nsenter".into(),
            format!("--net={}", self.path().display()).into(),
            "--".into(),
        ]
    }

    /// Makes the namespace with loopback, the node's address and a route for Service addresses.
    pub(super) fn create(&self) -> Result<()> {
        ip(&["netns", "add", &self.name])?;
        self.ip(&["link", "set", "lo", "up"])?;
        // A bridge serves as the node's device: the kernel may lack the dummy device.
        self.ip(&["link", "add", "node0", "type", "bridge"])?;
        self.ip(&["addr", "add", &format!("{NODE_IP}/24"), "dev", "node0"])?;
        self.ip(&["link", "set", "node0", "up"])?;
        // kube-proxy rewrites a Service's address only after a route was found for it.
        self.ip(&["route", "add", SERVICE_CIDR, "dev", "node0"])?;
        // Absent on the host until the module is loaded; built into some kernels, so failing to load it says nothing.
        let _ = command::quiet(Command::new("modprobe").arg("br_netfilter"));
        self.shell("echo 1 > /proc/sys/net/ipv4/ip_forward")?;
        self.shell("echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables")
            .context("Services between pods need bridged packets to pass iptables (kernel module br_netfilter)")
    }

    /// Deletes the namespace, and with it every device in it.
    pub(super) fn delete(&self) -> Result<()> {
        if self.path().exists() {
            ip(&["netns", "del", &self.name])?;
        }
        Ok(())
    }

    fn ip(&self, words: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], words].concat())
    }

    fn shell(&self, script: &str) -> Result<()> {
        let prefix = self.prefix();
        command::quiet(Command::new(&prefix[0]).args(&prefix[1..]).args(["sh", "-c", script]))
    }
}

/// The way out, for a cluster that asked for it: a pair of devices, a default route, and masquerading on the host.
pub(super) struct Egress {
    /// The host's end of the pair; its name says whose it is.
    device: String,
    /// The host's address on it, where the host's DNS is offered.
    pub(super) host_ip: Ipv4Addr,
    inner_ip: Ipv4Addr,
}

impl Egress {
    /// Device and addresses follow from the cluster's name, so that `down` finds them without a record.
    pub(super) fn of_cluster(cluster: &str) -> Self {
        let hash = Sha256::digest(cluster.as_bytes());
        // A network device's name has at most 15 characters.
        let device = format!("ag{}", hex::encode(&hash[..4]));
        let (third, fourth) = (hash[4], hash[5] & 0b1111_1100);
        Self {
            device,
            host_ip: Ipv4Addr::new(10, 98, third, fourth + 1),
            inner_ip: Ipv4Addr::new(10, 98, third, fourth + 2),
        }
    }

    pub(super) fn create(&self, network: &Network) -> Result<()> {
        let inner = "out0";
        ip(&[
            "link",
            "add",
            &self.device,
            "type",
            "veth",
            "peer",
            "name",
            inner,
            "netns",
            &network.name,
        ])?;
        ip(&["addr", "add", &format!("{}/30", self.host_ip), "dev", &self.device])?;
        ip(&["link", "set", &self.device, "up"])?;
        network.ip(&["addr", "add", &format!("{}/30", self.inner_ip), "dev", inner])?;
        network.ip(&["link", "set", inner, "up"])?;
        network.ip(&["route", "add", "default", "via", &self.host_ip.to_string()])?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("failed to let the host forward packets")?;
        for rule in self.rules() {
            iptables("-I", &rule)?;
        }
        Ok(())
    }

    /// Takes away whatever is there; a cluster without a way out has none of it.
    pub(super) fn delete(&self) {
        for rule in self.rules() {
            while iptables("-D", &rule).is_ok() {}
        }
        if std::path::Path::new("/sys/class/net").join(&self.device).exists() {
            let _ = ip(&["link", "del", &self.device]);
        }
    }

    fn rules(&self) -> [Vec<String>; 3] {
        let words = |line: String| line.split(' ').map(String::from).collect();
        [
            words(format!("nat POSTROUTING -s {}/32 -j MASQUERADE", self.inner_ip)),
            words(format!("filter FORWARD -i {} -j ACCEPT", self.device)),
            words(format!(
                "filter FORWARD -o {} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                self.device
            )),
        ]
    }
}

fn iptables(action: &str, rule: &[String]) -> Result<()> {
    command::quiet(
        Command::new("iptables")
            .args(["-w", "10", "-t", &rule[0], action])
            .args(&rule[1..]),
    )
}

fn ip(words: &[&str]) -> Result<()> {
    command::quiet(Command::new("ip").args(words))
}
