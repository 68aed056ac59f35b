//! Every property of a definition, and what its shape lets be done to it.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A property: its path below `spec`, with `[]` for the first element of a list and `{}` for the first entry of a map.
#[derive(Clone, Debug)]
pub struct Property {
    pub path: String,
    schema: Value,
}

/// What is done to a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Rule {
    Delete,
    Empty,
    WrongType,
    // Numbers.
    Increase,
    Decrease,
    Zero,
    Negative,
    Huge,
    Least,
    Most,
    BelowLeast,
    AboveMost,
    // Texts.
    Change,
    TooLong,
    Nul,
    Each(usize),
    NoneOfThem,
    // Truths.
    Toggle,
    // Lists, maps and objects.
    Push,
    Pop,
    TooMany,
    UnknownField,
    BadKey,
    /// A value of the property's own table.
    Meant(usize),
}

/// A rule at a property.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mutation {
    pub path: String,
    pub rule: Rule,
}

/// All properties of a definition's spec.
pub fn properties(definition: &CustomResourceDefinition) -> Vec<Property> {
    let definition = serde_json::to_value(definition).unwrap();
    let spec = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut found = Vec::new();
    below("", spec, &mut found);
    found
}

fn below(path: &str, schema: &Value, found: &mut Vec<Property>) {
    let mut go = |path: String, schema: &Value| {
        found.push(Property {
            path: path.clone(),
            schema: schema.clone(),
        });
        below(&path, schema, found);
    };
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        go(
            if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            },
            schema,
        );
    }
    if schema["items"].is_object() {
        go(format!("{path}.[]"), &schema["items"]);
    }
    if schema["additionalProperties"].is_object() {
        go(format!("{path}.{{}}"), &schema["additionalProperties"]);
    }
}

impl Property {
    /// The structural rules of its type, and its own values.
    pub fn rules(&self) -> Vec<Rule> {
        let bounded = |bound: &str| self.schema[bound].is_number();
        let mut rules = vec![Rule::Delete, Rule::WrongType];
        match self.schema["type"].as_str() {
            Some("integer" | "number") => {
                rules.extend([Rule::Increase, Rule::Decrease, Rule::Zero, Rule::Negative, Rule::Huge]);
                if bounded("minimum") {
                    rules.extend([Rule::Least, Rule::BelowLeast]);
                }
                if bounded("maximum") {
                    rules.extend([Rule::Most, Rule::AboveMost]);
                }
            }
            Some("string") if self.schema["enum"].is_array() => {
                let values = self.schema["enum"].as_array().map_or(0, Vec::len);
                rules.extend((0..values).map(Rule::Each));
                rules.extend([Rule::NoneOfThem, Rule::Empty]);
            }
            Some("string") => rules.extend([Rule::Change, Rule::Empty, Rule::TooLong, Rule::Nul]),
            Some("boolean") => rules.push(Rule::Toggle),
            Some("array") => rules.extend([Rule::Push, Rule::Pop, Rule::Empty, Rule::TooMany]),
            Some("object") if self.schema["additionalProperties"].is_object() => {
                rules.extend([Rule::Push, Rule::Pop, Rule::Empty, Rule::TooMany, Rule::BadKey]);
            }
            Some("object") => rules.extend([Rule::Empty, Rule::UnknownField]),
            // A quantity.
            _ => rules.extend([Rule::Increase, Rule::Zero, Rule::Negative, Rule::Huge, Rule::Change]),
        }
        rules.extend((0..super::values::meant(&self.path).len()).map(Rule::Meant));
        rules
    }

    /// The value that the rule makes of what is there; `None` takes it away.
    fn value(&self, rule: Rule, old: &Value) -> Option<Value> {
        let bound = |name: &str| self.schema[name].as_f64().unwrap_or(0.0);
        let number = |n: f64| {
            if self.schema["type"] == "integer" {
                json!(n as i64)
            } else {
                json!(n)
            }
        };
        let text = || old.as_str().unwrap_or("a").to_owned();
        let quantity = self.schema["x-kubernetes-int-or-string"] == true;
        Some(match rule {
            Rule::Delete => return None,
            Rule::WrongType => match self.schema["type"].as_str() {
                Some("string") => json!(7),
                Some("array") => json!({"a": 1}),
                Some("object") => json!(["a"]),
                _ => json!({"not": ["this"]}),
            },
            Rule::Empty => match self.schema["type"].as_str() {
                Some("array") => json!([]),
                Some("string") => json!(""),
                _ => json!({}),
            },
            Rule::Increase if quantity => json!("3Gi"),
            Rule::Change if quantity => json!("lots"),
            Rule::Negative if quantity => json!("-1Gi"),
            Rule::Huge if quantity => json!("1Ei"),
            Rule::Increase => number(old.as_f64().unwrap_or(1.0) + 1.0),
            Rule::Decrease => number(old.as_f64().unwrap_or(1.0) - 1.0),
            Rule::Zero => json!(0),
            Rule::Negative => json!(-1),
            Rule::Huge => json!(i64::MAX),
            Rule::Least => number(bound("minimum")),
            Rule::Most => number(bound("maximum")),
            Rule::BelowLeast => number(bound("minimum") - 1.0),
            Rule::AboveMost => number(bound("maximum") + 1.0),
            Rule::Change => json!(text() + "x"),
            Rule::TooLong => json!("a".repeat(self.schema["maxLength"].as_u64().unwrap_or(300) as usize + 1)),
            Rule::Nul => json!(text() + "\u{0}"),
            Rule::Each(n) => self.schema["enum"][n].clone(),
            Rule::NoneOfThem => json!("NoSuchThing"),
            Rule::Toggle => json!(!old.as_bool().unwrap_or_default()),
            Rule::Push | Rule::Pop | Rule::TooMany | Rule::UnknownField | Rule::BadKey => {
                return Some(self.grown(rule, old));
            }
            Rule::Meant(n) => super::values::meant(&self.path)[n].clone(),
        })
    }

