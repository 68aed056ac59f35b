//! Commands from clients through the gateway to a runner and back, and what becomes of them when somebody dies between.

use protocol::frame::GatewayFrame;
use rstest::rstest;
use serde_json::{Value, json};

use crate::support::{
    Served,
    cluster::Cluster,
    end,
    process::Process,
    records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

const SESSION: &str = "/api/projects/team-a/agentic-sessions/s";

fn running() -> Value {
    json!({"phase": "Running", "podUID": "p1", "attempt": 1, "run": 1})
}

fn people(cluster: &Cluster) {
    cluster.interactive("s", "u", &running());
    cluster.runner("t1", Some("p1"));
    cluster.caller("token", "ann");
    cluster.allow("ann", &["get", "update"], "team-a");
}

async fn served() -> Served {
    let served = Served::new().await;
    people(&served.cluster);
    served
}

async fn request(address: std::net::SocketAddr, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let url = format!("http://{address}{SESSION}{path}");
    let mut request = http().request(method.parse().unwrap(), url).bearer_auth("token");
    if !body.is_null() {
        request = request.json(body);
    }
    let response = request.send().await.unwrap();
    let code = response.status().as_u16();
    (
        code,
        serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default(),
    )
}

async fn state(address: std::net::SocketAddr, id: &str) -> Value {
    request(address, "GET", &format!("/commands/{id}"), &Value::Null)
        .await
        .1
}

/// Waits until a command has an answer.
async fn answered(address: std::net::SocketAddr, id: &str) -> Value {
    let answer = async {
        loop {
            let command = state(address, id).await;
            if command["state"] != "pending" {
                return command;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    Box::pin(soon("an answer", answer)).await
}

async fn runner(address: std::net::SocketAddr) -> Runner {
    Runner::admitted(address, &hello("s", "u", "p1"), "t1").await.0
}

/// What a kept command is, in the words of the wire.
async fn ordered(runner: &mut Runner) -> Value {
    serde_json::to_value(runner.frame().await).unwrap()
}

fn user_record(seq: u64, command: &str) -> String {
    let body = json!({"command": command, "uuid": "00000000-0000-5000-8000-000000000001", "text": "hello"});
    json!({"seq": seq, "attempt": 1, "turn": 2, "ts": "2026-01-02T03:04:05Z", "kind": "user", "body": body}).to_string()
}

fn done_record(seq: u64, command: &str, error: Option<&str>) -> String {
    let mut body = json!({"event": "commandDone", "id": command});
    if let Some(error) = error {
        body["error"] = error.into();
    }
    json!({"seq": seq, "attempt": 1, "turn": 2, "ts": "2026-01-02T03:04:05Z", "kind": "session", "body": body})
        .to_string()
}

#[tokio::test]
async fn a_message_is_kept_given_to_the_runner_and_answered_once() {
    let served = served().await;
    let mut runner = runner(served.address).await;
    let (code, sent) = request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "hello"}),
    )
    .await;
    assert_eq!(
        (code, &sent["state"], &sent["kind"]),
        (202, &json!("pending"), &json!("user_message")),
        "{sent}"
    );
    assert_eq!(
        ordered(&mut runner).await,
        json!({"user_message": {"id": "m1", "text": "hello"}})
    );
    runner
        .text(r#"{"command_result":{"id":"m1","seq":9}}"#.to_owned())
        .await;
    let answer = answered(served.address, "m1").await;
    assert_eq!((&answer["state"], &answer["seq"]), (&json!("done"), &json!(9)));
    // Another answer changes nothing, nor does the same request.
    runner
        .text(r#"{"command_result":{"id":"m1","error":"no"}}"#.to_owned())
        .await;
    assert_eq!(
        runner.deliver(&records(1, 1)).await,
        1,
        "the answer was taken before this"
    );
    let (code, again) = request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "hello"}),
    )
    .await;
    assert_eq!((code, &again["state"]), (202, &json!("done")));
    let (code, error) = request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "other"}),
    )
    .await;
    assert_eq!(code, 409, "{error}");
}

