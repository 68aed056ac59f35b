//! Whoever reads a session's events, whenever they come, reads the same.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use reqwest::Method;
use serde_json::json;

use crate::harness::client::Gateway;
use crate::harness::scene::marker;
use crate::harness::sse::{Event, records, to_the_close};
use crate::harness::{Keys, scene};

/// All records of the session from the gateway, after checking that their numbers have no gap.
pub async fn complete_log(gateway: &Gateway, name: &str) -> Result<Vec<Event>> {
    let response = gateway.request(Method::GET, &format!("/{name}/events")).send().await?;
    let events = to_the_close(response).await?;
    let found = records(&events);
    without_gap(&found)?;
    ensure!(
        !found.iter().any(|record| record.kind == "gap"),
        "the log says itself that it has a gap"
    );
    let close = events.last().context("no close")?.json()?;
    ensure!(
        close["lastSeq"].as_u64() == found.last().and_then(Event::seq),
        "the close names the last record: {close}"
    );
    Ok(found)
}

fn without_gap(records: &[Event]) -> Result<()> {
    let numbers: Vec<_> = records.iter().map(Event::seq).collect();
    let expected: Vec<_> = (1..=records.len() as u64).map(Some).collect();
    ensure!(
        !numbers.is_empty() && numbers == expected,
        "the numbers have a gap: {numbers:?}"
    );
    for record in records {
        ensure!(
            record.json()?["seq"].as_u64() == record.seq(),
            "the id is not the record's own number: {record:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_client_from_the_start_and_one_after_the_end_read_the_same_records() -> Result<()> {
    scene("events", Keys::Good, async |scene| {
        let (gateway, marker) = (Gateway::reach(scene).await?, marker());
        let steps = json!([
            { "thinking": "What is there?", "text": "I look.", "chunk_ms": 20, "chunk_chars": 2,
              "tools": [{ "name": "Bash", "input": { "command": "seq 1 200" } }] },
            { "text": "Two hundred lines.", "chunk_ms": 20, "chunk_chars": 2 },
        ]);
        scene.create("watched", &marker, &steps).await?;
        let live = gateway.request(Method::GET, "/watched/events").send().await?;
        let live = tokio::spawn(to_the_close(live));
        scene.phase("watched", Phase::Completed).await?;
        let late = complete_log(&gateway, "watched").await?;
        let all = live.await??;
        ensure!(
            records(&all) == late,
            "the client from the start read {:#?}\nthe late one {late:#?}",
            records(&all)
        );

        let uid = scene.uid("watched").await?;
        ensure!(
            late.iter()
                .all(|record| record.id.as_ref().is_some_and(|id| id.starts_with(&format!("{uid}/"))))
        );
        for kind in ["session", "user", "cli", "usage", "end"] {
            ensure!(
                late.iter().any(|record| record.kind == kind),
                "no record of kind {kind}"
            );
        }
        ensure!(
            late.last().is_some_and(|record| record.kind == "end"),
            "the last record closes the attempt"
        );
        ensure!(
            all.iter().any(|event| event.kind == "delta"),
            "the live client saw the text grow"
        );
        let phases: Vec<_> = all.iter().filter(|event| event.kind == "phase").collect();
        ensure!(
            phases.last().is_some_and(|phase| phase.data.contains("Completed")),
            "{phases:?}"
        );

        let status = scene.status("watched").await?;
        ensure!(
            status.last_seq == status.acked_seq && status.last_seq == late.last().and_then(Event::seq),
            "{status:#?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_client_that_comes_back_goes_on_where_it_was() -> Result<()> {
    scene("comeback", Keys::Good, async |scene| {
        let gateway = Gateway::reach(scene).await?;
        scene.create("left", &marker(), &json!([{ "text": "Said." }])).await?;
        scene.phase("left", Phase::Completed).await?;
        let all = complete_log(&gateway, "left").await?;
        let half = all.len() / 2;
        let last = all[half].id.clone().context("a record without id")?;
        let request = gateway
            .request(Method::GET, "/left/events")
            .header("last-event-id", last);
        let rest = records(&to_the_close(request.send().await?).await?);
        ensure!(rest == all[half + 1..], "{rest:#?}");
        let foreign = gateway
            .request(Method::GET, "/left/events")
            .header("last-event-id", "another-session/7");
        let again = records(&to_the_close(foreign.send().await?).await?);
        ensure!(again == all, "the id of another session means from the start");
        Ok(())
    })
    .await
}
