//! The CRD as it is installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool, ValidationRule,
};
use kube::CustomResourceExt as _;
use protocol::names::annotation;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{AgenticSession, ProjectSettings, session::MUTABLE};

/// Every definition that the operator needs, in the order of their names.
pub fn crds() -> [CustomResourceDefinition; 2] {
    [session_crd(), settings_crd()]
}

/// The definition of `AgenticSession`, with the digest of its schema as an annotation.
pub fn session_crd() -> CustomResourceDefinition {
    definition(AgenticSession::crd(), |root| {
        let properties = root.properties.get_or_insert_default();
        if let Some(status) = properties.get_mut("status") {
            // In every read and in the answer to a create, without a write.
            status.default = Some(JSON(json!({"phase": "Pending"})));
        }
        if let Some(spec) = properties.get_mut("spec") {
            forbid_changes(spec);
        }
    })
}

/// The definition of `ProjectSettings`, with the digest of its schema as an annotation.
pub fn settings_crd() -> CustomResourceDefinition {
    definition(ProjectSettings::crd(), |_| ())
}

fn definition(mut crd: CustomResourceDefinition, change: impl Fn(&mut JSONSchemaProps)) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let root = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut());
        if let Some(root) = root {
            forbid_null(root);
            change(root);
        }
    }
    let digest = digest(&crd);
    crd.metadata
        .annotations
        .get_or_insert_default()
        .insert(annotation::SCHEMA.to_owned(), digest);
    crd
}

/// SHA-256 of the schema in a definition of this build: what an operator expects of the installed one.
pub fn schema_digest(crd: &CustomResourceDefinition) -> Option<&str> {
    Some(crd.metadata.annotations.as_ref()?.get(annotation::SCHEMA)?)
}

/// All definitions as YAML.
pub fn crd_yaml() -> Result<String, serde_saphyr::ser::Error> {
    let documents: Vec<_> = crds().iter().map(serde_saphyr::to_string).collect::<Result<_, _>>()?;
    Ok(documents.join("---\n"))
}

/// One rule for all fields that cannot be changed, added or taken away, so that a new field cannot be forgotten; its message names those that were.
///
/// The API server evaluates it at each write of a status too, and for each field that a rule names it collects all properties of the spec anew. So
/// it first compares the two specs, which looks at no more than what is there; a rule for each field took a third of all memory that a status write
/// takes. `optionalOldSelf` would need a newer API server.
fn forbid_changes(spec: &mut JSONSchemaProps) {
    let fields: Vec<_> = spec
        .properties
        .iter()
        .flat_map(|properties| properties.keys())
        .filter(|field| !MUTABLE.contains(&&***field))
        .collect();
    let same = |field: &String| {
        format!("has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})")
    };
    let all_are: Vec<_> = fields.iter().map(|field| format!("({})", same(field))).collect();
    // Words and no list of them: what it costs to filter and join one is estimated beyond what the API server allows.
    let changed: Vec<_> = fields
        .iter()
        .map(|field| format!("({} ? '' : 'spec.{field} ')", same(field)))
        .collect();
    let rule = ValidationRule {
        rule: format!("self == oldSelf || ({})", all_are.join(" && ")),
        message: Some(format!(
            "of spec only {} can be changed: create another session",
            MUTABLE.join(", ")
        )),
        message_expression: Some(format!(
            "{} + 'cannot be changed: create another session'",
            changed.join(" + ")
        )),
        ..ValidationRule::default()
    };
    spec.x_kubernetes_validations.get_or_insert_default().push(rule);
}

/// `Option` means that a field may be left out, not that it may be null; a null would be neither set nor absent to the rules.
fn forbid_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema
        .properties
        .iter_mut()
        .flat_map(|properties| properties.values_mut())
        .for_each(forbid_null);
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        forbid_null(values);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        forbid_null(items);
    }
}

fn digest(crd: &CustomResourceDefinition) -> String {
    // A definition always serialises; were it not to, the digest would differ from every other.
    let bytes = serde_json::to_vec(&crd.spec).unwrap_or_default();
    hex::encode(&Sha256::digest(bytes)[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every node of the schema below `path`, with its path.
    fn nodes<'a>(path: &str, schema: &'a JSONSchemaProps, found: &mut Vec<(String, &'a JSONSchemaProps)>) {
        found.push((path.to_owned(), schema));
        for (name, property) in schema.properties.iter().flatten() {
            nodes(&format!("{path}.{name}"), property, found);
        }
        if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
            nodes(&format!("{path}{{}}"), values, found);
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            nodes(&format!("{path}[]"), items, found);
        }
    }

    fn with_nodes(check: impl Fn(&str, &JSONSchemaProps)) {
        for crd in crds() {
            let root = crd.spec.versions[0].schema.as_ref().unwrap();
            let mut found = Vec::new();
            nodes("", root.open_api_v3_schema.as_ref().unwrap(), &mut found);
            assert!(found.len() > 40, "the whole schema is walked");
            for (path, node) in found {
                check(&path, node);
            }
        }
    }

    #[test]
    fn every_field_is_described() {
        with_nodes(|path, node| {
            assert!(
                path.is_empty() || path.ends_with("[]") || path.ends_with("{}") || node.description.is_some(),
                "{path} has no description"
            );
        });
    }

    #[test]
    fn every_field_has_a_type_that_api_servers_know() {
        with_nodes(|path, node| {
            assert!(
                node.type_.is_some() || node.x_kubernetes_int_or_string == Some(true),
                "{path} has no type"
            );
            assert!(
                !node.format.as_deref().unwrap_or_default().starts_with("uint"),
                "{path} has format {:?}",
                node.format
            );
            assert_eq!(node.nullable, None, "{path} may be null");
        });
    }

    #[test]
    fn whatever_a_user_writes_is_bounded() {
        with_nodes(|path, node| {
            if !path.starts_with(".spec") || node.x_kubernetes_int_or_string == Some(true) {
                return;
            }
            match node.type_.as_deref() {
                Some("string") => assert!(
                    node.max_length.is_some() || node.enum_.is_some(),
                    "{path} has no maxLength"
                ),
                Some("array") => assert!(node.max_items.is_some(), "{path} has no maxItems"),
                Some("object") if node.additional_properties.is_some() => {
                    assert!(node.max_properties.is_some(), "{path} has no maxProperties");
                }
                _ => {}
            }
        });
    }

    #[test]
    fn a_session_is_pending_before_anybody_writes_its_status() {
        with_nodes(|path, node| {
            if path == ".status" {
                assert_eq!(node.default, Some(JSON(json!({"phase": "Pending"}))));
            }
        });
    }
}