#[rstest]
#[case("/interrupt", json!({"id": "c", "turn": 3}), json!({"interrupt": {"id": "c", "turn": 3}}))]
#[case("/end", json!({"id": "c"}), json!({"end_session": {"id": "c"}}))]
#[case("/permissions", json!({"id": "c", "requestId": "r1", "behavior": "allow"}),
    json!({"permission_response": {"id": "c", "requestId": "r1", "response": {"behavior": "allow"}}}))]
#[case("/permissions", json!({"id": "c", "requestId": "r1", "behavior": "deny", "message": "no"}),
    json!({"permission_response": {"id": "c", "requestId": "r1", "response": {"behavior": "deny", "message": "no"}}}))]
#[tokio::test]
async fn each_command_is_resent_after_each_welcome_until_a_record_answers_it(
    #[case] path: &str,
    #[case] body: Value,
    #[case] frame: Value,
) {
    let served = served().await;
    let (code, error) = request(served.address, "POST", path, &body).await;
    assert_eq!(code, 202, "{error}");
    for _ in 0..2 {
        let mut runner = runner(served.address).await;
        assert_eq!(ordered(&mut runner).await, frame);
    }
    let mut last = runner(served.address).await;
    assert_eq!(ordered(&mut last).await, frame);
    last.deliver(&[done_record(1, "c", Some("not now"))]).await;
    let answer = answered(served.address, "c").await;
    assert_eq!(
        (&answer["state"], &answer["error"]),
        (&json!("refused"), &json!("not now"))
    );
    let mut later = runner(served.address).await;
    assert_eq!(
        later.deliver(&records(2, 2)).await,
        2,
        "an answered command is not sent again"
    );
}

#[tokio::test]
async fn an_interrupt_without_a_turn_means_the_newest() {
    let served = served().await;
    assert_eq!(
        request(served.address, "POST", "/interrupt", &Value::Null).await.0,
        409,
        "there is no turn"
    );
    let mut runner = runner(served.address).await;
    runner.deliver(&[user_record(1, "prompt")]).await;
    assert_eq!(request(served.address, "POST", "/interrupt", &Value::Null).await.0, 202);
    assert_eq!(ordered(&mut runner).await["interrupt"]["turn"], 2);
}

#[tokio::test]
async fn the_record_of_a_message_is_its_answer_even_if_it_comes_after_the_run() {
    let served = served().await;
    request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "hello"}),
    )
    .await;
    let over = |delivered: &str| {
        let condition = json!({"type": "EventsDelivered", "status": delivered, "reason": "Delivered", "message": "", "lastTransitionTime": "2026-01-02T03:04:05Z"});
        json!({"phase": "Stopped", "reason": "Inactivity", "podUID": "p1", "attempt": 1, "run": 1, "conditions": [condition]})
    };
    served.cluster.interactive("s", "u", &over("False"));
    assert_eq!(
        state(served.address, "m1").await["state"],
        "pending",
        "records are still to come"
    );
    let mut drain = hello("s", "u", "p1");
    drain.role = protocol::frame::Role::Drain;
    let (mut drain, _) = Runner::admitted(served.address, &drain, "t1").await;
    assert_eq!(
        drain.deliver(&[user_record(1, "m1"), end(2)]).await,
        2,
        "a drain is sent no commands"
    );
    assert_eq!(answered(served.address, "m1").await["seq"], 1);
}

#[tokio::test]
async fn a_command_expires_with_its_run_and_a_session_that_is_over_takes_none() {
    let served = served().await;
    request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "hello"}),
    )
    .await;
    let mut runner = runner(served.address).await;
    ordered(&mut runner).await;
    runner.deliver(&[end(1)]).await;
    served.cluster.interactive(
        "s",
        "u",
        &json!({"phase": "Completed", "podUID": "p1", "attempt": 1, "run": 1}),
    );
    let answer = answered(served.address, "m1").await;
    assert_eq!(answer["state"], "expired");
    assert!(
        answer["error"]
            .as_str()
            .unwrap()
            .contains("before the command was carried out"),
        "{answer}"
    );
    let (code, error) = request(served.address, "POST", "/messages", &json!({"text": "hello"})).await;
    assert_eq!(code, 409);
    assert!(
        error["message"].as_str().unwrap().contains("/agentic-sessions/s/start"),
        "{error}"
    );
}

