//! Answers that are streamed: passed on unchanged, metered, and ended.

use super::*;

#[tokio::test]
async fn a_stream_passes_byte_for_byte_and_is_metered_wherever_it_is_cut_into_pieces() {
    let length = streamed().len();
    let mut rig = Rig::new(move |number| async move {
        let whole = streamed().into_bytes();
        let (a, b) = whole.split_at(number.min(whole.len()));
        sse(pieces(vec![a.to_vec(), b.to_vec()]))
    })
    .await;
    for cut in 1..length {
        let answer = rig.call().send();
        let (answer, (opening, closing)) = tokio::join!(async { answer.await.unwrap().text().await }, rig.records());
        assert_eq!(answer.unwrap(), streamed(), "cut at {cut}");
        assert!(opening.open && !closing.open && !closing.estimated);
        assert_eq!((opening.usage.input_tokens, opening.usage.output_tokens), (25, 1));
        assert_eq!(
            (closing.usage.total(), closing.cost_usd),
            (1115, Some(NanoUsd(2_100_000)))
        );
        assert!(closing.first_token_at.is_some() && closing.ended_at.is_some());
    }
    assert_eq!(rig.proxy.witness().last_status, Some(200));
}

#[tokio::test]
async fn nothing_behind_the_start_flows_before_the_opening_record_is_on_disk() {
    let mut rig = Rig::new(|_| async { fine() }).await;
    let mut answer = rig.call().send().await.unwrap();
    assert_eq!(answer.chunk().await.unwrap().unwrap(), START);
    let opening = rig.event().await;
    let early = tokio::time::timeout(MOMENT, answer.chunk()).await;
    assert!(
        early.is_err(),
        "more of the response came before the record was on disk"
    );
    opening.durable.unwrap().send(()).unwrap();
    assert_eq!(answer.text().await.unwrap(), REST);
}

#[tokio::test]
async fn a_response_that_cannot_be_recorded_is_cut() {
    let mut rig = Rig::new(|_| async { fine() }).await;
    let answer = rig.call().send().await.unwrap();
    drop(rig.event().await.durable);
    assert!(answer.text().await.is_err());
    assert!(rig.event().await.body.estimated);
}

#[tokio::test]
async fn the_closing_record_is_told_before_the_agent_sees_the_end() {
    let mut rig = Rig::new(|_| async { fine() }).await;
    let answer = rig.call().send().await.unwrap();
    rig.event().await.durable.unwrap().send(()).unwrap();
    assert!(answer.text().await.unwrap().ends_with(REST));
    assert!(!rig.events.try_recv().unwrap().body.open);
}

#[tokio::test]
async fn an_error_inside_a_stream_is_witnessed() {
    let rig = Rig::new(|_| async {
        sse("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n".into())
    })
    .await;
    rig.call().send().await.unwrap().text().await.unwrap();
    assert_eq!(rig.proxy.witness().last_status, Some(529));
}

#[tokio::test]
async fn a_stream_that_breaks_is_closed_with_an_estimate_and_breaks_for_the_agent_too() {
    let broken = Arc::new(tokio::sync::Notify::new());
    let breaks = Arc::clone(&broken);
    let mut rig = Rig::new(move |_| {
        let breaks = Arc::clone(&breaks);
        let first = Ok(Bytes::from(streamed()[..START.len() + 200].to_owned()));
        let then = stream::once(async move {
            breaks.notified().await;
            Err("cut")
        });
        async { sse(AxumBody::from_stream(stream::iter([first]).chain(then))) }
    })
    .await;
    let mut answer = rig.call().send().await.unwrap();
    rig.event().await.durable.unwrap().send(()).unwrap();
    answer.chunk().await.unwrap();
    broken.notify_one();
    let closing = rig.event().await.body;
    assert!(closing.estimated && closing.usage.output_tokens > 1);
    assert!(answer.text().await.is_err());
    rig.proxy.settled().await;
    assert_eq!(rig.proxy.witness().last_status, Some(Witness::UNREACHABLE));
}

