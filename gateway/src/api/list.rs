//! The sessions of a project, in pages.

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use crds::Phase;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use tokio::time::timeout;

use super::{
    ApiError, List, OfProject,
    messages::wrong_query,
    openapi::{self, Operation},
    projects::example,
};
use crate::{Gateway, catalog::Wanted};

/// Sessions of a page, when the client does not say.
const DEFAULT_LIMIT: usize = 100;
/// Sessions of a page at most.
const MAX_LIMIT: usize = 500;
/// How long a gateway that has just started may take to learn of all sessions.
const SYNCED_WITHIN: Duration = Duration::from_secs(10);

/// Which sessions.
#[derive(Deserialize, JsonSchema)]
struct Page {
    /// Sessions at most, 1 to 500; 100 when absent.
    #[schemars(range(min = 1, max = 500))]
    limit: Option<usize>,
    /// Sessions to pass over. Pages by offset shift when sessions come and go; those by cursor do not.
    offset: Option<usize>,
    /// `nextCursor` of the page before.
    cursor: Option<String>,
    /// Part of the name, the display name or the beginning of the prompt, in any case.
    search: Option<String>,
    /// Only sessions in this phase; several are separated by commas.
    phase: Option<String>,
}

/// Sessions of a project, newest first.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct SessionList {
    /// The sessions; texts of more than 256 characters are cut: get the session for all of it.
    #[schemars(with = "Vec<crds::AgenticSession>")]
    items: Vec<Arc<RawValue>>,
    /// How many sessions there are in all pages; with a cursor: in those behind it.
    total_count: usize,
    /// Sessions of a page at most.
    limit: usize,
    /// Sessions passed over.
    offset: usize,
    /// Whether there is another page.
    has_more: bool,
    /// `offset` of the next page.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_offset: Option<usize>,
    /// `cursor` of the next page.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// The operation.
pub(super) fn list() -> Operation {
    openapi::get("listSessions", "The sessions of a project, newest first", page)
        .query::<Page>()
        .answers::<SessionList>(
            200,
            "The sessions",
            json!({"items": [example()], "totalCount": 1, "limit": 100, "offset": 0, "hasMore": false}),
        )
        .refuses(&[400])
}

async fn page(
    State(gateway): State<Arc<Gateway>>,
    OfProject { project, .. }: OfProject<List>,
    query: Result<Query<Page>, QueryRejection>,
) -> Result<Json<SessionList>, ApiError> {
    let Query(Page {
        limit,
        offset,
        cursor,
        search,
        phase,
    }) = query.map_err(wrong_query)?;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::bad_request(format!("limit must be 1 to {MAX_LIMIT}")));
    }
    let offset = offset.unwrap_or_default();
    let wanted = Wanted {
        search: search.filter(|search| !search.is_empty()),
        phases: phases(phase.as_deref().unwrap_or_default())?,
        after: cursor.as_deref().map(key).transpose()?,
    };
    synced(&gateway).await?;
    let found = gateway.watched.listed(&project, &wanted);
    let items: Vec<_> = found.iter().skip(offset).take(limit).collect();
    let end = offset.saturating_add(items.len());
    let has_more = end < found.len();
    let next_cursor = items.last().filter(|_| has_more);
    Ok(Json(SessionList {
        next_cursor: next_cursor.map(|entry| format!("{}/{}", entry.key.0, entry.key.1)),
        next_offset: has_more.then_some(end),
        items: items.into_iter().map(|entry| entry.item.clone()).collect(),
        total_count: found.len(),
        limit,
        offset,
        has_more,
    }))
}

/// Waits until all sessions are known, but not for ever.
pub(super) async fn synced(gateway: &Gateway) -> Result<(), ApiError> {
    let synced = timeout(SYNCED_WITHIN, gateway.watched.synced()).await;
    synced.map_err(|_| {
        ApiError::unavailable("the gateway has just started and does not know the sessions yet: try again")
    })
}

fn phases(text: &str) -> Result<HashSet<Phase>, ApiError> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| {
            serde_json::from_value(name.into()).map_err(|_| {
                ApiError::bad_request(format!(
                    "{name:?} is no phase: they are Pending, Creating, Running, Stopping, Completed, Failed and Stopped"
                ))
            })
        })
        .collect()
}

fn key(cursor: &str) -> Result<(String, String), ApiError> {
    let (created, name) = cursor.split_once('/').ok_or_else(|| {
        ApiError::bad_request(format!(
            "{cursor:?} is no cursor: send the `nextCursor` of the page before"
        ))
    })?;
    Ok((created.to_owned(), name.to_owned()))
}
