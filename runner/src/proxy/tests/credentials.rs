//! Credentials that change while the proxy runs, and Google's.

use std::path::Path;

use axum::routing::post;
use protocol::names::{RUNNER_SECRETS, env};
use ring::signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey};
use secrecy::SecretString;

use super::*;
use crate::secrets::Secrets;

const PEM: &str = include_str!("../testdata/fake-service-account.pem");

fn put(folder: &Path, name: &str, value: &str) {
    let folder = folder.join(RUNNER_SECRETS[0]);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), value).unwrap();
}

fn files(folder: &Path) -> Secrets {
    Secrets::new(folder.to_owned(), |_| None)
}

fn status_of_new(shown: &str) -> u16 {
    if shown.ends_with("new") { 200 } else { 401 }
}

#[tokio::test]
async fn a_key_that_was_changed_in_its_secret_is_taken_at_the_next_call() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), env::ANTHROPIC_API_KEY, "fake-old\n");
    let credential = Credential::anthropic(&files(folder.path())).unwrap();
    let mut rig = Rig::guarded(status_of_new, credential, None).await;
    put(folder.path(), env::ANTHROPIC_API_KEY, "fake-new\n");
    let call = rig.call();
    let (answer, _) = tokio::join!(async { call.send().await.unwrap().text().await }, rig.records());
    assert_eq!(answer.unwrap(), streamed());
    assert_eq!(rig.asked().len(), 1);
    assert!(!rig.proxy.witness().credential_refused);
}

#[tokio::test]
async fn a_refused_key_is_tried_once_and_nothing_more_goes_out() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), env::ANTHROPIC_AUTH_TOKEN, "fake-old");
    let credential = Credential::anthropic(&files(folder.path())).unwrap();
    let rig = Rig::guarded(status_of_new, credential, None).await;
    for _ in 0..3 {
        assert_eq!(rig.call().send().await.unwrap().status(), 401);
    }
    let asked = rig.asked();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].1["authorization"], "Bearer fake-old");
    assert!(rig.proxy.witness().credential_refused);
}

#[tokio::test]
async fn a_key_that_is_gone_is_a_refusal_and_not_an_outage() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), env::ANTHROPIC_API_KEY, "fake-new");
    let credential = Credential::anthropic(&files(folder.path())).unwrap();
    let rig = Rig::guarded(status_of_new, credential, None).await;
    put(folder.path(), env::ANTHROPIC_API_KEY, "");
    assert_eq!(rig.call().send().await.unwrap().status(), 401);
    assert!(rig.asked().is_empty() && rig.proxy.witness().credential_refused);
}

fn forbidden() -> Response {
    (StatusCode::FORBIDDEN, "not this model").into_response()
}

#[tokio::test]
async fn a_model_that_is_forbidden_once_another_was_not_is_the_askers_matter() {
    let mut rig = Rig::new(|number| async move { if number == 2 { forbidden() } else { fine() } }).await;
    for status in [200, 403, 200] {
        let call = rig.call();
        let answered = async {
            let answer = call.send().await.unwrap();
            let told = answer.status();
            answer.text().await.unwrap();
            told
        };
        let told = if status == 200 {
            tokio::join!(answered, rig.records()).0
        } else {
            answered.await
        };
        assert_eq!(told, status);
        assert_eq!(rig.proxy.witness().last_status, Some(status));
        assert!(!rig.proxy.witness().credential_refused);
    }
}

#[tokio::test]
async fn a_model_that_is_forbidden_while_another_is_still_asked_decides_nothing() {
    let second = Arc::new(tokio::sync::Notify::new());
    let told = Arc::clone(&second);
    let mut rig = Rig::new(move |number| {
        let told = Arc::clone(&told);
        async move {
            if number == 2 {
                return forbidden();
            }
            told.notified().await;
            fine()
        }
    })
    .await;
    let first = tokio::spawn(rig.call().send());
    while rig.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.call().send().await.unwrap().status(), 403);
    assert!(!rig.proxy.witness().credential_refused);
    second.notify_one();
    let first = async { first.await.unwrap().unwrap().text().await.unwrap() };
    assert_eq!(tokio::join!(first, rig.records()).0, streamed());
}

/// A token endpoint that numbers its tokens; from the second on they are good ones.
async fn tokens(status: StatusCode, expires_in: u64) -> (String, Arc<Mutex<Vec<String>>>) {
    let forms = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&forms);
    let app = Router::new().route(
        "/token",
        post(move |form: String| {
            let number = {
                let mut forms = seen.lock().unwrap();
                forms.push(form);
                forms.len()
            };
            let token = format!("fake-token-{}", if number == 1 { "old" } else { "new" });
            let body = serde_json::json!({ "access_token": token, "expires_in": expires_in });
            async move { (status, body.to_string()) }
        }),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/token", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, forms)
}

fn vertex() -> Vertex {
    Vertex {
        project: "p".into(),
        region: "us-east5".into(),
    }
}

const CALL: &str = "/v1/projects/p/locations/us-east5/publishers/anthropic/models/claude-opus-5-5:streamRawPredict";

async fn google(guard: fn(&str) -> u16, account: serde_json::Value) -> (Rig, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    put(
        folder.path(),
        env::GOOGLE_APPLICATION_CREDENTIALS,
        "/app/vertex/key.json",
    );
    put(folder.path(), "key.json", &account.to_string());
    let credential = Credential::google(&files(folder.path())).unwrap();
    (Rig::guarded(guard, credential, Some(vertex())).await, folder)
}

fn service_account(token_uri: &str) -> serde_json::Value {
    serde_json::json!({
        "type": "service_account", "client_email": "fake@p.iam.gserviceaccount.com",
        "private_key": PEM, "private_key_id": "fake-key-id", "token_uri": token_uri,
    })
}