    /// What becomes of a list, a map or an object whose members change.
    fn grown(&self, rule: Rule, old: &Value) -> Value {
        let most = |bound: &str| self.schema[bound].as_u64().unwrap_or(64) as usize + 1;
        let filler = || match self.schema["items"]["type"].as_str() {
            Some("object") => json!({}),
            _ => json!("another"),
        };
        if let Some(list) = old.as_array() {
            let mut list = list.clone();
            match rule {
                Rule::Push => list.push(filler()),
                Rule::Pop => drop(list.pop()),
                _ => {
                    list = (0..most("maxItems"))
                        .map(|n| list.first().map_or(json!(format!("a{n}")), Value::clone))
                        .collect();
                }
            }
            return Value::Array(list);
        }
        let mut map: Map<String, Value> = old.as_object().cloned().unwrap_or_default();
        let like = map.values().next().cloned().unwrap_or(json!("a"));
        match rule {
            Rule::Push => drop(map.insert("another".to_owned(), like)),
            Rule::Pop => drop(map.keys().next().cloned().and_then(|key| map.remove(&key))),
            Rule::UnknownField => drop(map.insert("noSuchField".to_owned(), json!(1))),
            Rule::BadKey => drop(map.insert("0 no/key\u{e9}".to_owned(), like)),
            _ => map.extend((0..most("maxProperties")).map(|n| (format!("a{n}"), like.clone()))),
        }
        Value::Object(map)
    }
}

/// Applies a mutation to a spec. What lies on the way is made where it is missing.
pub fn mutate(properties: &[Property], mutation: &Mutation, spec: &mut Value) {
    let Some(property) = properties.iter().find(|property| property.path == mutation.path) else {
        return;
    };
    let steps: Vec<&str> = mutation.path.split('.').collect();
    let (last, way) = steps.split_last().expect("a path has a step");
    let mut at = spec;
    for step in way {
        at = entry(at, step);
    }
    let old = entry(at, last).clone();
    match (property.value(mutation.rule, &old), at) {
        (Some(value), at) => *entry(at, last) = value,
        (None, Value::Array(elements)) => drop(elements.pop()),
        (None, Value::Object(map)) => {
            let key = if *last == "{}" {
                map.keys().next().cloned()
            } else {
                Some((*last).to_owned())
            };
            key.and_then(|key| map.remove(&key));
        }
        (None, _) => {}
    }
}

fn entry<'a>(at: &'a mut Value, step: &str) -> &'a mut Value {
    if step == "[]" {
        if at.as_array().is_none_or(Vec::is_empty) {
            *at = json!([null]);
        }
        return &mut at[0];
    }
    if !at.is_object() {
        *at = json!({});
    }
    if step == "{}" {
        let map = at.as_object_mut().expect("it was made one");
        let first = map.keys().next().cloned().unwrap_or_else(|| "a".to_owned());
        return map.entry(first).or_insert(Value::Null);
    }
    at.as_object_mut()
        .expect("it was made one")
        .entry(step.to_owned())
        .or_insert(Value::Null)
}

/// Any mutation of any of these properties.
pub fn any(properties: &[Property], random: &mut StdRng) -> Mutation {
    let property = properties.choose(random).expect("there are properties");
    let rules = property.rules();
    Mutation {
        path: property.path.clone(),
        rule: rules[random.random_range(0..rules.len())],
    }
}

/// Every mutation there is.
pub fn all(properties: &[Property]) -> Vec<Mutation> {
    properties
        .iter()
        .flat_map(|property| property.rules().into_iter().map(|rule| (property.path.clone(), rule)))
        .map(|(path, rule)| Mutation { path, rule })
        .collect()
}

/// Without what says nothing: nulls, and what `mutate` left empty on its way.
pub fn tidy(spec: &mut Value) {
    if let Value::Object(map) = spec {
        map.retain(|_, value| !value.is_null());
        map.values_mut().for_each(tidy);
    }
}
