//! The OpenAPI 3.1 document. A route is registered together with what is said of it, and schemas are those of the types that
//! are read and written, so that the document cannot speak of another API than the one that is served.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    Router,
    handler::Handler,
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::error;
use crate::Gateway;

/// What is said of the parameters of paths.
const PATH_PARAMETERS: [(&str, &str, &str); 6] = [
    ("task", "Id of the task.", "task-123"),
    ("task_session", "Id of the session.", "session-task-123"),
    ("project", "The project: a namespace of the cluster.", "team-a"),
    (
        "session",
        "Name of the session.",
        "agentic-session-1700000000-0a1b2c3d4e5f",
    ),
    ("id", "Id of the command.", "review-1"),
    ("path", "Path below the workspace.", "src/main.rs"),
];

/// One method of one path.
pub struct Operation {
    name: &'static str,
    handler: MethodRouter<Arc<Gateway>>,
    fields: Map<String, Value>,
    describe: Vec<Describe>,
    refused: BTreeSet<u16>,
    refusal: Refusal,
}

/// Describes a refusal of a status, in the form that an API's errors have.
type Refusal = fn(&mut Map<String, Value>, &mut SchemaGenerator, u16);

/// The form of an API's errors.
pub trait ErrorForm: JsonSchema {
    /// A refusal of this status.
    fn example(code: u16) -> Value;
}

type Describe = Box<dyn FnOnce(&mut Map<String, Value>, &mut SchemaGenerator) + Send>;