#[tokio::test]
async fn a_stream_that_ends_early_but_properly_does_so_for_the_agent_too() {
    let mut rig = Rig::new(|_| async { sse(START.into()) }).await;
    let answer = rig.call().send();
    let (text, (_, closing)) = tokio::join!(async { answer.await.unwrap().text().await }, rig.records());
    assert_eq!(text.unwrap(), START);
    assert!(closing.estimated);
    rig.proxy.settled().await;
    assert_eq!(rig.proxy.witness().last_status, Some(Witness::UNREACHABLE));
}

#[tokio::test]
async fn an_agent_that_hangs_up_ends_the_call_upstream() {
    let mut rig = Rig::new(|_| async { sse(hanging(START)) }).await;
    let mut answer = rig.call().send().await.unwrap();
    answer.chunk().await.unwrap();
    rig.event().await.durable.unwrap().send(()).unwrap();
    drop(answer);
    let closing = rig.event().await.body;
    assert!(closing.estimated && !closing.open);
}

#[tokio::test]
async fn a_stream_that_the_agent_gives_up_behind_its_head_has_cost_its_prompt() {
    let mut rig = Rig::new(|_| async { sse(hanging(": ping\n\n")) }).await;
    let mut answer = rig.call().send().await.unwrap();
    answer.chunk().await.unwrap();
    drop(answer);
    let closing = rig.event().await.body;
    assert!(closing.estimated && !closing.open && closing.usage.input_tokens > 0);
}

/// Hangs up when the API has been asked.
async fn hung_up(rig: &Rig, call: reqwest::RequestBuilder) {
    let asked = async {
        while rig.asked().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        answer = call.send() => panic!("{answer:?}"),
        asked = tokio::time::timeout(DEADLINE, asked) => asked.unwrap(),
    }
}

#[tokio::test]
async fn a_stream_that_the_agent_gives_up_before_it_begins_has_cost_its_prompt() {
    let mut rig = Rig::new(|_| std::future::pending()).await;
    let body = format!(
        r#"{{"model":"claude-opus-5-5","max_tokens":100,"stream":true,"x":"{}"}}"#,
        "x".repeat(3_000)
    );
    hung_up(&rig, rig.call().body(body)).await;
    let closing = rig.event().await.body;
    assert!(closing.estimated && !closing.open);
    assert!((1_000..1_100).contains(&closing.usage.input_tokens) && closing.usage.output_tokens == 0);
    assert!(closing.cost_usd.unwrap() >= NanoUsd(1_000 * 4_000));
}

