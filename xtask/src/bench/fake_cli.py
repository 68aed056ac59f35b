"""A CLI that says what the file `says` in its working folder tells it to: `lines:<n>`, `long:<bytes>` or `calls:<n>`."""

import http.client
import json
import os
import sys
import time
import uuid
from urllib.parse import urlsplit

OUT = sys.stdout.buffer
SESSION = str(uuid.uuid4())


def say(value):
    OUT.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


def envelope(value):
    return value | {"session_id": SESSION, "uuid": str(uuid.uuid4())}


def assistant(text, name):
    content = [{"type": "text", "text": text}]
    return envelope({
        "type": "assistant",
        "message": {"id": name, "type": "message", "role": "assistant", "model": "claude-opus-5-5",
                    "content": content, "stop_reason": None,
                    "usage": {"input_tokens": 5, "output_tokens": 1}},
        "parent_tool_use_id": None,
    })


def lines(count):
    head, tail = json.dumps(assistant("@", "msg_#"), separators=(",", ":")).split("@")
    text = "a line of what a model may say, neither short nor long, number "
    block = []
    for n in range(count):
        block.append(head.replace("msg_#", f"msg_{n // 10}") + text + str(n) + tail + "\n")
        if len(block) == 200:
            OUT.write("".join(block).encode())
            OUT.flush()
            block.clear()
    OUT.write("".join(block).encode())


def first_token(base, key):
    """Seconds until the first delta of a streamed answer."""
    url = urlsplit(base)
    body = json.dumps({
        "model": "claude-opus-5-5", "max_tokens": 100, "stream": True,
        "system": "x" * 48_000,
        "messages": [{"role": "user", "content": '@mock {"steps":[{"text":"hello"}]}'}],
    })
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01", "content-type": "application/json"}
    begun = time.perf_counter()
    connection = http.client.HTTPConnection(url.hostname, url.port)
    connection.request("POST", "/v1/messages", body, headers)
    response = connection.getresponse()
    while b"content_block_delta" not in response.readline():
        pass
    took = time.perf_counter() - begun
    response.read()
    connection.close()
    return took


def calls(count):
    with open(os.path.join(os.getcwd(), "direct")) as file:
        direct, key = file.read().split()
    took = {"direct": [], "proxy": []}
    for _ in range(count):
        took["direct"].append(first_token(direct, key))
        took["proxy"].append(first_token(os.environ["ANTHROPIC_BASE_URL"], os.environ["ANTHROPIC_API_KEY"]))
    with open(os.path.join(os.getcwd(), "took.json"), "w") as file:
        json.dump(took, file)


def result(uuids):
    say(envelope({
        "type": "result", "subtype": "success", "is_error": False, "result": "done", "num_turns": 1,
        "duration_ms": 1, "duration_api_ms": 1, "total_cost_usd": 0.0, "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "output_tokens": 5}, "modelUsage": {}, "queued_turn_count": 0,
        "terminal_reason": "completed", "user_message_uuids": uuids, "permission_denials": [],
    }))


def turn(message):
    uuids = [message["uuid"]] if message.get("uuid") else []
    say(envelope({"type": "system", "subtype": "session_state_changed", "state": "running"}))
    say(envelope({"type": "system", "subtype": "init", "cwd": os.getcwd(), "tools": [], "mcp_servers": [],
                  "model": "claude-opus-5-5", "permissionMode": "bypassPermissions", "apiKeySource": "none",
                  "slash_commands": [], "claude_code_version": "2.1.329"}))
    with open("says") as file:
        what, number = file.read().split(":")
    if what == "lines":
        lines(int(number))
    elif what == "long":
        say(envelope({"type": "user", "message": {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "x" * int(number)}]},
            "parent_tool_use_id": None}))
    else:
        calls(int(number))
    result(uuids)
    say(envelope({"type": "system", "subtype": "session_state_changed", "state": "idle"}))
    OUT.flush()


if "-v" in sys.argv or "--version" in sys.argv:
    print("2.1.329 (Claude Code)")
    sys.exit(0)
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "user":
        turn(message)
    elif message["type"] == "control_request":
        say({"type": "control_response", "response": {
            "subtype": "success", "request_id": message["request_id"], "response": {"commands": []}}})
        OUT.flush()
