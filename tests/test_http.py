"""The HTTP doors, against the portal as users run it, with a real model."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from app.routers.streaming import KEEP_ALIVE_S
from tests.fake_llm import FakeLLM
from tests.support import MakePortal, Portal, ask, wait_until

pytestmark = pytest.mark.slow

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def client(portal: Portal) -> Iterator[httpx.Client]:
    with portal.client() as signed_in:
        yield signed_in


def say(client: httpx.Client, session: str, message: str, **options: Any) -> dict[str, Any]:
    body = {"session_id": session, "message": message, "max_tokens": 8, **options}
    answer = client.post("/api/llm/chat/session", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def history(client: httpx.Client, session: str, **query: Any) -> list[dict[str, Any]]:
    answer = client.get(f"/api/llm/chat/session/{session}/history", params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["messages"])


def read_sse(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, event, data) of every server-sent event."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and fields:
            yield fields["id"], fields["event"], json.loads(fields["data"])
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


# --- accounts ------------------------------------------------------------------------------------


def test_register_login_and_me(portal: Portal) -> None:
    account = {"username": "first", "email": "First@Example.org", "password": "correct horse"}
    with httpx.Client(base_url=portal.url) as client:
        registered = client.post("/api/auth/register", json=account)
        assert registered.status_code == 201
        assert registered.json()["role"] == "author"
        assert "password" not in registered.text
        assert client.post("/api/auth/register", json=account).status_code == 409
        for name in ("first", "first@example.org"):
            signed_in = client.post("/api/auth/login", json={"username": name, "password": "correct horse"})
            assert signed_in.json()["token_type"] == "bearer"
            assert signed_in.json()["expires_in"] > 0
        token = client.post("/api/auth/token", data={"username": "first", "password": "correct horse"}).json()
        headers = {"Authorization": f"Bearer {token['access_token']}"}
        me = client.get("/api/auth/me", headers=headers).json()
        assert (me["username"], me["email"]) == ("first", "first@example.org")
        wrong = client.post("/api/auth/login", json={"username": "first", "password": "wrong horse"})
        unknown = client.post("/api/auth/login", json={"username": "nobody", "password": "wrong horse"})
        assert (wrong.status_code, wrong.json()["detail"]) == (unknown.status_code, unknown.json()["detail"])


POISON = base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.x"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer x.y.z", "Basic YTpi", f"Bearer {POISON}"])
def test_without_a_good_token_nothing_is_served(portal: Portal, header: str) -> None:
    for method, path in (
        ("GET", "/api/auth/me"),
        ("POST", "/api/llm/chat"),
        ("POST", "/api/llm/chat/stream"),
        ("POST", "/api/llm/chat/session"),
        ("POST", "/api/llm/chat/session/stream"),
        ("GET", "/api/llm/chat/session/s/history"),
        ("DELETE", "/api/llm/chat/session/s"),
        ("POST", "/api/llm/chat/session/s/stop"),
        ("GET", "/api/llm/turns/t/events"),
    ):
        answer = httpx.request(method, portal.url + path, headers={"Authorization": header}, json={})
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "unauthenticated"


# --- chat ----------------------------------------------------------------------------------------


def test_chat_without_a_session(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 5, "temperature": 0}
    answer = client.post("/api/llm/chat", json=body).json()
    assert answer["response"]
    assert answer["usage"]["completion_tokens"] == 5
    with client.stream("POST", "/api/llm/chat/stream", json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = list(read_sse(stream.iter_lines()))
    assert [events[0][1], events[-1][1]] == ["accepted", "final"]
    assert events[0][2]["session_id"] is None
    assert events[-1][2]["response"] == answer["response"]
    usage = events[-1][2]["usage"]
    assert usage["ttft_ms"] == events[-1][2]["ttft_ms"] > 0
    assert usage["tokens_per_second"] > 0
    assert usage["cached_tokens"] > 0, "the same prompt again"


def test_a_reply_that_was_cut_at_its_longest_says_so(client: httpx.Client) -> None:
    said = say(client, "cut", "Tell me all about the sea.", max_tokens=3)
    assert said["finish_reason"] == history(client, "cut")[-1]["finish_reason"] == "length"


def test_a_session_remembers(client: httpx.Client) -> None:
    first = say(client, "memory", "My name is Ada.", system_prompt="You are brief.")
    say(client, "memory", "What is my name?")
    messages = history(client, "memory")
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[0]["content"] == "You are brief."
    assert messages[2]["id"] == first["message_id"]
    assert messages[2]["content"] == first["response"]
    assert [message["parent_id"] for message in messages[2:]] == [message["id"] for message in messages[1:-1]]
    assert all(message["status"] == "complete" for message in messages)
    assert messages[4]["usage"]["cached_tokens"] > 0, "the prefix is in the server's cache"


def test_history_in_pages(client: httpx.Client) -> None:
    for number in range(4):
        say(client, "pages", f"message {number}", max_tokens=1, system_prompt="Hi.")
    whole = history(client, "pages")
    newest = history(client, "pages", limit=3)
    assert newest == whole[-3:]
    older = history(client, "pages", limit=100, before=newest[0]["id"])
    assert older == whole[:-3]
    assert older[0]["role"] == "system"


def test_an_event_stream_and_its_replays(client: httpx.Client) -> None:
    body = {"session_id": "sse", "message": "Count to five.", "max_tokens": 20, "request_id": "r1"}
    with client.stream("POST", "/api/llm/chat/session/stream", json=body) as stream:
        live = list(read_sse(stream.iter_lines()))
    assert [id_ for id_, _, _ in live] == [f"1.{n}" for n in range(len(live))]
    assert all(name == data["type"] for _, name, data in live)
    turn = live[0][2]["turn_id"]
    assert {data["turn_id"] for _, _, data in live} == {turn}
    joined = "".join(data["content"] for _, name, data in live if name == "token")
    assert live[-1][2]["response"] == joined

    follow = f"/api/llm/turns/{turn}/events"
    with client.stream("GET", follow) as stream:
        assert list(read_sse(stream.iter_lines())) == live
    middle = len(live) // 2  # replies are as long as the model likes
    with client.stream("GET", follow, headers={"Last-Event-ID": f"1.{middle}"}) as stream:
        assert list(read_sse(stream.iter_lines())) == live[middle + 1 :]
    with client.stream("GET", follow, params={"after": "1.1"}) as stream:
        assert list(read_sse(stream.iter_lines())) == live[2:]
    ndjson = {"Accept": "application/x-ndjson"}
    with client.stream("POST", "/api/llm/chat/session/stream", json=body, headers=ndjson) as stream:
        assert stream.headers["content-type"].startswith("application/x-ndjson")
        assert [json.loads(line) for line in stream.iter_lines()] == [data for _, _, data in live]
    assert client.get(follow, params={"after": "soon"}).status_code == 422
    assert client.get("/api/llm/turns/nope/events").status_code == 404


def test_a_stream_is_live_and_can_be_stopped_from_elsewhere(portal: Portal, client: httpx.Client) -> None:
    body = {"session_id": "stop", "message": "Write a very long story.", "max_tokens": 1500}
    with portal.client() as other, client.stream("POST", "/api/llm/chat/session/stream", json=body) as stream:
        seen = []
        for _, name, data in read_sse(stream.iter_lines()):
            seen.append((name, data))
            if name == "token" and [kind for kind, _ in seen].count("token") == 3:
                stopped = other.post("/api/llm/chat/session/stop/stop").json()
                assert stopped["turn_id"] == data["turn_id"]
    name, data = seen[-1]
    assert name == "cancelled"
    assert data["response"] == "".join(piece["content"] for kind, piece in seen if kind == "token")
    kept = history(client, "stop")[-1]
    assert (kept["status"], kept["content"], kept["id"]) == (
        "cancelled",
        data["response"],
        data["message_id"],
    )
    assert kept["usage"] == data["usage"]
    assert data["usage"]["estimated"] is False, "llama.cpp counts what it has not reported"
    assert data["usage"]["completion_tokens"] >= 3
    assert data["usage"]["prompt_tokens"] > 0
    assert data["usage"]["tokens_per_second"] > 0


def queue_and_running(client: httpx.Client, session: str) -> bool:
    answer = client.get(f"/api/llm/chat/session/{session}/history")
    return answer.status_code == 200 and answer.json()["messages"][-1]["status"] == "pending"


@pytest.mark.parametrize("path", ["/api/llm/chat/session", "/api/llm/chat/session/stream"])
def test_a_turn_ends_with_its_client_unless_it_has_a_request_id(portal: Portal, path: str) -> None:
    with portal.client() as client:
        for request_id in (None, "keep-going"):
            session = f"leave-{path.rsplit('/', 1)[-1]}-{request_id}"
            body = {"session_id": session, "message": "Write a long story.", "max_tokens": 150}
            leave_early(portal, client, path, body | ({"request_id": request_id} if request_id else {}))
            wait_for_status(client, session, "complete" if request_id else "cancelled")
            if request_id:
                assert history(client, session)[-1]["usage"]["completion_tokens"] > 0


def wait_for_status(client: httpx.Client, session: str, status: str) -> None:
    wait_until(lambda: history(client, session)[-1]["status"] == status, what=f"status {status}")


def leave_early(portal: Portal, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Sends a request and closes the connection once its turn runs."""
    import socket

    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{portal.port}", "Content-Type: application/json"]
    head += [f"Authorization: {client.headers['Authorization']}", f"Content-Length: {len(data)}"]
    with socket.create_connection(("127.0.0.1", portal.port)) as sock:
        sock.sendall("\r\n".join([*head, "", ""]).encode() + data)
        wait_until(lambda: queue_and_running(client, body["session_id"]), what="the turn's beginning")


