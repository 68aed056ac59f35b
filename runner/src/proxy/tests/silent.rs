//! A model API that says nothing.

use super::*;

/// More of them than there are places.
#[tokio::test]
async fn calls_that_the_api_does_not_answer_are_given_up_and_leave_their_places() {
    let places = crate::limits::MAX_IN_FLIGHT;
    let mut rig = Rig::new(move |number| async move {
        if number <= places {
            std::future::pending::<()>().await;
        }
        fine()
    })
    .await;
    let patient = |rig: &Rig| {
        rig.request("POST", "/v1/messages")
            .timeout(Duration::from_hours(1))
            .body(r#"{"model":"claude-opus-5-5","max_tokens":100}"#)
    };
    let calls: Vec<_> = (0..=places).map(|_| tokio::spawn(patient(&rig).send())).collect();
    let asked = async |number| {
        while rig.asked().len() < number {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asked(places)).await.unwrap();
    tokio::time::sleep(MOMENT).await;
    assert_eq!(rig.asked().len(), places, "the last one waits for a place");
    tokio::time::pause();
    tokio::time::advance(client::SILENCE + Duration::from_secs(1)).await;
    tokio::time::resume();
    tokio::time::timeout(DEADLINE, asked(places + 1))
        .await
        .expect("the last one has a place");
    for _ in 0..places {
        let Metered { body, durable } = rig.event().await;
        assert!(body.estimated && durable.is_none());
        assert_eq!(body.usage.output_tokens, 100, "the API may have made the answer");
    }
    rig.records().await;
    let mut statuses = Vec::new();
    for call in calls {
        let answer = call.await.unwrap().unwrap();
        statuses.push(answer.status().as_u16());
        let body = answer.text().await.unwrap();
        assert!(
            statuses.last() == Some(&200) || body.contains("timeout_error"),
            "{body}"
        );
    }
    statuses.sort_unstable();
    assert_eq!((statuses[0], statuses[1], statuses[places]), (200, 504, 504));
}

#[tokio::test]
async fn a_stream_that_says_nothing_more_is_cut_and_metered() {
    let mut rig = Rig::new(|_| async { sse(hanging(START)) }).await;
    let call = rig.call().timeout(Duration::from_hours(1));
    let opened = async {
        let mut answer = call.send().await.unwrap();
        while let Ok(Some(_)) = answer.chunk().await {}
    };
    let told = async {
        let opening = rig.event().await;
        let _ = opening.durable.unwrap().send(());
        tokio::time::sleep(MOMENT).await;
        tokio::time::pause();
        tokio::time::advance(client::SILENCE + Duration::from_secs(1)).await;
        tokio::time::resume();
        rig.event().await.body
    };
    let ((), closing) = tokio::time::timeout(Duration::from_hours(2), async { tokio::join!(opened, told) })
        .await
        .unwrap();
    assert!(!closing.open && closing.estimated);
    assert_eq!(closing.usage.input_tokens, 25);
    assert_eq!(rig.proxy.witness().last_status, Some(Witness::UNREACHABLE));
}