#[tokio::test]
async fn an_answer_that_does_not_stream_is_metered_though_its_agent_has_hung_up() {
    let answer = Arc::new(tokio::sync::Notify::new());
    let may = Arc::clone(&answer);
    let body = r#"{"id":"msg_9","model":"unknown","content":[],"usage":{"input_tokens":3,"output_tokens":4}}"#;
    let mut rig = Rig::new(move |_| {
        let may = Arc::clone(&may);
        async move {
            may.notified().await;
            ([("content-type", "application/json")], body).into_response()
        }
    })
    .await;
    let call = rig.call().body(r#"{"model":"claude-opus-5-5","max_tokens":60000}"#);
    hung_up(&rig, call).await;
    answer.notify_one();
    let (_, closing) = rig.records().await;
    assert_eq!((closing.usage.total(), closing.estimated), (7, false));
}

#[tokio::test]
async fn an_answer_that_does_not_stream_and_is_cut_has_cost_what_it_may() {
    let mut rig = Rig::new(|_| std::future::pending()).await;
    let call = rig.call().body(r#"{"model":"claude-opus-5-5","max_tokens":60000}"#);
    hung_up(&rig, call).await;
    rig.proxy.cut();
    let closing = rig.event().await.body;
    assert!(
        closing.estimated && closing.usage.output_tokens == 60_000,
        "{closing:?}"
    );
}

#[tokio::test]
async fn a_cut_ends_what_hangs_and_what_is_asked_afterwards() {
    let mut rig = Rig::new(|_| async { sse(hanging(START)) }).await;
    let mut answer = rig.call().send().await.unwrap();
    answer.chunk().await.unwrap();
    rig.event().await.durable.unwrap().send(()).unwrap();
    rig.proxy.cut();
    tokio::time::timeout(DEADLINE, rig.proxy.settled()).await.unwrap();
    assert!(rig.events.try_recv().unwrap().body.estimated);
    assert!(answer.chunk().await.is_err());
    assert_eq!(rig.call().send().await.unwrap().status(), 503);
    assert_eq!(rig.asked().len(), 1);
}

#[tokio::test]
async fn a_cut_ends_a_call_that_was_never_answered() {
    let rig = Rig::new(|_| std::future::pending()).await;
    let cut = async {
        while rig.asked().is_empty() {
            tokio::task::yield_now().await;
        }
        rig.proxy.cut();
    };
    let (answer, ()) = tokio::join!(rig.call().send(), cut);
    assert_eq!(answer.unwrap().status(), 503);
    tokio::time::timeout(DEADLINE, rig.proxy.settled()).await.unwrap();
}

fn packed(text: &str) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    gzip.finish().unwrap()
}

#[tokio::test]
async fn a_compressed_stream_that_unpacks_to_very_much_is_metered_to_its_end() {
    let much = ": nothing\n".repeat(1 << 20);
    let bytes = packed(&format!("{START}{much}{REST}"));
    let length = bytes.len();
    let mut rig = Rig::new(move |_| {
        let mut response = sse(bytes.clone().into());
        response
            .headers_mut()
            .insert("content-encoding", "gzip".parse().unwrap());
        async { response }
    })
    .await;
    let call = rig.call();
    let answer = async {
        let mut answer = call.send().await.unwrap();
        let mut passed = 0;
        while let Ok(Some(piece)) = answer.chunk().await {
            passed += piece.len();
        }
        passed
    };
    let (passed, (opening, closing)) = tokio::join!(answer, rig.records());
    assert!(passed == length || passed > much.len(), "{passed} of {length}");
    assert_eq!((opening.usage.output_tokens, closing.usage.output_tokens), (1, 90));
}

#[tokio::test]
async fn a_compressed_stream_is_passed_on_and_metered_all_the_same() {
    let mut rig = Rig::new(|_| async {
        let bytes = packed(&streamed());
        let mut response = sse(pieces(bytes.chunks(7).map(<[u8]>::to_vec).collect()));
        response
            .headers_mut()
            .insert("content-encoding", "gzip".parse().unwrap());
        response
    })
    .await;
    let call = rig.call().header("accept-encoding", "gzip");
    let answer = async { call.send().await.unwrap().bytes().await.unwrap() };
    let (bytes, (_, closing)) = tokio::join!(answer, rig.records());
    let mut text = String::new();
    // The test's client decodes by itself when it is built with gzip.
    if std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut text).is_err() {
        text = String::from_utf8(bytes.to_vec()).unwrap();
    }
    assert_eq!(text, streamed());
    assert_eq!(closing.usage.output_tokens, 90);
}

#[tokio::test]
async fn an_encoding_that_cannot_be_metered_is_refused_and_has_cost_its_prompt() {
    let mut rig = Rig::new(|_| async {
        let mut response = fine();
        response.headers_mut().insert("content-encoding", "br".parse().unwrap());
        response
    })
    .await;
    assert_eq!(rig.call().send().await.unwrap().status(), 502);
    let closing = rig.event().await.body;
    assert!(
        closing.estimated && !closing.open && closing.usage.input_tokens > 0,
        "{closing:?}"
    );
}