def test_clear_keeps_the_system_prompt(client: httpx.Client) -> None:
    say(client, "clear", "hi", system_prompt="You are brief.")
    assert client.delete("/api/llm/chat/session/clear").json()["ok"] is True
    assert [message["role"] for message in history(client, "clear")] == ["system"]
    assert client.delete("/api/llm/chat/session/never").status_code == 404


def test_another_owners_session_and_turn_are_404(portal: Portal, client: httpx.Client) -> None:
    mine = say(client, "private", "secret")
    with portal.client("eve") as eve:
        for method, path in (
            ("GET", "/api/llm/chat/session/private/history"),
            ("DELETE", "/api/llm/chat/session/private"),
            ("POST", "/api/llm/chat/session/private/stop"),
            ("GET", f"/api/llm/turns/{mine['turn_id']}/events"),
        ):
            assert eve.request(method, path).status_code == 404, path
        theirs = say(eve, "private", "hello")
        assert theirs["turn_id"] != mine["turn_id"]
        assert len(history(eve, "private")) == 2


def test_the_same_request_id_at_once_is_one_turn(client: httpx.Client) -> None:
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        answers.append(say(client, "twice", "hi", request_id="r", temperature=1))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["response"] for answer in answers}) == 1
    assert len({answer["turn_id"] for answer in answers}) == 1
    conflict = client.post(
        "/api/llm/chat/session", json={"session_id": "twice", "message": "other", "request_id": "r"}
    )
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "conflict")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ('{"session_id": "s"', 400, "body"),
        ("[]", 422, "body"),
        ('{"message": "hi"}', 422, "session_id"),
        ('{"session_id": "a b", "message": "hi"}', 422, "session_id"),
        ('{"session_id": "s", "message": ""}', 422, "message"),
        ('{"session_id": "s", "message": "   "}', 422, "message"),
        ('{"session_id": "s", "message": "\\ud800"}', 400, "body"),
        ('{"session_id": "s", "message": "hi", "temperature": 9}', 422, "temperature"),
        ('{"session_id": "s", "message": "hi", "temperature": NaN}', 400, "body"),
        ('{"session_id": "s", "message": "hi", "max_tokens": 0}', 422, "max_tokens"),
        ('{"session_id": "s", "message": "hi", "request_id": "a/b"}', 422, "request_id"),
        ('{"session_id": "s", "message": "a\\u0000b"}', 422, "message"),
        ('{"session_id": "s", "message": "hi", "tools": [{"x": "\\ud800"}]}', 400, "body"),
        ('{"session_id": "s", "message": "hi", "model": "gpt-9"}', 422, "model"),
    ],
)
def test_bad_input_is_named(client: httpx.Client, body: str, status: int, field: str) -> None:
    headers = {"Content-Type": "application/json", "X-Request-ID": "my-id"}
    for path in ("/api/llm/chat/session", "/api/llm/chat/session/stream"):
        answer = client.post(path, content=body, headers=headers)
        if path.endswith("stream") and field == "model":
            continue  # accepted, and then an error event
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["request_id"]) == ("invalid_request", "my-id")
        assert error["message"].startswith(field)
        assert answer.json()["detail"] == error["message"]