#[tokio::test]
async fn the_commands_of_a_deleted_session_expire() {
    let served = served().await;
    request(
        served.address,
        "POST",
        "/messages",
        &json!({"id": "m1", "text": "hello"}),
    )
    .await;
    served.cluster.delete("team-a", "s");
    let expired = async {
        loop {
            let command = served.gateway.log.command("u", "m1").await.unwrap().unwrap();
            if command.answer.state() == "expired" {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    Box::pin(soon("the command expiring", expired)).await;
}

#[rstest]
#[case("/messages", json!({}), 400, "text")]
#[case("/messages", json!({"text": ""}), 400, "text must have")]
#[case("/messages", json!({"text": "x".repeat(100_001)}), 400, "text must have")]
#[case("/messages", json!({"text": "a", "id": "a/b"}), 400, "cannot be a command's")]
#[case("/messages", json!({"text": "a", "id": "prompt"}), 400, "cannot be a command's")]
#[case("/messages", json!({"text": "a", "txt": "b"}), 400, "unknown field `txt`")]
#[case("/interrupt", json!({"turn": "x"}), 400, "turn")]
#[case("/permissions", json!({"requestId": "r", "behavior": "maybe"}), 400, "behavior")]
#[case("/permissions", json!({"requestId": "r", "behavior": "allow", "message": "m"}), 400, "`deny` only")]
#[tokio::test]
async fn a_command_that_cannot_be_understood_is_refused_with_its_field(
    #[case] path: &str,
    #[case] body: Value,
    #[case] code: u16,
    #[case] says: &str,
) {
    let served = served().await;
    let (answered, error) = request(served.address, "POST", path, &body).await;
    assert_eq!(answered, code);
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
}

#[tokio::test]
async fn a_session_that_is_not_interactive_takes_no_messages() {
    let served = served().await;
    served.cluster.set("team-a", "s", "u", &running());
    let (code, error) = request(served.address, "POST", "/messages", &json!({"text": "hello"})).await;
    assert_eq!(code, 409);
    assert!(
        error["message"].as_str().unwrap().contains("interactive: true"),
        "{error}"
    );
}

#[tokio::test]
async fn commands_without_an_answer_are_bounded() {
    let served = served().await;
    for n in 0..64 {
        let (code, _) = request(
            served.address,
            "POST",
            "/messages",
            &json!({"id": format!("m{n}"), "text": "hello"}),
        )
        .await;
        assert_eq!(code, 202);
    }
    let (code, _) = request(served.address, "POST", "/messages", &json!({"text": "hello"})).await;
    assert_eq!(code, 429);
}

/// Between which two steps of a command somebody dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    /// The gateway, before the runner was told.
    GatewayKept,
    /// The gateway, after the runner was told.
    GatewaySent,
    /// The gateway, after the runner answered, before anything of it was stored.
    GatewayAnswered,
    /// The gateway, after the record of the effect was acknowledged.
    GatewayStored,
    /// The runner, after it was told and before it did anything.
    RunnerSent,
    /// The runner, after the effect was on its disk and before it said so.
    RunnerDone,
    /// The runner, after it said so.
    RunnerAnswered,
    /// The runner before it did anything, and its run ends so.
    RunEnds,
}

impl Death {
    /// How often the gateway gives the command to a runner. Given twice with one id, a runner does it once: its own tests show
    /// that, whoever dies.
    fn given(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Self::GatewayKept | Self::GatewayStored | Self::RunEnds => 1..=1,
            // Nobody knows that it was done.
            Self::GatewaySent | Self::RunnerSent | Self::RunnerDone => 2..=2,
            // The answer had left: it was heard, or was not.
            Self::GatewayAnswered | Self::RunnerAnswered => 1..=2,
        }
    }
}

/// Runners that remember nothing: what they are given twice they do twice.
#[derive(Default)]
struct Given(Vec<Value>);

impl Given {
    /// Does the next command; the record of its effect.
    fn carry_out(&mut self, frame: &GatewayFrame) -> String {
        let id = gateway::commands::id(frame);
        self.0.push(json!(frame));
        if matches!(frame, GatewayFrame::UserMessage(_)) {
            user_record(1, id)
        } else {
            done_record(1, id, None)
        }
    }
}

#[rstest]
#[tokio::test]
async fn a_command_is_given_once_more_only_while_nobody_knows_what_became_of_it_and_is_answered_whoever_dies_when(
    #[values(
        ("/messages", json!({"id": "c", "text": "hello"})),
        ("/interrupt", json!({"id": "c", "turn": 1})),
        ("/permissions", json!({"id": "c", "requestId": "r", "behavior": "allow"})),
        ("/end", json!({"id": "c"}))
    )]
    command: (&str, Value),
    #[values(
        Death::GatewayKept,
        Death::GatewaySent,
        Death::GatewayAnswered,
        Death::GatewayStored,
        Death::RunnerSent,
        Death::RunnerDone,
        Death::RunnerAnswered,
        Death::RunEnds
    )]
    death: Death,
) {
    let (path, body) = command;
    let cluster = Cluster::start().await;
    people(&cluster);
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(&cluster, folder.path()).await;
    let mut given = Given::default();

    assert_eq!(request(process.address, "POST", path, &body).await.0, 202);
    if death != Death::GatewayKept {
        let mut first = runner(process.address).await;
        let frame = first.frame().await;
        let record = given.carry_out(&frame);
        if !matches!(death, Death::GatewaySent | Death::RunnerSent | Death::RunEnds) {
            match death {
                Death::GatewayStored => assert_eq!(first.deliver(&[record]).await, 1),
                Death::GatewayAnswered | Death::RunnerAnswered => {
                    first.text(r#"{"command_result":{"id":"c","seq":1}}"#.to_owned()).await;
                }
                _ => {}
            }
        }
        if death == Death::RunEnds {
            first.deliver(&[end(1)]).await;
            cluster.interactive(
                "s",
                "u",
                &json!({"phase": "Failed", "reason": "RunnerCrashed", "podUID": "p1", "attempt": 1}),
            );
        }
    }
    if format!("{death:?}").starts_with("Gateway") {
        process.child.kill().await.unwrap();
        process = Process::start(&cluster, folder.path()).await;
    }
    // A client that did not hear asks again.
    let again = request(process.address, "POST", path, &body).await;
    assert_eq!(again.0, 202, "{}", again.1);
    if death == Death::RunEnds {
        assert_eq!(answered(process.address, "c").await["state"], "expired");
        let mut second = runner(process.address).await;
        second.send(&records(2, 2)).await;
        let first = second.frame().await;
        assert!(
            matches!(first, GatewayFrame::Ack(_)),
            "an expired command is given to nobody: {first:?}"
        );
        assert!(death.given().contains(&given.0.len()));
        return;
    }
    let mut second = runner(process.address).await;
    if state(process.address, "c").await["state"] == "pending" {
        let frame = second.frame().await;
        let record = given.carry_out(&frame);
        second.send(&[record]).await;
    }
    assert_eq!(answered(process.address, "c").await["state"], "done");
    let mut last = runner(process.address).await;
    last.send(&records(2, 2)).await;
    let first = last.frame().await;
    assert!(
        matches!(first, GatewayFrame::Ack(_)),
        "an answered command is given to nobody: {first:?}"
    );
    assert!(death.given().contains(&given.0.len()), "{death:?}: {:?}", given.0);
    assert!(
        given.0.iter().all(|frame| *frame == given.0[0]),
        "the same with the same id: {:?}",
        given.0
    );
}