macro_rules! methods {
    ($($(#[$doc:meta])* $function:ident $filter:ident),* $(,)?) => {
        $(
            $(#[$doc])*
            pub fn $function<H, T>(id: &str, summary: &str, handler: H) -> Operation
            where
                H: Handler<T, Arc<Gateway>>,
                T: 'static,
            {
                Operation::new(stringify!($function), id, summary, on(MethodFilter::$filter, handler))
            }
        )*
    };
}

methods! {
    /// An operation of this method.
    get GET,
    /// An operation of this method.
    post POST,
    /// An operation of this method.
    put PUT,
    /// An operation of this method.
    patch PATCH,
    /// An operation of this method.
    delete DELETE,
}

impl Operation {
    fn new(name: &'static str, id: &str, summary: &str, handler: MethodRouter<Arc<Gateway>>) -> Self {
        let fields = [
            ("operationId", json!(id)),
            ("summary", json!(summary)),
            ("parameters", json!([])),
            ("responses", json!({})),
        ];
        let fields = fields
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect();
        Self {
            name,
            handler,
            fields,
            describe: Vec::new(),
            refused: BTreeSet::new(),
            refusal: refusal::<error::Status>,
        }
    }

    fn with(mut self, describe: impl FnOnce(&mut Map<String, Value>, &mut SchemaGenerator) + Send + 'static) -> Self {
        self.describe.push(Box::new(describe));
        self
    }

    /// What the operation does, when a line does not say it.
    #[must_use]
    pub fn says(mut self, description: &str) -> Self {
        self.fields.insert("description".to_owned(), description.into());
        self
    }

    /// Needs no token.
    #[must_use]
    pub fn open(mut self) -> Self {
        self.fields.insert("security".to_owned(), json!([]));
        self
    }

    /// Takes the fields of `T` in its query.
    #[must_use]
    pub fn query<T: JsonSchema>(self) -> Self {
        self.with(|fields, generator| {
            let schema = generator.root_schema_for::<T>().to_value();
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                let mut property = property.clone();
                let description = property
                    .as_object_mut()
                    .and_then(|property| property.remove("description"));
                push(
                    fields,
                    json!({
                        "name": name, "in": "query", "required": required.contains(&json!(name)),
                        "description": description, "schema": property,
                    }),
                );
            }
        })
    }

    /// Takes a header.
    #[must_use]
    pub fn header(self, name: &'static str, description: &'static str, example: &'static str) -> Self {
        self.with(move |fields, _| {
            push(
                fields,
                json!({
                    "name": name, "in": "header", "required": false, "description": description,
                    "schema": {"type": "string"}, "example": example,
                }),
            );
        })
    }

    /// Takes a JSON body.
    #[must_use]
    pub fn body<T: JsonSchema>(self, required: bool, example: Value) -> Self {
        self.with(move |fields, generator| {
            let schema = generator.subschema_for::<T>();
            let content = json!({"application/json": {"schema": schema, "example": example}});
            fields.insert(
                "requestBody".to_owned(),
                json!({"required": required, "content": content}),
            );
        })
        .refuses(&[400, 408, 413])
    }

    /// Takes any bytes as its body.
    #[must_use]
    pub fn bytes(self) -> Self {
        self.with(|fields, _| {
            let content = json!({"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}});
            fields.insert("requestBody".to_owned(), json!({"required": true, "content": content}));
        })
        .refuses(&[400, 408, 413])
    }

    /// Answers with JSON.
    #[must_use]
    pub fn answers<T: JsonSchema>(self, code: u16, description: &'static str, example: Value) -> Self {
        self.with(move |fields, generator| {
            let schema = generator.subschema_for::<T>();
            let content = json!({"application/json": {"schema": schema, "example": example}});
            fields["responses"][code.to_string()] = json!({"description": description, "content": content});
        })
    }

    /// Its answer 200 may also be a stream of this media type.
    #[must_use]
    pub fn streams(self, media: &'static str) -> Self {
        self.with(move |fields, _| {
            fields["responses"]["200"]["content"][media] = json!({"schema": {"type": "string"}});
        })
    }

    /// Answers with something else than JSON, or with nothing when there is no media type.
    #[must_use]
    pub fn answers_with(self, code: u16, description: &'static str, media: &'static [&'static str]) -> Self {
        self.with(move |fields, _| {
            let mut answer = json!({"description": description});
            for media in media {
                // A schema of a stream is taken for that of each event.
                let is_stream = *media == "text/event-stream";
                answer["content"][*media] = if is_stream {
                    json!({})
                } else {
                    json!({"schema": {"type": "string"}})
                };
            }
            fields["responses"][code.to_string()] = answer;
        })
    }

    /// What its answer 200 of this media type looks like.
    #[must_use]
    pub fn looks(self, media: &'static str, example: Value) -> Self {
        self.with(move |fields, _| {
            fields["responses"]["200"]["content"][media]["example"] = example;
        })
    }

    /// Answers with an error, for these reasons among others.
    #[must_use]
    pub fn refuses(mut self, codes: &[u16]) -> Self {
        self.refused.extend(codes);
        self
    }

    /// Its errors have another form than that of the Kubernetes API.
    #[must_use]
    pub fn errors<E: ErrorForm>(mut self) -> Self {
        self.refusal = refusal::<E>;
        self
    }
}

fn push(fields: &mut Map<String, Value>, parameter: Value) {
    if let Some(parameters) = fields.get_mut("parameters").and_then(Value::as_array_mut) {
        parameters.push(parameter);
    }
}

fn refusal<E: ErrorForm>(fields: &mut Map<String, Value>, generator: &mut SchemaGenerator, code: u16) {
    let schema = generator.subschema_for::<E>();
    let content = json!({"application/json": {"schema": schema, "example": E::example(code)}});
    fields["responses"][code.to_string()] = json!({"description": error::meaning(code), "content": content});
}

/// Routes, and the document of them.
pub struct Api {
    router: Router<Arc<Gateway>>,
    generator: SchemaGenerator,
    paths: BTreeMap<String, Value>,
}

impl Default for Api {
    fn default() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Self {
            router: Router::new(),
            generator: settings.into_generator(),
            paths: BTreeMap::new(),
        }
    }
}

impl Api {
    /// Adds a path with its methods.
    #[must_use]
    pub fn route<const N: usize>(mut self, path: &str, operations: [Operation; N]) -> Self {
        let mut methods = Map::new();
        let mut handlers = MethodRouter::new();
        for operation in operations {
            let Operation {
                name,
                handler,
                mut fields,
                describe,
                mut refused,
                refusal,
            } = operation;
            path_parameters(path, &mut fields);
            for describe in describe {
                describe(&mut fields, &mut self.generator);
            }
            if !fields.contains_key("security") {
                refused.extend([401, 403, 404, 429, 503]);
            }
            for code in refused {
                refusal(&mut fields, &mut self.generator, code);
            }
            handlers = handlers.merge(handler);
            methods.insert(name.to_owned(), Value::Object(fields));
        }
        self.router = self.router.route(path, handlers);
        self.paths.insert(path.replace("{*", "{"), Value::Object(methods));
        self
    }

    /// The routes and the document.
    pub fn finish(mut self) -> (Router<Arc<Gateway>>, Value) {
        let mut schemas = self.generator.take_definitions(true);
        let document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Agentic gateway",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "Agentic sessions: create them, follow their events, speak with their agents.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            // Wherever it was served.
            "servers": [{"url": "/", "description": "This gateway"}],
            "security": [{"kubernetes": []}, {"apiKey": []}],
            "paths": self.paths,
            "components": {
                "schemas": std::mem::take(&mut schemas),
                "securitySchemes": {
                    "apiKey": {
                        "type": "apiKey", "in": "header", "name": "X-API-Key",
                        "description": "A key of this gateway, for one namespace.",
                    },
                    "kubernetes": {
                        "type": "http", "scheme": "bearer",
                        "description": "A Kubernetes token, such as that of `kubectl create token <service account>`.",
                    },
                },
            },
        });
        (self.router, document)
    }
}

fn path_parameters(path: &str, fields: &mut Map<String, Value>) {
    for segment in path.split('/') {
        let Some(name) = segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) else {
            continue;
        };
        let name = name.trim_start_matches('*');
        let said = PATH_PARAMETERS.iter().find(|(known, ..)| *known == name);
        let (_, description, example) = said.copied().unwrap_or((name, name, name));
        push(
            fields,
            json!({
                "name": name, "in": "path", "required": true, "description": description,
                "schema": {"type": "string"}, "example": example,
            }),
        );
    }
}
