//! The reference of `AgenticSession`, made from the definition, so that it says what the API server checks.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Where the reference is, relative to the repository's root.
pub const REFERENCE: &str = "docs/reference.md";

const HEAD: &str = "\
<!-- Made by `cargo xtask generate` from the definitions. Do not edit. -->

# Reference of `vteam.ambient-code/v1alpha1`

Every field that exists acts. The same text is in `kubectl explain agenticsession.spec` and `kubectl explain projectsettings.spec`.
What the phases and reasons mean is in the [guide](guide.md#phases).

# AgenticSession

`metadata.name` has at most 52 characters.
";

const SETTINGS: &str = "
# ProjectSettings

One in a namespace, named `projectsettings`; see [operations](operations.md).
";

/// The reference as Markdown.
pub fn reference() -> Result<String> {
    let mut text = String::new();
    for (head, crd, parts) in [
        (HEAD, crds::session_crd(), &["spec", "status"][..]),
        (SETTINGS, crds::settings_crd(), &["spec"]),
    ] {
        text.push_str(head);
        let definition = serde_json::to_value(&crd)?;
        let version = &definition["spec"]["versions"][0];
        for part in parts {
            let schema = version["schema"]["openAPIV3Schema"]["properties"]
                .get(part)
                .with_context(|| format!("the definition has no {part}"))?;
            object(&mut text, part, schema)?;
        }
        let short = crd.spec.names.short_names.iter().flatten().next();
        let name = short.unwrap_or(&crd.spec.names.plural);
        columns(&mut text, name, &version["additionalPrinterColumns"])?;
    }
    Ok(text)
}

/// A section for an object, then one for each object in it.
fn object(text: &mut String, path: &str, schema: &Value) -> Result<()> {
    write!(text, "\n## `{path}`\n\n")?;
    if let Some(description) = schema["description"].as_str() {
        write!(text, "{}\n\n", prose(description))?;
    }
    text.push_str("| field | type | meaning |\n| --- | --- | --- |\n");
    let required = schema["required"].as_array();
    let properties: Vec<_> = schema["properties"].as_object().into_iter().flatten().collect();
    for (name, field) in &properties {
        let mut meaning = prose(field["description"].as_str().unwrap_or_default());
        if required.is_some_and(|names| names.contains(&Value::from(name.as_str()))) {
            meaning.push_str(" Required.");
        }
        for fact in facts(field) {
            write!(meaning, "<br>{fact}")?;
        }
        writeln!(text, "| `{name}` | {} | {meaning} |", kind(field))?;
    }
    let rules = rules(schema);
    if !rules.is_empty() {
        text.push_str("\nRefused at apply:\n\n");
        for rule in rules {
            writeln!(text, "- {rule}")?;
        }
    }
    for (name, field) in properties {
        let (path, nested) = if field["items"].is_object() {
            (format!("{path}.{name}[]"), &field["items"])
        } else {
            (format!("{path}.{name}"), field)
        };
        if nested["properties"].is_object() {
            object(text, &path, nested)?;
        }
    }
    Ok(())
}

/// Type of a field in a reader's words.
fn kind(field: &Value) -> String {
    if field["x-kubernetes-int-or-string"] == true {
        return "quantity".to_owned();
    }
    match field["type"].as_str().unwrap_or("any") {
        "array" => format!("list of {}", kind(&field["items"])),
        "object" if field["additionalProperties"].is_object() => {
            format!("map of {}", kind(&field["additionalProperties"]))
        }
        "string" if field["format"] == "date-time" => "time".to_owned(),
        other => other.to_owned(),
    }
}

/// Bounds, default and rules of a field.
fn facts(field: &Value) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<_> = values
            .iter()
            .filter_map(Value::as_str)
            .map(|value| format!("`{value}`"))
            .collect();
        facts.push(format!("One of {}.", values.join(", ")));
    }
    for (key, word) in [
        ("maxLength", "characters"),
        ("maxItems", "items"),
        ("maxProperties", "entries"),
    ] {
        if let Some(bound) = field[key].as_u64() {
            facts.push(format!("At most {bound} {word}."));
        }
    }
    if !field["default"].is_null() {
        facts.push(format!("Default: `{}`.", field["default"]));
    }
    if !field["properties"].is_object() {
        facts.extend(rules(field).into_iter().map(|rule| format!("Refused: {rule}.")));
    }
    facts
}

/// Messages of an object's CEL rules; what each refuses, it says.
fn rules(schema: &Value) -> Vec<String> {
    schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|rule| rule["message"].as_str())
        .map(prose)
        .collect()
}

fn columns(text: &mut String, name: &str, columns: &Value) -> Result<()> {
    write!(
        text,
        "\n## Columns of `kubectl get {name}`\n\n| column | from | |\n| --- | --- | --- |\n"
    )?;
    for column in columns.as_array().into_iter().flatten() {
        let wide = if column["priority"].as_i64().unwrap_or_default() > 0 {
            "`-o wide`"
        } else {
            ""
        };
        let (name, path) = (
            column["name"].as_str().unwrap_or_default(),
            column["jsonPath"].as_str().unwrap_or_default(),
        );
        writeln!(text, "| {name} | `{path}` | {wide} |")?;
    }
    Ok(())
}

/// Text that stays in its table cell.
fn prose(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}
