//! The chart: what it renders, what rights it gives, and that a real API server takes it.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod values;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use xtask::{
    chart::{self, CHART},
    cluster::ControlPlane,
    command, paths,
    tools::{self, Group},
};

static HELM: LazyLock<PathBuf> = LazyLock::new(|| {
    tools::ensure(Group::Chart).unwrap();
    tools::path("helm").unwrap()
});

fn folder() -> PathBuf {
    paths::workspace().join(CHART)
}

/// The chart rendered with values, each as `--set` and `--set-json` take them.
fn rendered(values: &[&str]) -> Vec<Value> {
    let arguments: Vec<_> = values.iter().flat_map(|value| ["--set-json", *value]).collect();
    chart::template(&HELM, &folder(), &arguments).unwrap()
}

fn refusal(value: &str) -> String {
    chart::template(&HELM, &folder(), &["--set-json", value])
        .unwrap_err()
        .to_string()
}

fn names(objects: &[Value]) -> BTreeSet<String> {
    objects
        .iter()
        .map(|object| format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"])))
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn words(value: &Value) -> String {
    value
        .as_array()
        .into_iter()
        .flatten()
        .map(text)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Who may do what where, one line for each rule of each binding.
fn rights(objects: &[Value]) -> String {
    let mut lines = BTreeSet::new();
    for binding in objects
        .iter()
        .filter(|object| text(&object["kind"]).ends_with("RoleBinding"))
    {
        let place = match text(&binding["kind"]) {
            "ClusterRoleBinding" => "everywhere",
            _ => text(&binding["metadata"]["namespace"]),
        };
        let role = objects
            .iter()
            .find(|object| {
                object["kind"] == binding["roleRef"]["kind"] && object["metadata"]["name"] == binding["roleRef"]["name"]
            })
            .expect("every binding binds a role of the chart");
        for subject in binding["subjects"].as_array().unwrap() {
            assert_eq!(subject["kind"], "ServiceAccount");
            for rule in role["rules"].as_array().unwrap() {
                let only = match &rule["resourceNames"] {
                    Value::Null => String::new(),
                    names => format!(" named {}", words(names)),
                };
                let who = text(&subject["name"]);
                let what = format!("{}/{}{only}", words(&rule["apiGroups"]), words(&rule["resources"]));
                lines.insert(format!("{who} | {place} | {what} | {}", words(&rule["verbs"])));
            }
        }
    }
    lines.into_iter().collect::<Vec<_>>().join("\n")
}

#[test]
fn helm_lint_has_nothing_to_say() {
    command::output(Command::new(&*HELM).args(["lint", "--strict", "--quiet"]).arg(folder())).unwrap();
}

#[test]
fn whoever_widens_a_right_sees_it_here() {
    insta::assert_snapshot!(rights(&rendered(&[])));
}

#[test]
fn nobody_has_all_verbs_or_reads_secrets_or_grants_rights() {
    for line in rights(&rendered(&[])).lines() {
        for forbidden in ["*", "secrets", "pods/exec", "escalate", "impersonate", "rolebindings"] {
            assert!(!line.contains(forbidden), "{line}");
        }
    }
}

#[test]
fn with_a_watched_namespace_sessions_elsewhere_are_out_of_the_operators_reach() {
    let rights = rights(&rendered(&[r#"watchNamespace="team-a""#]));
    for line in rights.lines().filter(|line| line.contains("| everywhere |")) {
        // The gateway serves all namespaces: each caller by the caller's own rights.
        // Nodes are in no namespace.
        let expected = [
            "customresourcedefinitions",
            "agentic-operator | everywhere | /nodes | list watch",
            "agentic-gateway | everywhere |",
        ];
        assert!(expected.iter().any(|what| line.contains(what)), "{line}");
    }
    assert!(rights.contains("agentic-operator | team-a | batch/jobs"));
    assert!(rights.contains("agentic-uninstall | team-a | batch/jobs"));
}

#[test]
fn without_gateway_nothing_of_it_is_left() {
    let objects = rendered(&["gateway.enabled=false"]);
    assert!(!names(&objects).iter().any(|name| name.contains("gateway")));
    assert!(!Value::from(objects).to_string().contains("GATEWAY_URL"));
}

#[test]
fn a_user_id_of_null_leaves_users_to_the_cluster() {
    let text = Value::from(rendered(&["runAsUser=null"])).to_string();
    for word in ["runAsUser", "runAsGroup", "fsGroup"] {
        assert!(!text.contains(&format!("{word}\":")), "{word}");
    }
    assert!(text.contains(r#"{"name":"RUN_AS_USER","value":"none"}"#));
}

#[test]
fn the_definition_stays_when_the_chart_goes() {
    let objects = rendered(&[]);
    let installed: Vec<_> = objects
        .iter()
        .filter(|object| object["kind"] == "CustomResourceDefinition")
        .collect();
    for expected in crds::crds() {
        let expected = serde_json::to_value(expected).unwrap();
        let definition = installed
            .iter()
            .find(|object| object["metadata"]["name"] == expected["metadata"]["name"])
            .unwrap();
        assert_eq!(definition["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
        assert_eq!(definition["spec"], expected["spec"]);
    }
}

#[test]
fn what_is_applied_without_helm_runs_no_uninstall() {
    for (path, content) in chart::manifests(paths::workspace(), &HELM).unwrap() {
        assert!(
            path.starts_with("manifests/uninstall/") || !content.contains("uninstall"),
            "{path}"
        );
        assert!(!content.contains("helm.sh/"), "{path}");
    }
}

/// What the operator is told that pods of sessions may reach.
fn session_egress(values: &[&str]) -> Value {
    let objects = rendered(values);
    let deployment = objects
        .iter()
        .find(|object| object["kind"] == "Deployment" && object["metadata"]["name"] == "agentic-operator")
        .unwrap();
    let variables = &deployment["spec"]["template"]["spec"]["containers"][0]["env"];
    let variable = variables
        .as_array()
        .unwrap()
        .iter()
        .find(|variable| variable["name"] == "SESSION_EGRESS");
    variable.map_or(Value::Null, |variable| {
        serde_json::from_str(&text(&variable["value"]).replace("$$", "$")).unwrap()
    })
}

#[test]
fn pods_of_sessions_reach_dns_the_gateway_public_addresses_and_what_values_add() {
    let rules = session_egress(&[]);
    let rules = rules.as_array().unwrap();
    assert_eq!(rules.len(), 3, "{rules:#?}");
    let ports: BTreeSet<_> = rules[0]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::to_string)
        .collect();
    assert!(ports.contains(r#"{"port":53,"protocol":"UDP"}"#) && ports.contains(r#"{"port":53,"protocol":"TCP"}"#));
    let gateway = &rules[1];
    assert_eq!(gateway["ports"], json!([{"protocol": "TCP", "port": 8080}]));
    let gateway_pods = rendered(&[])
        .into_iter()
        .find(|object| object["kind"] == "StatefulSet")
        .unwrap();
    assert_eq!(
        gateway["to"][0]["podSelector"]["matchLabels"], gateway_pods["spec"]["selector"]["matchLabels"],
        "the pods that are named are the gateway's"
    );
    for (block, everything, metadata) in [(0, "0.0.0.0/0", "169.254.0.0/16"), (1, "::/0", "fc00::/7")] {
        let block = &rules[2]["to"][block]["ipBlock"];
        assert_eq!(block["cidr"], everything);
        assert!(
            block["except"].as_array().unwrap().contains(&metadata.into()),
            "{block}"
        );
    }
    assert_eq!(rules[2].get("ports"), None);

    assert_eq!(session_egress(&["gateway.enabled=false"]).as_array().unwrap().len(), 2);
    assert_eq!(session_egress(&["networkPolicy.enabled=false"]), Value::Null);
    let more = session_egress(&[r#"networkPolicy.egress=[{"to":[{"ipBlock":{"cidr":"10.1.2.3/32"}}]}]"#]);
    assert_eq!(more[3]["to"][0]["ipBlock"]["cidr"], "10.1.2.3/32");
    let odd = session_egress(&[r#"networkPolicy.egress=[{"to":[{"podSelector":{"matchLabels":{"a":"'$(HOME)"}}}]}]"#]);
    assert_eq!(odd[3]["to"][0]["podSelector"]["matchLabels"]["a"], "'$(HOME)");
}

/// One real API server for all that must be asked of one.
#[test]
fn a_real_api_server_takes_the_chart_its_pods_and_the_examples_and_gives_users_their_rights() {
    let cluster = ControlPlane::start().unwrap();
    let kubectl = |words: &str| command::output(cluster.kubectl().unwrap().args(words.split(' ')));
    let helm = |words: &str| {
        let mut helm = Command::new(&*HELM);
        let helm = helm
            .current_dir(folder())
            .env("KUBECONFIG", cluster.kubeconfig())
            .args(words.split(' '));
        command::output(helm).unwrap()
    };

    kubectl("create namespace agents").unwrap();
    kubectl("label namespace agents pod-security.kubernetes.io/enforce=restricted").unwrap();
    helm("install agentic-operator . --namespace=agents --set=operator.replicas=2");
    kubectl("wait crd/agenticsessions.vteam.ambient-code --for=condition=Established --timeout=30s").unwrap();

    let database = r#"gateway.database.secretName="database""#;
    for pod in [rendered(&[]), rendered(&[database])]
        .iter()
        .flat_map(|objects| bare_pods(objects))
    {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pod.to_string()).unwrap();
        kubectl(&format!(
            "create --dry-run=server --namespace=agents -f {}",
            file.path().display()
        ))
        .unwrap();
    }

    for role in ["view", "edit", "admin"] {
        kubectl(&format!(
            "create rolebinding {role} --clusterrole={role} --user={role}-user --namespace=agents"
        ))
        .unwrap();
    }
    let may = |user: &str, verb: &str| {
        kubectl(&format!(
            "auth can-i {verb} agenticsessions.vteam.ambient-code --namespace=agents --as={user}-user"
        ))
        .is_ok()
    };
    // The aggregation controller needs a moment.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !may("edit", "create") {
        assert!(Instant::now() < deadline, "editors may not create sessions");
    }
    assert!(may("view", "list") && !may("view", "create"));
    assert!(may("admin", "delete") && !may("nobody", "get"));

    let examples = paths::workspace().join("docs/examples");
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "of-the-values"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": session_egress(&[])}});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), policy.to_string()).unwrap();
    kubectl(&format!(
        "create --dry-run=server --namespace=agents -f {}",
        file.path().display()
    ))
    .unwrap();
    for file in ["hello.yaml", "full.yaml"] {
        kubectl(&format!(
            "create --namespace=agents --as=edit-user -f {}",
            examples.join(file).display()
        ))
        .unwrap();
    }
    helm("upgrade agentic-operator . --namespace=agents --set=logLevel=debug");
    helm("uninstall agentic-operator --namespace=agents --no-hooks");
    kubectl("get as hello --namespace=agents").unwrap();
    // The definition was kept; the same release takes it over again.
    helm("install agentic-operator . --namespace=agents");
}

/// The pods of all templates: of a Deployment, Pod Security refuses the pods only.
fn bare_pods(objects: &[Value]) -> Vec<Value> {
    let pod = |object: &Value| {
        let mut pod = object.pointer("/spec/template")?.clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = object["metadata"]["name"].clone();
        // The hook's account exists while the hook runs; the claim is the StatefulSet controller's to add.
        pod["spec"]["serviceAccountName"] = "default".into();
        if object["kind"] == "StatefulSet" {
            pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
        }
        Some(pod)
    };
    objects.iter().filter_map(pod).collect()
}
