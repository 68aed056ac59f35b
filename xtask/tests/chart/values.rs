//! Values: each acts, and none that cannot work is taken.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{folder, refusal, rendered};

/// A value other than the default for every value that there is.
const CHANGES: &[&str] = &[
    r#"image.registry="r.example.com/a""#,
    r#"image.tag="t-2""#,
    r#"image.pullPolicy="Always""#,
    r#"image.pullSecrets=["pull"]"#,
    r#"watchNamespace="team-a""#,
    "runAsUser=1234",
    r#"logLevel="debug""#,
    "crds.install=false",
    "rbac.aggregate=false",
    r#"operator.image.repository="o""#,
    r#"operator.image.tag="t-3""#,
    r#"operator.image.digest="sha256:1111111111111111111111111111111111111111111111111111111111111111""#,
    "operator.jobRetention=60",
    "operator.replicas=2",
    r#"operator.resources.requests.cpu="21m""#,
    r#"operator.resources.requests.memory="33Mi""#,
    r#"operator.resources.limits.memory="257Mi""#,
    r#"operator.nodeSelector={"a":"b"}"#,
    r#"operator.tolerations=[{"key":"a"}]"#,
    r#"operator.affinity={"nodeAffinity":{}}"#,
    r#"operator.priorityClassName="high""#,
    r#"operator.podAnnotations={"a":"b"}"#,
    r#"runner.image.repository="r""#,
    r#"runner.image.tag="t-4""#,
    r#"runner.image.digest="sha256:2222222222222222222222222222222222222222222222222222222222222222""#,
    r#"runner.image.pullPolicy="Always""#,
    "networkPolicy.enabled=false",
    r#"networkPolicy.dns.to=[{"ipBlock":{"cidr":"10.96.0.10/32"}}]"#,
    r#"networkPolicy.dns.ports=[{"protocol":"UDP","port":53}]"#,
    r#"networkPolicy.blocked=["10.0.0.0/8"]"#,
    r#"networkPolicy.egress=[{"to":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"langfuse"}}}]}]"#,
    "gateway.enabled=false",
    r#"gateway.image.repository="g""#,
    r#"gateway.image.tag="t-5""#,
    r#"gateway.image.digest="sha256:3333333333333333333333333333333333333333333333333333333333333333""#,
    "gateway.persistence.enabled=false",
    r#"gateway.persistence.size="6Gi""#,
    r#"gateway.persistence.storageClassName="fast""#,
    "gateway.replicas=3",
    r#"gateway.database.secretName="database""#,
    r#"gateway.database.secretKey="uri""#,
    r#"gateway.database.caKey="ca.crt""#,
    r#"gateway.compat.apis=["claude-code"]"#,
    r#"gateway.compat.namespace="team-b""#,
    "gateway.compat.authEnabled=false",
    r#"gateway.compat.allowHosts=["tasks.example.com"]"#,
    r#"gateway.compat.apiKeySecret="key""#,
    "gateway.compat.rateLimitPerMinute=0",
    r#"gateway.compat.defaultModel="m""#,
    "gateway.compat.maxTurns=51",
    "gateway.compat.sessionMaxConcurrent=11",
    "gateway.compat.sessionIdleTimeoutSeconds=1801",
    "gateway.compat.sessionMaxSeconds=604799",
    "gateway.compat.sessionCleanupIntervalSeconds=301",
    "gateway.compat.sessionRetentionSeconds=86401",
    "gateway.compat.claudeCodeMaxConcurrent=21",
    "gateway.compat.claudeCodeTimeoutSeconds=601",
    "gateway.compat.claudeCodeKeepSeconds=61",
    "gateway.compat.claudeCodeEphemeral=false",
    "gateway.compat.port=8000",
    r#"gateway.retention.age="91d""#,
    r#"gateway.retention.deleted="8d""#,
    r#"gateway.retention.sessionSize="2Gi""#,
    r#"gateway.retention.namespaceSize="3Gi""#,
    r#"gateway.retention.size="5Gi""#,
    r#"gateway.apiKeysSecret="keys""#,
    r#"gateway.tls.secretName="certificate""#,
    r#"gateway.allowOrigins=["https://console.example.com"]"#,
    "gateway.maxConnections=2000",
    "gateway.ratePerMinute=100",
    r#"gateway.service.type="NodePort""#,
    r#"gateway.service.annotations={"a":"b"}"#,
    r#"gateway.resources.requests.cpu="22m""#,
    r#"gateway.resources.requests.memory="65Mi""#,
    r#"gateway.resources.limits.memory="513Mi""#,
    r#"gateway.nodeSelector={"a":"b"}"#,
    r#"gateway.tolerations=[{"key":"a"}]"#,
    r#"gateway.affinity={"nodeAffinity":{}}"#,
    r#"gateway.priorityClassName="high""#,
    r#"gateway.podAnnotations={"a":"b"}"#,
    "metrics.enabled=false",
    "metrics.serviceMonitor.enabled=true",
    r#"metrics.serviceMonitor.interval="31s""#,
    r#"metrics.serviceMonitor.labels={"a":"b"}"#,
    "uninstall.enabled=false",
    "uninstall.timeout=181",
];

