//! A runner that is killed between any two of its steps: whoever comes next ends where it would have ended.
//!
//! `RUNNER_EVERY_KILL=1` takes every point; without it a few, chosen by a seed that is printed.

use futures::StreamExt as _;
use protocol::{Kind, Outcome};
use rand::SeedableRng as _;
use rand::seq::IndexedRandom as _;
use runner::control::client::ask;
use runner::control::{Reply, Request};
use runner::kill_point::VARIABLE;
use serde_json::{Value, json};
use tests::model::Logged;

use crate::common::{Session, bash, ended, eventually, script, text};

/// How many points are taken when not all are.
const FEW: usize = 6;

fn points(all: Vec<String>) -> Vec<String> {
    if std::env::var_os("RUNNER_EVERY_KILL").is_some() {
        eprintln!("all {} points", all.len());
        return all;
    }
    let seed = std::env::var("RUNNER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let few: Vec<_> = all.choose_multiple(&mut random, FEW).cloned().collect();
    eprintln!("RUNNER_SEED={seed}: {few:?} of {} points", all.len());
    few
}

/// The points of a run that wrote so many records and sent so many messages.
fn all_points(records: usize, sent: usize) -> Vec<String> {
    let durable = (1..=records).map(|seq| format!("durable:{seq}"));
    let sent = (1..=sent).map(|n| format!("sent:{n}"));
    let ends = ["report", "reported"].map(str::to_owned);
    durable.chain(sent).chain(ends).collect()
}

fn one_shot() -> String {
    // The CLI's transcript is behind its stdout by some milliseconds; a round of a real model takes longer.
    let round = || bash("sleep 0.3");
    // The last answer is said twice: killed between it and the CLI's result, the CLI has nothing to go on with, and is told to.
    script("MARK", &[round(), round(), round(), text("Done."), text("Done.")])
}

#[tokio::test]
async fn a_one_shot_ends_the_same_wherever_its_runner_was_killed() {
    let first = Session::new().await;
    first.run(&one_shot(), &[]).await;
    let all = all_points(first.records().len(), 1);
    futures::stream::iter(points(all))
        .for_each_concurrent(4, one_shot_killed_at)
        .await;
}

async fn one_shot_killed_at(point: String) {
    let session = Session::new().await;
    let mut command = session.command(&one_shot(), &[]);
    let killed = ended(command.env(VARIABLE, &point).spawn().unwrap()).await;
    assert_eq!(killed.code, None, "{point}: it was killed");
    session.assert_nothing_left().await;
    let over = session.bodies(Kind::Cli).iter().any(|line| line["type"] == "result");
    let asked = session.model.requests().len();

    let ended = session.run(&one_shot(), &[]).await;
    assert_eq!(ended.code, Some(0), "{point}: {}", ended.stderr);
    let report = session.report();
    assert_eq!(
        (report.outcome, report.result.as_str()),
        (Outcome::Succeeded, "Done."),
        "{point}"
    );
    session.assert_prompt_once("MARK");
    assert_no_finished_round_again(&session, &point);
    if over {
        assert_eq!(
            session.model.requests().len(),
            asked,
            "{point}: nothing is asked of the model again"
        );
    }
    let prompts = session
        .bodies(Kind::User)
        .iter()
        .filter(|user| user["command"] == "prompt")
        .count();
    assert_eq!(prompts, 1, "{point}");
    assert_gap_free(&session);
}

fn assert_gap_free(session: &Session) {
    let records = session.records();
    assert!(records.iter().map(|record| record.seq).eq(1..=records.len() as u64));
    let last = records.last().unwrap();
    let ends = records.iter().filter(|record| record.kind == Kind::End).count();
    assert_eq!(
        (ends, last.kind),
        (last.attempt as usize, Kind::End),
        "each attempt has its end"
    );
}

/// A finished round is not asked for again, but the last one, which may not have been in the transcript yet.
fn assert_no_finished_round_again(session: &Session, point: &str) {
    let steps: Vec<_> = session
        .model
        .requests()
        .iter()
        .filter_map(|request| request.step)
        .collect();
    let mut furthest = 0;
    for step in steps {
        assert!(step + 1 >= furthest, "{point}: step {step} after {furthest}");
        furthest = furthest.max(step);
    }
}

fn with_a_tool() -> String {
    let wait = "touch began; while [ ! -e go ]; do sleep 0.02; done";
    script("MARK", &[bash(wait), text("Done."), text("Done."), text("Done.")])
}

#[tokio::test]
async fn a_message_for_a_running_turn_arrives_once_wherever_the_runner_was_killed() {
    let first = Session::new().await;
    let child = first.start(&with_a_tool(), &["--interactive"]);
    let began = first.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    let before = first.status("figures", |status| status.last_seq > 8).await.last_seq;
    assert!(follow(&first).await);
    std::fs::write(first.workspace().join("go"), "").unwrap();
    first.idle(1).await;
    first.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let all = first.records().len();
    let last = usize::try_from(before).unwrap();
    // Before them nothing is said, and behind them nothing is done.
    let mut all: Vec<_> = (last..all - 2).map(|seq| format!("durable:{seq}")).collect();
    all.extend(["sent:1".to_owned(), "sent:2".to_owned()]);
    futures::stream::iter(points(all))
        .for_each_concurrent(4, folded_killed_at)
        .await;
}

/// Sends the message, always with the same id; says whether it was taken.
async fn follow(session: &Session) -> bool {
    let request = Request::Send {
        text: "FOLLOW".into(),
        id: Some("c-1".into()),
    };
    matches!(
        ask(&session.state().join("control.sock"), &request).await,
        Ok(Reply::Done(_))
    )
}

async fn folded_killed_at(point: String) {
    let session = Session::new().await;
    let mut command = session.command(&with_a_tool(), &["--interactive"]);
    let mut child = command.env(VARIABLE, &point).spawn().unwrap();
    let began = session.workspace().join("began");
    eventually("the tool runs, or the runner is dead", || {
        began.exists() || child.try_wait().unwrap().is_some()
    })
    .await;
    follow(&session).await;
    std::fs::write(session.workspace().join("go"), "").unwrap();
    // It dies by itself, or with what is left to do.
    let request = Request::End;
    let killed = tokio::select! {
        killed = child.wait() => killed.unwrap(),
        () = async {
            session.idle(1).await;
            let _ = ask(&session.state().join("control.sock"), &request).await;
            std::future::pending::<()>().await;
        } => unreachable!(),
    };
    let killed = killed.code().is_none();
    session.assert_nothing_left().await;
    if !killed {
        // Fewer records came this time.
        return;
    }
    if !session.events("stopping").is_empty() {
        // The end was asked for, and that is on disk.
        assert_eq!(
            session.run("not used", &["--interactive"]).await.code,
            Some(0),
            "{point}"
        );
        assert_said_once(&session, &point);
        return;
    }

    let child = session.start("not used", &["--interactive"]);
    session.status("it is there", |status| status.attempt == 2).await;
    assert!(follow(&session).await, "{point}: with the same id it is taken or known");
    session
        .status("all is answered", |status| {
            status.phase == runner::status::Phase::Idle && status.queued == 0
        })
        .await;
    assert_said_once(&session, &point);
    let sent = session
        .bodies(Kind::User)
        .iter()
        .filter(|user| user["command"] == "c-1")
        .count();
    assert_eq!(sent, 1, "{point}");
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0), "{point}");
    assert_gap_free(&session);
}

