//! Writes whose answer is the written object: of that its version alone is asked for and read. The rest is what was sent.

use http::{
    HeaderValue,
    header::{ACCEPT, CONTENT_TYPE},
};
use k8s_openapi::NamespaceResourceScope;
use kube::{
    Client, Resource,
    api::{Patch, PatchParams, PostParams, Request},
};
use serde::{Deserialize, Serialize};

/// Metadata, where the API server can; else the whole.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";

#[derive(Deserialize)]
struct Written {
    metadata: Version,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    #[serde(default)]
    resource_version: String,
}

/// Creates an object; answers its version.
pub async fn create<K>(client: &Client, namespace: &str, object: &K) -> kube::Result<String>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Serialize,
{
    let body = serde_json::to_vec(object).map_err(kube::Error::SerdeError)?;
    let request = Request::new(K::url_path(&(), Some(namespace))).create(&PostParams::default(), body);
    send(client, request).await
}

/// Changes the status of an object; answers the version that it then has.
pub async fn patch_status<K>(
    client: &Client,
    namespace: &str,
    name: &str,
    params: &PatchParams,
    patch: &Patch<impl Serialize>,
) -> kube::Result<String>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    let request = Request::new(K::url_path(&(), Some(namespace))).patch_subresource("status", name, params, patch);
    send(client, request).await
}

/// Changes an object by operations that are all done or none (RFC 6902).
pub async fn patch_json<K>(
    client: &Client,
    namespace: &str,
    name: &str,
    operations: &serde_json::Value,
) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    let request = http::Request::patch(format!("{}/{name}", K::url_path(&(), Some(namespace))))
        .header(CONTENT_TYPE, "application/json-patch+json")
        .body(operations.to_string().into_bytes())
        .map_err(kube::core::request::Error::BuildRequest);
    send(client, request).await.map(drop)
}

async fn send(
    client: &Client,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> kube::Result<String> {
    let mut request = request.map_err(kube::Error::BuildRequest)?;
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static(METADATA));
    let written: Written = client.request(request).await?;
    Ok(written.metadata.resource_version)
}
