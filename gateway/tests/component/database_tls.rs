//! The line to PostgreSQL with TLS: whom it is spoken with is checked, and nothing is said in the clear that should not be.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use gateway::store::{
    Admission, EventLog as _, StoreError,
    postgres::{Database, PostgresLog},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use xtask::postgres::Postgres;

use crate::support::{cluster::Cluster, process::Process, soon};

/// An authority's certificate in a file, and a server's that it has issued, with its key.
struct Issued {
    authority: PathBuf,
    certificate: String,
    key: String,
}

fn issue(folder: &Path, file: &str, host: &str) -> Issued {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([host.to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let path = folder.join(file);
    std::fs::write(&path, authority.pem()).unwrap();
    Issued {
        authority: path,
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    }
}

/// How the gateway's own connections are made, as the server sees them.
fn encrypted(server: &Postgres) -> String {
    let select = "SELECT count(*) FILTER (WHERE ssl), count(*) FILTER (WHERE NOT ssl)
        FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'agentic-gateway'";
    server.say("postgres", select).unwrap().trim().to_owned()
}

async fn refusal(database: Database) -> StoreError {
    match PostgresLog::open(&database, None).await {
        Ok(_) => panic!("the log opened"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn the_log_is_written_over_tls_to_the_server_that_the_authority_vouches_for_and_to_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let issued = issue(folder.path(), "ca.pem", "localhost");
    let stranger = issue(folder.path(), "other.pem", "localhost");
    let server = Postgres::start_with_tls(&issued.certificate, &issued.key).unwrap();
    let url = server.database_at("localhost").unwrap();
    let trusting = |url: &str, authority: &Path| Database {
        url: url.to_owned(),
        authorities: Some(authority.to_owned()),
    };

    let log = PostgresLog::open(&trusting(&url, &issued.authority), None)
        .await
        .unwrap();
    let admission = Admission {
        session: "u".to_owned(),
        namespace: "team-a".to_owned(),
        name: "s".to_owned(),
        pod: "p1".to_owned(),
        seen: 0,
        heard: 0,
    };
    log.admit(admission).await.unwrap();
    assert_eq!(log.state("u").await.unwrap().epoch, 1);
    let seen = encrypted(&server);
    assert!(
        seen.ends_with("|0") && !seen.starts_with("0|"),
        "encrypted|plain: {seen}"
    );

    // In the words of libpq.
    let words = format!("{url}?sslmode=verify-full&sslrootcert={}", issued.authority.display());
    let again = PostgresLog::open(&words.as_str().into(), None).await.unwrap();
    assert_eq!(again.state("u").await.unwrap().epoch, 1);

    let said = |error: StoreError| {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    let unknown = said(refusal(trusting(&url, &stranger.authority)).await);
    assert!(unknown.contains("invalid peer certificate"), "{unknown}");
    let renamed = url.replace("localhost", "127.0.0.1");
    let renamed = said(refusal(trusting(&renamed, &issued.authority)).await);
    assert!(renamed.contains("not valid for name"), "{renamed}");
    // Nobody whom the system trusts has issued it.
    let system = said(refusal(format!("{url}?sslmode=require").as_str().into()).await);
    assert!(system.contains("certificate"), "{system}");
    let plain = said(refusal(url.as_str().into()).await);
    assert!(
        plain.contains("pg_hba.conf") && plain.contains("no encryption"),
        "{plain}"
    );
    let missing = said(refusal(trusting(&url, Path::new("/no/ca.pem"))).await);
    assert!(missing.contains("/no/ca.pem"), "{missing}");
}

#[tokio::test]
async fn a_gateway_with_an_authority_speaks_tls_on_each_of_its_lines() {
    let folder = tempfile::tempdir().unwrap();
    let issued = issue(folder.path(), "ca.pem", "localhost");
    let server = Postgres::start_with_tls(&issued.certificate, &issued.key).unwrap();
    let cluster = Cluster::start().await;
    let arguments = [
        format!("--database-url={}", server.database_at("localhost").unwrap()),
        format!("--database-ca={}", issued.authority.display()),
    ];
    let _process = Process::start_with(&[], &cluster, folder.path(), &arguments).await;
    // Its lines are made when it needs them, or in the background.
    let seen = soon("a line to the database", async {
        loop {
            let seen = encrypted(&server);
            if seen != "0|0" {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert!(
        seen.ends_with("|0") && !seen.starts_with("0|"),
        "encrypted|plain: {seen}"
    );
}