@pytest.mark.parametrize("kind", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_a_body_that_does_not_say_that_it_is_json(client: httpx.Client, kind: dict[str, str]) -> None:
    body = '{"session_id": "s", "message": "hi"}'
    answer = client.post("/api/llm/chat/session", content=body, headers=kind)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "body: Content-Type: application/json is needed"
    answer = client.post("/v1/chat/completions", content='{"messages": []}', headers=kind)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "body: Content-Type: application/json is needed"


def test_a_key_where_no_provider_takes_one(client: httpx.Client, session: str) -> None:
    assert ask(client, session, max_tokens=1).status_code == 200
    refused = client.put(f"/api/sessions/{session}/key", json={"provider": "p", "key": "mine"})
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("provider: no provider here takes keys of sessions")


def test_unknown_addresses_and_methods_have_the_same_form(client: httpx.Client) -> None:
    for method, path, status in (("GET", "/api/nope", 404), ("PUT", "/api/llm/chat", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "detail"}


# --- health and OpenAPI --------------------------------------------------------------------------


def test_health_needs_no_sign_in(portal: Portal) -> None:
    assert httpx.get(f"{portal.url}/health/live").json() == {"status": "ok"}
    assert httpx.get(f"{portal.url}/health/ready").json() == {
        "status": "ok",
        "database": "ok",
        "llm": "ok",
        "mqtt": "ok",
    }
    health = httpx.get(f"{portal.url}/api/llm/health").json()
    assert (health["status"], health["temperature"], health["max_tokens"]) == ("ok", 0.6, 512)
    assert "/" not in health["model"]
    assert health["latency_ms"] is not None


def test_the_openapi_document_describes_events_and_errors(portal: Portal, client: httpx.Client) -> None:
    document = httpx.get(f"{portal.url}/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["description"] for operation in operations)
    schema = {"$ref": "#/components/schemas/TurnEvent", "components": document["components"]}
    validator = Draft202012Validator(schema)
    body = {"session_id": "openapi", "message": "hi", "max_tokens": 4}
    with client.stream("POST", "/api/llm/chat/session/stream", json=body) as stream:
        for _, _, event in read_sse(stream.iter_lines()):
            validator.validate(event)
    began = time.monotonic()
    assert client.get("/docs").status_code == 200
    assert time.monotonic() - began < 5


def test_a_silent_stream_is_kept_open_by_comments(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    assert KEEP_ALIVE_S <= 15, "so long a stream may be silent"
    fake_thread.script.gate = answers = threading.Event()
    times = {"app.routers.streaming.KEEP_ALIVE_S": 1.0}
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).with_times(times).start()
    path, body = "/api/llm/chat/session/stream", {"session_id": "s", "message": "hello"}
    like_openai = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    with (
        portal.client() as client,
        client.stream("POST", path, json=body) as answer,
        client.stream("POST", "/v1/chat/completions", json=like_openai) as other,
    ):
        told, lines = other.iter_lines(), answer.iter_lines()
        events = (line for line in lines if line.startswith((":", "event")))
        assert next(told) == ": still here"
        assert [next(events), next(events)] == ["event: accepted", ": still here"]
        answers.set()
        assert list(events)[-2:] == ["event: token", "event: final"]
        assert (list(told)[-2], other.status_code) == ("data: [DONE]", 200)
