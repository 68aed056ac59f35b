//! The cluster's certificate authority and what it signs. Keys are elliptic: made in no time, and small.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

/// A certificate that an authority signs.
struct Wanted<'a> {
    file: &'a str,
    common_name: &'a str,
    organization: Option<&'a str>,
    addresses: &'a [Ipv4Addr],
    names: &'a [&'a str],
}

/// The folder with `ca.crt`, `<name>.crt`, `<name>.key`, and the service accounts' `sa.key` and `sa.pub`.
pub(super) struct Certificates(PathBuf);

impl Certificates {
    /// Makes all of them anew: a cluster's state never outlives the cluster.
    pub(super) fn create(folder: &Path, addresses: &[Ipv4Addr], node: &str) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let authority = authority(folder)?;
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        for wanted in [
            Wanted {
                file: "apiserver",
                common_name: "kube-apiserver",
                organization: None,
                addresses,
                names: &names,
            },
            Wanted {
                file: "admin",
                common_name: "admin",
                organization: Some("system:masters"),
                addresses: &[],
                names: &[],
            },
            Wanted {
                file: "kubelet",
                common_name: &format!("system:node:{node}"),
                organization: Some("system:nodes"),
                addresses,
                names: &[],
            },
        ] {
            issue(folder, &authority, &wanted)?;
        }
        let accounts = KeyPair::generate()?;
        write_key(&folder.join("sa.key"), &accounts)?;
        fs::write(folder.join("sa.pub"), accounts.public_key_pem())?;
        Ok(Self(folder.to_owned()))
    }

    /// A file's path, for a command line.
    pub(super) fn path(&self, file: &str) -> String {
        self.0.join(file).display().to_string()
    }

    /// A file's bytes, for a kubeconfig that needs no other file.
    pub(super) fn read(&self, file: &str) -> Result<Vec<u8>> {
        fs::read(self.0.join(file)).with_context(|| format!("failed to read {}", self.path(file)))
    }
}

fn authority(folder: &Path) -> Result<Issuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "agentic-test-cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    fs::write(folder.join("ca.crt"), certificate.pem())?;
    Ok(Issuer::new(params, key))
}

fn issue(folder: &Path, authority: &Issuer<'_, KeyPair>, wanted: &Wanted<'_>) -> Result<()> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, wanted.common_name);
    if let Some(organization) = wanted.organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.subject_alt_names = wanted
        .addresses
        .iter()
        .map(|address| SanType::IpAddress(IpAddr::V4(*address)))
        .collect();
    for name in wanted.names {
        params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, authority)?;
    fs::write(folder.join(format!("{}.crt", wanted.file)), certificate.pem())?;
    write_key(&folder.join(format!("{}.key", wanted.file)), &key)
}

fn write_key(path: &Path, key: &KeyPair) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("failed to create {}", path.display()))?;
    file.write_all(key.serialize_pem().as_bytes())?;
    Ok(())
}