/// In every request each message once, and both in the last one.
pub fn assert_said_once(session: &Session, point: &str) {
    let requests = session.model.requests();
    let asked: Vec<_> = requests.iter().filter(|request| request.asks_for_message()).collect();
    let counts = |request: &Logged| {
        ["MARK", "FOLLOW"].map(|marker| {
            let said = |message: &&Value| message["role"] == "user" || message["role"] == "system";
            let text: String = request.messages().iter().filter(said).map(Value::to_string).collect();
            text.matches(marker).count()
        })
    };
    for request in &asked {
        let [mark, follow] = counts(request);
        assert!(
            mark == 1 && follow <= 1,
            "{point}: {mark} {follow} {:#?}",
            request.messages()
        );
    }
    assert_eq!(
        counts(asked.last().unwrap()),
        [1, 1],
        "{point}: {:#?}",
        asked.last().unwrap().messages()
    );
}

#[tokio::test]
async fn after_an_interrupt_nobody_goes_on_with_the_turn_though_the_runner_was_killed_before_it_was_done() {
    let session = Session::new().await;
    let prompt = script("MARK", &[bash("touch began; sleep 100"), text("Not said.")]);
    let mut command = session.command(&prompt, &["--interactive"]);
    let child = command.env(VARIABLE, "interrupt").spawn().unwrap();
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    let _ = ask(
        &session.state().join("control.sock"),
        &Request::Interrupt { turn: None },
    )
    .await;
    assert_eq!(ended(child).await.code, None);
    session.assert_nothing_left().await;
    let asked = session.model.requests().len();

    let child = session.start("not used", &["--interactive"]);
    session.idle(1).await;
    assert_eq!(session.model.requests().len(), asked);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    let outcomes: Vec<_> = session
        .events("turnEnded")
        .iter()
        .map(|event| event["outcome"].clone())
        .collect();
    assert_eq!(outcomes, ["stoppedByUser"]);
}

#[tokio::test]
async fn a_model_outage_ends_the_attempt_and_the_next_one_goes_on_with_messages_and_costs() {
    let session = Session::new().await;
    let outage = json!({ "text": "Two.", "error": { "status": 529, "times": 5 } });
    let child = session.start(&script("MARK", &[text("One.")]), &["--interactive"]);
    session.idle(1).await;
    session.send(&script("NEXT", &[outage])).await;
    assert_eq!(ended(child).await.code, Some(75));
    assert_eq!(session.report().outcome, Outcome::ModelUnavailable);
    let spent = session.report().cost_usd.unwrap();

    let child = session.start("not used", &["--interactive"]);
    let status = session.idle(3).await;
    assert!(status.cost_usd.unwrap() > spent, "what was spent before counts");
    let last = session.model.requests().pop().unwrap();
    for marker in ["MARK", "NEXT", runner::drive::CONTINUE] {
        assert_eq!(last.user_messages_with(marker), 1, "{marker}: {:#?}", last.messages());
    }
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
}

#[tokio::test]
async fn an_idle_cli_that_is_killed_is_started_again_and_says_nothing_by_itself() {
    let session = Session::new().await;
    let prompt = script("MARK", &[bash("echo $PPID > cli.pid"), text("One.")]);
    let child = session.start(&prompt, &["--interactive"]);
    session.idle(1).await;
    let asked = session.model.requests().len();
    let pid = std::fs::read_to_string(session.workspace().join("cli.pid")).unwrap();
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    session.send(&script("NEXT", &[text("Two.")])).await;
    session.idle(2).await;
    assert_eq!(session.model.requests().len(), asked + 1);
    let last = session.model.requests().pop().unwrap();
    assert_eq!(["MARK", "NEXT"].map(|marker| last.user_messages_with(marker)), [1, 1]);
    session.ask(&Request::End).await;
    assert_eq!(ended(child).await.code, Some(0));
    assert_eq!(session.events("agentRestarted").len(), 1);
}
