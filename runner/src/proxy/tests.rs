//! The proxy between a client on loopback and a model API made for each test.

use std::{
    convert::Infallible,
    io::Write as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body as AxumBody,
    extract::Request,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{HeaderMap, StatusCode};
use protocol::{NanoUsd, record::UsageBody};
use rstest::rstest;
use tokio::{net::TcpListener, sync::mpsc};

use super::*;

mod credentials;
mod silent;
mod streamed;
mod tools;

const TOKEN: &str = "per-run-token";
const KEY: &str = "sk-ant-fake-upstream";
const DEADLINE: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to happen.
const MOMENT: Duration = Duration::from_millis(80);

const START: &str = concat!(
    "event: message_start\n",
    r#"data: {"type":"message_start","message":{"id":"msg_1","model":"claude-opus-5-5","usage":{"input_tokens":25,"cache_read_input_tokens":1000,"output_tokens":1}}}"#,
    "\n\n",
);
const REST: &str = concat!(
    "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0}\n\n",
    "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"héllo\"}}\n\n",
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":90}}\n\n",
    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
);

fn streamed() -> String {
    format!("{START}{REST}")
}

fn sse(body: AxumBody) -> Response {
    ([("content-type", "text/event-stream")], body).into_response()
}

fn pieces(parts: Vec<Vec<u8>>) -> AxumBody {
    AxumBody::from_stream(stream::iter(
        parts.into_iter().map(|part| Ok::<_, Infallible>(Bytes::from(part))),
    ))
}

/// A body that never ends.
fn hanging(beginning: &'static str) -> AxumBody {
    let first = stream::once(async move { Ok::<_, Infallible>(Bytes::from(beginning)) });
    AxumBody::from_stream(first.chain(stream::pending()))
}

/// What the model API was asked: request lines and headers.
type Asked = Arc<Mutex<Vec<(String, HeaderMap)>>>;

struct Rig {
    proxy: Proxy,
    events: mpsc::Receiver<Metered>,
    asked: Asked,
}

impl Rig {
    async fn new<F, R>(answer: F) -> Self
    where
        F: Fn(usize) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response> + Send,
    {
        let asked = Asked::default();
        let seen = Arc::clone(&asked);
        let app = Router::new().fallback(move |request: Request| {
            let (seen, answer) = (Arc::clone(&seen), answer.clone());
            async move {
                let number = {
                    let mut seen = seen.lock().unwrap();
                    seen.push((
                        format!("{} {}", request.method(), request.uri()),
                        request.headers().clone(),
                    ));
                    seen.len()
                };
                answer(number).await
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/base", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let mut rig = Self::towards(base_url).await;
        rig.asked = asked;
        rig
    }

    /// Towards an API that answers with the status that a request's credential has.
    async fn guarded(guard: fn(&str) -> u16, credential: Credential, vertex: Option<Vertex>) -> Self {
        let asked = Asked::default();
        let seen = Arc::clone(&asked);
        let app = Router::new().fallback(move |request: Request| {
            let seen = Arc::clone(&seen);
            async move {
                let headers = request.headers().clone();
                let shown = headers.get("x-api-key").or_else(|| headers.get("authorization"));
                let status = guard(shown.map(|shown| shown.to_str().unwrap()).unwrap_or_default());
                seen.lock()
                    .unwrap()
                    .push((format!("{} {}", request.method(), request.uri()), headers));
                match status {
                    200 => fine(),
                    status => (StatusCode::from_u16(status).unwrap(), "no").into_response(),
                }
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/base", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let mut rig = Self::with(base_url, credential, vertex).await;
        rig.asked = asked;
        rig
    }

    async fn towards(base_url: String) -> Self {
        Self::with(base_url, Credential::ApiKey(KEY.into()), None).await
    }

    async fn with(base_url: String, credential: Credential, vertex: Option<Vertex>) -> Self {
        let (sender, events) = mpsc::channel(16);
        let upstream = Upstream {
            base_url,
            credential,
            vertex,
            authorities: None,
        };
        let config = ProxyConfig {
            upstream,
            token: TOKEN.into(),
            prices: Prices::default(),
            mcp: Servers::default(),
        };
        Self {
            proxy: Proxy::start(config, sender).await.unwrap(),
            events,
            asked: Asked::default(),
        }
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()
            .unwrap()
            .request(method.parse().unwrap(), format!("http://{}{path}", self.proxy.addr()))
            .header("x-api-key", TOKEN)
            .timeout(DEADLINE)
    }

    fn call(&self) -> reqwest::RequestBuilder {
        self.request("POST", "/v1/messages?beta=true")
            .body(r#"{"model":"claude-opus-5-5","max_tokens":100,"stream":true}"#)
    }

    async fn event(&mut self) -> Metered {
        tokio::time::timeout(DEADLINE, self.events.recv())
            .await
            .unwrap()
            .unwrap()
    }

    /// The opening, answered at once, and the closing.
    async fn records(&mut self) -> (UsageBody, UsageBody) {
        let opening = self.event().await;
        let _ = opening.durable.unwrap().send(());
        (opening.body, self.event().await.body)
    }

    fn asked(&self) -> Vec<(String, HeaderMap)> {
        self.asked.lock().unwrap().clone()
    }
}

fn fine() -> Response {
    sse(streamed().into())
}

#[tokio::test]
async fn the_api_sees_the_real_key_and_never_the_agents() {
    let mut rig = Rig::new(|_| async { fine() }).await;
    let call = rig
        .call()
        .header("authorization", "Bearer of-the-agent")
        .header("anthropic-beta", "a,b")
        .header("accept-encoding", "gzip");
    let _ = tokio::join!(async { call.send().await.unwrap().text().await }, rig.records());
    let (line, headers) = &rig.asked()[0];
    assert_eq!(line, "POST /base/v1/messages?beta=true");
    assert_eq!(headers["x-api-key"], KEY);
    assert_eq!(
        (&headers["anthropic-beta"], &headers["accept-encoding"]),
        (&"a,b".parse().unwrap(), &"identity".parse().unwrap())
    );
    assert!(!headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_bearer_credential_is_sent_as_one() {
    let used = credential::Authorization::bearer("fake-bearer".into()).unwrap();
    let (name, value) = (used.name, used.value);
    assert_eq!(
        (name.as_str(), value.to_str().unwrap()),
        ("authorization", "Bearer fake-bearer")
    );
    assert!(!format!("{value:?}").contains("fake"));
    assert!(credential::Authorization::key("two\nlines".into()).is_err());
}

#[rstest]
#[case::no_token("POST", "/v1/messages", "", 401)]
#[case::another_token("POST", "/v1/messages", "per-run-tokeN", 401)]
#[case::the_upstream_key("POST", "/v1/messages", KEY, 401)]
#[case::another_path("GET", "/v1/files", TOKEN, 404)]
#[case::root("GET", "/", TOKEN, 404)]
#[tokio::test]
async fn what_is_not_allowed_never_reaches_the_api(
    #[case] method: &str,
    #[case] path: &str,
    #[case] token: &str,
    #[case] status: u16,
) {
    let rig = Rig::new(|_| async { fine() }).await;
    let request = rig.request(method, path).header("x-api-key", token);
    let mut request = request.build().unwrap();
    request.headers_mut().insert("x-api-key", token.parse().unwrap());
    let answer = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .unwrap()
        .execute(request)
        .await
        .unwrap();
    assert_eq!(answer.status(), status);
    let body: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(body["type"], "error");
    assert!(rig.asked().is_empty());
    assert_eq!(rig.proxy.witness(), Witness::default());
}

#[tokio::test]
async fn the_token_is_taken_as_bearer_too() {
    let rig = Rig::new(|_| async { "[]".into_response() }).await;
    let mut request = rig
        .request("GET", "/v1/models?limit=1")
        .bearer_auth(TOKEN)
        .build()
        .unwrap();
    request.headers_mut().remove("x-api-key");
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .unwrap();
    assert_eq!(client.execute(request).await.unwrap().text().await.unwrap(), "[]");
    assert_eq!(rig.asked()[0].0, "GET /base/v1/models?limit=1");
}

#[rstest]
#[case(401)]
#[case(403)]
#[tokio::test]
async fn after_a_refused_credential_nothing_more_is_forwarded(#[case] status: u16) {
    let rig = Rig::new(move |_| async move {
        let body = format!(r#"{{"type":"error","error":{{"type":"x","message":"bad key {KEY}"}}}}"#);
        (StatusCode::from_u16(status).unwrap(), body).into_response()
    })
    .await;
    for _ in 0..3 {
        let answer = rig.call().send().await.unwrap();
        assert_eq!(answer.status(), status);
        let body = answer.text().await.unwrap();
        assert!(body.contains("bad key [redacted]") && !body.contains(KEY), "{body}");
    }
    assert_eq!(rig.asked().len(), 1);
    let expected = Witness {
        last_status: Some(status),
        retry_after: None,
        credential_refused: true,
    };
    assert_eq!(rig.proxy.witness(), expected);
}

#[rstest]
#[case::packed(true)]
#[case::with_a_byte_that_is_no_text(false)]
#[tokio::test]
async fn the_key_is_taken_out_of_a_refusal_however_it_is_written(#[case] packed: bool) {
    let rig = Rig::new(move |_| async move {
        let behind: &[u8] = if packed { b"" } else { b"\xff" };
        let text = [b"bad key ", KEY.as_bytes(), behind].concat();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let (encoding, body) = if packed {
            ("gzip", gzip.finish().unwrap())
        } else {
            ("identity", text)
        };
        (StatusCode::BAD_REQUEST, [("content-encoding", encoding)], body).into_response()
    })
    .await;
    let answer = rig.call().send().await.unwrap();
    assert!(!answer.headers().contains_key("content-encoding"));
    let body = answer.text().await.unwrap();
    assert!(body.starts_with("bad key [redacted]") && !body.contains(KEY), "{body}");
}

#[tokio::test]
async fn a_forbidden_list_of_models_says_nothing_of_model_calls() {
    let rig = Rig::new(|_| async { StatusCode::FORBIDDEN.into_response() }).await;
    assert_eq!(rig.request("GET", "/v1/models").send().await.unwrap().status(), 403);
    assert_eq!(rig.proxy.witness(), Witness::default());
}

#[tokio::test]
async fn an_overloaded_api_is_witnessed_with_its_wait() {
    let rig = Rig::new(|number| async move {
        if number == 1 {
            (StatusCode::from_u16(529).unwrap(), [("retry-after", "7")], "busy").into_response()
        } else {
            fine()
        }
    })
    .await;
    let answer = rig.call().send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["retry-after"]),
        (529, &"7".parse().unwrap())
    );
    let expected = Witness {
        last_status: Some(529),
        retry_after: Some(7),
        credential_refused: false,
    };
    assert_eq!(rig.proxy.witness(), expected);
    rig.call().send().await.unwrap();
    assert_eq!(rig.proxy.witness().last_status, Some(200));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let rig =
        Rig::new(|_| async { (StatusCode::TEMPORARY_REDIRECT, [("location", "/elsewhere")]).into_response() }).await;
    assert_eq!(rig.call().send().await.unwrap().status(), 502);
    assert_eq!(rig.asked().len(), 1);
}

#[tokio::test]
async fn an_api_that_cannot_be_reached_is_a_bad_gateway_and_witnessed() {
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let rig = Rig::towards(format!("http://{unused}")).await;
    let answer = rig.call().send().await.unwrap();
    assert_eq!(answer.status(), 502);
    let body: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["type"], "api_error");
    assert!(!body.to_string().contains(&unused.port().to_string()), "{body}");
    assert!(body.to_string().contains("Connection refused"), "{body}");
    assert_eq!(rig.proxy.witness().last_status, Some(Witness::UNREACHABLE));
}

#[tokio::test]
async fn a_response_that_is_not_streamed_is_metered_before_it_is_passed_on() {
    let body = r#"{"id":"msg_9","model":"unknown","content":[],"usage":{"input_tokens":3,"output_tokens":4}}"#;
    let mut rig =
        Rig::new(move |_| async move { ([("content-type", "application/json")], body).into_response() }).await;
    let call = rig.call();
    let (answer, (opening, closing)) = tokio::join!(async { call.send().await.unwrap().text().await }, rig.records());
    assert_eq!(answer.unwrap(), body);
    assert!(opening.open && !closing.open);
    assert_eq!(
        (closing.message_id.as_str(), closing.usage.total(), closing.cost_usd),
        ("msg_9", 7, Some(NanoUsd(3 * 4_000 + 4 * 20_000)))
    );
}

#[tokio::test]
async fn counting_tokens_is_free() {
    let mut rig = Rig::new(|_| async { r#"{"input_tokens":9}"#.into_response() }).await;
    let answer = rig
        .request("POST", "/v1/messages/count_tokens?beta=true")
        .body("{}")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.text().await.unwrap(), r#"{"input_tokens":9}"#);
    rig.proxy.cut();
    rig.proxy.settled().await;
    assert!(rig.events.try_recv().is_err());
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused() {
    let rig = Rig::new(|_| async { fine() }).await;
    let answer = rig.call().body(vec![b' '; (64 << 20) + 1]).send().await;
    // The connection may be closed while the client still writes.
    assert!(answer.map_or(true, |answer| answer.status() == 413));
    assert!(rig.asked().is_empty());
}

#[tokio::test]
async fn beyond_the_limit_a_call_is_held_until_the_turn_is_stopped() {
    let rig = Rig::new(|_| async { fine() }).await;
    rig.proxy.set_limits(Limits {
        cost: Some(NanoUsd(1_000)),
        tokens: None,
    });
    rig.proxy.set_spent(Amount {
        cost: NanoUsd(1_000),
        tokens: 7,
    });
    let mut beyond = rig.proxy.beyond_limits();
    let stop = async {
        beyond.wait_for(|beyond| *beyond).await.unwrap();
        rig.proxy.cut();
    };
    let (answer, ()) = tokio::join!(rig.call().send(), stop);
    assert_eq!(answer.unwrap().status(), 503);
    assert!(rig.asked().is_empty());
}

#[tokio::test]
async fn a_base_url_that_is_none_is_refused_by_name() {
    let config = ProxyConfig {
        upstream: Upstream {
            base_url: "api.example.com".into(),
            credential: Credential::ApiKey(KEY.into()),
            vertex: None,
            authorities: None,
        },
        token: TOKEN.into(),
        prices: Prices::default(),
        mcp: Servers::default(),
    };
    let error = Proxy::start(config, mpsc::channel(1).0).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("ANTHROPIC_BASE_URL \"api.example.com\""));
}