/// Paths of all values; an empty map or list is a value.
fn leaves(path: &str, value: &Value, found: &mut BTreeSet<String>) {
    match value.as_object() {
        Some(entries) if !entries.is_empty() => {
            for (name, value) in entries {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                leaves(&path, value, found);
            }
        }
        _ => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn every_value_acts() {
    let values = std::fs::read_to_string(folder().join("values.yaml")).unwrap();
    let mut all = BTreeSet::new();
    leaves("", &serde_saphyr::from_str(&values).unwrap(), &mut all);
    let changed: BTreeSet<_> = CHANGES
        .iter()
        .map(|change| change.split_once('=').unwrap().0.to_owned())
        .collect();
    assert_eq!(all, changed, "each value has a change to try");

    // A ServiceMonitor's values act once there is one.
    let monitored = "metrics.serviceMonitor.enabled=true";
    let (plain, with_monitor) = (rendered(&[]), rendered(&[monitored]));
    // Several gateways and the place of their URL need a database.
    let database = r#"gateway.database.secretName="database""#;
    let with_database = rendered(&[database]);
    // Other systems' APIs have values once one of them is served.
    let compat = [
        r#"gateway.compat.apis=["tasks"]"#,
        r#"gateway.compat.namespace="team-a""#,
    ];
    let with_compat = rendered(&compat);
    for change in CHANGES {
        let acts = if change.starts_with("gateway.compat.") {
            rendered(&[compat[0], compat[1], change]) != with_compat
        } else if change.starts_with("gateway.database.") && *change != database || *change == "gateway.replicas=3" {
            rendered(&[database, change]) != with_database
        } else if change.contains("serviceMonitor.") && *change != monitored {
            rendered(&[monitored, change]) != with_monitor
        } else {
            rendered(&[change]) != plain
        };
        assert!(acts, "{change} changes nothing");
    }
}

#[test]
fn a_pod_annotation_of_the_charts_own_may_be_replaced() {
    for part in ["operator", "gateway"] {
        let value = format!(r#"{part}.podAnnotations={{"kubectl.kubernetes.io/default-container":"other"}}"#);
        let text = serde_json::to_string(&rendered(&[&value])).unwrap();
        assert!(
            text.contains(r#""kubectl.kubernetes.io/default-container":"other""#),
            "{part}"
        );
    }
}

#[test]
fn a_value_that_does_not_exist_or_cannot_work_is_refused() {
    for (value, complaint) in [
        ("gatway.enabled=false", "gatway"),
        ("operator.replica=2", "replica"),
        ("runAsUser=0", "runAsUser"),
        (r#"image.pullPolicy="Sometimes""#, "pullPolicy"),
        (r#"watchNamespace="a,b""#, "watchNamespace"),
        (r#"gateway.persistence.size="big""#, "size"),
        ("gateway.persistence.size=0", "size"),
        (r#"operator.resources.limits={"memory":"."}"#, "memory"),
        (r#"networkPolicy.blocked=["10.0.0.1"]"#, "blocked"),
        ("gateway.replicas=2", "Set gateway.database.secretName to a Secret"),
    ] {
        let refusal = refusal(value);
        assert!(refusal.contains(complaint), "{value}: {refusal}");
    }
}