async fn vertex_call(rig: &mut Rig) -> (StatusCode, Option<UsageBody>) {
    let call = rig
        .request("POST", CALL)
        .body(r#"{"anthropic_version":"v","max_tokens":100,"stream":true}"#);
    let answered = tokio::spawn(async move {
        let response = call.send().await.unwrap();
        let status = response.status();
        let _ = response.text().await;
        status
    });
    let mut closing = None;
    loop {
        tokio::select! {
            Some(event) = rig.events.recv() => match event.durable {
                Some(durable) => drop(durable.send(())),
                None => closing = Some(event.body),
            },
            () = tokio::time::sleep(MOMENT) => if answered.is_finished() { break },
        }
    }
    (answered.await.unwrap(), closing)
}

#[tokio::test]
async fn a_service_accounts_key_is_exchanged_and_renewed_once_when_its_token_is_refused() {
    let (url, forms) = tokens(StatusCode::OK, 3_600).await;
    let (mut rig, _folder) = google(status_of_new, service_account(&url)).await;
    for _ in 0..2 {
        let (status, closing) = vertex_call(&mut rig).await;
        let closing = closing.unwrap();
        assert_eq!(status, 200);
        assert_eq!(
            (closing.model.as_str(), closing.cost_usd.is_some()),
            ("claude-opus-5-5", true)
        );
    }
    let lines: Vec<(String, String)> = rig
        .asked()
        .into_iter()
        .map(|(line, headers)| (line, headers["authorization"].to_str().unwrap().to_owned()))
        .collect();
    let path = CALL.strip_prefix("/v1").unwrap();
    let expected =
        ["old", "new", "new"].map(|token| (format!("POST /base{path}"), format!("Bearer fake-token-{token}")));
    assert_eq!(lines, expected);
    let forms = forms.lock().unwrap().clone();
    assert_eq!(forms.len(), 2, "a good token is kept");
    assert_signed(&forms[0], &url);
}

fn assert_signed(form: &str, audience: &str) {
    let form = reqwest::Url::parse(&format!("http://x/?{form}")).unwrap();
    let field = |name: &str| form.query_pairs().find(|(key, _)| key == name).unwrap().1.into_owned();
    assert_eq!(field("grant_type"), "urn:ietf:params:oauth:grant-type:jwt-bearer");
    let jwt = field("assertion");
    let parts: Vec<&str> = jwt.split('.').collect();
    let decoded = |part: &str| base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, part).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&decoded(parts[1])).unwrap();
    assert_eq!(
        (claims["iss"].as_str(), claims["aud"].as_str()),
        (Some("fake@p.iam.gserviceaccount.com"), Some(audience))
    );
    let der: String = PEM.lines().filter(|line| !line.starts_with('-')).collect();
    let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, der).unwrap();
    let key = RsaKeyPair::from_pkcs8(&der).unwrap();
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key().as_ref())
        .verify(format!("{}.{}", parts[0], parts[1]).as_bytes(), &decoded(parts[2]))
        .unwrap();
}

#[tokio::test]
async fn a_token_is_not_used_up_to_its_last_moment() {
    let (url, forms) = tokens(StatusCode::OK, 30).await;
    let (mut rig, _folder) = google(|_| 200, service_account(&url)).await;
    for _ in 0..2 {
        assert_eq!(vertex_call(&mut rig).await.0, 200);
    }
    assert_eq!(forms.lock().unwrap().len(), 2);
}

#[rstest]
#[case::refused(StatusCode::BAD_REQUEST, 401, true)]
#[case::out_of_order(StatusCode::SERVICE_UNAVAILABLE, 502, false)]
#[tokio::test]
async fn a_key_that_is_not_exchanged_is_refused_or_tried_again_later(
    #[case] status: StatusCode,
    #[case] told: u16,
    #[case] refused: bool,
) {
    let (url, _) = tokens(status, 3_600).await;
    let (mut rig, _folder) = google(|_| 200, service_account(&url)).await;
    assert_eq!(vertex_call(&mut rig).await.0, told);
    assert_eq!(rig.proxy.witness().credential_refused, refused);
    assert!(rig.asked().is_empty());
}

#[tokio::test]
async fn a_users_refresh_token_is_exchanged_too_and_never_over_plain_http_elsewhere() {
    let (url, forms) = tokens(StatusCode::OK, 3_600).await;
    let user = |url: &str| {
        serde_json::json!({
            "type": "authorized_user", "client_id": "fake-id", "client_secret": "fake&secret",
            "refresh_token": "fake-refresh", "token_uri": url,
        })
    };
    let (mut rig, _folder) = google(|_| 200, user(&url)).await;
    assert_eq!(vertex_call(&mut rig).await.0, 200);
    let expected = "grant_type=refresh_token&client_id=fake-id&client_secret=fake%26secret&refresh_token=fake-refresh";
    assert_eq!(*forms.lock().unwrap(), [expected]);
    let (mut rig, _folder) = google(|_| 200, user("http://tokens.example/token")).await;
    assert_eq!(vertex_call(&mut rig).await.0, 401);
}

#[tokio::test]
async fn a_key_that_cannot_sign_is_found_before_the_first_call() {
    let mut account = service_account("https://tokens.example/");
    account["private_key"] = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----".into();
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), env::GOOGLE_APPLICATION_CREDENTIALS, &account.to_string());
    let credential = Credential::google(&files(folder.path())).unwrap();
    let error = credential
        .check(&reqwest::Client::builder().tls_certs_only([]).build().unwrap())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("private_key"), "{error}");
    let given = Secrets::new(Path::new("").to_owned(), |name| {
        (name == env::VERTEX_USER_TOKEN).then(|| SecretString::from("fake-given"))
    });
    assert!(Credential::google(&given).is_some());
}
