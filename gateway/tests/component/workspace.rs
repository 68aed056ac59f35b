//! Files of a workspace through the runner of a session.

use std::{collections::BTreeMap, net::SocketAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use protocol::frame::{FileOperation, FileRequest, GatewayFrame, MAX_CHUNK};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::{
    Served,
    cluster::Cluster,
    process::Process,
    runner::{Runner, hello},
    soon,
    sse::http,
};

const WORKSPACE: &str = "/api/projects/team-a/agentic-sessions/s/workspace";

async fn served() -> Served {
    let served = Served::new().await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served.cluster.caller("token", "ann");
    served.cluster.allow("ann", &["get", "update"], "team-a");
    served
}

/// When a runner leaves without a word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Leaves {
    Never,
    /// After a request, before anything is done.
    Asked,
    /// Between the pieces of a write.
    Pieces,
    /// After the file was replaced, before it says so.
    Replaced,
}

/// A runner with files, which it gives out once it is gone.
async fn runner(served: &Served, files: &[(&str, Vec<u8>)], leaves: Leaves) -> JoinHandle<BTreeMap<String, Vec<u8>>> {
    runner_at(served.address, files, leaves).await
}

pub(crate) async fn runner_at(
    address: SocketAddr,
    files: &[(&str, Vec<u8>)],
    leaves: Leaves,
) -> JoinHandle<BTreeMap<String, Vec<u8>>> {
    let (mut runner, _) = Runner::admitted(address, &hello("s", "u", "p1"), "t1").await;
    let mut files: BTreeMap<String, Vec<u8>> = files
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), bytes.clone()))
        .collect();
    tokio::spawn(async move {
        let mut writes: BTreeMap<String, (String, Vec<u8>)> = BTreeMap::new();
        while let Ok(frame) = runner.next().await {
            match frame {
                GatewayFrame::FileRequest(_) if leaves == Leaves::Asked => return files,
                GatewayFrame::FileRequest(FileRequest {
                    id,
                    op: FileOperation::Write,
                    path,
                    ..
                }) => {
                    writes.insert(id, (path, Vec::new()));
                }
                GatewayFrame::FileRequest(request) => answer(&mut runner, &files, request).await,
                GatewayFrame::FileChunk(chunk) => {
                    let (_, bytes) = writes.get_mut(&chunk.id).unwrap();
                    assert_eq!(chunk.offset, bytes.len() as u64);
                    bytes.extend(STANDARD.decode(chunk.data).unwrap());
                    if leaves == Leaves::Pieces {
                        return files;
                    }
                    if chunk.eof {
                        let (path, bytes) = writes.remove(&chunk.id).unwrap();
                        files.insert(path, bytes);
                        if leaves == Leaves::Replaced {
                            return files;
                        }
                        runner
                            .text(json!({"command_result": {"id": chunk.id}}).to_string())
                            .await;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        files
    })
}

pub(crate) async fn answer(runner: &mut Runner, files: &BTreeMap<String, Vec<u8>>, request: FileRequest) {
    let FileRequest {
        id,
        op,
        path,
        offset,
        length,
    } = request;
    let entry = |name: &str, size: usize| {
        let name = name.rsplit('/').next().unwrap();
        json!({"name": name, "kind": if name == "folder" { "folder" } else { "file" }, "size": size, "modified": "2026-01-02T03:04:05Z"})
    };
    let bytes = match (op, files.get(&path)) {
        (FileOperation::List, _) => {
            let inside = files.iter().filter(|(name, _)| {
                name.strip_prefix(&path)
                    .is_some_and(|rest| !rest.trim_start_matches('/').is_empty())
            });
            json!(inside.map(|(name, bytes)| entry(name, bytes.len())).collect::<Vec<_>>())
                .to_string()
                .into_bytes()
        }
        (FileOperation::Stat, Some(bytes)) => entry(&path, bytes.len()).to_string().into_bytes(),
        (FileOperation::Stat, None) if files.keys().any(|name| name.starts_with(&format!("{path}/"))) => {
            entry("folder", 0).to_string().into_bytes()
        }
        (FileOperation::Stat, None) if path == "link" => {
            br#"{"name":"link","kind":"link","size":0,"modified":"2026-01-02T03:04:05Z"}"#.to_vec()
        }
        (FileOperation::Read, Some(bytes)) => {
            assert!(length <= 1 << 20, "windows are bounded");
            let end = bytes.len().min((offset + length) as usize);
            bytes[offset as usize..end].to_vec()
        }
        _ => {
            let error = if path == "out" {
                "refused: it leads out of the workspace"
            } else {
                "not found: there is no such file"
            };
            let chunk = json!({"id": id, "offset": 0, "data": "", "eof": true, "error": error});
            return runner.text(json!({"file_chunk": chunk}).to_string()).await;
        }
    };
    let mut at = offset;
    let mut pieces = bytes.chunks(MAX_CHUNK).peekable();
    if pieces.peek().is_none() {
        runner
            .text(json!({"file_chunk": {"id": id, "offset": at, "data": "", "eof": true}}).to_string())
            .await;
    }
    while let Some(piece) = pieces.next() {
        let chunk = json!({"id": id, "offset": at, "data": STANDARD.encode(piece), "eof": pieces.peek().is_none()});
        runner.text(json!({"file_chunk": chunk}).to_string()).await;
        at += piece.len() as u64;
    }
}

async fn get(served: &Served, path: &str, range: Option<&str>) -> reqwest::Response {
    let mut request = http()
        .get(served.url(&format!("{WORKSPACE}{path}")))
        .bearer_auth("token");
    if let Some(range) = range {
        request = request.header("range", range);
    }
    soon("the answer", request.send()).await.unwrap()
}

async fn put(served: &Served, path: &str, bytes: Vec<u8>) -> (u16, Value) {
    let request = http()
        .put(served.url(&format!("{WORKSPACE}{path}")))
        .bearer_auth("token")
        .body(bytes);
    let response = soon("the answer", request.send()).await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 7 % 251) as u8).collect()
}

#[tokio::test]
async fn files_are_listed_read_in_whole_and_in_part_and_written() {
    let served = served().await;
    let long = noise(3 << 20 | 5);
    let files = [
        ("a.txt", b"hello world".to_vec()),
        ("empty", Vec::new()),
        ("src/long", long.clone()),
    ];
    let runner = runner(&served, &files, Leaves::Never).await;

    let folder: Value = get(&served, "", None).await.json().await.unwrap();
    assert_eq!(folder["items"].as_array().unwrap().len(), 3, "{folder}");
    let folder: Value = get(&served, "/src", None).await.json().await.unwrap();
    assert_eq!(
        (&folder["items"][0]["path"], &folder["items"][0]["isDir"]),
        (&json!("src/long"), &json!(false))
    );

    let whole = get(&served, "/src/long", None).await;
    assert_eq!(
        (
            whole.status().as_u16(),
            whole.headers()["content-length"].to_str().unwrap()
        ),
        (200, "3145733")
    );
    assert_eq!(whole.bytes().await.unwrap(), long);
    let part = get(&served, "/src/long", Some("bytes=1048570-2097160")).await;
    assert_eq!(
        (
            part.status().as_u16(),
            part.headers()["content-range"].to_str().unwrap()
        ),
        (206, "bytes 1048570-2097160/3145733")
    );
    assert_eq!(part.bytes().await.unwrap(), long[1_048_570..=2_097_160]);
    assert_eq!(get(&served, "/empty", None).await.bytes().await.unwrap().len(), 0);
    assert_eq!(get(&served, "/a.txt", Some("bytes=11-")).await.status(), 416);

    let written = noise(700_000);
    assert_eq!(
        put(&served, "/new%20folder/b", written.clone()).await,
        (200, json!({"path": "new folder/b", "size": 700_000}))
    );
    assert_eq!(
        get(&served, "/new%20folder/b", None).await.bytes().await.unwrap(),
        written
    );
    assert_eq!(put(&served, "/c", Vec::new()).await.0, 200);
    served.stop().await;
    assert_eq!(runner.await.unwrap()["new folder/b"], written);
}

#[rstest]
#[case("/none", 404, "no such file")]
#[case("/out", 400, "leads out")]
#[case("/link", 409, "links are not followed")]
#[case("/a/..%2F..%2Fb", 400, "must not have")]
#[case("/%2Fetc%2Fpasswd", 400, "relative")]
#[case("/a%00b", 400, "NUL")]
#[tokio::test]
async fn what_cannot_be_read_is_said(#[case] path: &str, #[case] code: u16, #[case] says: &str) {
    let served = served().await;
    let _runner = runner(&served, &[], Leaves::Never).await;
    let answer = get(&served, path, None).await;
    assert_eq!(answer.status().as_u16(), code);
    let error: Value = answer.json().await.unwrap();
    assert!(error["message"].as_str().unwrap().contains(says), "{error}");
}

#[rstest]
#[case("Running", "not connected")]
#[case("Completed", "/agentic-sessions/s/start")]
#[tokio::test]
async fn without_a_runner_it_is_said_how_to_come_to_one(#[case] phase: &str, #[case] says: &str) {
    let served = served().await;
    served.cluster.set("team-a", "s", "u", &json!({"phase": phase}));
    for answer in [get(&served, "", None).await, get(&served, "/a", None).await] {
        assert_eq!(answer.status(), 409);
        assert!(answer.text().await.unwrap().contains(says));
    }
    assert_eq!(put(&served, "/a", Vec::new()).await.0, 409);
}

#[rstest]
#[case(Leaves::Asked, None)]
#[case(Leaves::Pieces, None)]
#[case(Leaves::Replaced, Some(500_000))]
#[tokio::test]
async fn a_write_whose_runner_dies_is_not_called_done_and_can_be_repeated(
    #[case] leaves: Leaves,
    #[case] left: Option<usize>,
) {
    let served = served().await;
    let first = runner(&served, &[], leaves).await;
    let (code, error) = put(&served, "/a", noise(500_000)).await;
    assert!(code == 502 || code == 409, "{error}");
    let files = first.await.unwrap();
    assert_eq!(files.get("a").map(Vec::len), left, "as a whole or not at all");
    let files: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.clone()))
        .collect();
    let _second = runner(&served, &files, Leaves::Never).await;
    assert_eq!(put(&served, "/a", noise(500_000)).await.0, 200);
    assert_eq!(get(&served, "/a", None).await.bytes().await.unwrap(), noise(500_000));
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_write_writes_nothing() {
    use tokio::io::AsyncWriteExt as _;

    let served = served().await;
    let runner = runner(&served, &[("a", b"old".to_vec())], Leaves::Never).await;
    let mut socket = tokio::net::TcpStream::connect(served.address).await.unwrap();
    let head = format!(
        "PUT {WORKSPACE}/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer token\r\ncontent-length: 1000000\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&noise(600_000)).await.unwrap();
    drop(socket);
    assert_eq!(get(&served, "/a", None).await.text().await.unwrap(), "old");
    served.stop().await;
    assert_eq!(runner.await.unwrap()["a"], b"old");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_neither_records_nor_other_readers() {
    let served = served().await;
    let _runner = runner(
        &served,
        &[("long", noise(64 << 20)), ("a", b"short".to_vec())],
        Leaves::Never,
    )
    .await;
    let idle = get(&served, "/long", None).await;
    assert_eq!(idle.status(), 200);
    for _ in 0..20 {
        assert_eq!(get(&served, "/a", None).await.text().await.unwrap(), "short");
    }
    drop(idle);
}

#[rstest]
#[case::a_part_was_sent(400_000, None)]
#[case::the_file_is_there_and_the_client_was_not_told(500_000, Some(500_000))]
#[tokio::test]
async fn a_write_whose_gateway_dies_is_not_called_done_and_can_be_repeated(
    #[case] sent: usize,
    #[case] left: Option<usize>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
    cluster.caller("token", "ann");
    cluster.allow("ann", &["get", "update"], "team-a");
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(&cluster, folder.path()).await;
    let (mut first, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
    let mut client = tokio::net::TcpStream::connect(process.address).await.unwrap();
    let head = format!(
        "PUT {WORKSPACE}/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer token\r\ncontent-length: 500000\r\n\r\n"
    );
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(&noise(sent)).await.unwrap();
    // As far as the runner gets, it has it; the last piece makes a file of it.
    let (mut pieces, mut file) = (Vec::new(), None);
    while file.is_none() && (left.is_some() || pieces.len() < MAX_CHUNK) {
        if let GatewayFrame::FileChunk(chunk) = first.frame().await {
            pieces.extend(STANDARD.decode(chunk.data).unwrap());
            file = chunk.eof.then(|| pieces.clone());
        }
    }
    process.child.kill().await.unwrap();
    while let Ok(frame) = first.next().await {
        assert!(
            !matches!(frame, GatewayFrame::FileChunk(chunk) if chunk.eof),
            "a part is no file"
        );
    }
    assert_eq!(file.as_ref().map(Vec::len), left);
    let mut answer = Vec::new();
    let _ = soon("the end of the connection", client.read_to_end(&mut answer)).await;
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));

    let process = Process::start(&cluster, folder.path()).await;
    let _second = runner_at(process.address, &[], Leaves::Never).await;
    let file = format!("http://{}{WORKSPACE}/a", process.address);
    let again = http().put(&file).bearer_auth("token").body(noise(500_000)).send();
    assert_eq!(soon("the answer", again).await.unwrap().status(), 200);
    let read = http().get(&file).bearer_auth("token").send().await.unwrap();
    assert_eq!(read.bytes().await.unwrap(), noise(500_000));
}
